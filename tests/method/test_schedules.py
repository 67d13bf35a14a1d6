"""Learning rates at the knots, by hand."""

import dataclasses

import jax
import numpy as np
import pytest

from conadv_jax.config import Optimizer, Schedule, Steps
from conadv_jax.method.schedules import SCHEDULES, make_schedule

PEAK = 4.0
POLYNOMIAL = Schedule(
  name='polynomial',
  warmup_epochs=0.0,
  power=2.0,
  end_learning_rate=0.0,
  decay_rate=0.5,
  decay_epochs=1.0,
)


def rates(steps_of, warmup=10, total=110, decay=30, **changes):
  """Learning rates of the optimizer updates `steps_of`."""
  schedule = make_schedule(
    dataclasses.replace(POLYNOMIAL, **changes),
    Steps(total=total, stop=total, warmup=warmup, decay=decay, per_epoch=1.0),
    PEAK,
  )
  # int64 counts, for float64: 1 - k / D cancels near the end.
  with jax.enable_x64(True):
    return np.asarray(jax.jit(jax.vmap(schedule))(np.array(steps_of)))


@pytest.mark.parametrize('name', SCHEDULES)
def test_a_config_accepts_every_schedule_of_the_table(name):
  assert dataclasses.replace(POLYNOMIAL, name=name).name == name


def test_warmup_is_linear_from_zero_to_the_peak():
  for name in SCHEDULES:
    actual = rates([0, 1, 5, 9, 10], name=name)
    np.testing.assert_allclose(actual, [0, 0.4, 2.0, 3.6, 4.0], 1e-6)


@pytest.mark.parametrize(
  'power, end, expected',
  [
    # 60: half of the decay is left; 109, the last update: a hundredth.
    (2.0, 0.0, [4.0, 1.0, 4e-4]),
    (2.0, 0.5, [4.0, 0.5 + 3.5 / 4, 0.5 + 3.5e-4]),
    (1.0, 0.0, [4.0, 2.0, 0.04]),
    # 0.5 ** 1.6 = 0.329876978, 0.01 ** 1.6 = 6.30957344e-4
    (1.6, 0.0, [4.0, 1.31950791, 2.52382937e-3]),
    (1.6, 1e-4, [4.0, 1.31957492, 2.62376628e-3]),
  ],
)
def test_polynomial_knots(power, end, expected):
  actual = rates([10, 60, 109], power=power, end_learning_rate=end)
  np.testing.assert_allclose(actual, expected, 1e-6)


@pytest.mark.parametrize('power', [1.6, 2.0])
@pytest.mark.parametrize('total', [10, 100, 1173])
def test_polynomial_ends_at_its_end_in_float32(power, total):
  # No update of a run has this rate, but a restored run may ask for it. Where
  # rounding makes 1 - D / D negative, a power of it is not a number.
  schedule = make_schedule(
    dataclasses.replace(POLYNOMIAL, power=power, end_learning_rate=0.5),
    Steps(total=total, stop=total, warmup=0, decay=1, per_epoch=1.0),
    PEAK,
  )
  after = np.array([total, total + 1], np.int32)
  actual = jax.jit(jax.vmap(schedule))(after)
  np.testing.assert_allclose(actual, [0.5, 0.5], 1e-6)


@pytest.mark.parametrize(
  'end, expected',
  [
    # cos at 0, 45, 90 and 180 degrees
    (0.0, [4.0, 3.41421356, 2.0, 0.0]),
    (1.0, [4.0, 3.56066017, 2.5, 1.0]),
  ],
)
def test_cosine_knots(end, expected):
  actual = rates([10, 35, 60, 110], name='cosine', end_learning_rate=end)
  np.testing.assert_allclose(actual, expected, 1e-6, 1e-12)


def test_exponential_is_a_staircase_counted_from_the_end_of_the_warmup():
  actual = rates([10, 39, 40, 69, 70, 99, 100, 109], name='exponential')
  np.testing.assert_allclose(actual, [4, 4, 2, 2, 1, 1, 0.5, 0.5], 1e-6)


@pytest.mark.parametrize(
  'name, expected',
  [
    ('polynomial', [4.0, 1.0, 4e-4]),
    ('cosine', [4.0, 2.0, 4 * np.sin(np.pi / 200) ** 2]),
    ('exponential', [4.0, 2.0, 0.5]),
  ],
)
def test_without_warmup_the_first_update_has_the_peak(name, expected):
  actual = rates([0, 50, 99], warmup=0, total=100, name=name)
  np.testing.assert_allclose(actual, expected, 1e-6, 1e-12)


@pytest.mark.parametrize('name', SCHEDULES)
def test_warmup_may_last_for_the_whole_run(name):
  actual = rates([0, 5, 9], warmup=10, total=10, name=name)
  np.testing.assert_allclose(actual, [0.0, 2.0, 3.6], 1e-6)


@pytest.mark.parametrize('name', SCHEDULES)
@pytest.mark.parametrize('warmup', [0, 1, 10])
def test_rates_rise_to_the_peak_once_and_never_again(name, warmup):
  actual = rates(range(110), name=name, warmup=warmup)
  assert actual.argmax() == warmup and actual.max() == PEAK
  assert (np.diff(actual[:warmup]) > 0).all()
  assert (np.diff(actual[warmup:]) <= 0).all()
  assert (actual >= 0).all()


@pytest.mark.parametrize(
  'scaling, batch_size, expected',
  [
    ('none', 1024, 4.0),
    ('linear', 1024, 16.0),
    ('sqrt', 1024, 8.0),
    ('linear', 256, 4.0),
    ('sqrt', 64, 2.0),
  ],
)
def test_peak_learning_rate(scaling, batch_size, expected):
  optimizer = Optimizer(
    name='lars',
    learning_rate=4.0,
    base_batch_size=256,
    scaling=scaling,
    momentum=0.9,
    nesterov=False,
    weight_decay=0.0,
    lars_denominator='norm_of_sum',
    trust_coefficient=0.001,
    beta1=0.9,
    beta2=0.999,
    decay=0.9,
    eps=0.0,
  )
  assert optimizer.peak_learning_rate(batch_size) == pytest.approx(expected)
