"""The method: one training step, and what it is made of."""
