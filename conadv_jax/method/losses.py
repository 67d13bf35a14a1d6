"""Cross-entropy of class labels."""

import jax
import jax.numpy as jnp
import optax


def cross_entropy(
  logits: jax.Array, labels: jax.Array, label_smoothing: float = 0.0
) -> jax.Array:
  """Cross-entropy in nats: logits [..., K], int labels [...] -> [...].

  With smoothing s the target is (1 - s) * onehot + s / K (arXiv:1512.00567,
  section 7: the true class keeps its share of s).
  """
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  if not label_smoothing:
    return losses
  uniform = -jax.nn.log_softmax(logits).mean(-1)
  return (1 - label_smoothing) * losses + label_smoothing * uniform


def top1(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """1.0 where the first largest logit is the label's, else 0: [...]."""
  return (jnp.argmax(logits, -1) == labels).astype(jnp.float32)
