"""The paper's idea: which weights attack, and how the perturbation ages.

The perturbation of batch t is made with theta_{t - tau}. For tau >= 1 it is
made in step t - 1, beside an update that does not need it: the two gradients
share no result, and may run concurrently (ConAdv, arXiv:2106.00221, algorithm
1). For tau = 0 it is made first, and the update waits (AdvProp,
arXiv:1911.09665).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from conadv_jax.config import Config
from conadv_jax.devices.mesh import (
  BATCH,
  REPLICATED,
  own_copy,
  per_device,
)
from conadv_jax.devices.sums import mean_over_devices
from conadv_jax.method import losses, sam
from conadv_jax.method.attack import attack_batch
from conadv_jax.method.gradients import batch_places, over_microbatches
from conadv_jax.method.pixels import Batch, normalize, perturbed, wide_dtype
from conadv_jax.method.setup import Setup
from conadv_jax.method.state import (
  Perturbation,
  Snapshot,
  TrainState,
  copied,
)

Metrics = dict[str, jax.Array]
# (state_t, batch_t, batch_{t+1}) -> (state_{t+1}, metrics)
StepFn = Callable[[TrainState, Batch, Batch], tuple[TrainState, Metrics]]


def attacker(config: Config, state: TrainState) -> Snapshot:
  """Returns theta_{t + 1 - tau}: the weights that attack batch t + 1 in step t.

  For tau = 0 theta_t, which attacks batch t.
  """
  if config.num_snapshots <= 1:
    return Snapshot(state.params, state.batch_stats)
  old = state.snapshots[1]
  if config.attack.update_batch_stats:
    # In train mode, where statistics can move, the attack does not read them:
    # it moves those of now, whatever the age of its weights.
    old = old.replace(batch_stats=state.batch_stats)
  return old


def pending_perturbation(
  config: Config, step_fn: StepFn, state: TrainState, batch: Batch
) -> TrainState:
  """Makes delta_t (again), from batch_t and theta_{t - tau}.

  Runs `step_fn`, the compiled step that trains, as step t - 1 from the oldest
  snapshot and discards its update: only the same program gives the same bits.
  At t = 0 this is the warm start: the first tau + 1 batches are attacked with
  the initial weights, as if theta had been theta_0 before the run.

  Args:
    config: of the run.
    step_fn: compiled; it donates its state.
    state: of step t; its perturbation may be None, as after a restore.
    batch: batch_t.

  Returns:
    `state` with the perturbation.
  """
  if not config.staleness_steps:
    return state
  oldest = state.snapshots[0]
  past = state.replace(
    step=state.step - 1, snapshots=(oldest, *state.snapshots[:-1])
  )
  if config.num_snapshots == 1:
    past = past.replace(params=oldest.params, batch_stats=oldest.batch_stats)
  if past.perturbation is None:  # its value is not read, its shape is
    past = past.replace(perturbation=_of_right_shape(config, state, batch))
  # The step donates: no buffer may be in its arguments twice.
  past = copied(past)
  return state.replace(perturbation=step_fn(past, batch, batch)[0].perturbation)


def blank(
  config: Config, devices: int, params: Any, image_shape: tuple[int, ...]
) -> Perturbation | None:
  """Makes a pending perturbation of zeros, where `devices` share a group."""
  if not config.staleness_steps:
    return None
  groups = config.batch_size // config.bn_group_size
  shape = (groups, config.bn_group_size, *image_shape)
  images = jnp.zeros(shape, config.dtype) if config.is_adversarial else None
  weights = sam.blank(config, devices, params) if config.ascends else None
  return Perturbation(images, weights)


def _of_right_shape(
  config: Config, state: TrainState, batch: Batch
) -> Perturbation:
  """Makes a perturbation for a step whose update is discarded."""
  image, label, weights = batch[config.attacked], batch['label'], None
  images = jnp.zeros(image.shape, config.dtype, device=image.sharding)
  if sam.in_groups(config):
    own = label.sharding.shard_shape(label.shape)
    make = functools.partial(sam.blank, config, label.shape[1] // own[1])
    weights = jax.jit(make, out_shardings=label.sharding)(state.params)
  elif config.ascends:
    weights = sam.chosen(config, state.params)
  return Perturbation(images if config.is_adversarial else None, weights)


def make_attack_stats_fn(
  setup: Setup,
) -> Callable[[TrainState, Batch], Metrics]:
  """Makes (state_t, batch_t) -> how the pending perturbation has aged.

  Compares delta_t, made with theta_{t - tau}, with a fresh one made with
  theta_t from the same random start:

    delta_agreement  percentage of pixels at which both have the same sign
    delta_cosine     of the angle between both, mean over examples
    loss_stale       loss of theta_t on image + delta_t, no smoothing
    top1_stale       its accuracy there, in percent
    loss_fresh,      the same with the fresh perturbation: what a sequential
    top1_fresh       attack would have reached
  """
  config, mesh = setup.config, setup.mesh
  wide = wide_dtype(config)
  names = (
    'delta_agreement', 'delta_cosine', 'loss_stale', 'top1_stale',
    'loss_fresh', 'top1_fresh',
  )  # fmt: skip

  def one_microbatch(step, now, part):
    batch, stale, places = part
    fresh, _ = attack_batch(setup, now, batch, step, places)
    same = jnp.sign(stale) == jnp.sign(fresh)
    values = (
      100 * same.mean(dtype=wide),
      _cosine(stale.astype(wide), fresh.astype(wide)).mean(),
      *_loss_and_top1(setup, now, batch, stale),
      *_loss_and_top1(setup, now, batch, fresh),
    )
    return dict(zip(names, values, strict=True)), None

  def on_device(step, now, delta, batch):
    now = own_copy(now)
    means, _ = over_microbatches(
      config.microbatches,
      lambda part, _: one_microbatch(step, now, part),
      (batch, delta, batch_places(config, mesh)),
      None,
    )
    return mean_over_devices(means)

  fn = per_device(mesh, on_device, (REPLICATED,) * 2 + (BATCH,) * 2, REPLICATED)

  def attack_stats(state: TrainState, batch: Batch) -> Metrics:
    now = Snapshot(state.params, state.batch_stats)
    return fn(state.step, now, state.perturbation.images, batch)

  return attack_stats


def _loss_and_top1(
  setup: Setup, weights: Snapshot, batch: Batch, delta: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Of `weights` on image + delta, as the attack sees them."""
  config = setup.config
  variables = {'params': weights.params, 'batch_stats': weights.batch_stats}
  route, label = (config.route_of('adv'),), batch['label']
  image = batch[config.attacked].astype(wide_dtype(config))
  x = normalize(setup.spec, perturbed(image, delta))[:, None]
  logits, _ = setup.apply_fn(variables, x, route, config.attack.train_mode)
  loss = losses.cross_entropy(logits[:, 0], label).mean()
  top1 = losses.top1(logits[:, 0], label).mean(dtype=loss.dtype)
  return loss, 100 * top1


def _cosine(a: jax.Array, b: jax.Array) -> jax.Array:
  """Of each example of [G, b, H, W, C]; 0 where one is 0."""
  axes = (-3, -2, -1)
  product = jnp.square(a).sum(axes) * jnp.square(b).sum(axes)
  cosine = (a * b).sum(axes) / jnp.sqrt(jnp.where(product > 0, product, 1))
  return jnp.where(product > 0, cosine, 0)
