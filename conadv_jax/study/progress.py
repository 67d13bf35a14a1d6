"""What is left of a study, and how long that takes."""

from __future__ import annotations

import collections
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from conadv_jax.study.design import Cell, Study
from conadv_jax.study.record import FAILED, SECONDS, Record, Row


class Left(NamedTuple):
  """What is left of a study.

  Attributes:
    searches: runs; at least, as a best value at an end of a grid adds one.
    arms: runs.
    seconds: {device: of training there in one process}, at the pace of the
      device's runs so far; of every device that has any.
  """

  searches: int
  arms: int
  seconds: dict[str, float]


def left(study: Study, record: Record) -> Left:
  """Counts the runs that have no result yet, and what they take.

  On each device, a run takes the seconds per epoch of its arm there so far; of
  its search, if the arm has none, and of all runs, if that has none.
  """
  rows, choices = record.rows(), record.choices()
  ended = {row['cell'] for row in rows if row['status'] != FAILED}
  searches = [] if choices is not None else _searches(study, ended)
  cells = study.final_cells(choices or study.untuned)
  arms = [cell for cell in cells if cell.name not in ended]
  # Arms of the same settings share a run.
  runs = {cell.digest: cell for cell in (*searches, *arms)}.values()
  seconds = {
    device: sum(_pace_of(study, c, pace) * c.config.epochs for c in runs)
    for device, pace in _pace(rows).items()
  }
  return Left(len(searches), len(arms), seconds)


def _searches(study: Study, ended: Collection[str]) -> list[Cell]:
  """The runs of all grids that have not ended."""
  cells = []
  for name, search in study.searches.items():
    for number, (field, values) in enumerate(search.grid.items()):
      tried = [study.trial(name, {}, field, value) for value in values]
      new = [cell for cell in tried if cell.name not in ended]
      # One value of a later field has been run with the field before.
      cells += new[1:] if number and len(new) == len(tried) else new
  return cells


def _pace(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
  """{device: {arm or search: median seconds per epoch}}; '' of all."""
  found = collections.defaultdict(lambda: collections.defaultdict(list))
  for row in rows:
    if row.get('epochs') and {SECONDS, 'device'} <= row.keys():
      for name in (row['arm'], ''):
        found[row['device']][name].append(row[SECONDS] / row['epochs'])
  return {
    device: {name: float(np.median(paces)) for name, paces in names.items()}
    for device, names in sorted(found.items())
  }


def _pace_of(study: Study, cell: Cell, pace: Mapping[str, float]) -> float:
  arm = study.arms.get(cell.arm)
  names = (cell.arm, arm.search if arm else '', '')
  return next(pace[name] for name in names if name in pace)
