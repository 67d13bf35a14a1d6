"""Intervals: hand cases, and how often they cover in simulation."""

import numpy as np
import pytest

from conadv_jax.study import statistics
from conadv_jax.study.statistics import difference, equivalence, mean, recovery


def by_seed(values):
  return dict(enumerate(map(float, values)))


def test_mean_has_students_interval():
  # t of 2 degrees of freedom at 97.5 % is 4.3027 (any table); s = 1.
  found = mean(by_seed([1, 2, 3]))
  half = 4.3027 / np.sqrt(3)
  assert found.value == 2 and found.count == 3
  assert (found.low, found.high) == pytest.approx((2 - half, 2 + half), 1e-4)


def test_one_value_has_no_interval_and_none_has_no_mean():
  one = mean({3: 5.0})
  assert (one.value, one.count) == (5.0, 1)
  assert np.isnan(one.low) and not one.excludes_zero
  assert np.isnan(mean({}).value)


def test_differences_are_of_shared_seeds():
  found = difference({0: 5.0, 1: 7.0, 9: 100.0}, {0: 4.0, 1: 5.0, 2: 0.0})
  assert (found.value, found.count) == (1.5, 2)


RECOVERIES = pytest.mark.parametrize(
  'recovery', [statistics.recovery, statistics.bootstrapped_recovery]
)


@RECOVERIES
def test_recovery_is_the_share_of_the_gap(recovery):
  large = by_seed([80, 82, 81])
  small = by_seed([82, 84, 83])
  method = by_seed([81, 83, 82])
  found = recovery(method, large, small)
  # Every seed gives back half of its gap: nothing is left to chance.
  assert (found.value, found.low, found.high) == pytest.approx((0.5,) * 3)
  assert found.count == 3


@RECOVERIES
def test_recovery_of_no_gap_is_no_number(recovery):
  found = recovery(by_seed([1, 2]), by_seed([1, 1]), by_seed([1, 1]))
  assert np.isnan(found.value) and np.isnan(found.low)
  assert np.isnan(recovery({0: 1.0}, {1: 1.0}, {0: 2.0}).value)


def test_a_bootstrap_draws_seeds():
  # 1 + 2 of a gap of 2 + 2, from seeds that differ.
  values = by_seed([81, 84]), by_seed([80, 82]), by_seed([82, 84])
  found = statistics.bootstrapped_recovery(*values)
  assert found.value == pytest.approx(0.75)
  assert (found.low, found.high) == pytest.approx((0.5, 1.0))


def test_fiellers_interval_of_a_gap_without_spread_is_students():
  # The interval of the mean of 1, 2 and 3, over a gap of 4.
  large = by_seed([80, 80, 80])
  found = recovery(by_seed([81, 82, 83]), large, by_seed([84, 84, 84]))
  half = 4.3027 / np.sqrt(3)
  ends = ((2 - half) / 4, (2 + half) / 4)
  assert (found.low, found.high) == pytest.approx(ends, 1e-4)


def test_fiellers_interval_ends_where_a_t_test_rejects():
  large = by_seed([80, 82, 81, 80])
  small, method = by_seed([83, 84, 84, 82]), by_seed([81, 84, 82, 81])
  found = recovery(method, large, small)
  assert found.low < found.value < found.high
  for share in (found.low, found.high):
    left = {
      seed: method[seed] - large[seed] - share * (small[seed] - large[seed])
      for seed in large
    }
    of_left = mean(left)
    ends = min(abs(of_left.low), abs(of_left.high))
    assert ends == pytest.approx(0, abs=1e-12)


def test_recovery_of_a_gap_that_may_be_0_has_no_ends():
  large = by_seed([80, 82, 81])
  small, method = by_seed([80.5, 81, 83]), by_seed([81, 83, 82])
  assert not difference(small, large).excludes_zero
  found = recovery(method, large, small)
  assert found.value > 0 and np.isnan(found.low) and np.isnan(found.high)


def simulated(count, pairs, shift, seed=0):
  """{seed: value} of two arms whose difference is normal: sd 1, mean shift."""
  draw = np.random.default_rng(seed)
  for _ in range(count):
    common = draw.normal(0, 5, pairs)
    yield (
      by_seed(common + draw.normal(shift, 1, pairs)),
      by_seed(common),
    )


def test_intervals_of_differences_cover_at_their_level():
  covered = [
    f.low <= 0.3 <= f.high
    for f in (difference(a, b) for a, b in simulated(4000, 8, 0.3))
  ]
  # 95 % +- 3 standard errors of 4,000 draws.
  assert 100 * np.mean(covered) == pytest.approx(95, abs=1.04)


@pytest.mark.parametrize(
  ('recovery', 'seeds', 'expected'),
  [
    *((statistics.recovery, seeds, 95) for seeds in (3, 5, 8)),
    (statistics.bootstrapped_recovery, 3, 74),
    (statistics.bootstrapped_recovery, 8, 88),
  ],
)
def test_intervals_of_recovery_cover_as_often_as_they_say(
  recovery, seeds, expected, monkeypatch
):
  """With the spread over seeds of the study of Fashion-MNIST."""
  monkeypatch.setattr(statistics, '_RESAMPLES', 300)
  draw = np.random.default_rng(1)
  covered = []
  for _ in range(1000):
    large, method, small = draw.normal(0, (0.25, 0.2, 0.1), (seeds, 3)).T
    found = recovery(
      by_seed(method + 0.6), by_seed(large), by_seed(small + 1.2)
    )
    # Where there are no ends, no value is left out.
    covered.append(not (found.low > 0.5 or found.high < 0.5))
  spread = np.sqrt(expected * (100 - expected) / 1000)
  assert 100 * np.mean(covered) == pytest.approx(expected, abs=3 * spread + 1)


@pytest.mark.parametrize('shift', [-0.8, 0.8])
def test_equivalence_has_its_size_at_the_margin(shift):
  """At a true difference of the margin it may hold in 5 % of all studies."""
  held = [
    equivalence(a, b, 0.8).holds for a, b in simulated(4000, 8, shift, seed=2)
  ]
  assert 100 * np.mean(held) == pytest.approx(5, abs=1.04)


def test_equivalence_is_shown_where_the_90_percent_interval_is_inside():
  for a, b in simulated(200, 6, 0.2, seed=3):
    found = equivalence(a, b, 1.0)
    inside = -1 < found.difference.low and found.difference.high < 1
    assert found.holds == inside


def test_equal_arms_are_equivalent_and_one_pair_shows_nothing():
  same = by_seed([1, 2, 3])
  assert equivalence(same, same, 0.1).p == 0
  assert equivalence(same, by_seed([2, 3, 4]), 0.5).p == 1
  one = equivalence({0: 1.0}, {0: 1.0}, 0.5)
  assert np.isnan(one.p) and not one.holds


def test_rank_correlation_sees_order_only():
  pairs = [(1, 10), (2, 100), (3, 1000), (4, 5)]
  # Ranks 1 2 3 4 and 2 3 4 1: 1 - 6 * (1 + 1 + 1 + 9) / (4 * 15).
  assert statistics.rank_correlation(pairs) == pytest.approx(-0.2)
  assert np.isnan(statistics.rank_correlation([(1, 2), (1, 3)]))
  assert np.isnan(statistics.rank_correlation([]))
