"""ConAdv: concurrent adversarial learning for large-batch training."""

__version__ = '0.1.0'
