"""ConAdv: concurrent adversarial learning for large-batch training."""
