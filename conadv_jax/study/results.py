"""Makes the row of a run out of its work directory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from conadv_jax.base.fields import flatten
from conadv_jax.config import to_dict
from conadv_jax.run import workdir
from conadv_jax.study.design import PLACES, Cell

_SUMMARY = (
  'steps', 'epochs', 'top1', 'train_top1', 'train_loss', 'flops',
  'images_per_sec', 'seconds', 'nonfinite_steps', 'spike_steps',
)  # fmt: skip
_SCORES = ('loss', 'top5', 'ece')  # of the clean images of the eval split


def row_of(cell: Cell, path: epath.Path, status: str) -> dict[str, Any]:
  """The row of `cell`, which ended with `status` in `path`.

  Returns:
    What it was, its settings in `cell.fields`, and what was measured: numbers
    of summary.json, the gap train_top1 - top1 in points, `_SCORES`, the top-1
    under each attack, and what its analyses found.
  """
  row = {
    'cell': cell.name, 'phase': cell.phase, 'arm': cell.arm,
    'seed': cell.config.seed, 'status': status, 'digest': cell.digest,
  }  # fmt: skip
  resolved = flatten(to_dict(cell.config))
  row |= {name: resolved[name] for name in cell.fields if name not in PLACES}
  if (path / 'config.json').exists():
    started = workdir.read_run(path)
    row['git_commit'] = started.get('git_commit', '')
    row['device'] = started['devices']['kind']
  if status != 'done':
    return row | {'error': last_error(path)}
  summary = json.loads((path / 'summary.json').read_text())
  row |= {k: summary[k] for k in _SUMMARY if summary.get(k) is not None}
  if 'train_top1' in row:
    row['gap'] = row['train_top1'] - row['top1']
  for found in summary.get('evaluations', ()):
    split = found['data']['split']
    if (found['attack'], split) == ('none', cell.config.dataset.eval_split):
      row |= {name: found[name] for name in _SCORES}
  for attack, top1 in summary['robust_top1_by_attack'].items():
    row[f'top1_{attack}'] = top1
  for file in sorted(path.glob('analysis/*.json')):
    found = json.loads(file.read_text())['values']
    row |= {k: v for k, v in found.items() if k not in ('loss', 'top1')}
  return row


def describe(row: Mapping[str, Any]) -> str:
  """Puts a row into one line."""
  if row['status'] != 'done':
    return f'{row["cell"]}: {row["status"]}: {row["error"]}'
  train = f'{row["train_top1"]:.2f} / ' if 'train_top1' in row else ''
  return (
    f'{row["cell"]}: {train}{row["top1"]:.2f} % after {row["steps"]:.0f} '
    f'steps, {row["seconds"]:.0f} s'
  )


def last_line(path: epath.Path) -> str:
  """The last line of a run's log; '' if there is none yet."""
  lines = _log(path).strip().splitlines()
  return lines[-1] if lines else ''


def last_error(path: epath.Path) -> str:
  """The last error in a run's log, or else its last line."""
  found = f'\n{_log(path)}'.rpartition('\nerror: ')
  return found[2].strip() if found[1] else last_line(path)


def _log(path: epath.Path) -> str:
  file = path / 'log.txt'
  return file.read_bytes().decode(errors='replace') if file.exists() else ''
