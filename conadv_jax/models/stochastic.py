"""Dropout and stochastic depth, addressed by step and place in the batch.

Both draw from the 'dropout' stream of Linen, which `apply_fn` seeds with the
key of the step, folded with the example's place in the batch. So a mask depends
on the step, the layer and that place, and neither on the number of devices nor
on that of microbatches; every view of an example draws its own. A call without
that stream, an attack's or an evaluation's, drops nothing.
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
  key = module.make_rng(STREAM)
  views = len(layout.routes)
  shape = (layout.groups, x.shape[0] // (layout.groups * views))
  examples = layout.examples
  if examples is None:
    examples = jnp.arange(shape[0] * shape[1]).reshape(shape)

  def draw(example: jax.Array) -> jax.Array:  # [V, *features]
    # In float32 whatever the types of the run: the same mask with 64-bit types.
    return jax.random.bernoulli(
      jax.random.fold_in(key, example), jnp.float32(keep), (views, *features)
    )

  kept_GbV = jax.vmap(jax.vmap(draw))(examples)
  kept = layout.fold(jnp.swapaxes(kept_GbV, 1, 2))
  kept = kept.reshape(kept.shape + (1,) * (x.ndim - kept.ndim))
  return jnp.where(kept, x / keep, 0)
