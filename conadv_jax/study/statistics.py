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
  interval is the percentile bootstrap over seeds, which keeps the three runs of
  a seed together (Efron & Tibshirani 1993, chapter 13). It means nothing where
  the gap may be 0.

  Args:
    method: accuracy at the large batch.
    large: of the baseline at the large batch.
    small: of the baseline at the small batch.
    level: of the interval.
  """
  seeds = _shared(method, large, small)
  if not seeds:
    return Interval(np.nan, np.nan, np.nan, 0)
  gain = np.array([method[seed] - large[seed] for seed in seeds])
  gap = np.array([small[seed] - large[seed] for seed in seeds])
  value, low, high = _ratio(gain, gap), np.nan, np.nan
  if len(seeds) > 1 and not np.isnan(value):
    picks = np.random.default_rng(0).integers(
      len(seeds), size=(_RESAMPLES, len(seeds))
    )
    ratios = _ratio(gain[picks], gap[picks])
    tail = 50 * (1 - level)
    low, high = np.nanpercentile(ratios, [tail, 100 - tail])
  return Interval(float(value), float(low), float(high), len(seeds))


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


def _ratio(gain: np.ndarray, gap: np.ndarray) -> np.ndarray:
  """Of the means over the last axis; nan where the gap is 0."""
  gap = gap.mean(-1)
  return gain.mean(-1) / np.where(gap == 0, np.nan, gap)
