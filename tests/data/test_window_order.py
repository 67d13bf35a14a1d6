"""The order in which the records of TFRecord files are read."""

import numpy as np
import pytest
import record_files
from hypothesis import given, settings
from hypothesis import strategies as st
from record_files import LENGTHS

from conadv_jax.base.errors import ConfigError
from conadv_jax.data.sources import tfrecord, window_order

tf_paths = record_files.tf_paths
SHARDS = st.lists(st.integers(0, 9), min_size=1, max_size=9).filter(any)
SEEDS = st.integers(0, 2**63 - 1)


@settings(deadline=None)
@given(SHARDS, SEEDS, st.integers(0, 2**40), st.data())
def test_each_id_is_read_once_per_epoch_over_all_hosts(
  lengths, seed, epoch, data
):
  lengths = np.array(lengths)
  num_examples = lengths.sum()
  num_hosts = data.draw(st.integers(1, min(int(num_examples), 9)))
  window_shards = data.draw(st.integers(1, 4))
  seen = []
  for host in range(num_hosts):
    windows = window_order.windows(
      lengths, seed, epoch, host, num_hosts, window_shards
    )
    ids = np.concatenate([window.ids() for window in windows])
    share = num_examples // num_hosts + (host < num_examples % num_hosts)
    assert len(ids) == share
    seen.extend(ids)
    for window in windows:
      assert 1 <= len(window.shards) <= window_shards
      shards = np.searchsorted(np.cumsum(lengths), window.ids(), side='right')
      assert set(shards) == set(window.shards)
  assert sorted(seen) == list(range(num_examples))


@settings(deadline=None)
@given(SHARDS, SEEDS, st.integers(0, 200), st.data())
def test_a_stream_may_start_at_any_record(lengths, seed, start, data):
  lengths = np.array(lengths)
  num_hosts = data.draw(st.integers(1, min(int(lengths.sum()), 5)))
  host = data.draw(st.integers(0, num_hosts - 1))

  def ids(start, count):
    output = []
    for window, skip in window_order.stream(
      lengths, seed, host, num_hosts, 2, start
    ):
      output.extend((i, window.epoch) for i in window.ids()[skip:])
      if len(output) >= count:
        return output[:count]

  assert ids(start, 40) == ids(0, start + 40)[start:]


def test_late_records_are_found_at_once():
  lengths = np.full(1024, 1251)
  window, skip = next(window_order.stream(lengths, 1, 3, 64, 8, 2**40))
  share = 1024 * 1251 // 64
  assert window.epoch == 2**40 // share
  assert 0 <= skip < window.num_records <= 8 * 1251


def test_windows_have_about_the_same_number_of_files():
  lengths = np.full(1024, 1251)
  for host in range(0, 60, 7):
    windows = window_order.windows(lengths, 0, 0, host, 60, 8)
    sizes = [len(window.shards) for window in windows]
    assert max(sizes) - min(sizes) <= 1
    assert len(sizes) == 3


def test_orders_differ_by_seed_epoch_and_window():
  lengths = np.full(8, 30)

  def order(seed, epoch):
    windows = window_order.windows(lengths, seed, epoch, 0, 1, 1)
    shuffles = [tuple(window.ids() - window.ids().min()) for window in windows]
    assert len(set(shuffles)) == 8
    return tuple(np.concatenate([window.ids() for window in windows]))

  assert len({order(s, e) for s in (0, 1, 2**63 - 1) for e in (0, 1)}) == 6


def test_every_file_is_equally_likely_to_come_first_and_last():
  lengths = np.full(5, 2)
  ids = np.stack(
    [
      np.concatenate(
        [w.ids() for w in window_order.windows(lengths, 7, epoch, 0, 1, 1)]
      )
      for epoch in range(4000)
    ]
  )
  for place in (0, 3, 9):
    counts = np.bincount(ids[:, place], minlength=10)
    # Mean 400, standard deviation 19 each.
    assert np.abs(counts - 400).max() < 100


def test_golden_order():
  """Fails if a NumPy release changes the order: old runs cannot resume then."""
  windows = window_order.windows(np.array(LENGTHS), 42, 1, 0, 1, 2)
  assert [window.shards.tolist() for window in windows] == [[4, 3], [0, 1]]
  assert [window.ids().tolist() for window in windows] == [
    [17, 12, 14, 13, 18, 8, 11, 9, 10, 16, 15],
    [5, 6, 2, 1, 4, 3, 7, 0],
  ]


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'seed': -1}, 'seed=-1'),
    ({'seed': 2**63}, 'seed=9223372036854775808'),
    ({'host': 2}, r'host=2: must be in \[0, 2\)'),
    ({'host': -1}, 'host=-1'),
    ({'num_hosts': 20}, 'at most the 19 records'),
    ({'start_record': -1}, 'start_record=-1'),
  ],
)
def test_arguments_out_of_range_are_named(tf_paths, change, message):
  source = tfrecord.TfRecords(tf_paths, LENGTHS)
  arguments = {'seed': 0, 'host': 0, 'num_hosts': 2, 'start_record': 0}
  with pytest.raises(ConfigError, match=message):
    source.stream(**arguments | change)


def test_a_window_needs_a_file(tf_paths):
  source = tfrecord.TfRecords(tf_paths, LENGTHS, window_shards=0)
  with pytest.raises(ConfigError, match='window_shards=0'):
    source.stream(0, 0, 1)
