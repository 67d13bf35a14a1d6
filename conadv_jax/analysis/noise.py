"""The gradient noise scale along a run that has logged it."""

from __future__ import annotations

from typing import Any

import numpy as np

from conadv_jax import hosts
from conadv_jax.analysis.results import Found
from conadv_jax.analysis.subject import Lacks, Subject
from conadv_jax.run import metrics

_WINDOWS = 10
_COLUMNS = ('step', 'noise_square', 'noise_trace')


def asked(subject: Subject) -> dict[str, Any]:
  """What is averaged.

  Raises:
    Lacks: if the run has not logged it.
  """
  steps = _table(subject)[:, 0]
  if not len(steps):
    raise Lacks('noise: the run has not logged it; train with noise_scale=True')
  return {'rows': len(steps), 'steps': [steps[0], steps[-1]]}


def measure(subject: Subject) -> Found:
  """Averages |G|^2 and tr(Sigma) over steps, then divides.

  Over the whole run, over its last quarter, and over windows for the picture;
  `conadv_jax.method.noise` has the formulas.
  """
  table = _table(subject)
  windows = np.array_split(table, min(_WINDOWS, len(table)))
  means = np.array([window.mean(0) for window in windows])
  _, square, trace = table.mean(0)
  _, last_square, last_trace = table[-max(1, len(table) // 4) :].mean(0)
  values = {
    'noise_square': square,
    'noise_trace': trace,
    'noise_scale': trace / square,
    'noise_scale_last_quarter': last_trace / last_square,
  }
  return Found(values, dict(zip(_COLUMNS, means.T, strict=True)))


def _table(subject: Subject) -> np.ndarray:
  """The rows of metrics.jsonl that have `_COLUMNS`: [rows, 3]."""

  def read() -> list[list[float]]:
    rows = metrics.read_metrics(subject.path)
    table = [[row.get(name) for name in _COLUMNS] for row in rows]
    return [row for row in table if None not in row]

  return np.reshape(hosts.on_writer('metrics.jsonl', read), (-1, 3))
