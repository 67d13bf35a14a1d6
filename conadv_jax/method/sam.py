"""Perturbs weights, as the attack perturbs images: SAM and its relatives.

The update takes its gradient at theta_t + e_t, and moves theta_t by it:

  e_t = rho N(d_t);  theta_{t+1} = Opt(theta_t, grad L(theta_t + e_t; batch_t))

which seeks weights whose neighbours are good too (Foret et al. 2020,
arXiv:2010.01412). `Method.ascent` says what d_t is:

  gradient   grad L(theta_{t - tau}; batch_t). With tau = 0 that is SAM, and the
             update waits. With tau >= 1 it is made in step t - 1, beside an
             update that does not need it (AsyncSAM, arXiv:2503.11147, but for
             the batch: theirs ascends on batch_{t-1}).
  lookahead  grad L(y_t; batch_t), y_t = Opt(theta_{t-1}, d_{t-1}), and the
             update takes (1 - mix) grad L(theta_t + e_t; batch_t) + mix d_{t+1}
             (SAMPa, arXiv:2410.10683).
  momentum   where the optimizer's momentum moves the weights, which costs
             nothing (MSAM, arXiv:2401.12033).
  random     normally distributed numbers: a control.

L is the training loss over the views that the input makes, on their routes. The
running statistics of those come from the pass of the ascent, whose weights are
not perturbed, and not from both; of `momentum` and `random` from the update.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from conadv_jax.base.fields import check
from conadv_jax.config import Config
from conadv_jax.devices import sharded_optimizer
from conadv_jax.devices.mesh import Mesh, Places
from conadv_jax.method import optim
from conadv_jax.method.gradients import Means, training_loss
from conadv_jax.method.pixels import Batch, wide_dtype
from conadv_jax.method.setup import Setup
from conadv_jax.method.state import Snapshot, Stream, TrainState, stream_key
from conadv_jax.models.norm import norms_of

Params = Any


def check_parts(config: Config, mesh: Mesh) -> None:
  """Raises ConfigError if a group of `sam.group_size` is no part of a batch."""
  if not in_groups(config):
    return
  part = config.batch_size // config.microbatches // mesh.shape['data']
  size = config.sam.group_size
  fix = (
    f'a part of the batch has {part} examples on {mesh.shape["data"]} devices '
    f'with microbatches={config.microbatches}; groups are such parts, or 0, '
    'the whole batch'
  )
  more = config.batch_size // mesh.shape['data'] / size
  if more == int(more):
    fix += f': set microbatches={int(more)}'
  check(size == part, 'sam.group_size', size, fix)


def in_groups(config: Config) -> bool:
  """Tells whether parts of a batch have ascent gradients of their own."""
  return config.ascends and config.sam.group_size not in (0, config.batch_size)


def chosen(config: Config, params: Params) -> Params:
  """Returns the leaves that are perturbed: all, or those of normalisation.

  Those are of the modules that have a `scale`.
  """
  if config.sam.mask == 'all':
    return params
  flat = traverse_util.flatten_dict(params)
  return traverse_util.unflatten_dict(
    {path: x for path, x in flat.items() if (*path[:-1], 'scale') in flat}
  )


def with_chosen(params: Params, part: Params) -> Params:
  """Returns `params` with the leaves of `part` in place of its own."""
  flat = traverse_util.flatten_dict(params)
  return traverse_util.unflatten_dict(flat | traverse_util.flatten_dict(part))


def blank(config: Config, devices: int, params: Params) -> Params:
  """Makes a pending d_t of zeros, where so many `devices` share a group."""
  groups = config.batch_size // (config.sam.group_size or config.batch_size)
  axes = (groups, devices) if in_groups(config) else ()
  return jax.tree.map(
    lambda x: jnp.zeros(axes + x.shape, x.dtype), chosen(config, params)
  )


def is_beside(config: Config) -> bool:
  """Tells whether the ascent is made in the pass over parts of the update.

  If not, and there is one, the update waits for the ascent of the whole batch.
  """
  return config.ascends and (config.staleness_steps > 0 or in_groups(config))


def ascent(
  setup: Setup, weights: Snapshot, batch: Batch, step: jax.Array, places: Places
) -> Means:
  """Computes d of a microbatch, with the gradients of chosen leaves alone.

  Args:
    setup: what the step is made of.
    weights: theta_{t - tau}, with the statistics that the pass moves.
    batch: examples of batch_t.
    step: t.
    places: of the examples in the batch.
  """
  config = setup.config
  wide = wide_dtype(config)
  images = {view: batch[view].astype(wide) for view in config.ascent_views}

  def loss(part):
    params = with_chosen(weights.params, part)
    return training_loss(
      setup, params, weights.batch_stats, images, batch['label'], step, places
    )

  part = chosen(config, weights.params)
  d, (_, _, stats) = jax.grad(loss, has_aux=True)(part)
  if in_groups(config):
    d = jax.lax.pmean(d, 'bn')
  return Means(ascent=d, ascent_stats=stats)


def moved(config: Config, now: Snapshot, d: Params) -> Snapshot:
  """Computes theta + rho N(d), with T = diag(|theta|):

    global     N(d) = d / |d|
    adaptive   N(d) = T^2 d / |T d|                     ASAM, arXiv:2102.11600
    layerwise  N(d) = |theta_l| d_l / |d_l| of each array l; of batch norm, of
               each row that a route has             LookLayerSAM, 2203.02714

  0 where the length below is 0.
  """
  part = chosen(config, now.params)
  if config.sam.normalize == 'layerwise':
    directions = _layerwise(part, d, norms_of(now.batch_stats))
  else:
    if config.sam.normalize == 'adaptive':
      d = jax.tree.map(lambda x, w: x * jnp.abs(w), d, part)
    length = optax.tree.norm(d)
    directions = jax.tree.map(lambda x: _divided(x, length), d)
    if config.sam.normalize == 'adaptive':
      directions = jax.tree.map(lambda x, w: x * jnp.abs(w), directions, part)
  new = optax.tree.add_scale(part, config.sam.rho, directions)
  return now.replace(params=with_chosen(now.params, new))


def _layerwise(part: Params, d: Params, norms: set[tuple[str, ...]]) -> Params:
  """N(d) of each array; of the modules `norms`, of each row."""

  def scaled(path, w, x):
    is_routed = tuple(key.key for key in path[:-1]) in norms
    axes = tuple(range(1, w.ndim)) if is_routed else None

    def length(x):
      return jnp.sqrt(jnp.square(x).sum(axes, keepdims=True))

    return _divided(length(w) * x, length(x))

  return jax.tree_util.tree_map_with_path(scaled, part, d)


def _divided(x: jax.Array, length: jax.Array) -> jax.Array:
  """x / length, 0 where that is 0; not finite where that is not."""
  return jnp.where(length == 0, 0, x / jnp.where(length == 0, 1, length))


def free_direction(setup: Setup, state: TrainState) -> Params:
  """Returns d_t of the ascents that compute no gradient."""
  config = setup.config
  if config.ascent == 'momentum':
    moves = optim.momentum_moves(config.optimizer, state.opt_state)
    moves = sharded_optimizer.joined(config, setup.mesh, moves, state.params)
    return chosen(config, moves)
  part = chosen(config, state.params)
  key = stream_key(config.seed, Stream.ASCENT, state.step)
  return optax.tree.random_like(key, part, jax.random.normal)


def lookahead(setup: Setup, state: TrainState, d: Params) -> Snapshot:
  """Computes y_{t+2} = Opt(theta_{t+1}, d_{t+1}) after step t.

  It is kept as a snapshot, and attacks batch_{t+2} in step t + 1. The first two
  are theta_0. Where d is not finite, it is theta_{t+1}.
  """
  config, mesh = setup.config, setup.mesh
  params, _, _ = sharded_optimizer.apply_updates(
    config,
    mesh,
    setup.optimizer,
    sharded_optimizer.split(config, mesh, d),
    state.opt_state,
    state.params,
  )
  ok = jnp.isfinite(optax.tree.norm(d))
  params = jax.tree.map(
    lambda new, old: jnp.where(ok, new, old), params, state.params
  )
  return Snapshot(params, state.batch_stats)
