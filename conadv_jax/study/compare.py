"""Draws the curves of any runs beside each other, and a published one."""

from __future__ import annotations

import csv
import pathlib
from collections.abc import Sequence

import numpy as np

from conadv_jax.base import storage
from conadv_jax.base.errors import ConfigError, unknown
from conadv_jax.run import metrics, workdir
from conadv_jax.run.plots import save, subplots

# Panels: title, split and name of the values in metrics.jsonl.
_PANELS = (
  ('train loss', 'train', 'loss'),
  ('train top-1, clean, %', 'train', 'top1_clean'),
  ('test top-1, %', 'test', 'top1'),
  ('learning rate', 'train', 'learning_rate'),
)
_TEST = ('test', 'top1')
# Test accuracy by epoch, %. mlperf_64k: ResNet-50 with LARS at 65,536, Google's
# JAX submission to MLPerf v0.7 (result_0). mlperf_40k: at 40,448, NVIDIA's Eos
# in v4.0, of which only the first and last epochs are at hand.
_MAX_EPOCHS_BETWEEN = 4  # published ones, for a value between them
_REFERENCES = pathlib.Path(__file__).with_name('references.csv')

Points = list[tuple[float, float]]  # epoch, value


def draw(directories: Sequence[str], output: str, reference: str = '') -> None:
  """Draws loss, accuracy and rate against the epoch, a line for each run.

  Args:
    directories: work directories of runs.
    output: the picture.
    reference: a published test accuracy to draw and to compare with; '' = none.

  Raises:
    ConfigError: a directory has no metrics, or there is no such reference.
  """
  published = _reference(reference)
  canvas, axes = subplots(2, 2, (9, 6.4))
  for number, directory in enumerate(directories):
    path = storage.expand(directory)
    rows = metrics.read_metrics(path)
    if not rows:
      raise ConfigError(f'--compare={directory}: holds no metrics.jsonl')
    per_epoch = workdir.read_run(path)['steps']['per_epoch']
    for axis, (_, split, name) in zip(axes.flat, _PANELS, strict=True):
      points = [
        (row['step'] / per_epoch, row[name])
        for row in rows
        if row['split'] == split and row.get(name) is not None
      ]
      if (split, name) == _TEST and published:
        print(_compared(path.name, points, reference, published))
      if points:
        marker = 'o' if len(points) < 3 else None
        axis.plot(
          *zip(*points, strict=True), color=f'C{number % 10}', marker=marker,
          label=path.name, lw=1.2,
        )  # fmt: skip
  for axis, (title, *of) in zip(canvas.axes, _PANELS, strict=True):
    if tuple(of) == _TEST and published:
      axis.plot(*zip(*published, strict=True), 'k--', label=reference, lw=1)
    axis.set(title=title, xlabel='epoch')
    axis.grid(alpha=0.3)
  handles, labels = canvas.axes[2].get_legend_handles_labels()
  canvas.legend(handles, labels, loc='outside lower center', frameon=False)
  save(canvas, storage.expand(output))
  print(f'written: {output}')


def _reference(name: str) -> Points:
  """The published accuracy called `name`; nothing for ''."""
  with _REFERENCES.open(encoding='utf-8') as file:
    rows = list(csv.DictReader(file))
  found = [
    (float(row['epoch']), float(row['top1']))
    for row in rows
    if row['reference'] == name
  ]
  if name and not found:
    known = sorted({row['reference'] for row in rows})
    raise unknown('reference', name, known)
  return found


def _compared(
  name: str, points: Points, reference: str, published: Points
) -> str:
  """A table of a run's accuracy where the published one is known."""
  lines = [f'{name} beside {reference}: epoch, test top-1 %, difference']
  epochs, top1 = map(np.array, zip(*published, strict=True))
  for epoch, value in points:
    after = np.searchsorted(epochs, epoch)
    around = epochs[max(after - 1, 0) : after + 1]
    is_known = epochs[0] <= epoch <= epochs[-1]
    if is_known and around[-1] - around[0] <= _MAX_EPOCHS_BETWEEN:
      expected = np.interp(epoch, epochs, top1)
      lines.append(f'  {epoch:6.1f} {value:6.2f} {value - expected:+7.2f}')
  if len(lines) == 1:
    lines.append('  no evaluation where that is known')
  return '\n'.join(lines)
