"""Metrics of an evaluation: by hand, by SciPy, and in simulation."""

import numpy as np
import pytest
from scipy import stats

from conadv_jax.run import scores
from conadv_jax.run.scores import Outcomes


def outcomes(right, confidence=None, loss=None, usable=None, label=None):
  """Outcomes of N examples of which the first class is right or not."""
  count = len(right)
  right = np.array(right, bool)
  label = np.zeros(count, int) if label is None else np.array(label)
  first = np.stack([label + ~right, label + right], 1)
  return Outcomes(
    label,
    first,
    first == label[:, None],
    np.full(count, 0.5) if confidence is None else np.array(confidence),
    np.ones(count) if loss is None else np.array(loss, float),
    np.full(count, True) if usable is None else np.array(usable),
  )


def test_the_metrics_by_hand():
  made = outcomes([True, False, True, True], loss=[1, 2, 3, 4])
  found = scores.of(made)
  low, high = found.pop('top1_low'), found.pop('top1_high')
  assert found == {'top1': 75.0, 'top5': 100.0, 'loss': 2.5, 'ece': 25.0}
  assert 0 < low < 75 < high < 100
  made = made._replace(usable=np.array([True, True, True, False]))
  found = scores.of(made)
  assert found['top1'] == pytest.approx(200 / 3) and found['loss'] == 2.0
  assert found['bad_examples'] == 1


# ---- Calibration ------------------------------------------------------------


def test_the_calibration_error_by_hand():
  """Two bins: 1/5 + 4/5 of the examples, off by 0.95 and by 0.05."""
  confidence = np.array([0.05, 0.7, 0.7, 0.7, 0.7])
  correct = np.array([True, True, True, True, False])
  assert scores.ece(confidence, correct) == pytest.approx(
    100 * (0.95 / 5 + 0.05 * 4 / 5)
  )
  # Their gaps have opposite signs: in one bin they would cancel.
  confidence, correct = np.array([0.1, 0.9]), np.array([True, False])
  assert scores.ece(confidence, correct) == pytest.approx(90.0)
  # A confidence of 1 is in the last bin, with all that are above 14/15.
  confidence, correct = np.array([1.0, 0.96]), np.array([False, True])
  assert scores.ece(confidence, correct) == pytest.approx(100 * (1 - 0.04) / 2)


def test_the_calibration_error_by_its_definition():
  rng = np.random.default_rng(0)
  confidence = rng.random(1000) ** 0.3
  correct = rng.random(1000) < confidence**2
  expected = 0.0
  for m in range(1, 16):
    inside = ((m - 1) / 15 < confidence) & (confidence <= m / 15)
    if inside.any():
      gap = correct[inside].mean() - confidence[inside].mean()
      expected += inside.mean() * abs(gap)
  assert scores.ece(confidence, correct) == pytest.approx(100 * expected)
  assert expected > 0.1


def test_a_calibrated_network_has_little_error_and_a_diverged_one_none():
  rng = np.random.default_rng(0)
  confidence = rng.random(100_000)
  correct = rng.random(100_000) < confidence
  assert scores.ece(confidence, correct) < 1.0
  assert scores.ece(np.ones(4), np.full(4, True)) == 0.0  # the last bin's edge
  assert np.isnan(scores.ece(np.array([0.5, np.nan]), np.array([True, True])))


# ---- Intervals --------------------------------------------------------------


@pytest.mark.parametrize(
  'correct, count', [(0, 9), (9, 9), (3, 7), (997, 1000)]
)
def test_the_interval_is_wilsons(correct, count):
  expected = stats.binomtest(correct, count).proportion_ci(method='wilson')
  assert scores.interval(correct, count) == pytest.approx(
    (100 * expected.low, 100 * expected.high), abs=1e-9
  )


def test_it_is_the_bootstraps_away_from_the_ends():
  right = np.arange(2000) < 1500
  by_bootstrap = stats.bootstrap(
    (right,), np.mean, n_resamples=4000, method='percentile', rng=0
  ).confidence_interval
  expected = (100 * by_bootstrap.low, 100 * by_bootstrap.high)
  assert scores.interval(1500, 2000) == pytest.approx(expected, abs=0.15)


@pytest.mark.parametrize('p', [0.05, 0.5, 0.9, 0.99, 0.997])
@pytest.mark.parametrize('count', [360, 10_000])
def test_the_interval_covers_in_simulation(p, count):
  """And is not just wide: of 4,000, 94 to 99 % cover."""
  draws = np.random.default_rng(0).binomial(count, p, 4000)
  ends = {int(k): scores.interval(int(k), count) for k in np.unique(draws)}
  covers = [ends[int(k)][0] <= 100 * p <= ends[int(k)][1] for k in draws]
  assert 0.935 < np.mean(covers) < 0.99


# ---- Of several -------------------------------------------------------------


def test_an_example_is_right_if_it_resists_all_attempts():
  tries = [
    outcomes(
      [True, True, False, True], loss=[1, 5, 2, 1], confidence=[0.1] * 4
    ),
    outcomes(
      [True, False, True, True], loss=[3, 4, 9, 0], confidence=[0.2] * 4
    ),
  ]
  worst = scores.worst(tries)
  assert worst.correct.tolist() == [True, False, False, True]
  assert worst.loss.tolist() == [3, 4, 2, 1]
  assert worst.confidence.tolist() == [0.2, 0.2, 0.1, 0.1]
  assert worst.first.shape == (4, 2)


def test_sets_of_labels_judge_the_first_and_drop_those_without():
  made = outcomes([False, False, True, True], label=[0, 0, 1, 1])
  sets = np.zeros((4, 3), bool)
  sets[0, 1] = sets[2, 0] = sets[3, [1, 2]] = True  # of the second, none
  found = scores.by_label_sets(made, sets)
  assert made.first[:, 0].tolist() == [1, 1, 1, 1]
  assert found.correct.tolist() == [True, False, True]
  assert found.right.any(1).tolist() == [True, False, True]
  assert len(found.loss) == 3
