"""The method: one training step, staleness, attacks, and what they are made of."""
