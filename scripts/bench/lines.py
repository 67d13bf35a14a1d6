"""Straight lines through measurements, and where the latter leave them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Line(NamedTuple):
  """y = a + b * x by least squares; `r2` is None where y does not vary."""

  a: float
  b: float
  r2: float | None


def fit(xs: Sequence[float], ys: Sequence[float]) -> Line:
  """The line through two points or more, of different x."""
  b, a = statistics.linear_regression(xs, ys)
  mean = statistics.fmean(ys)
  total = sum((y - mean) ** 2 for y in ys)
  rest = sum((y - a - b * x) ** 2 for x, y in zip(xs, ys, strict=True))
  return Line(a, b, 1 - rest / total if total else None)


def bend(
  xs: Sequence[float], rounds: Sequence[Sequence[float]], tolerance: float
) -> tuple[float, float] | None:
  """The first x at which y is off the line through its two neighbours.

  Both ends have one neighbour only, and cannot be off.

  Args:
    xs: in order, up or down.
    rounds: of each x, y in each round. What slows down a whole round cancels:
      the median over rounds of y over the line's is compared.
    tolerance: share of y that is not yet off.

  Returns:
    (x, y over the line's, less 1), or None if no x is off.
  """
  points = list(zip(xs, rounds, strict=True))
  for before, (x, ys), after in zip(
    points, points[1:], points[2:], strict=False
  ):
    share = (x - before[0]) / (after[0] - before[0])
    ratios = [
      y / (p + share * (q - p))
      for p, y, q in zip(before[1], ys, after[1], strict=True)
    ]
    departure = statistics.median(ratios) - 1
    if abs(departure) > tolerance:
      return x, departure
  return None
