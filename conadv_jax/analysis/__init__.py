"""What the loss of a trained network is like around its weights."""
