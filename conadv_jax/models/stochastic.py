"""Dropout and stochastic depth, addressed by step and place in the batch.

Both draw their masks over `[G, V, b]`, before the views are folded, from the
'dropout' stream of Linen, which `apply_fn` seeds with the key of the step. So a
mask depends on the step, the layer and the example's place, and not on the
number of devices; every view of an example draws its own. A call without that
stream, an attack's or an evaluation's, drops nothing.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from conadv_jax.models.norm import Layout

STREAM = 'dropout'


class DropPath(nn.Module):
  """Stochastic depth (Huang et al. 2016, arXiv:1603.09382), per example.

  x / (1 - rate) for an example that is kept, 0 for one that is dropped: a
  residual branch of the right mean, not rescaled in evaluation.

  Attributes:
    rate: probability of dropping, in [0, 1).
  """

  rate: float

  @nn.compact
  def __call__(self, x: jax.Array, layout: Layout) -> jax.Array:
    """x: [G * V * b, ..., C], folded by `layout`; returns the same shape."""
    return _drop(self, x, layout, ())


class Dropout(nn.Module):
  """Dropout (Srivastava et al. 2014) of single features of an example.

  x / (1 - rate) where a feature is kept, 0 where it is dropped.

  Attributes:
    rate: probability of dropping, in [0, 1).
  """

  rate: float

  @nn.compact
  def __call__(self, x: jax.Array, layout: Layout) -> jax.Array:
    """x: [G * V * b, C], folded by `layout`; returns the same shape."""
    return _drop(self, x, layout, x.shape[1:])


def _drop(
  module: DropPath | Dropout,
  x: jax.Array,
  layout: Layout,
  features: tuple[int, ...],
) -> jax.Array:
  """`x` with a mask drawn over [G, V, b, *features]."""
  if not module.rate or not module.has_rng(STREAM):
    return x
  keep = 1 - module.rate
  views = len(layout.routes)
  lead = (layout.groups, views, x.shape[0] // (layout.groups * views))
  # In float32 whatever the types of the run: the same mask with 64-bit types.
  kept = jax.random.bernoulli(
    module.make_rng(STREAM), jnp.float32(keep), lead + features
  )
  kept = layout.fold(kept)
  kept = kept.reshape(kept.shape + (1,) * (x.ndim - kept.ndim))
  return jnp.where(kept, x / keep, 0)
