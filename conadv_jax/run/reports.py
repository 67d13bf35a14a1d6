"""What people read of an evaluation: tables, and curves of robustness."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from conadv_jax.base import storage
from conadv_jax.data.sources.source import sha256_digits
from conadv_jax.run import evaluations, plots, workdir
from conadv_jax.run.evaluations import Found, Row

_SHOWN = 20  # classes that are printed
HEAD = (
  f'{"attack":<12}{"norm":>6}{"epsilon":>9}{"steps":>7}{"restarts":>10}'
  f'{"top1 %":>9}{"95 % interval":>17}{"top5 %":>9}{"loss":>9}{"ECE %":>8}'
)


def line(row: Row) -> str:
  """A row of `evaluations` under HEAD."""
  interval = f'{row["top1_low"]:.2f}-{row["top1_high"]:.2f}'
  return (
    f'{row["attack"]:<12}{row["norm"] or "":>6}{row["epsilon"]:>9g}'
    f'{row["attack_steps"]:>7}{row["restarts"]:>10}{row["top1"]:>9.2f}'
    f'{interval:>17}{row["top5"]:>9.2f}{row["loss"]:>9.4f}{row["ece"]:>8.2f}'
  )


# ---- By class ---------------------------------------------------------------


def by_class(
  found: Sequence[Found], class_names: Sequence[str]
) -> list[dict[str, Any]]:
  """Computes the accuracy of each class, the worst first.

  Args:
    found: of the same examples, clean ones first.
    class_names: in the order of the labels; () if they have none.

  Returns:
    For each class that occurs: `label`, `class` (its name), `examples`, and
    top-1 in percent, `clean` and under each attack. The worst has the lowest
    under any attack, then the lowest of `clean`.
  """
  size = 1 + max(int(made.label.max()) for _, made in found)
  columns = {}
  for row, made in found:
    used = made.where(made.usable)
    count = np.bincount(used.label, minlength=size)
    right = np.bincount(used.label, used.correct, size)
    columns[_name(row)] = 100 * right / np.maximum(count, 1)
  rows = [
    {'label': int(k), 'class': class_names[k] if class_names else ''}
    | {'examples': int(count[k])}
    | {name: float(top1[k]) for name, top1 in columns.items()}
    for k in np.flatnonzero(count)
  ]
  attacks = [name for name in columns if name != 'clean'] or ['clean']
  return sorted(
    rows, key=lambda row: (min(row[name] for name in attacks), row['clean'])
  )


def write_by_class(
  found: Sequence[Found],
  class_names: Sequence[str],
  folder: epath.Path,
) -> str:
  """Writes the table of `by_class` as CSV; returns its worst classes as text.

  Its name has a digest of what was measured and how.
  """
  rows = by_class(found, class_names)
  text = io.StringIO()
  writer = csv.DictWriter(text, rows[0], lineterminator='\n')
  writer.writeheader()
  writer.writerows(rows)
  subjects = [evaluations.subject(row) for row, _ in found]
  digest = sha256_digits([json.dumps(subjects, sort_keys=True)])
  data = found[0][0]['data']
  name = f'per_class_{data["name"]}_{data["split"]}_{digest}.csv'
  path = folder / ''.join(c if c.isalnum() or c in '._' else '-' for c in name)
  path.parent.mkdir(parents=True, exist_ok=True)
  storage.write_text(path, text.getvalue())
  shown = [
    '  '.join(f'{_text(value):>12}' for value in values)
    for values in (rows[0], *(row.values() for row in rows[:_SHOWN]))
  ]
  return '\n'.join([*shown, f'{len(rows)} classes, the worst first: {path}'])


def _name(row: Row) -> str:
  """'clean', or the attack with its ball."""
  if row['attack'] == 'none':
    return 'clean'
  return f'{row["attack"]} {row["norm"]} {row["epsilon"]:g}'


def _text(value: Any) -> str:
  return f'{value:.2f}' if isinstance(value, float) else str(value)[:12]


# ---- By radius --------------------------------------------------------------


def write_curves(
  rows: Sequence[Row], title: str, folder: epath.Path
) -> list[epath.Path]:
  """Draws top-1 over the radius, robustness_ATTACK_NORM.png and .json.

  Args:
    rows: of the same examples: clean, and attacks with several radii.
    title: of the pictures.
    folder: where they are written.

  Returns:
    The pictures.
  """
  clean, *others = rows
  paths = []
  for attack, norm in dict.fromkeys((r['attack'], r['norm']) for r in others):
    of_attack = [
      r for r in others if (r['attack'], r['norm']) == (attack, norm)
    ]
    if all(row['epsilon'] for row in of_attack):
      of_attack.append(clean)
    points = sorted(
      (
        {k: row[k] for k in ('epsilon', 'top1', 'top1_low', 'top1_high')}
        for row in of_attack
      ),
      key=lambda point: point['epsilon'],
    )
    path = folder / f'robustness_{attack}_{norm}.png'
    first = of_attack[0]
    plots.robustness_curve(
      points,
      f'{attack}, {first["attack_steps"]} steps, {first["restarts"]} restarts: '
      f'{title}',
      f'radius in {norm}, grey levels of 255',
      path,
    )
    what = evaluations.subject(first)
    del what['epsilon']
    workdir.write_json(path.with_suffix('.json'), {**what, 'points': points})
    paths.append(path)
  return paths
