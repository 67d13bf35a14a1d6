"""Intervals of differences between arms, paired by seed.

Runs of the same seed start from the same weights and see the same examples in
the same order, so arms are compared seed by seed. Values are accuracies in
percent, and differences in percentage points.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import scipy.stats

Values = Mapping[int, float]  # {seed: value} of an arm

_RESAMPLES = 10_000


@dataclasses.dataclass(frozen=True)
class Interval:
  """An estimate with its confidence interval.

  Attributes:
    value: the estimate; nan without values.
    low: lower end; nan of fewer than two values, as is `high`.
    high: upper end.
    count: values, or pairs, that it is of.
  """

  value: float
  low: float
  high: float
  count: int

  @property
  def excludes_zero(self) -> bool:
    """Whether it lies on one side of 0; False where it has no ends."""
    return self.low > 0 or self.high < 0


def mean(values: Values, level: float = 0.95) -> Interval:
  """Computes the mean over seeds, with Student's t interval.

    mean +- t_{n-1, (1 + level) / 2} * s / sqrt(n)

  where s is the standard deviation with n - 1 in the denominator.

  Args:
    values: of each seed, taken as independent and normal.
    level: that the interval covers the mean with.
  """
  found = np.array(list(values.values()), float)
  if not len(found):
    return Interval(np.nan, np.nan, np.nan, 0)
  center, low, high = found.mean(), np.nan, np.nan
  if len(found) > 1:
    t = scipy.stats.t.ppf((1 + level) / 2, len(found) - 1)
    half = t * found.std(ddof=1) / np.sqrt(len(found))
    low, high = center - half, center + half
  return Interval(float(center), float(low), float(high), len(found))


def difference(a: Values, b: Values, level: float = 0.95) -> Interval:
  """Computes the mean of a - b over the seeds that both have, as `mean`."""
  return mean({seed: a[seed] - b[seed] for seed in _shared(a, b)}, level)


def recovery(
  method: Values, large: Values, small: Values, level: float = 0.95
) -> Interval:
  """Computes which share of a gap a method gives back.

    R = mean(method - large) / mean(small - large)

  `large` and `small` are the baseline at a large and at a small batch. The
  interval is Fieller's over seeds: all R for which Student's t test does not
  reject mean(method - large) = R mean(small - large). It has ends where the gap
  of these seeds differs from 0 at the same level (Fieller 1954).

  Args:
    method: accuracy at the large batch.
    large: of the baseline at the large batch.
    small: of the baseline at the small batch.
    level: that the interval covers R with.
  """
  gain, gap = _gain_and_gap(method, large, small)
  count, value, low, high = len(gain), _ratio(gain, gap), np.nan, np.nan
  if count > 1:
    t = scipy.stats.t.ppf((1 + level) / 2, count - 1)
    # The ends are the roots of a R^2 - 2 b R + c.
    means = np.array([gain.mean(), gap.mean()])
    (c, b), (_, a) = np.outer(means, means) - t**2 * np.cov(gain, gap) / count
    if a > 0:
      half = np.sqrt(max(b**2 - a * c, 0.0)) / a
      low, high = b / a - half, b / a + half
  return Interval(float(value), float(low), float(high), count)


def bootstrapped_recovery(
  method: Values, large: Values, small: Values, level: float = 0.95
) -> Interval:
  """Computes `recovery`, with the percentile bootstrap over seeds.

  A seed keeps its three runs (Efron & Tibshirani 1993, chapter 13). Of few
  seeds it is too narrow: of normal values it covers R at 95 % in about 74 % of
  studies of 3 seeds, 85 % of 5, 88 % of 8 and 93 % of 20.
  """
  gain, gap = _gain_and_gap(method, large, small)
  count, value, low, high = len(gain), _ratio(gain, gap), np.nan, np.nan
  if count > 1 and not np.isnan(value):
    picks = np.random.default_rng(0).integers(count, size=(_RESAMPLES, count))
    tail = 50 * (1 - level)
    ratios = _ratio(gain[picks], gap[picks])
    low, high = np.nanpercentile(ratios, [tail, 100 - tail])
  return Interval(float(value), float(low), float(high), count)


@dataclasses.dataclass(frozen=True)
class Equivalence:
  """Result of `equivalence`.

  Attributes:
    difference: with its 90 % interval.
    margin: that it was tested against.
    p: the larger p-value of the two one-sided tests; nan of one pair or none.
  """

  difference: Interval
  margin: float
  p: float

  @property
  def holds(self) -> bool:
    """Whether the arms are equivalent at 5 %."""
    return self.p < 0.05


def equivalence(a: Values, b: Values, margin: float) -> Equivalence:
  """Tests |mean(a - b)| >= margin by two one-sided paired t tests.

  Rejecting both at 5 % says that the arms differ by less than the margin; the
  90 % interval lies within it then (Schuirmann 1987).

  Args:
    a: values of an arm.
    b: values of the other.
    margin: of equivalence, in the unit of the values, > 0; to be stated before
      the runs.
  """
  found = difference(a, b, level=0.9)
  if found.count < 2:
    return Equivalence(found, margin, np.nan)
  diffs = np.array([a[seed] - b[seed] for seed in _shared(a, b)])
  error = diffs.std(ddof=1) / np.sqrt(len(diffs))
  room = margin - abs(found.value)  # the nearer end decides
  if error == 0:
    return Equivalence(found, margin, 0.0 if room > 0 else 1.0)
  p = scipy.stats.t.sf(room / error, len(diffs) - 1)
  return Equivalence(found, margin, float(p))


def rank_correlation(pairs: Sequence[tuple[float, float]]) -> float:
  """Computes Spearman's correlation; nan where one of the two is constant."""
  columns = np.array(pairs, float).T
  if len(pairs) < 2 or any(len(set(column)) == 1 for column in columns):
    return float('nan')
  return float(scipy.stats.spearmanr(*columns).statistic)


def _shared(*arms: Values) -> list[int]:
  """The seeds that all arms have."""
  return sorted(set.intersection(*(set(arm) for arm in arms)))


def _gain_and_gap(
  method: Values, large: Values, small: Values
) -> tuple[np.ndarray, np.ndarray]:
  """method - large and small - large, of the seeds that all three have."""
  seeds = _shared(method, large, small)
  values = [[arm[seed] for seed in seeds] for arm in (method, large, small)]
  of_method, of_large, of_small = np.array(values, float)
  return of_method - of_large, of_small - of_large


def _ratio(gain: np.ndarray, gap: np.ndarray) -> np.ndarray:
  """Of the means over the last axis; nan of none, and of a gap of 0."""
  if not gap.size:
    return np.array(np.nan)
  gap = gap.mean(-1)
  return gain.mean(-1) / np.where(gap == 0, np.nan, gap)
