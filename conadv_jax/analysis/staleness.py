"""What staleness costs the attack, along a run.

Steps of the run are repeated from its checkpoints, which stay as they are, with
the weights of the last steps kept. Then batch_t is attacked with theta_{t-tau}
for several tau, and theta_t says what the perturbation is worth.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from conadv_jax.analysis.results import Found
from conadv_jax.analysis.subject import Lacks, Subject
from conadv_jax.base import fields
from conadv_jax.data.quarantine import Quarantine
from conadv_jax.devices.mesh import BATCH, REPLICATED, own_copy, per_device
from conadv_jax.method.attack import attack_batch
from conadv_jax.method.gradients import batch_places, over_microbatches
from conadv_jax.method.pixels import Batch
from conadv_jax.method.setup import Setup
from conadv_jax.method.staleness import (
  StepFn,
  make_attack_stats_fn,
  pending_perturbation,
)
from conadv_jax.method.state import Perturbation, Snapshot, TrainState, copied
from conadv_jax.run import feed, provenance
from conadv_jax.run.initial import restore_before
from conadv_jax.run.reopen import saved_steps

TAUS = (0, 1, 2, 4, 8, 16)
_OLDEST = max(TAUS)


def make_attack_fn(
  setup: Setup,
) -> Callable[[jax.Array, Snapshot, Batch], jax.Array]:
  """Makes (t, weights, batch_t) -> delta, as the step makes it."""
  config, mesh = setup.config, setup.mesh

  def on_device(step, weights, batch):
    weights = own_copy(weights)

    def one_microbatch(part, _):
      batch, places = part
      delta, _ = attack_batch(setup, weights, batch, step, places)
      return (), delta

    blank = jnp.zeros(batch[config.attacked].shape, config.dtype)
    _, delta = over_microbatches(
      config.microbatches,
      one_microbatch,
      (batch, batch_places(config, mesh)),
      own_copy(blank),
    )
    return delta

  return per_device(mesh, on_device, (REPLICATED,) * 2 + (BATCH,), BATCH)


def asked(subject: Subject) -> dict[str, Any]:
  """What is measured: at which steps t, of which ages.

  Steps are those of `--at`, else the 16th after the start and after each
  checkpoint, as far as the run goes.

  Raises:
    Lacks: if the run has no adversarial view, or fewer steps.
    ConfigError: for a step that the run has not, or that is too early, or if
      the examples are not those of the run.
  """
  config, steps = subject.config, _steps(subject)
  spec, data_dir = subject.run.spec, config.dataset.data_dir
  data = provenance.of_examples(spec, data_dir, train=subject.trained_on)
  data = provenance.of_result(spec, data, data_dir, 'train')
  return {'steps': steps, 'taus': TAUS, 'data': data}


def _steps(subject: Subject) -> list[int]:
  """The steps of `asked`; raises as that does, but for the examples."""
  config, options = subject.config, subject.options
  stop = subject.run.steps.stop
  if not config.is_adversarial:
    raise Lacks(f'staleness: {config.method!r} has no adversarial view')
  if stop < _OLDEST:
    raise Lacks(f'staleness: needs {_OLDEST} steps, the run has {stop}')
  starts = (0, *saved_steps(subject.path))
  near = [step + _OLDEST for step in starts if step + _OLDEST <= stop]
  steps = options.steps or near
  fix = f'must be steps of the run, from {_OLDEST} to {stop}'
  fields.check(_OLDEST <= steps[0] <= steps[-1] <= stop, 'at', options.at, fix)
  return steps


def measure(subject: Subject) -> Found:
  """Measures perturbations of each age at each step.

  For each tau of `TAUS`, delta of batch_t is made with theta_{t-tau}:

    error, loss  of theta_t on batch_t + delta (percent, nats), as the attack of
                 the run sees it: its route, its mode of batch norm
    cosine       between delta and the one of tau = 0, mean over examples
    agreement    percentage of pixels at which both have the same sign

  Attacks start at the same random points whatever tau is.
  """
  run, rows = subject.run, []
  steps = _steps(subject)
  subject.begin('staleness', _OLDEST * len(steps))
  step_fn = run.compile_step()
  attack = jax.jit(make_attack_fn(run.setup))
  stats = jax.jit(make_attack_stats_fn(run.setup))
  for step in steps:
    state, batch, weights = _repeated(subject, step_fn, step)
    for tau in TAUS:
      delta = attack(state.step, weights[-1 - tau], batch)
      found = stats(state.replace(perturbation=Perturbation(delta)), batch)
      row = {ours: found[name] for ours, name in _NAMES.items()}
      row['error'] = 100 - row.pop('top1')
      rows.append({'step': step, 'tau': tau} | jax.device_get(row))
  values = {
    f'{name}_tau_{row["tau"]}': row[name]
    for name in ('error', 'loss', 'cosine', 'agreement')
    for row in rows[-len(TAUS) :]
  }
  return Found(values, {'rows': rows})


_NAMES = {
  'top1': 'top1_stale', 'loss': 'loss_stale', 'cosine': 'delta_cosine',
  'agreement': 'delta_agreement',
}  # fmt: skip


def _repeated(
  subject: Subject, step_fn: StepFn, step: int
) -> tuple[TrainState, Batch, Sequence[Snapshot]]:
  """state_t and batch_t, t = `step`; and theta_{t-16} to theta_t."""
  run, source = subject.run, subject.trained_on
  start, state = restore_before(subject.path, run, step - _OLDEST + 1)
  quarantine = Quarantine(max_share=run.config.dataset.max_bad_share)
  ids = feed.ExampleIds(start, keep=1)
  batches = feed.batches(run, source, quarantine, ids, start, step - start + 1)
  batch = next(batches)
  state = pending_perturbation(run.config, step_fn, state, batch)
  weights = collections.deque(maxlen=_OLDEST + 1)
  while True:
    now = Snapshot(state.params, state.batch_stats)
    weights.append(copied(now))  # the step donates its own
    following = next(batches, None)
    if following is None:
      return state, batch, weights
    state, _ = step_fn(state, batch, following)
    batch = following
    subject.tick()
