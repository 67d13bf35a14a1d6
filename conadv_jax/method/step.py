"""One step of training: the update, and the attack on the next batch.

For a staleness tau >= 1 the two sub-steps of a program share no result, unless
`attack.update_batch_stats` asks the update for the attack's statistics:

  update       delta_t, batch_t, theta_t              -> theta_{t+1}
  adversarial  batch_{t+1}, theta_{t+1-tau}           -> delta_{t+1}

so the compiler may run them concurrently (ConAdv, arXiv:2106.00221, algorithm
1). For tau = 0 the attack on batch_t with theta_t comes first and the update
waits for it (AdvProp, arXiv:1911.09665).

Batches are dicts of `clean` (and `aa`) uint8 [G, b, H, W, C] and `label` int32
[G, b]. G, V, b: batch-norm groups, views, examples per group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from conadv_jax.config import Config
from conadv_jax.data.datasets import DatasetSpec
from conadv_jax.devices import mesh as mesh_lib
from conadv_jax.method import losses, optim
from conadv_jax.method.gradients import (
  Batch,
  Means,
  batch_places,
  make_attack_fn,
  make_passes,
  normalize,
  over_microbatches,
  weighted_loss,
  wide_dtype,
)
from conadv_jax.method.state import Snapshot, Spikes, TrainState
from conadv_jax.models import ApplyFn

Metrics = dict[str, jax.Array]
StepFn = Callable[[TrainState, Batch, Batch], tuple[TrainState, Metrics]]

# The deviation of losses counts as at least so much of their mean, or of 1 nat:
# where a loss hardly moves, rounding is no spike.
_MIN_DEVIATION = 1e-3


def make_train_step(
  config: Config,
  spec: DatasetSpec,
  apply_fn: ApplyFn,
  tx: optax.GradientTransformation,
  schedule: optax.Schedule,
  mesh: mesh_lib.Mesh,
) -> StepFn:
  """The function (state_t, batch_t, batch_{t+1}) -> (state_{t+1}, metrics).

  Pure, and not jitted here: whoever runs or audits it jits this very function.
  Where tau = 0, or nothing is adversarial, batch_{t+1} is not read.

  An update whose loss, gradient norm or statistics are not finite is not
  applied: weights, statistics, optimizer and averages stay as they were, the
  step is counted, and the run goes on to the next batch. With `spike.sigmas`,
  neither is one whose loss is a spike (`_judge_loss`).
  """
  tau = config.staleness_steps
  passes = make_passes(config, spec, apply_fn, mesh)
  update = _make_update(config, tx, mesh)

  def train_step(state: TrainState, batch: Batch, next_batch: Batch):
    now = Snapshot(state.params, state.batch_stats)
    means, pending = passes(
      state.step,
      now,
      _attacker(config, state),
      batch,
      state.perturbation,
      next_batch if tau else {},
    )
    with jax.named_scope('optimizer'):
      new, metrics = update(state, means)
    applied = state.step - state.nonfinite_steps
    if state.spikes is not None:
      applied -= state.spikes.steps
    metrics['learning_rate'] = jnp.asarray(schedule(applied))
    return new.replace(
      step=state.step + 1,
      snapshots=(*state.snapshots, now)[1:] if tau else (),
      perturbation=pending,
    ), metrics

  return train_step


def _attacker(config: Config, state: TrainState) -> Snapshot:
  """theta_{t + 1 - tau}: the weights that attack batch t + 1 in step t.

  For tau = 0 theta_t, which attacks batch t.
  """
  if config.staleness_steps <= 1:
    return Snapshot(state.params, state.batch_stats)
  old = state.snapshots[1]
  if config.attack.update_batch_stats:
    # In train mode, where statistics can move, the attack does not read them:
    # it moves those of now, whatever the age of its weights.
    old = old.replace(batch_stats=state.batch_stats)
  return old


def _make_update(
  config: Config, tx: optax.GradientTransformation, mesh: mesh_lib.Mesh
):
  """(state, Means) -> (state, metrics): the optimizer, if all is well."""
  views = [view for view, _ in config.views]

  def update(state: TrainState, means: Means):
    stats = means.batch_stats
    if means.attack_stats is not None:
      adv = config.routes.index('adv')
      stats = _mean_on_route(stats, means.attack_stats, adv)
    grads = means.grads
    packed = optim.pack(config, state.params)
    specs = optim.packed_specs(config, packed)
    if config.shard_optimizer:
      packed = mesh_lib.split(mesh, packed, specs)
    updates, opt_state = tx.update(grads, state.opt_state, packed)
    new = optax.apply_updates(packed, updates)
    if config.shard_optimizer:
      new = mesh_lib.gather(mesh, new, specs)
    params = optim.unpack(config, new, state.params)
    grad_norm = optax.tree.norm(grads)
    loss = weighted_loss(config, means.loss_V)
    finite = _is_finite(loss, grad_norm, means.batch_stats)
    applied, spikes, spike_metrics = _judge_loss(
      config, state.spikes, loss, finite
    )
    ema = _averaged(config, state.ema, Snapshot(params, stats))
    params, stats, opt_state, ema = jax.tree.map(
      lambda new, old: jnp.where(applied, new, old),
      (params, stats, opt_state, ema),
      (state.params, state.batch_stats, state.opt_state, state.ema),
    )
    bad = 1 - finite.astype(jnp.int32)
    new = state.replace(
      params=params,
      batch_stats=stats,
      opt_state=opt_state,
      ema=ema,
      nonfinite_steps=state.nonfinite_steps + bad,
      nonfinite_streak=(state.nonfinite_streak + bad) * bad,
      spikes=spikes,
    )
    metrics = {
      'loss': loss,
      'grad_norm': grad_norm,
      'nonfinite_steps': new.nonfinite_steps,
      'nonfinite_streak': new.nonfinite_streak,
    } | spike_metrics
    for i, view in enumerate(views):
      metrics[f'loss_{view}'] = means.loss_V[i]
      metrics[f'top1_{view}'] = means.top1_V[i]
    if config.optimizer.name == 'lars':
      metrics['trust_ratios'] = optim.kernel_trust_ratios(
        config.optimizer, grads, packed
      )
    return new, metrics

  return update


def no_spikes(config: Config) -> Spikes | None:
  """`TrainState.spikes` before the first step; None with spike.sigmas = 0."""
  if not config.spike.sigmas:
    return None
  losses_W = jnp.zeros(config.spike.window_steps, wide_dtype(config))
  zero = jnp.zeros((), jnp.int32)
  return Spikes(losses=losses_W, count=zero, steps=zero, streak=zero)


def _is_finite(loss: jax.Array, grad_norm: jax.Array, stats: Any) -> jax.Array:
  """Whether an update may be applied.

  A variance can overflow where neither loss nor gradient does, as a batch norm
  then multiplies by 0. New weights need no look: a gradient of finite norm is
  below 2e19, and so a step overflows only for rates or weights of that size.
  The statistics are those of the update alone: it must not wait for an attack.
  """
  finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
  for leaf in jax.tree.leaves(stats):
    finite &= jnp.isfinite(leaf).all()
  return finite


def _judge_loss(
  config: Config, old: Spikes | None, loss: jax.Array, finite: jax.Array
) -> tuple[jax.Array, Spikes | None, Metrics]:
  """(whether the update is applied, the new `Spikes`, metrics of them).

  A spike is a loss above the mean plus `sigmas` standard deviations of the
  losses of the last `window_steps` applied updates, once there are so many.
  After `max_in_a_row` of them the loss has moved for good: the next update is
  applied whatever its loss, and the window starts anew with it. Steps that are
  not finite neither end such a row nor belong to it.
  """
  if old is None:
    return finite, None, {}
  settings, window = config.spike, config.spike.window_steps
  mean = old.losses.mean()
  deviation = jnp.maximum(
    jnp.sqrt(jnp.square(old.losses - mean).mean()),
    _MIN_DEVIATION * jnp.maximum(jnp.abs(mean), 1),
  )
  limit = mean + settings.sigmas * deviation
  limit = jnp.where(old.count >= window, limit, jnp.inf)
  high = finite & (loss > limit)
  has_moved = high & (old.streak >= settings.max_in_a_row)
  spike = high & ~has_moved
  applied = finite & ~spike
  # Counts are kept below 2 W: only their rest and whether W is reached matter.
  place = jnp.where(has_moved, 0, old.count)
  wrapped = jnp.where(place + 1 < 2 * window, place + 1, window)
  new = Spikes(
    losses=old.losses.at[place % window].set(
      jnp.where(applied, loss, old.losses[place % window])
    ),
    count=jnp.where(applied, wrapped, old.count),
    steps=old.steps + spike.astype(jnp.int32),
    streak=jnp.where(applied, 0, old.streak + spike.astype(jnp.int32)),
  )
  return (
    applied,
    new,
    {
      'spike_limit': limit,
      'spike_steps': new.steps,
      'spike_streak': new.streak,
    },
  )


def make_attack_stats_fn(
  config: Config, spec: DatasetSpec, apply_fn: ApplyFn, mesh: mesh_lib.Mesh
):
  """(state_t, batch_t) -> how the pending perturbation has aged.

  Compares delta_t, made with theta_{t - tau}, with a fresh one made with
  theta_t from the same random start:

    delta_agreement  percentage of pixels at which both have the same sign
    loss_stale       loss of theta_t on clean + delta_t, no smoothing
    loss_fresh       the same with the fresh perturbation: what a sequential
                     attack would have reached
  """
  attack_fn = make_attack_fn(config, spec, apply_fn)
  route = (config.routes.index('adv'),)
  wide = wide_dtype(config)

  def one_microbatch(step, now, part, _):
    batch, stale, places = part
    fresh, _ = attack_fn(now, batch, step, places)
    variables = {'params': now.params, 'batch_stats': now.batch_stats}

    def loss(delta):
      pixels = batch['clean'].astype(wide) + delta.astype(wide)
      x = normalize(spec, jnp.clip(pixels, 0, 255))[:, None]
      logits, _ = apply_fn(variables, x, route, config.attack.train_mode)
      return losses.cross_entropy(logits[:, 0], batch['label']).mean()

    same = jnp.sign(stale) == jnp.sign(fresh)
    return {
      'delta_agreement': 100 * same.mean(dtype=wide),
      'loss_stale': loss(stale),
      'loss_fresh': loss(fresh),
    }, None

  def per_device(step, now, delta, batch):
    means, _ = over_microbatches(
      config.microbatches,
      lambda *args: one_microbatch(step, now, *args),
      (batch, delta, batch_places(config, mesh)),
      None,
      dict.fromkeys(
        ('delta_agreement', 'loss_stale', 'loss_fresh'), jnp.zeros((), wide)
      ),
    )
    return mesh_lib.mean_over_devices(means)

  fn = mesh_lib.per_device(
    mesh,
    per_device,
    (mesh_lib.REPLICATED,) * 2 + (mesh_lib.BATCH,) * 2,
    mesh_lib.REPLICATED,
  )

  def attack_stats(state: TrainState, batch: Batch) -> Metrics:
    now = Snapshot(state.params, state.batch_stats)
    return fn(state.step, now, state.perturbation, batch)

  return attack_stats


def pending_perturbation(
  config: Config, step_fn: StepFn, state: TrainState, batch: Batch
) -> TrainState:
  """`state` with delta_t made (again), from batch_t and theta_{t - tau}.

  Runs `step_fn`, the compiled step that trains, as step t - 1 from the oldest
  snapshot and discards its update: only the same program gives the same bits.
  At t = 0 this is the warm start: the first tau + 1 batches are attacked with
  the initial weights, as if theta had been theta_0 before the run.
  """
  if not config.staleness_steps:
    return state
  oldest = state.snapshots[0]
  past = state.replace(
    step=state.step - 1, snapshots=(oldest, *state.snapshots[:-1])
  )
  if config.staleness_steps == 1:
    past = past.replace(params=oldest.params, batch_stats=oldest.batch_stats)
  if past.perturbation is None:  # restored: its value is not read, its shape is
    image = batch['clean']
    blank = jnp.zeros(image.shape, config.dtype, device=image.sharding)
    past = past.replace(perturbation=blank)
  past = jax.tree.map(
    jnp.copy, past
  )  # the step donates: no buffer may be twice
  return state.replace(perturbation=step_fn(past, batch, batch)[0].perturbation)


def _averaged(config: Config, ema: Snapshot | None, new: Snapshot):
  """decay * ema + (1 - decay) * new; statistics are copied if not averaged."""
  if ema is None:
    return None
  average = optax.incremental_update(new, ema, 1 - config.ema.decay)
  if not config.ema.batch_stats:
    average = average.replace(batch_stats=new.batch_stats)
  return average


def _mean_on_route(a: Any, b: Any, route: int) -> Any:
  """Leaves of `a` with row `route` replaced by the mean of both rows.

  Elements of `b` that are not finite are left out. They come from an attack,
  for which the finite check of the update must not wait.
  """

  def mean(x, y):
    both = (x[route] + y[route]) / 2
    return x.at[route].set(jnp.where(jnp.isfinite(both), both, x[route]))

  return jax.tree.map(mean, a, b)
