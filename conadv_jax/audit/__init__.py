"""The training step, compiled for TPU slices that need not exist."""
