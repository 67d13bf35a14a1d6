"""Draws the curves of any runs beside each other."""

from __future__ import annotations

from collections.abc import Sequence

from conadv_jax.base import storage
from conadv_jax.base.errors import ConfigError
from conadv_jax.run import metrics, workdir
from conadv_jax.run.plots import save, subplots

# Panels: title, split and name of the values in metrics.jsonl.
_PANELS = (
  ('train loss', 'train', 'loss'),
  ('train top-1, clean, %', 'train', 'top1_clean'),
  ('test top-1, %', 'test', 'top1'),
  ('learning rate', 'train', 'learning_rate'),
)


def draw(directories: Sequence[str], output: str) -> None:
  """Draws loss, accuracy and rate against the epoch, a line for each run.

  Args:
    directories: work directories of runs.
    output: the picture.

  Raises:
    ConfigError: a directory has no metrics.
  """
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
      if points:
        marker = 'o' if len(points) < 3 else None
        axis.plot(
          *zip(*points, strict=True), color=f'C{number % 10}', marker=marker,
          label=path.name, lw=1.2,
        )  # fmt: skip
  for axis, (title, *_) in zip(canvas.axes, _PANELS, strict=True):
    axis.set(title=title, xlabel='epoch')
    axis.grid(alpha=0.3)
  handles, labels = canvas.axes[0].get_legend_handles_labels()
  canvas.legend(handles, labels, loc='outside lower center', frameon=False)
  save(canvas, storage.expand(output))
  print(f'written: {output}')
