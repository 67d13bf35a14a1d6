"""Batch norm over groups of examples, with one set of rows per route."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Layout:
  """How views `[G, V, b, ...]` are folded to one axis for convolutions.

  A group that spans `span` devices is split into as many blocks, which go
  before the views: `[G, span, V, b / span, ...]`. So the folded axis is sharded
  as it lies, and folding moves no data between devices.

  Attributes:
    groups: G, batch-norm groups.
    span: devices that share a group.
    routes: row of the batch norm that each view uses, length V.
  """

  groups: int
  span: int
  routes: tuple[int, ...]

  def fold(self, x: jax.Array) -> jax.Array:
    """[G, V, b, ...] -> [G * V * b, ...]."""
    if self.span > 1:
      g, v, b, *rest = x.shape
      x = x.reshape(g, v, self.span, b // self.span, *rest)
      x = jnp.swapaxes(x, 1, 2)
      return x.reshape(-1, *rest)
    return x.reshape(-1, *x.shape[3:])

  def split(self, x: jax.Array) -> jax.Array:
    """[G * V * b, ...] -> [G, span, V, b / span, ...]."""
    shape = (self.groups, self.span, len(self.routes), -1)
    return x.reshape(shape + x.shape[1:])

  def unfold(self, x: jax.Array) -> jax.Array:
    """[G * V * b, ...] -> [G, V, b, ...]."""
    x = jnp.swapaxes(self.split(x), 1, 2)
    g, v, m, b, *rest = x.shape
    return x.reshape(g, v, m * b, *rest)


class RoutedBatchNorm(nn.Module):
  """Batch norm (Ioffe and Szegedy 2015, arXiv:1502.03167), routed and grouped.

  In train mode the statistics are those of one group of one view,

    y = (x - mean_gv) / sqrt(var_gv + epsilon) * scale_r + bias_r,

  where r is the view's route; the running statistics of each route in use move
  to the mean over its groups, `momentum * old + (1 - momentum) * new`, biased
  variance. In evaluation mode the running statistics of the route are used.
  Parameters and statistics have one row per route, all made at init, so that a
  call with one route finds the others in place and leaves them alone (dual
  batch norm: Xie et al. 2020, arXiv:1911.09665).

  Attributes:
    num_routes: R, rows of `scale`, `bias`, `mean` and `var`, each [R, C].
    dtype: of the result; statistics are computed in float32 or wider.
  """

  num_routes: int
  momentum: float = 0.9
  epsilon: float = 1e-5
  dtype: Any = jnp.float32
  scale_init: nn.initializers.Initializer = nn.initializers.ones

  @nn.compact
  def __call__(self, x: jax.Array, layout: Layout, train: bool) -> jax.Array:
    """x: [G * V * b, ..., C], folded by `layout`; returns the same shape."""
    wide = jnp.promote_types(self.dtype, jnp.float32)
    rows = (self.num_routes, x.shape[-1])
    scale = self.param('scale', self.scale_init, rows, wide)
    bias = self.param('bias', nn.initializers.zeros, rows, wide)
    mean = self.variable('batch_stats', 'mean', jnp.zeros, rows, wide)
    var = self.variable('batch_stats', 'var', jnp.ones, rows, wide)

    split = layout.split(x)  # [G, span, V, b / span, ..., C]
    routes = jnp.array(layout.routes)
    if train:
      axes = (1, *range(3, split.ndim - 1))
      mean_GVC = split.mean(axes, dtype=wide)
      var_GVC = jnp.square(split.astype(wide)).mean(axes)
      var_GVC = jnp.maximum(var_GVC - jnp.square(mean_GVC), 0)
      if not self.is_initializing():
        mean.value = self._moved(mean.value, mean_GVC, layout.routes)
        var.value = self._moved(var.value, var_GVC, layout.routes)
    else:
      mean_GVC = mean.value[routes][None]
      var_GVC = var.value[routes][None]

    factor_GVC = jax.lax.rsqrt(var_GVC + self.epsilon) * scale[routes]
    offset_GVC = bias[routes] - mean_GVC * factor_GVC

    def spread(v_GVC: jax.Array) -> jax.Array:  # over examples and pixels
      g, v, c = v_GVC.shape
      ones = (1,) * (split.ndim - 4)
      return v_GVC.reshape(g, 1, v, *ones, c)

    y = split.astype(wide) * spread(factor_GVC) + spread(offset_GVC)
    return y.reshape(x.shape).astype(self.dtype)

  def _moved(
    self, old_RC: jax.Array, batch_GVC: jax.Array, routes: tuple[int, ...]
  ) -> jax.Array:
    batch_VC = jax.lax.stop_gradient(batch_GVC).mean(0)
    new_RC = old_RC
    for route in sorted(set(routes)):
      views = [i for i, r in enumerate(routes) if r == route]
      target_C = sum(batch_VC[i] for i in views) / len(views)
      moved_C = self.momentum * old_RC[route] + (1 - self.momentum) * target_C
      new_RC = new_RC.at[route].set(moved_C)
    return new_RC
