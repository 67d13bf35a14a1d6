"""One step of training: the update, and the attack on the next batch.

For a staleness tau >= 1 the two sub-steps of a program share no result, unless
`attack.update_batch_stats` asks the update for the attack's statistics:

  update       delta_t, batch_t, theta_t              -> theta_{t+1}
  adversarial  batch_{t+1}, theta_{t+1-tau}           -> delta_{t+1}

so the compiler may run them concurrently (ConAdv, arXiv:2106.00221, algorithm
1). For tau = 0 the attack on batch_t with theta_t comes first and the update
waits for it (AdvProp, arXiv:1911.09665).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from conadv_jax.config import Config
from conadv_jax.devices import sharded_optimizer
from conadv_jax.devices.mesh import Places
from conadv_jax.method import fast_advprop, noise, optim, spikes, staleness
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
from conadv_jax.method.state import Snapshot, TrainState


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
  now = Snapshot(state.params, state.batch_stats)
  passes = fast_advprop.sub_steps if config.adv_every else sub_steps
  means, pending = over_devices(setup, passes)(
    state.step,
    now,
    staleness.attacker(config, state),
    batch,
    next_batch if config.staleness_steps else {},
    state.perturbation,
  )
  with jax.named_scope('optimizer'):
    new, metrics = update(setup, state, means)
    if config.noise_scale:
      metrics |= noise.estimates(
        config.batch_size,
        noise.parts(config, setup.mesh),
        means.square,
        jnp.square(metrics['grad_norm']),
      )
  return new.replace(
    step=state.step + 1,
    snapshots=staleness.aged(config, state),
    perturbation=pending,
  ), metrics


def sub_steps(
  setup: Setup,
  step: jax.Array,
  now: Snapshot,
  attacker: Snapshot,
  batch: Batch,
  next_batch: Batch,
  delta: jax.Array | None,
  places: Places,
) -> tuple[Means, jax.Array | None]:
  """Computes both sub-steps on a microbatch of one device.

  Args:
    setup: what the step is made of.
    step: t.
    now: theta_t.
    attacker: theta_{t+1-tau}; theta_t for tau = 0.
    batch: examples of batch_t.
    next_batch: the same places of batch_{t+1}; {} for tau = 0.
    delta: delta_t of `batch`, [G, b, H, W, C]; None for tau = 0.
    places: where the examples are in their batch.

  Returns:
    `Means` over the microbatch, and delta_{t+1} of `next_batch`, or None.
  """
  pending = attack_stats = None
  with jax.named_scope('adversarial'):
    if setup.config.staleness_steps:  # ConAdv: the update does not wait
      pending, attack_stats = attack_batch(
        setup, attacker, next_batch, step + 1, places
      )
    elif setup.config.is_adversarial:  # AdvProp: it does
      delta, attack_stats = attack_batch(setup, attacker, batch, step, places)
  with jax.named_scope('update'):
    images = trained_views(setup.config, batch, delta)
    means = loss_gradient(setup, now, images, batch['label'], step, places)
  return means.replace(attack_stats=attack_stats), pending


def update(
  setup: Setup, state: TrainState, means: Means
) -> tuple[TrainState, Metrics]:
  """Applies the optimizer to theta_t, unless the step is bad.

  An update whose loss, gradient norm or statistics are not finite is not
  applied: weights, statistics, optimizer and averages stay as they were, the
  step is counted, and the run continues with the next batch. With
  `spike.sigmas`, neither is one whose loss is a spike (`spikes.judge_loss`).
  """
  config, stats = setup.config, means.batch_stats
  if means.attack_stats is not None:
    stats = _mean_on_route(stats, means.attack_stats, config.route_of('adv'))
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


def _mean_on_route(a: Any, b: Any, route: int) -> Any:
  """Replaces row `route` of the leaves of `a` by the mean of both rows.

  Elements of `b` that are not finite are left out. They come from an attack,
  for which the finite check of the update must not wait.
  """

  def mean(x, y):
    both = (x[route] + y[route]) / 2
    return x.at[route].set(jnp.where(jnp.isfinite(both), both, x[route]))

  return jax.tree.map(mean, a, b)
