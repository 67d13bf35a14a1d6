"""Which TFRecord files `fetch` reads and keeps, from several threads."""

import collections
import concurrent.futures
import threading
import time

import numpy as np
import pytest
import tensorflow as tf

from conadv_jax.data.sources.tfrecord import TfRecords

COUNT = 12  # files of two records


@pytest.fixture(scope='module')
def paths(tmp_path_factory):
  root = tmp_path_factory.mktemp('tfrecord')
  found = [root / f'{i}' for i in range(COUNT)]
  for i, path in enumerate(found):
    with tf.io.TFRecordWriter(str(path)) as writer:
      writer.write(record_of(2 * i))
      writer.write(record_of(2 * i + 1))
  return found


def record_of(example_id):
  return b'record %d' % example_id


def open_with_hook(paths, hook, **kwargs):
  """A source that calls `hook` with each file before it reads it."""
  source = TfRecords(paths, [2] * COUNT, **kwargs)
  load = source._load

  def hooked(shard):
    hook(shard)
    return load(shard)

  source._load = hooked
  return source


def test_the_files_used_last_are_kept(paths):
  loads = []
  source = open_with_hook(paths, loads.append, cached_shards=3)
  for shard in (0, 1, 2, 0, 3, 0, 2):
    assert source.fetch(np.array([2 * shard])) == [record_of(2 * shard)]
  assert loads == [0, 1, 2, 3]
  source.fetch(np.array([2]))
  assert loads == [0, 1, 2, 3, 1]


def until(condition):
  """Waits, at most 20 s, until `condition()` is true."""
  deadline = time.monotonic() + 20
  while not condition() and time.monotonic() < deadline:
    time.sleep(0.01)


def num_waiting(source):
  """Threads that wait for a file that another one is reading."""
  files = list(source._cache.values())
  return sum(len(file._condition._waiters) for file in files)


def test_files_are_read_at_the_same_time_and_each_one_once(paths):
  """Readers of many cores ask for more files at once than are kept."""
  loads = collections.Counter()
  together = threading.Barrier(COUNT + 1, timeout=30)

  def hook(shard):
    loads[shard] += 1
    together.wait()  # Passes once all files are being read.

  source = open_with_hook(paths, hook)
  ids = [*range(0, 2 * COUNT, 2), *range(1, 2 * COUNT, 2)]
  with concurrent.futures.ThreadPoolExecutor(2 * COUNT) as pool:
    found = pool.map(lambda i: source.fetch(np.array([i])), ids)
    until(lambda: num_waiting(source) == COUNT)
    together.wait()
    assert list(found) == [[record_of(i)] for i in ids]
  assert set(loads.values()) == {1}


def test_a_failed_read_reaches_all_that_wait_and_is_tried_again(paths):
  loads, waiting = [], threading.Semaphore(0)

  def hook(shard):
    loads.append(shard)
    if len(loads) == 1:
      assert waiting.acquire(timeout=30)
      raise OSError('broken')

  source = open_with_hook(paths, hook)

  def fetch(_):
    with pytest.raises(OSError, match='broken'):
      source.fetch(np.array([0]))

  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    jobs = [pool.submit(fetch, i) for i in range(4)]
    # The read fails once the other three wait for it.
    until(lambda: num_waiting(source) == 3)
    waiting.release()
    for job in jobs:
      job.result(timeout=30)
  assert loads == [0]
  assert source.fetch(np.array([1])) == [record_of(1)]
  assert loads == [0, 0]
