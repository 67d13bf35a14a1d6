"""The order of examples is a pure function of (seed, step)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conadv_jax.base.errors import ConfigError
from conadv_jax.data import sampler

SEEDS = st.integers(0, 2**63 - 1)
STEPS = st.integers(0, 2**40)


def stream(seed, start, num_steps, batch_size, num_examples):
  batches = [
    sampler.example_ids(seed, step, batch_size, num_examples)
    for step in range(start, start + num_steps)
  ]
  ids, epochs = zip(*batches, strict=True)
  return np.concatenate(ids), np.concatenate(epochs)


@settings(deadline=None)
@given(SEEDS, STEPS, st.integers(1, 90), st.integers(1, 60))
def test_each_id_is_seen_once_per_epoch(seed, start, batch_size, num_examples):
  num_steps = -(-4 * num_examples // batch_size)
  ids, epochs = stream(seed, start, num_steps, batch_size, num_examples)
  assert ids.dtype == epochs.dtype == np.int64
  assert (np.diff(epochs) >= 0).all()
  whole = [e for e in np.unique(epochs) if (epochs == e).sum() == num_examples]
  assert len(whole) >= 3
  for epoch in whole:
    assert sorted(ids[epochs == epoch]) == list(range(num_examples))


@settings(deadline=None)
@given(SEEDS, STEPS, st.integers(1, 90), st.integers(1, 60))
def test_the_epoch_counts_positions(seed, step, batch_size, num_examples):
  _, epochs = sampler.example_ids(seed, step, batch_size, num_examples)
  expected = [
    (step * batch_size + i) // num_examples for i in range(batch_size)
  ]
  assert epochs.tolist() == expected


@settings(deadline=None)
@given(SEEDS, st.integers(0, 50), st.integers(1, 12), st.integers(1, 60))
def test_the_order_does_not_depend_on_the_batch_size(
  seed, step, batch_size, num_examples
):
  ids, _ = sampler.example_ids(seed, step, batch_size, num_examples)
  one_by_one, _ = stream(seed, step * batch_size, batch_size, 1, num_examples)
  assert ids.tolist() == one_by_one.tolist()


@settings(deadline=None)
@given(SEEDS, st.integers(0, 2**30))
def test_seeds_and_epochs_have_orders_of_their_own(seed, epoch):
  def order(seed, epoch):
    return sampler.example_ids(seed, epoch, 64, 64)[0].tolist()

  other = (seed + 1) % 2**63
  orders = [order(seed, epoch), order(seed, epoch + 1), order(other, epoch)]
  assert len({tuple(order) for order in orders}) == 3


def test_every_place_is_equally_likely():
  orders = np.stack(
    [sampler.example_ids(7, epoch, 5, 5)[0] for epoch in range(5000)]
  )
  counts = np.stack([np.bincount(column, minlength=5) for column in orders.T])
  # Mean 1000, standard deviation 28 each.
  assert np.abs(counts - 1000).max() < 150


def test_a_batch_may_hold_many_epochs():
  ids, epochs = sampler.example_ids(3, 5, 100, 7)
  assert epochs[0] == 500 // 7
  assert epochs[-1] == 599 // 7
  assert np.bincount(ids, minlength=7).min() >= 14


def test_late_steps_are_exact():
  step, batch_size, num_examples = 2**40, 98_304, 1_000
  ids, epochs = sampler.example_ids(1, step, batch_size, num_examples)
  assert epochs[0] == step * batch_size // num_examples
  assert epochs[-1] == (step * batch_size + batch_size - 1) // num_examples
  assert ids.min() == 0
  assert ids.max() == num_examples - 1


def test_golden_order():
  """Fails if a NumPy release changes the order: old runs cannot resume then."""
  ids, epochs = sampler.example_ids(42, 1, 12, 10)
  assert epochs.tolist() == [1] * 8 + [2] * 4
  assert ids.tolist() == [5, 3, 0, 2, 7, 1, 6, 8, 9, 6, 0, 7]


def test_a_caller_cannot_change_the_cached_order():
  ids, _ = sampler.example_ids(0, 0, 10, 10)
  before = ids.tolist()
  ids[:] = 0
  assert sampler.example_ids(0, 0, 10, 10)[0].tolist() == before


@pytest.mark.parametrize(
  ('name', 'arguments'),
  [
    ('seed=-1', (-1, 0, 1, 1)),
    ('seed=9223372036854775808', (2**63, 0, 1, 1)),
    ('step=-1', (0, -1, 1, 1)),
    ('batch_size=0', (0, 0, 0, 1)),
    ('num_examples=0', (0, 0, 1, 0)),
  ],
)
def test_arguments_out_of_range_are_named(name, arguments):
  with pytest.raises(ConfigError, match=name):
    sampler.example_ids(*arguments)
