"""Batch norm over groups of examples, with one set of rows per route."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from flax import traverse_util


@flax.struct.dataclass
class Layout:
  """How views `[G, V, b, ...]` are folded to one axis for convolutions.

  Everything is what one device has of a batch: G of its groups, and of a group
  that spans several devices the b examples that are here.

  Attributes:
    groups: G, batch-norm groups.
    routes: row of the batch norm that each view uses, length V.
    bn_axis: mesh axis over whose devices a group lies, under `jax.shard_map`;
      None where groups are whole.
    examples: places of the examples in the batch of the step, int [G, b], by
      which dropout is drawn; None counts them from 0.
  """

  groups: int = flax.struct.field(pytree_node=False)
  routes: tuple[int, ...] = flax.struct.field(pytree_node=False)
  bn_axis: str | None = flax.struct.field(pytree_node=False, default=None)
  examples: jax.Array | None = None

  def fold(self, x: jax.Array) -> jax.Array:
    """[G, V, b, ...] -> [G * V * b, ...]."""
    return x.reshape(-1, *x.shape[3:])

  def unfold(self, x: jax.Array) -> jax.Array:
    """[G * V * b, ...] -> [G, V, b, ...]."""
    return x.reshape(self.groups, len(self.routes), -1, *x.shape[1:])


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

    split = layout.unfold(x)  # [G, V, b, ..., C]
    routes = jnp.array(layout.routes)
    if train:
      axes = tuple(range(2, split.ndim - 1))
      mean_GVC = split.mean(axes, dtype=wide)
      square_GVC = jnp.square(split.astype(wide)).mean(axes)
      if layout.bn_axis and not self.is_initializing():
        mean_GVC, square_GVC = jax.lax.pmean(
          (mean_GVC, square_GVC), layout.bn_axis
        )
      var_GVC = jnp.maximum(square_GVC - jnp.square(mean_GVC), 0)
      if not self.is_initializing():
        mean.value = self._moved(mean.value, mean_GVC, layout.routes)
        var.value = self._moved(var.value, var_GVC, layout.routes)
    else:
      mean_GVC = mean.value[routes][None]
      var_GVC = var.value[routes][None]

    factor_GVC = jax.lax.rsqrt(var_GVC + self.epsilon) * scale[routes]
    offset_GVC = bias[routes] - mean_GVC * factor_GVC

    def spread(v_GVC: jax.Array) -> jax.Array:  # over examples and pixels
      *gv, c = v_GVC.shape
      return v_GVC.reshape(*gv, *(1,) * (split.ndim - 3), c)

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


def norms_of(batch_stats: Any) -> set[tuple[str, ...]]:
  """Returns the paths of the batch norms, whose leaves have a row per route."""
  return {path[:-1] for path in traverse_util.flatten_dict(batch_stats)}
