"""Grids of runs that answer a question, with its statistics."""
