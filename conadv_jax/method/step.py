"""One step of training: the update, and the attack on the next batch.

For a staleness tau >= 1 the two sub-steps of a program share no result, unless
`attack.update_batch_stats` asks the update for the attack's statistics:

  update       delta_t, batch_t, theta_t              -> theta_{t+1}
  adversarial  batch_{t+1}, theta_{t+1-tau}           -> delta_{t+1}

so the compiler may run them concurrently (ConAdv, arXiv:2106.00221, algorithm
1). For tau = 0 the attack on batch_t with theta_t comes first and the update
waits for it (AdvProp, arXiv:1911.09665). delta perturbs images, or weights
(`method.sam`), or both.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from conadv_jax.config import Config
from conadv_jax.devices import sharded_optimizer
from conadv_jax.devices.mesh import Places
from conadv_jax.method import (
  fast_advprop,
  noise,
  optim,
  sam,
  spikes,
  staleness,
)
from conadv_jax.method.attack import attack_batch
from conadv_jax.method.gradients import (
  Means,
  loss_gradient,
  over_devices,
  weighted_loss,
)
from conadv_jax.method.pixels import Batch, trained_views
from conadv_jax.method.setup import Setup
from conadv_jax.method.staleness import Metrics
from conadv_jax.method.state import Perturbation, Snapshot, TrainState


def train_step(
  setup: Setup, state: TrainState, batch: Batch, next_batch: Batch
) -> tuple[TrainState, Metrics]:
  """Computes theta_{t+1} and delta_{t+1} from theta_t, delta_t and two batches.

  Pure, and not jitted here: whoever runs or audits it jits this very function.
  Where tau = 0, or no view is adversarial, batch_{t+1} is not read.

  Args:
    setup: what the step is made of.
    state: theta_t, delta_t and all else that changes.
    batch: batch_t: uint8 views [G, b, H, W, C] and labels [G, b].
    next_batch: batch_{t+1}, likewise.
  """
  config = setup.config
  passes = fast_advprop.sub_steps if config.adv_every else sub_steps
  trained, first = trained_weights(setup, state, batch)
  means, pending = over_devices(setup, passes)(
    state.step,
    trained,
    staleness.attacker(config, state),
    batch,
    next_batch if config.staleness_steps else {},
    of_parts(config, state.perturbation),
  )
  if first.ascent_stats is not None:
    means = means.replace(ascent_stats=first.ascent_stats)
  if pending is not None and means.ascent is not None:
    pending = pending.replace(weights=means.ascent)
  with jax.named_scope('optimizer'):
    new, metrics = update(setup, state, means)
    if config.noise_scale:
      metrics |= noise.estimates(
        config.batch_size,
        noise.parts(config, setup.mesh),
        means.square,
        jnp.square(metrics['grad_norm']),
      )
    newest = Snapshot(state.params, state.batch_stats)
    if config.ascent == 'lookahead':
      newest = sam.lookahead(setup, new, means.ascent)
  return new.replace(
    step=state.step + 1,
    snapshots=(*state.snapshots, newest)[1:],
    perturbation=pending,
  ), metrics


def trained_weights(
  setup: Setup, state: TrainState, batch: Batch
) -> tuple[Snapshot, Means]:
  """Computes theta_t + e_t, at which the update takes its gradient.

  Where groups of examples have perturbations of their own, or there are none,
  that is theta_t.

  Returns:
    The weights, and the Means of an ascent that the update has to wait for.
  """
  config, first = setup.config, Means()
  now = Snapshot(state.params, state.batch_stats)
  if config.ascent == 'none' or sam.in_groups(config):
    return now, first
  if not config.ascends:
    d = sam.free_direction(setup, state)
  elif config.staleness_steps:
    d = state.perturbation.weights
  else:
    with jax.named_scope('adversarial'):
      first, _ = over_devices(setup, _ascent_alone, trains=False)(
        state.step, now, now, batch, {}, None
      )
    d = first.ascent
  return sam.moved(config, now, d), first


def of_parts(
  config: Config, perturbation: Perturbation | None
) -> Perturbation | None:
  """Returns what parts of a batch differ in; the rest is `trained_weights`."""
  if perturbation is None or sam.in_groups(config):
    return perturbation
  return perturbation.replace(weights=None)


def sub_steps(
  setup: Setup,
  step: jax.Array,
  now: Snapshot,
  attacker: Snapshot,
  batch: Batch,
  next_batch: Batch,
  delta: Perturbation | None,
  places: Places,
) -> tuple[Means, Perturbation | None]:
  """Computes both sub-steps on a microbatch of one device.

  Args:
    setup: what the step is made of.
    step: t.
    now: `trained_weights`.
    attacker: theta_{t+1-tau}; theta_t for tau = 0.
    batch: examples of batch_t.
    next_batch: the same places of batch_{t+1}; {} for tau = 0.
    delta: delta_t of `batch`; None for tau = 0.
    places: where the examples are in their batch.

  Returns:
    `Means` over the microbatch, and delta_{t+1} of `next_batch`, or None.
  """
  config, pending = setup.config, None
  with jax.named_scope('adversarial'):
    if config.staleness_steps:  # ConAdv: the update does not wait
      pending, found = make_perturbation(
        setup, attacker, now.batch_stats, next_batch, step + 1, places
      )
    else:  # AdvProp: it does
      delta, found = make_perturbation(
        setup, attacker, now.batch_stats, batch, step, places
      )
  with jax.named_scope('update'):
    now, images = apply_perturbation(config, now, batch, delta)
    means = loss_gradient(setup, now, images, batch['label'], step, places)
    if config.ascent == 'lookahead':
      grads = optax.incremental_update(
        found.ascent, means.grads, config.sam.mix
      )
      means = means.replace(grads=grads)
  return means.replace(
    attack_stats=found.attack_stats,
    ascent=found.ascent,
    ascent_stats=found.ascent_stats,
  ), pending


def make_perturbation(
  setup: Setup,
  attacker: Snapshot,
  batch_stats: Any,
  batch: Batch,
  step: jax.Array,
  places: Places,
) -> tuple[Perturbation, Means]:
  """Computes the perturbation of a microbatch, and what comes of it.

  Args:
    setup: what the step is made of.
    attacker: weights that make it.
    batch_stats: that an ascent moves.
    batch: examples of batch_t.
    step: t.
    places: where the examples are in their batch.
  """
  config, found = setup.config, Means()
  images = attack_stats = d = None
  if config.is_adversarial:
    images, attack_stats = attack_batch(setup, attacker, batch, step, places)
  if sam.is_beside(config):
    weights = attacker.replace(batch_stats=batch_stats)
    found = sam.ascent(setup, weights, batch, step, places)
    if sam.in_groups(config):
      d = jax.tree.map(lambda x: x[None, None], found.ascent)
      found = found.replace(ascent=None)
  return Perturbation(images, d), found.replace(attack_stats=attack_stats)


def apply_perturbation(
  config: Config, now: Snapshot, batch: Batch, delta: Perturbation | None
) -> tuple[Snapshot, dict[str, jax.Array]]:
  """Computes the weights and images that a microbatch is trained with."""
  delta = delta or Perturbation()
  if delta.weights is not None:
    d = jax.tree.map(lambda x: x[0, 0], delta.weights)
    now = sam.moved(config, now, d)
  return now, trained_views(config, batch, delta.images)


def update(
  setup: Setup, state: TrainState, means: Means
) -> tuple[TrainState, Metrics]:
  """Applies the optimizer to theta_t, unless the step is bad.

  An update whose loss, gradient norm or statistics are not finite is not
  applied: weights, statistics, optimizer and averages stay as they were, the
  step is counted, and the run continues with the next batch. With
  `spike.sigmas`, neither is one whose loss is a spike (`spikes.judge_loss`).
  """
  config, stats = setup.config, _moved_stats(setup.config, means)
  params, opt_state, packed = sharded_optimizer.apply_updates(
    config,
    setup.mesh,
    setup.optimizer,
    means.grads,
    state.opt_state,
    state.params,
  )
  loss = weighted_loss(config, config.shares, means.loss_V)
  grad_norm = optax.tree.norm(means.grads)
  finite = spikes.is_finite(loss, grad_norm, means.batch_stats)
  applied, seen, spike_metrics = spikes.judge_loss(
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
    spikes=seen,
  )
  metrics = {
    'loss': loss,
    'grad_norm': grad_norm,
    'nonfinite_steps': new.nonfinite_steps,
    'nonfinite_streak': new.nonfinite_streak,
    'learning_rate': jnp.asarray(setup.schedule(_updates_done(state))),
  } | spike_metrics
  for i, (view, _) in enumerate(config.views):
    metrics[f'loss_{view}'] = means.loss_V[i]
    metrics[f'top1_{view}'] = means.top1_V[i]
  if config.optimizer.name == 'lars':
    metrics['trust_ratios'] = optim.kernel_trust_ratios(
      config.optimizer, means.grads, packed
    )
  return new, metrics


def _updates_done(state: TrainState) -> jax.Array:
  """Counts the updates that were applied before this step."""
  done = state.step - state.nonfinite_steps
  return done if state.spikes is None else done - state.spikes.steps


def _averaged(
  config: Config, ema: Snapshot | None, new: Snapshot
) -> Snapshot | None:
  """decay * ema + (1 - decay) * new; statistics are copied if not averaged."""
  if ema is None:
    return None
  average = optax.incremental_update(new, ema, 1 - config.ema.decay)
  if not config.ema.batch_stats:
    average = average.replace(batch_stats=new.batch_stats)
  return average


def _ascent_alone(setup, step, now, _, batch, __, ___, places):
  """`sub_steps` of the ascent that an update waits for."""
  return sam.ascent(setup, now, batch, step, places), None


def _moved_stats(config: Config, means: Means) -> Any:
  """Returns the running statistics after all passes of a step."""
  stats = means.batch_stats
  if means.attack_stats is not None:
    rows = {config.route_of('adv')}
    stats = _blended(stats, means.attack_stats, rows, 0.5)
  if means.ascent_stats is not None and config.sam.rho:
    rows = {config.route_of(view) for view in config.ascent_views}
    stats = _blended(stats, means.ascent_stats, rows, 1.0)
  return stats


def _blended(a: Any, b: Any, rows: Collection[int], share: float) -> Any:
  """Replaces rows of the leaves of `a` by (1 - share) a + share b.

  Elements of that which are not finite are left out. They come from an attack
  or an ascent, for which the finite check of the update must not wait.
  """
  rows = np.array(sorted(rows))

  def blended(x, y):
    new = (1 - share) * x[rows] + share * y[rows]
    return x.at[rows].set(jnp.where(jnp.isfinite(new), new, x[rows]))

  return jax.tree.map(blended, a, b)
