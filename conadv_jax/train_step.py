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

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from conadv_jax import attack as attack_lib
from conadv_jax import losses, optim
from conadv_jax.config import Config
from conadv_jax.data.datasets import DatasetSpec
from conadv_jax.models import ApplyFn
from conadv_jax.state import Snapshot, Stream, TrainState, stream_key

Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]
StepFn = Callable[[TrainState, Batch, Batch], tuple[TrainState, Metrics]]


def normalize(spec: DatasetSpec, pixels: jax.Array) -> jax.Array:
  """(pixels - mean) / std per channel; pixels in grey levels of 255."""
  mean = jnp.array(spec.mean_px, pixels.dtype)
  return (pixels - mean) / jnp.array(spec.std_px, pixels.dtype)


def make_attack_fn(config: Config, spec: DatasetSpec, apply_fn: ApplyFn):
  """(weights, batch, batch index) -> (delta, batch statistics).

  The random start is addressed by the index of the batch in the run, so a
  batch is attacked alike whenever, and with whatever weights, that is done.
  The statistics are those after the last gradient of the attack, or None unless
  `attack.update_batch_stats` asks for them.
  """
  route = (config.routes.index('adv'),)
  moves_stats = config.attack.update_batch_stats

  def attack_fn(weights: Snapshot, batch: Batch, index: jax.Array):
    wide = wide_dtype(config)
    image = batch['clean'].astype(wide)
    key = stream_key(config.seed, Stream.ATTACK, index)
    start = attack_lib.sample_start(
      config.attack, key, image, batch['label'], spec.num_classes
    )
    variables = {'params': weights.params, 'batch_stats': weights.batch_stats}

    def loss_fn(pixels, labels):
      x = normalize(spec, pixels)[:, None]
      logits, stats = apply_fn(variables, x, route, config.attack.train_mode)
      loss = losses.cross_entropy(logits[:, 0], labels).sum()
      return loss, stats if moves_stats else None

    delta, stats = attack_lib.perturb(
      config.attack,
      loss_fn,
      image,
      start,
      weights.batch_stats if moves_stats else None,
    )
    return delta.astype(config.dtype), stats

  return attack_fn


def make_train_step(
  config: Config,
  spec: DatasetSpec,
  apply_fn: ApplyFn,
  tx: optax.GradientTransformation,
  schedule: optax.Schedule,
) -> StepFn:
  """The function (state_t, batch_t, batch_{t+1}) -> (state_{t+1}, metrics).

  Pure, and not jitted here: whoever runs or audits it jits this very function.
  Where tau = 0, or nothing is adversarial, batch_{t+1} is not read.

  An update whose loss or gradient norm is not finite is not applied: weights,
  statistics, optimizer and averages stay as they were, the step is counted, and
  the run goes on to the next batch.
  """
  tau = config.staleness_steps
  attack_fn = (
    make_attack_fn(config, spec, apply_fn) if config.is_adversarial else None
  )
  update = _make_update(config, spec, apply_fn, tx)

  def train_step(state: TrainState, batch: Batch, next_batch: Batch):
    now = Snapshot(state.params, state.batch_stats)
    if attack_fn is None:
      delta, pending, attack_stats = None, None, None
    elif tau == 0:
      delta, attack_stats = attack_fn(now, batch, state.step)
      pending = None
    else:
      delta = state.perturbation
      # In train mode, where statistics can move, the attack does not read them:
      # it moves those of now, whatever the age of its weights.
      old = _attacker(config, state)
      if config.attack.update_batch_stats:
        old = old.replace(batch_stats=state.batch_stats)
      pending, attack_stats = attack_fn(old, next_batch, state.step + 1)

    new, metrics = update(state, batch, delta, attack_stats)
    applied = state.step - state.nonfinite_steps
    metrics['learning_rate'] = jnp.asarray(schedule(applied))
    return new.replace(
      step=state.step + 1,
      snapshots=(*state.snapshots, now)[1:] if tau else (),
      perturbation=pending,
    ), metrics

  return train_step


def _attacker(config: Config, state: TrainState) -> Snapshot:
  """theta_{t + 1 - tau}: the weights that attack batch t + 1 in step t."""
  if config.staleness_steps > 1:
    return state.snapshots[1]
  return Snapshot(state.params, state.batch_stats)


def _make_loss_fn(config: Config, spec: DatasetSpec, apply_fn: ApplyFn):
  """(params, batch_stats, images by view, labels, key) -> mean loss over views.

  With it: loss and top-1 (%) of each view [V], and the moved statistics. `key`
  is for dropout and stochastic depth.
  """
  views = tuple(view for view, _ in config.views)
  routes = tuple(config.routes.index(route) for _, route in config.views)
  weights = config.loss.weights_of(views)
  smoothing = config.loss.label_smoothing

  def loss_fn(params, batch_stats, images, labels, key):
    variables = {'params': params, 'batch_stats': batch_stats}
    x_GVbHWC = jnp.stack([normalize(spec, images[v]) for v in views], 1)
    logits, stats = apply_fn(variables, x_GVbHWC, routes, True, key)
    labels_GVb = jnp.broadcast_to(labels[:, None], logits.shape[:-1])
    loss_V = losses.cross_entropy(logits, labels_GVb, smoothing).mean((0, 2))
    top1_V = 100 * losses.top1(logits, labels_GVb).mean((0, 2))
    loss = jnp.dot(jnp.array(weights, loss_V.dtype), loss_V)
    return loss, (loss_V, top1_V, stats)

  return loss_fn


def _make_update(config, spec, apply_fn, tx):
  """The update sub-step, with the finite check."""
  views = [view for view, _ in config.views]
  gradient = jax.value_and_grad(
    _make_loss_fn(config, spec, apply_fn), has_aux=True
  )

  def update(state, batch, delta, attack_stats):
    wide = wide_dtype(config)
    images = {v: batch[v].astype(wide) for v in views if v != 'adv'}
    if delta is not None:
      images['adv'] = jnp.clip(images['clean'] + delta.astype(wide), 0, 255)
    key = stream_key(config.seed, Stream.DROPOUT, state.step)
    (loss, (loss_V, top1_V, stats)), grads = gradient(
      state.params, state.batch_stats, images, batch['label'], key
    )
    if attack_stats is not None:
      stats = _mean_on_route(stats, attack_stats, config.routes.index('adv'))

    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    ema = _averaged(config, state.ema, Snapshot(params, stats))
    params, stats, opt_state, ema = jax.tree.map(
      lambda new, old: jnp.where(finite, new, old),
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
    )
    metrics = {
      'loss': loss,
      'grad_norm': grad_norm,
      'nonfinite_steps': new.nonfinite_steps,
      'nonfinite_streak': new.nonfinite_streak,
    }
    for i, view in enumerate(views):
      metrics[f'loss_{view}'] = loss_V[i]
      metrics[f'top1_{view}'] = top1_V[i]
    if config.optimizer.name == 'lars':
      metrics['trust_ratios'] = optim.kernel_trust_ratios(
        config.optimizer, grads, state.params
      )
    return new, metrics

  return update


def make_attack_stats_fn(config: Config, spec: DatasetSpec, apply_fn: ApplyFn):
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

  def attack_stats(state: TrainState, batch: Batch) -> Metrics:
    now = Snapshot(state.params, state.batch_stats)
    fresh, _ = attack_fn(now, batch, state.step)
    variables = {'params': now.params, 'batch_stats': now.batch_stats}

    def loss(delta):
      pixels = batch['clean'].astype(wide) + delta.astype(wide)
      x = normalize(spec, jnp.clip(pixels, 0, 255))[:, None]
      logits, _ = apply_fn(variables, x, route, config.attack.train_mode)
      return losses.cross_entropy(logits[:, 0], batch['label']).mean()

    same = jnp.sign(state.perturbation) == jnp.sign(fresh)
    return {
      'delta_agreement': 100 * same.mean(),
      'loss_stale': loss(state.perturbation),
      'loss_fresh': loss(fresh),
    }

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


def wide_dtype(config: Config) -> Any:
  """Type of pixels, loss and parameters: float32, or float64 if so set."""
  return jnp.promote_types(config.dtype, jnp.float32)


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
