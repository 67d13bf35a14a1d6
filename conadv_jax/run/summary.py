"""Ends a run: the last evaluation, summary.json and the pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from conadv_jax import hosts
from conadv_jax.config import Attack
from conadv_jax.experiment import Run
from conadv_jax.method.state import TrainState
from conadv_jax.run import evaluations, metrics, plots
from conadv_jax.run.evaluator import (
  Evaluator,
  attacked,
  eval_attack,
  weights_of,
)
from conadv_jax.run.guard import Guard

Summary = dict[str, Any]


def finished(path: epath.Path, step: int) -> Summary | None:
  """The summary of the run in `path` if it was written at `step`."""

  def read() -> Summary | None:
    summary = evaluations.read(path / 'summary.json')
    return summary if summary.get('steps') == step else None

  return hosts.on_writer('summary.json', read)


def write_results(
  run: Run,
  path: epath.Path,
  examples: evaluations.Examples,
  on_train: evaluations.Examples | None,
  state: TrainState,
  writer: metrics.Writer,
  guard: Guard,
  progress: metrics.Progress,
) -> Summary:
  """Evaluates the last weights, writes summary.json and plots/.

  Args:
    run: what was trained, to its last step.
    path: the work directory.
    examples: the eval split.
    on_train: those of `eval.train_split`.
    state: after that step.
    writer: of the metrics.
    guard: told what is done.
    progress: of this start of the run.

  Returns:
    The summary.
  """
  attacks = [eval_attack(run.config, a) for a in run.config.eval.attacks]
  rows = _measured(run, examples, attacks, state, guard)
  train_rows = _measured(run, on_train, (), state, guard) if on_train else []
  _log(run.steps.stop, rows, writer)
  seconds = writer.seconds_before + progress.seconds

  def write() -> Summary:
    summary = _summarized(run, state, path, rows, train_rows, seconds)
    evaluations.store(path / 'summary.json', rows + train_rows, summary)
    if run.config.plots:
      guard.enter('pictures')
      _draw(run, state, examples.evaluator, path)
      writer.pictures(run.steps.stop, (path / 'plots').glob('*.png'))
    return summary

  summary = hosts.on_writer('the summary and the plots', write)
  hosts.say(describe(summary, path))
  return summary


def _measured(
  run: Run,
  examples: evaluations.Examples,
  attacks: Sequence[Attack],
  state: TrainState,
  guard: Guard,
) -> list[evaluations.Row]:
  """Evaluates the last weights: on clean images, and by attack."""
  config, step = run.config, run.steps.stop
  found = evaluations.measured(
    config,
    examples,
    weights_of(config, state),
    step,
    attacks,
    before_batch=lambda: guard.enter('last_evaluation', step),
  )
  return [row for row, _ in found]


def _log(
  step: int, rows: Sequence[evaluations.Row], writer: metrics.Writer
) -> None:
  # All at the end: half of them would be there twice after a rerun.
  for row in rows:
    if row['attack'] == 'none':
      writer.write(step, 'test', evaluations.results(row))
    else:
      writer.write(step, f'test_{row["attack"]}', {'top1': row['top1']})
  writer.flush()


def _summarized(
  run: Run,
  state: TrainState,
  path: epath.Path,
  rows: Sequence[evaluations.Row],
  train_rows: Sequence[evaluations.Row],
  seconds: float,
) -> Summary:
  """The numbers of the run, from `_measured` and metrics.jsonl."""
  config, spikes = run.config, state.spikes
  on_train = train_rows[0] if train_rows else {}
  clean, *attacked_rows = (row['top1'] for row in rows)
  robust = dict(zip(config.eval.attacks, attacked_rows, strict=True))
  rates = [
    row['images_per_sec']
    for row in metrics.read_metrics(path)
    if row['split'] == 'train'
  ]
  return {
    'method': config.method,
    'staleness_steps': config.staleness_steps,
    'model': config.model,
    'dataset': config.dataset.name,
    'batch_size': config.batch_size,
    'seed': config.seed,
    'steps': run.steps.stop,
    'epochs': run.steps.stop / run.steps.per_epoch,
    'route': config.eval.route,
    'use_ema': config.eval.use_ema,
    'top1': clean,
    'train_top1': on_train.get('top1'),
    'train_loss': on_train.get('loss'),
    'robust_top1': min(robust.values(), default=None),
    'robust_top1_by_attack': robust,
    'robust_epsilon': config.eval.epsilon,
    'images_per_sec': float(np.median(rates)) if rates else None,
    'flops': run.flops_per_device() * run.mesh.size * run.steps.stop,
    'seconds': seconds,
    'nonfinite_steps': int(jax.device_get(state.nonfinite_steps)),
    'spike_steps': int(jax.device_get(spikes.steps)) if spikes else 0,
  }


def describe(summary: Summary, path: epath.Path) -> str:
  """Puts the summary into one line."""
  robust = ', '.join(
    f'{name} {top1:.2f} %'
    for name, top1 in summary['robust_top1_by_attack'].items()
  )
  return (
    f'done: top-1 {summary["top1"]:.2f} % clean'
    + (f', {robust} at epsilon {summary["robust_epsilon"]:g}' if robust else '')
    + f'; {summary["seconds"]:.0f} s of training; files in {path}'
  )


def _draw(
  run: Run,
  state: TrainState,
  evaluator: Evaluator,
  path: epath.Path,
) -> None:
  """Writes plots/training_curves.png and plots/adversarial_images.png."""
  config = run.config
  title = (
    f'{config.method}, {config.model}, {config.dataset.name}, batch '
    f'{config.batch_size}, {run.steps.stop} steps'
  )
  rows = metrics.read_metrics(path)
  plots.training_curves(rows, title, path / 'plots' / 'training_curves.png')

  attack = eval_attack(config, 'fgsm')
  weights = weights_of(config, state)
  clean, labels = evaluator.first_examples(12)
  delta, logits = attacked(run, attack, weights, clean, labels)
  names = [[str(i) for i in row.argmax(-1)] for row in logits]
  plots.adversarial_grid(
    clean,
    delta,
    *names,
    [str(i) for i in labels],
    f'FGSM, {attack.epsilon:g} of 255 grey levels: {title}',
    path / 'plots' / 'adversarial_images.png',
  )
