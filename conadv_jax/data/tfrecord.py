"""TFRecord files: whole files at a time, in an order of windows of them."""

from __future__ import annotations

import collections
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import google_crc32c
import numpy as np

from conadv_jax.data import shards
from conadv_jax.data.quarantine import DataError

_LENGTH = struct.Struct('<Q')
_CRC = struct.Struct('<I')
_FRAME = _LENGTH.size + 2 * _CRC.size  # around each record
_WAIT_SECONDS = (1.0, 2.0, 4.0)  # before each new try of a file
_CACHED_FILES = 4  # by `fetch`; a file of ImageNet has about 140 MB


class Window(NamedTuple):
  """Records of a few files that are shuffled together.

  Attributes:
    epoch: of this host.
    ids: int64 [n], in the order in which they are used.
  """

  epoch: int
  ids: np.ndarray


class TfRecords(shards.Shards):
  """Records of TFRecord files.

  Random access to a bucket is slow, so files are read whole. In each epoch, the
  files are shuffled over the whole set, and the sequence of their records is
  cut into as many equal parts as there are hosts. A host reads its part window
  by window, `window_shards` files each, and shuffles the records in a window.
  So an order depends on (seed, number of hosts), and may start at any record
  for the price of reading one window.
  """

  def __init__(
    self,
    paths: Sequence[Any],
    lengths: Sequence[int],
    num_classes: int,
    window_shards: int = 8,
  ):
    """Reads nothing yet.

    Args:
      paths: files of the split, local or remote.
      lengths: records of each, as the data set's own description says.
      num_classes: labels are 0 .. num_classes - 1.
      window_shards: files that are in memory and shuffled together; another
        window is read ahead.
    """
    super().__init__(paths, lengths, num_classes)
    self._window_shards = window_shards
    self._lock = threading.Lock()
    self._cached: collections.OrderedDict[int, list[bytes]] = (
      collections.OrderedDict()
    )

  def fetch(self, ids: np.ndarray) -> list[bytes]:
    """The record of each id; b'' for one whose checksum is wrong.

    Reads whole files, and keeps the last few.

    Raises:
      DataError: a file lacks records or cannot be read.
    """
    found, places = self._locate(np.asarray(ids))
    return [
      self._cached_file(int(shard))[place]
      for shard, place in zip(found, places, strict=True)
    ]

  def windows(
    self, seed: int, host: int, num_hosts: int, start_record: int = 0
  ) -> Iterator[Window]:
    """This host's windows, for ever, from the one that holds `start_record`.

    The first one lacks the records before `start_record`. Nothing is read.
    """
    share = self._share(host, num_hosts)
    epoch, skip = divmod(start_record, len(share))
    while True:
      for window in self._windows_of_epoch(seed, epoch, share):
        if skip < len(window):
          yield Window(epoch, window[skip:])
        skip = max(0, skip - len(window))
      epoch += 1

  def stream(self, seed: int, host: int, num_hosts: int, start_record: int):
    """A tf.data set of `record`, `id` and `epoch`, from `start_record` on.

    Raises:
      ValueError: there are more hosts than records.
    """
    import tensorflow as tf

    self._share(host, num_hosts)  # fails here, not in a thread

    def of_windows():
      for window in self.windows(seed, host, num_hosts, start_record):
        yield {
          'record': np.array(self._read_window(window.ids), object),
          'id': window.ids,
          'epoch': np.full(len(window.ids), window.epoch, np.int64),
        }

    spec = {
      'record': tf.TensorSpec([None], tf.string),
      'id': tf.TensorSpec([None], tf.int64),
      'epoch': tf.TensorSpec([None], tf.int64),
    }
    dataset = tf.data.Dataset.from_generator(of_windows, output_signature=spec)
    return dataset.prefetch(1).unbatch()

  def _share(self, host: int, num_hosts: int) -> range:
    """Places of a host in the sequence of an epoch: N / hosts, up to one."""
    bounds = [h * self.num_examples // num_hosts for h in (host, host + 1)]
    if bounds[0] == bounds[1]:
      raise ValueError(
        f'{num_hosts} hosts, but only {self.num_examples} records'
      )
    return range(*bounds)

  def _windows_of_epoch(
    self, seed: int, epoch: int, share: range
  ) -> Iterator[np.ndarray]:
    """The ids of each window of the share, shuffled."""
    order = _permutation(seed, epoch, 0, len(self._paths))
    ends = np.cumsum(self._lengths[order])
    first = int(np.searchsorted(ends, share.start, side='right'))
    last = int(np.searchsorted(ends, share.stop - 1, side='right'))
    for place in range(first, last + 1, self._window_shards):
      parts = []
      for i in range(place, min(place + self._window_shards, last + 1)):
        shard, begin = order[i], int(ends[i] - self._lengths[order[i]])
        low = max(share.start - begin, 0)
        high = min(share.stop - begin, int(self._lengths[shard]))
        parts.append(self._starts[shard] + np.arange(low, high))
      ids = np.concatenate(parts)
      # The place of the window in the epoch, so that hosts draw apart.
      yield ids[_permutation(seed, epoch, 1 + place, len(ids))]

  def _read_window(self, ids: np.ndarray) -> list[bytes]:
    """The records of `ids`, each file read once, in threads."""
    found, places = self._locate(ids)
    needed = np.unique(found)
    files = dict(
      zip(needed, shards.in_threads(self._read_file, needed), strict=True)
    )
    return [files[s][p] for s, p in zip(found, places, strict=True)]

  def _cached_file(self, shard: int) -> list[bytes]:
    # One thread at a time: others mostly wait for the same file.
    with self._lock:
      if shard not in self._cached:
        self._cached[shard] = self._read_file(shard)
      self._cached.move_to_end(shard)
      while len(self._cached) > _CACHED_FILES:
        self._cached.popitem(last=False)
      return self._cached[shard]

  def _read_file(self, shard: int) -> list[bytes]:
    """All records of a file; b'' for one whose checksum is wrong.

    Raises:
      DataError: the file cannot be read, has more or fewer records than it
        should, or the length of one is wrong, after which nothing can be found.
    """
    path, expected = self._paths[shard], int(self._lengths[shard])
    data = _read_with_retries(path)
    records, at = [], 0
    while at < len(data) and len(records) < expected:
      header = data[at : at + _LENGTH.size]
      (length,) = _LENGTH.unpack(header.ljust(_LENGTH.size, b'\0'))
      end = at + _FRAME + length
      if end > len(data) or not _matches(header, data, at + _LENGTH.size):
        raise DataError(
          f'{path} is cut or damaged: after {len(records)} of {expected}'
          f' records, at byte {at}, there is no whole record; copy it again'
        )
      begin = at + _LENGTH.size + _CRC.size
      record = data[begin : begin + length]
      if not _matches(record, data, begin + length):
        self._reasons[int(self._starts[shard]) + len(records)] = (
          'wrong checksum'
        )
        record = b''
      records.append(record)
      at = end
    if len(records) < expected or at < len(data):
      extra = ' and more' if at < len(data) else ''
      raise DataError(
        f'{path} has {len(records)} records{extra}, need {expected}; copy it'
        ' again, or prepare the data set again'
      )
    return records


def _permutation(seed: int, epoch: int, stream: int, count: int) -> np.ndarray:
  """A permutation of `count` places; see `sampler._permutation`."""
  key = np.array([seed, epoch], np.uint64)
  # The sampler's words start at counter 0, these a half of the range later.
  counter = np.array([0, 0, stream, 2**63], np.uint64)
  words = np.random.Philox(key=key, counter=counter).random_raw(count)
  return np.argsort(words, kind='stable')


def _matches(content: bytes, data: bytes, at: int) -> bool:
  """Whether the masked CRC-32C at `at` is that of `content`."""
  if at + _CRC.size > len(data):
    return False
  crc = google_crc32c.value(content)
  masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
  return _CRC.unpack_from(data, at)[0] == masked


def _read_with_retries(path: Any) -> bytes:
  """The content of a file; waits and tries again when storage fails."""
  waits = list(_WAIT_SECONDS)
  while True:
    try:
      return path.read_bytes()
    except FileNotFoundError as error:
      raise DataError(f'{path} is missing') from error
    except OSError as error:
      if not waits:
        raise DataError(f'{path}: cannot be read: {error}') from error
      print(f'{path}: {error}; trying again in {waits[0]:g} s', flush=True)
      time.sleep(waits.pop(0))
