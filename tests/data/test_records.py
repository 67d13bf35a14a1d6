"""Record files: what is read, in which order, and what damage does."""

import contextlib
import gc
import http.server
import itertools
import os
import pathlib
import subprocess
import sys
import threading
import time
import urllib.parse
import weakref

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from hypothesis import given, settings
from hypothesis import strategies as st

from conadv_jax.base import storage
from conadv_jax.base.errors import ConfigError, StorageError
from conadv_jax.data.sources import (
  array_record,
  records,
  tfrecord,
  window_order,
)
from scripts import make_fake_imagenet

LENGTHS = (5, 3, 0, 7, 4)


def contents(number):
  """A record of some length; zeros at its end must survive."""
  size = 40 + number * 7919 % 60
  return np.random.RandomState(number).bytes(size) + b'\0' * (number % 3)


RECORDS = [contents(number) for number in range(sum(LENGTHS))]


def write_tfrecord(path, data):
  with tf.io.TFRecordWriter(str(path)) as writer:
    for record in data:
      writer.write(record)


def write_array_record(path, data):
  writer = array_record_module.ArrayRecordWriter(str(path), 'group_size:1')
  for record in data:
    writer.write(record)
  writer.close()


FORMATS = {
  'tfrecord': (tfrecord.TfRecords, write_tfrecord),
  'array_record': (array_record.ArrayRecords, write_array_record),
}


def write(directory, name, lengths=LENGTHS):
  """Files of `RECORDS`; (paths, lengths)."""
  paths, stops = [], np.cumsum(lengths).tolist()
  for shard, (length, stop) in enumerate(zip(lengths, stops, strict=True)):
    paths.append(directory / f'x.{name}-{shard:05d}-of-{len(lengths):05d}')
    FORMATS[name][1](paths[-1], RECORDS[stop - length : stop])
  return paths, list(lengths)


@pytest.fixture(scope='module', params=FORMATS)
def files(request, tmp_path_factory):
  """(format, paths, lengths), not to be changed."""
  directory = tmp_path_factory.mktemp(request.param)
  return request.param, *write(directory, request.param)


@pytest.fixture(scope='module')
def tf_paths(tmp_path_factory):
  return write(tmp_path_factory.mktemp('tfrecord'), 'tfrecord')[0]


@pytest.fixture
def no_delay(monkeypatch):
  monkeypatch.setattr(storage, '_sleep', lambda seconds: None)


def open_files(files, **kwargs):
  name, paths, lengths = files
  return FORMATS[name][0](paths, lengths, **kwargs)


# What both formats do.


def test_fetch_returns_each_record(files):
  source = open_files(files)
  assert source.num_examples == len(RECORDS)
  ids = np.array([18, 0, 4, 5, 7, 8, 8, 14, 15])
  assert source.fetch(ids) == [RECORDS[i] for i in ids]
  assert source.fetch(np.arange(19)) == RECORDS
  assert source.fetch(np.array([], np.int64)) == []


def test_nbytes_is_the_size_of_the_files(files):
  _, paths, _ = files
  size = sum(path.stat().st_size for path in paths)
  assert open_files(files).nbytes == size
  assert size > sum(len(record) for record in RECORDS)


def test_describe_names_file_and_place(files):
  source = open_files(files)
  _, paths, _ = files
  assert source.describe(7) == f'{paths[1]}, record 2'
  assert source.describe(8) == f'{paths[3]}, record 0'


@pytest.mark.parametrize('example_id', [-1, 19])
def test_ids_out_of_range_are_refused(files, example_id):
  with pytest.raises(IndexError, match=r'must be in \[0, 19\)'):
    open_files(files).fetch(np.array([0, example_id]))


def test_threads_read_the_same_bytes(files):
  kwargs = {
    'tfrecord': {'cached_shards': 2},
    'array_record': {'max_open_files': 2, 'num_threads': 3},
  }[files[0]]
  source = open_files(files, **kwargs)
  ids = np.random.RandomState(0).randint(19, size=(8, 50, 5))
  wrong = []

  def run(thread):
    for row in ids[thread]:
      if source.fetch(row) != [RECORDS[i] for i in row]:
        wrong.append(row)

  threads = [threading.Thread(target=run, args=(i,)) for i in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert wrong == []


@pytest.mark.parametrize('name', FORMATS)
def test_the_fake_imagenet_is_parsed_to_images_and_labels(name, tmp_path):
  directory = make_fake_imagenet.prepare(
    str(tmp_path), name, num_train=20, num_eval=8, num_shards=3
  )
  split = tfds.builder_from_directory(directory).info.splits['train']
  source = FORMATS[name][0](split.filepaths, split.shard_lengths)

  def example(example_id):
    record = tf.numpy_function(
      lambda i: source.fetch(np.array([i]))[0], [example_id], tf.string
    )
    return source.parse(tf.ensure_shape(record, []), example_id)

  dataset = tf.data.Dataset.range(20).map(example)
  found = sorted((y, x) for x, y in dataset.as_numpy_iterator())
  synsets = make_fake_imagenet.synsets()
  assert found == sorted(
    (synsets.index(synset), data)
    for _, synset, data in make_fake_imagenet._images('train', 20, 0)
  )
  assert found[0][0].dtype == np.int32


@pytest.mark.parametrize(
  'record', [b'', tf.train.Example().SerializeToString()], ids=['b""', 'bare']
)
def test_a_record_without_image_and_label_is_empty(files, record):
  data, label = open_files(files).parse(tf.constant(record), tf.constant(0))
  assert (data.numpy(), label.numpy()) == (b'', -1)


@pytest.mark.parametrize('name', FORMATS)
def test_a_damaged_record_is_empty_and_the_others_survive(name, tmp_path):
  paths, lengths = write(tmp_path, name)
  flip(paths[3], paths[3].read_bytes().index(RECORDS[10][:20]) + 5)
  source = open_files((name, paths, lengths))
  expected = [b'' if i == 10 else record for i, record in enumerate(RECORDS)]
  assert source.fetch(np.arange(19)) == expected
  assert source.fetch(np.array([10])) == [b'']
  what = {'tfrecord': 'checksum', 'array_record': 'hash mismatch'}[name]
  assert source.describe(10) == f'{paths[3]}, record 2'
  assert what in source.why_unreadable(10)
  assert not source.why_unreadable(11)


@pytest.mark.parametrize('name', FORMATS)
def test_a_missing_shard_is_named_at_once(name, tmp_path):
  paths, lengths = write(tmp_path, name)
  paths[1].unlink()
  with pytest.raises(ConfigError) as error:
    open_files((name, paths, lengths))
  message = str(error.value)
  assert f'1 of 5 files cannot be used, the first is {paths[1]}' in message
  assert 'is missing' in message
  assert 'prepare_imagenet.md' in message


def test_a_file_that_may_not_be_read_is_named(files, monkeypatch):
  def refuse(path):
    raise PermissionError(13, 'Permission denied')

  monkeypatch.setattr(records, 'file_size', refuse)
  with pytest.raises(ConfigError, match='Permission denied; see that'):
    open_files(files)


def test_a_record_of_another_kind_fails_in_parse(files):
  with pytest.raises(tf.errors.InvalidArgumentError):
    open_files(files).parse(tf.constant(b'no Example'), tf.constant(0))


@pytest.mark.parametrize('name', FORMATS)
def test_an_empty_file_is_named_at_once(name, tmp_path):
  paths, lengths = write(tmp_path, name)
  paths[3].write_bytes(b'')
  with pytest.raises(ConfigError, match='records 7 records') as error:
    open_files((name, paths, lengths))
  assert str(paths[3]) in str(error.value)


def test_paths_and_lengths_must_match(files):
  name, paths, lengths = files
  with pytest.raises(ValueError, match='5 files but lengths'):
    open_files((name, paths, lengths[:-1]))


def flip(path, position, bit=3):
  data = bytearray(path.read_bytes())
  data[position] ^= 1 << bit
  path.write_bytes(data)


# ArrayRecord.


def cut_half(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def cut_end(path):
  path.write_bytes(path.read_bytes()[:-100])


def one_less(path):
  write_array_record(path, RECORDS[8:14])


def one_more(path):
  write_array_record(path, RECORDS[8:16])


def other_file(path):
  path.write_bytes(np.random.RandomState(0).bytes(200_000))


@pytest.mark.parametrize(
  ('change', 'found'),
  [
    (cut_half, '0 records,'),
    (cut_end, r'0 records \(Corrupted .*\),'),
    (one_less, '6 records,'),
    (one_more, '8 records,'),
    (other_file, r'0 records \(Corrupted .*\),'),
  ],
)
def test_array_record_files_of_another_count_are_refused(
  tmp_path, change, found
):
  paths, lengths = write(tmp_path, 'array_record')
  change(paths[3])
  with pytest.raises(ConfigError, match=f'holds {found}') as error:
    array_record.ArrayRecords(paths, lengths)
  assert str(paths[3]) in str(error.value)
  assert 'dataset_info.json records 7 records' in str(error.value)


def test_a_bucket_that_cannot_be_opened_is_no_damaged_file(monkeypatch):
  monkeypatch.setattr(records, 'file_size', lambda path: 1)
  with pytest.raises(ConfigError, match='cannot be opened .*gcsfuse'):
    array_record.ArrayRecords(['other://bucket/file'], [1])


def test_open_files_are_bounded(tmp_path):
  def count():
    links = [
      os.path.realpath(f'/proc/self/fd/{fd}')
      for fd in os.listdir('/proc/self/fd')
    ]
    return sum(link.startswith(str(tmp_path)) for link in links)

  if not pathlib.Path('/proc/self/fd').exists():
    pytest.skip('needs /proc')
  paths, lengths = write(tmp_path, 'array_record', (1,) * 12)
  source = array_record.ArrayRecords(paths, lengths, max_open_files=3)
  assert count() == 3
  for _ in range(3):
    assert source.fetch(np.arange(12)) == RECORDS[:12]
    assert count() == 3
  del source
  assert count() == 0


def test_a_low_limit_of_open_files_is_raised_or_kept(monkeypatch):
  limits = {}

  def run(soft, hard, wanted):
    monkeypatch.setattr(
      array_record.resource, 'getrlimit', lambda _: (soft, hard)
    )
    monkeypatch.setattr(
      array_record.resource,
      'setrlimit',
      lambda _, limit: limits.update(set=limit),
    )
    limits.clear()
    return array_record._raise_open_files(wanted), limits.get('set')

  assert run(1024, 4096, 1024) == (1024, (1536, 4096))
  assert run(1024, 1200, 1024) == (944, (1200, 1200))
  assert run(4096, 4096, 1024) == (1024, None)
  assert run(1024, -1, 1024) == (1024, (1536, -1))
  assert run(-1, -1, 1024) == (1024, None)
  assert run(100, 100, 1024)[0] == 1


class FailingReader:
  """Fails like a filesystem, for the first `failures` reads of all readers."""

  failures = 0

  original = array_record_module.ArrayRecordReader

  def __init__(self, path, **kwargs):
    self._reader = FailingReader.original(path, **kwargs)

  def __getattr__(self, name):
    return getattr(self._reader, name)

  def read(self, places):
    if FailingReader.failures:
      FailingReader.failures -= 1
      raise RuntimeError('Input/output error reading /mnt/x')
    return self._reader.read(places)


def test_failing_storage_is_asked_again_and_is_never_a_bad_record(
  tmp_path, monkeypatch, no_delay
):
  paths, lengths = write(tmp_path, 'array_record')
  source = array_record.ArrayRecords(paths, lengths, max_open_files=1)
  monkeypatch.setattr(
    array_record.array_record_module, 'ArrayRecordReader', FailingReader
  )
  FailingReader.failures = 4
  assert source.fetch(np.array([3])) == [RECORDS[3]]
  FailingReader.failures = 5
  with pytest.raises(StorageError, match='Input/output error') as info:
    source.fetch(np.array([8]))
  FailingReader.failures = 0
  assert source.fetch(np.array([8])) == [RECORDS[8]]
  assert not source.why_unreadable(8)
  assert str(info.value).startswith(f'{paths[3]}: cannot be read: ')


# The order of TFRecord streams.

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


# Streams of TFRecord files.


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


class FakeBucket(http.server.BaseHTTPRequestHandler):
  """Serves local files as the bucket `fake`, in the way of Cloud Storage."""

  def do_GET(self):
    name = urllib.parse.unquote(urllib.parse.urlparse(self.path).path)
    path = pathlib.Path(name.removeprefix('/storage/v1/b/fake/o'))
    if not path.exists():
      self.send_error(404)
      return
    data = path.read_bytes()
    first, last = self.headers['Range'].removeprefix('bytes=').split('-')
    start = int(first) if first else max(0, len(data) - int(last))
    stop = int(last) + 1 if first and last else len(data)
    self.send_response(206)
    self.send_header('Content-Range', f'bytes {start}-{stop - 1}/{len(data)}')
    self.send_header('Content-Length', str(stop - start))
    self.end_headers()
    with contextlib.suppress(
      OSError
    ):  # The reader hangs up when it has enough.
      self.wfile.write(data[start:stop])

  def log_message(self, *arguments):
    del arguments


def test_array_record_files_are_read_from_a_bucket(tmp_path):
  paths, lengths = write(tmp_path, 'array_record')
  code = f"""
import numpy as np
from conadv_jax.data.sources import array_record, records
records.file_size = lambda path: 1  # tensorflow asks the real Cloud Storage.
paths = {[f'gs://fake{path}' for path in paths]}
source = array_record.ArrayRecords(paths, {lengths})
print(b''.join(source.fetch(np.arange(19)[::-1])).hex())
"""
  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), FakeBucket)
  threading.Thread(target=server.serve_forever).start()
  address = f'http://127.0.0.1:{server.server_port}'
  kept = {k: v for k, v in os.environ.items() if 'proxy' not in k.lower()}
  try:
    done = subprocess.run(
      [sys.executable, '-c', code],
      env=kept | {'CLOUD_STORAGE_EMULATOR_ENDPOINT': address},
      cwd=pathlib.Path(__file__).parents[2],
      stdout=subprocess.PIPE,
      text=True,
      timeout=60,
      check=True,
    )
  finally:
    server.shutdown()
    server.server_close()
  assert bytes.fromhex(done.stdout) == b''.join(RECORDS[::-1])
