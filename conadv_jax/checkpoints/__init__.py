"""Checkpoints that are complete and checked, and how they are restored."""
