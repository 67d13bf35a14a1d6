"""The method: one training step, staleness, attacks, and their parts."""
