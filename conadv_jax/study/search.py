"""Chooses settings on a validation split, field by field."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from conadv_jax.base.errors import ConfigError
from conadv_jax.study.design import Study
from conadv_jax.study.record import DONE, Record, Row
from conadv_jax.study.runner import Runner, Steps

_MOST_ADDED = 3  # values beyond each end of a grid

_Score = tuple[float, float]  # accuracy, and loss times -1
_BAD = (-1.0, 0.0)  # of a run that did not end well: worse than all others


def choose(study: Study, record: Record, runner: Runner) -> Mapping[str, Any]:
  """Runs all searches and keeps their choices, unless they are kept already.

  Returns:
    {search: {field: value}}.

  Raises:
    ConfigError: no run of a search ended well.
    Preempted: after a signal.
  """
  known = record.choices()
  if known is not None:
    return known

  def logged(name: str) -> Steps:
    chosen = yield from _search(study, name)
    text = f'{name}: chose {chosen}'
    if not record.has_logged(text):  # before a stop
      record.log(text)
    return chosen

  choices = runner.drive({name: logged(name) for name in study.searches})
  record.choose(choices)
  record.log('all choices are fixed; the test split is looked at from here on')
  return choices


def _search(study: Study, name: str) -> Steps:
  """Tries the values of one field after the other."""
  chosen: dict[str, Any] = {}
  for field, values in study.searches[name].grid.items():
    found: dict[float, _Score] = {}
    new = list(values)
    while new:
      cells = [study.trial(name, chosen, field, value) for value in new]
      rows = yield cells
      for value, row in zip(new, rows, strict=True):
        found[value] = _score(row)
      new = _beyond(found, values)
    best = _best(found)
    if found[best] == _BAD:
      raise ConfigError(f'search {name!r}: every run over {field} failed')
    chosen[field] = best
  return chosen


def _score(row: Row) -> _Score:
  """Accuracy first; on few examples, the loss tells equal ones apart."""
  if row['status'] != DONE:
    return _BAD
  return row['top1'], -row.get('loss', math.inf)


def _best(found: Mapping[float, _Score]) -> float:
  """The value of the best score; of several, what was tried first."""
  return max(found, key=found.get)


def _beyond(
  found: Mapping[float, _Score], values: Sequence[float]
) -> list[float]:
  """The next value where the best is at an end of what was tried."""
  tried = sorted(found)
  best = _best(found)
  if len(tried) < 2 or len(tried) >= len(values) + _MOST_ADDED:
    return []
  neighbour = {tried[0]: tried[1], tried[-1]: tried[-2]}.get(best)
  return [] if neighbour is None else [float(f'{best**2 / neighbour:.6g}')]
