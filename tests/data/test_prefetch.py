"""Batches are handed over ahead of their use, all of them or an error."""

import time

import pytest

from conadv_jax.data.prefetch import Prefetcher


@pytest.mark.parametrize('depth', [0, 1, 2, 5])
def test_prefetcher_keeps_depth_batches_ahead(depth):
  put = []

  def transfer(batch):
    put.append(batch)
    return batch * 10

  prefetcher = Prefetcher(iter(range(8)), transfer, depth)
  assert put == []
  for i, batch in enumerate(prefetcher):
    assert batch == i * 10
    assert put == list(range(min(i + 1 + depth, 8)))
  assert i == 7


def test_prefetcher_names_the_step_at_which_input_ended():
  prefetcher = Prefetcher(iter('ab'), str.upper, expected=5, start_step=10)
  # What there is comes first: the error is for the batch that is missing.
  assert [next(prefetcher), next(prefetcher)] == ['A', 'B']
  for _ in range(2):
    with pytest.raises(
      RuntimeError,
      match='input ended at step 12: needed 5 batches from step 10, got 2',
    ):
      next(prefetcher)


def test_prefetcher_stops_after_the_expected_batches():
  batches = iter(range(10))
  prefetcher = Prefetcher(batches, lambda x: x, expected=3)
  assert list(prefetcher) == [0, 1, 2]
  assert next(batches) == 3


def test_prefetcher_counts_the_time_blocked_on_the_host():
  def slow():
    for i in range(3):
      time.sleep(0.05)
      yield i

  prefetcher = Prefetcher(slow(), lambda x: x)
  assert prefetcher.wait_seconds == 0
  assert next(prefetcher) == 0
  assert 0.15 <= prefetcher.wait_seconds < 1
  waited = prefetcher.wait_seconds
  time.sleep(0.2)
  assert list(prefetcher) == [1, 2]
  assert prefetcher.wait_seconds - waited < 0.1


def test_prefetcher_passes_errors_on():
  def failing():
    yield 1
    raise OSError('disk')

  prefetcher = Prefetcher(failing(), lambda x: x, 1, expected=5)
  assert next(prefetcher) == 1
  for _ in range(2):
    with pytest.raises(OSError, match='disk'):
      next(prefetcher)


@pytest.mark.parametrize('fails', ['the batches', 'put'])
def test_prefetcher_knows_of_a_failure_while_it_has_batches(fails):
  def check(i, where):
    if (i, where) == (3, fails):
      raise OSError('disk')
    return i

  batches = (check(i, 'the batches') for i in range(9))
  prefetcher = Prefetcher(batches, lambda i: check(i, 'put'), 2)
  assert next(prefetcher) == 0 and prefetcher.failure is None
  assert next(prefetcher) == 1 and str(prefetcher.failure) == 'disk'
  assert next(prefetcher) == 2
  with pytest.raises(OSError, match='disk'):
    next(prefetcher)


def test_prefetcher_refuses_a_negative_depth():
  with pytest.raises(ValueError, match='depth=-1'):
    Prefetcher(iter([]), lambda x: x, -1)
