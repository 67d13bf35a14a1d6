"""Streams of TFRecord files: windows, memory, and what damage does."""

import gc
import itertools
import time
import weakref

import numpy as np
import pytest
import record_files
import tensorflow as tf
from record_files import LENGTHS, RECORDS, flip, write, write_tfrecord

from conadv_jax.base.errors import ConfigError, StorageError
from conadv_jax.data.sources import records, tfrecord, window_order

tf_paths, no_delay = record_files.tf_paths, record_files.no_delay


def take(source, count, *arguments):
  dataset = source.stream(*arguments).take(count)
  return [
    (int(e['id']), int(e['epoch']), e['record'])
    for e in dataset.as_numpy_iterator()
  ]


@pytest.mark.parametrize('window_shards', [1, 2, 8])
@pytest.mark.parametrize(('host', 'num_hosts'), [(0, 1), (1, 3)])
def test_a_stream_yields_its_windows(
  tf_paths, window_shards, host, num_hosts, monkeypatch
):
  monkeypatch.setattr(tfrecord, '_CHUNK', 4)
  source = tfrecord.TfRecords(tf_paths, LENGTHS, window_shards=window_shards)
  for start in (0, 1, 5, 19, 40):
    arguments = (5, host, num_hosts, start)
    expected = []
    for window, skip in window_order.stream(
      source.lengths, *arguments[:-1], window_shards, start
    ):
      ids = window.ids()[skip:].tolist()
      expected += [(i, window.epoch, RECORDS[i]) for i in ids]
      if len(expected) >= 45:
        break
    assert take(source, 45, *arguments) == expected[:45]


def count_loads(source, monkeypatch):
  loads = []
  load = source._load
  monkeypatch.setattr(
    source, '_load', lambda shard: [loads.append(shard), load(shard)][1]
  )
  return loads


def test_a_late_start_reads_its_window_and_the_next_one(tf_paths, monkeypatch):
  source = tfrecord.TfRecords(tf_paths, LENGTHS, window_shards=1)
  loads = count_loads(source, monkeypatch)
  start = 19 * 1000 + 6
  # The generator itself: TensorFlow asks for a chunk or two ahead of time.
  chunks = source._chunks(0, 0, 1, start)
  next(chunks)
  windows = window_order.stream(source.lengths, 0, 0, 1, 1, start)
  expected = [w.shards[0] for w, _ in itertools.islice(windows, 2)]
  deadline = time.monotonic() + 10  # the next one is read by another thread
  while len(loads) < 2 and time.monotonic() < deadline:
    time.sleep(0.01)
  assert loads == expected


@pytest.fixture
def alive(monkeypatch):
  """The files whose contents are in memory."""
  found = weakref.WeakSet()

  class Shard(tfrecord._Shard):
    def __init__(self, *arguments):
      found.add(self)
      super().__init__(*arguments)

  monkeypatch.setattr(tfrecord, '_Shard', Shard)
  return found


def test_two_windows_are_in_memory_at_most(tf_paths, alive, monkeypatch):
  source = tfrecord.TfRecords(tf_paths, LENGTHS, window_shards=1)
  peak = []
  load = source._load

  def counting_load(shard):
    contents = load(shard)
    peak.append(len(alive))
    return contents

  monkeypatch.setattr(source, '_load', counting_load)
  take(source, 100, 0, 0, 1)
  assert max(peak) == 2


def test_a_dropped_stream_lets_go_of_its_windows(tf_paths, alive):
  source = tfrecord.TfRecords(tf_paths, LENGTHS)
  iterator = source.stream(0, 0, 1).as_numpy_iterator()
  next(iterator)
  assert len(alive) >= 4
  del iterator
  gc.collect()
  deadline = time.monotonic() + 10  # tensorflow closes it in a thread.
  while alive and time.monotonic() < deadline:
    time.sleep(0.01)
  assert not alive


def test_a_bad_checksum_in_a_stream_loses_one_record(tmp_path):
  paths, lengths = write(tmp_path, 'tfrecord')
  flip(paths[0], paths[0].read_bytes().index(RECORDS[2]))
  source = tfrecord.TfRecords(paths, lengths)
  found = {i: record for i, _, record in take(source, 19, 0, 0, 1)}
  assert found == dict(enumerate(RECORDS)) | {2: b''}
  assert source.describe(2).endswith('record 2')
  assert 'the checksum' in source.why_unreadable(2)


def header(path, record):
  """Where the header of a record is."""
  return path.read_bytes().index(record) - 12


def flipped_length(path):
  flip(path, header(path, RECORDS[10]))


def flipped_length_crc(path):
  flip(path, header(path, RECORDS[10]) + 9)


def cut_at_a_boundary(path):
  path.write_bytes(path.read_bytes()[: header(path, RECORDS[14 - 2])])


def cut_in_a_header(path):
  path.write_bytes(path.read_bytes()[: header(path, RECORDS[10]) + 5])


def cut_in_a_record(path):
  path.write_bytes(path.read_bytes()[: header(path, RECORDS[10]) + 30])


def cut_in_the_last_crc(path):
  path.write_bytes(path.read_bytes()[:-1])


def extra_record(path):
  write_tfrecord(path, RECORDS[8:16])


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (flipped_length, 'record 2 of the 7 .* has a damaged length'),
    (flipped_length_crc, 'record 2 of the 7 .* has a damaged length'),
    (cut_at_a_boundary, 'holds 4 records, but .* records 7 records'),
    (cut_in_a_header, 'record 2 of the 7 .* is cut off'),
    (cut_in_a_record, 'record 2 of the 7 .* is cut off'),
    (cut_in_the_last_crc, 'record 6 of the 7 .* is cut off'),
    (extra_record, 'holds 8 records, but .* records 7 records'),
  ],
)
def test_a_tfrecord_file_that_lost_records_stops_the_run(
  tmp_path, change, message
):
  paths, lengths = write(tmp_path, 'tfrecord')
  change(paths[3])
  source = tfrecord.TfRecords(paths, lengths, window_shards=1)
  with pytest.raises(ConfigError, match=message) as error:
    source.fetch(np.array([8]))
  assert str(paths[3]) in str(error.value)
  assert 'copy that file again' in str(error.value)
  assert source.fetch(np.array([0, 18])) == [RECORDS[0], RECORDS[18]]
  assert source.failure is None
  with pytest.raises(tf.errors.OpError, match='ConfigError'):
    take(source, 19, 0, 0, 1)
  assert isinstance(source.failure, ConfigError)
  assert str(source.failure) == str(error.value)


def test_a_file_that_vanishes_during_a_run_stops_it(tmp_path):
  paths, lengths = write(tmp_path, 'tfrecord')
  source = tfrecord.TfRecords(paths, lengths)
  paths[3].unlink()
  with pytest.raises(tf.errors.OpError):
    take(source, 19, 0, 0, 1)
  assert isinstance(source.failure, FileNotFoundError)


@pytest.mark.parametrize(
  'error', [OSError(5, 'Input/output error'), 'unavailable']
)
def test_failing_storage_is_asked_again(tf_paths, monkeypatch, no_delay, error):
  if error == 'unavailable':  # What remote filesystems of tensorflow raise.
    error = tf.errors.UnavailableError(None, None, 'try again')
  source = tfrecord.TfRecords(tf_paths, LENGTHS, cached_shards=1)
  calls = []

  def opened(path, mode):
    calls.append(path)
    if len(calls) < failures + 1:
      raise error
    return open(path, mode)

  monkeypatch.setattr(records, 'open', opened, raising=False)
  failures = 4
  assert source.fetch(np.array([0])) == [RECORDS[0]]
  assert len(calls) == 5
  calls.clear()
  failures = 5
  with pytest.raises(StorageError, match='output error|try again'):
    source.fetch(np.array([18]))
  # Nor does the stream end early; several threads read for it.
  calls.clear()
  failures = 10**6
  with pytest.raises(tf.errors.OpError):
    take(source, 19, 0, 0, 1)
  assert isinstance(source.failure, StorageError)
