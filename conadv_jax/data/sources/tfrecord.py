"""TFRecord files: in a shuffled order by whole files, or record by record.

A file is a row of records `length, CRC of length, data, CRC of data`, all
little-endian, a length in uint64, with masked CRC-32C. There is no index: to
find a record, the file is read from its start.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from concurrent import futures
from typing import Any

import google_crc32c
import numpy as np

from conadv_jax.base.errors import ConfigError
from conadv_jax.data.sources import records, window_order
from conadv_jax.data.sources.source import Share

_HEADER = struct.Struct('<QI')
_FOOTER = struct.Struct('<I')
_OVERHEAD_BYTES = _HEADER.size + _FOOTER.size
_CRC_MASK_DELTA = 0xA282EAD8
# Records that go to tf.data at once: enough to hide the cost of the call.
_CHUNK = 64


class TfRecords(records.ShardedRecords):
  """Streams records in a shuffled order, and reads single ones slowly.

  Attributes:
    window_shards: files that are in memory to be shuffled together; as many
      again are read ahead.
  """

  in_windows = True

  def __init__(
    self,
    paths: Sequence[os.PathLike | str],
    shard_lengths: Sequence[int],
    used: Sequence[tuple[int, int]] | None = None,
    *,
    window_shards: int = 8,
    num_threads: int = 8,
    cached_shards: int = 4,
  ):
    """Checks that the files exist; their contents are checked when read.

    Args:
      paths: as in `ShardedRecords`.
      shard_lengths: as there.
      used: as there.
      window_shards: see above; 8 of ImageNet's 1,024 are 1.1 GB.
      num_threads: files that are read at the same time.
      cached_shards: files that `fetch` keeps in memory, next to those that
        threads are reading; 1 or more.

    Raises:
      ConfigError: a file is missing, or too small for its recorded length.
    """
    self.window_shards = window_shards
    self._cached_shards = cached_shards
    # In the order of their last use; also those that are being read.
    self._cache: dict[int, futures.Future[_Shard]] = {}
    super().__init__(paths, shard_lengths, used, num_threads=num_threads)

  def _problem(self, shard: int, size: int) -> str:
    expected = int(self.file_lengths[shard])
    if size >= expected * _OVERHEAD_BYTES:
      return ''
    return records.count_damage(self.paths[shard], f'{size} bytes', expected)

  def fetch(self, ids: np.ndarray) -> list[bytes]:
    """Reads records anywhere, by way of whole files: slow unless ids are near.

    Args:
      ids: int64 [n], in [0, num_examples).

    Returns:
      The n records; b'' for one whose checksum fails.

    Raises:
      ConfigError: a file is damaged so that records are lost.
      StorageError: the storage failed, in spite of some attempts.
      OSError: a file is gone.
    """
    shards, places = self.locate(ids)
    output = [b''] * len(shards)
    for shard in np.unique(shards):
      contents = self._cached(int(shard))
      for index in np.flatnonzero(shards == shard):
        output[index] = self._record(contents, int(shard), int(places[index]))
    return output

  def order(self, share: Share):
    """A host's own order, by windows of files; see `stream`."""
    count = len(share.positions)
    start = share.steps.start * count
    stream = self.stream(share.seed, share.host, share.num_hosts, start)
    return stream.take(len(share.steps) * count)

  def stream(self, seed: int, host: int, num_hosts: int, start_record: int = 0):
    """A host's records of all epochs, without end, in the windows' order.

    The order depends on the arguments and on `window_shards`. In each epoch
    every id comes once, on one host. See `window_order`.

    Args:
      seed: 0 <= seed < 2**63.
      host: in [0, num_hosts).
      num_hosts: hosts that share the records.
      start_record: where to start, counting the host's records from the start
        of epoch 0. Costs one window, wherever it is.

    Returns:
      tf.data.Dataset of {'record': string, 'id': int64, 'epoch': int64}
      scalars; the record is b'' if its checksum fails. An
      iterator raises an OpError, with the reason in `failure`, once a file
      turns out to be shorter or longer than recorded, or cut.

    Raises:
      ConfigError: an argument is out of range.
    """
    import tensorflow as tf

    next(self._windows(seed, host, num_hosts, start_record))  # Raises early.

    def chunks():
      try:
        yield from self._chunks(seed, host, num_hosts, start_record)
      except Exception as error:
        self.failure = error
        raise

    dataset = tf.data.Dataset.from_generator(
      chunks,
      output_signature={
        'record': tf.TensorSpec([None], tf.string),
        'id': tf.TensorSpec([None], tf.int64),
        'epoch': tf.TensorSpec([None], tf.int64),
      },
    )
    return dataset.unbatch()

  def _windows(
    self, seed: int, host: int, num_hosts: int, start_record: int
  ) -> Iterator[tuple[window_order.Window, int]]:
    return window_order.stream(
      self.lengths, seed, host, num_hosts, self.window_shards, start_record
    )

  def _chunks(
    self, seed: int, host: int, num_hosts: int, start_record: int
  ) -> Iterator[dict[str, np.ndarray]]:
    """Up to `_CHUNK` records at a time, with one window read ahead."""
    windows = self._windows(seed, host, num_hosts, start_record)

    def start():
      window, skip = next(windows)
      loads = [self._pool.submit(self._load, shard) for shard in window.shards]
      return window, skip, loads

    ahead = start()
    try:
      while True:
        window, skip, loads = ahead
        # The last window is dropped here, before another one is started: two
        # are in memory at most.
        contents = {
          int(shard): load.result()
          for shard, load in zip(window.shards, loads, strict=True)
        }
        ahead = start()
        ids = window.ids()[skip:]
        for first in range(0, len(ids), _CHUNK):
          yield self._chunk(contents, ids[first : first + _CHUNK], window)
    finally:
      for load in ahead[2]:
        load.cancel()

  def _chunk(
    self,
    contents: dict[int, _Shard],
    ids: np.ndarray,
    window: window_order.Window,
  ) -> dict[str, Any]:
    shards, places = self.locate(ids)
    output = np.empty(len(ids), object)
    for index, (shard, place) in enumerate(
      zip(shards.tolist(), places.tolist(), strict=True)
    ):
      output[index] = self._record(contents[shard], shard, place)
    return {
      'record': output,
      'id': ids,
      'epoch': np.full(len(ids), window.epoch, np.int64),
    }

  def _record(self, contents: _Shard, shard: int, place: int) -> bytes:
    record, ok = contents.record(place)
    if ok:
      return record
    return self._unreadable(shard, place, 'the checksum of its data fails')

  def _cached(self, shard: int) -> _Shard:
    """The file; threads read several at a time, but none of them twice."""
    with self._lock:
      known = self._cache.pop(shard, None)
      contents = self._cache[shard] = known or futures.Future()
      complete = [s for s, c in self._cache.items() if c.done()]
      for oldest in complete[: -self._cached_shards]:
        del self._cache[oldest]
    if known is None:
      try:
        contents.set_result(self._load(shard))
      except BaseException as error:
        with self._lock:
          self._cache.pop(shard, None)  # The next call tries again.
        contents.set_exception(error)  # Other threads wait for it.
        raise
    return contents.result()

  def _load(self, shard: int) -> _Shard:
    path = self.paths[shard]
    return _Shard(records.read_bytes(path), path, int(self.file_lengths[shard]))


class _Shard:
  """The contents of one file, and where its records are."""

  def __init__(self, data: bytes, path: str, expected: int):
    """Walks over the lengths; the data are checked when asked for.

    Raises:
      ConfigError: a length is damaged, the file is cut, or the number of
        records is not the expected one.
    """
    self._data = data
    self._places: list[tuple[int, int]] = []
    position = 0
    while position < len(data):
      what = self._walk(position)
      if what:
        raise ConfigError(
          records.damage(
            path,
            f'record {len(self._places)} of the {expected} that'
            f' dataset_info.json records {what}',
          )
        )
      position = self._places[-1][1] + _FOOTER.size
    found = len(self._places)
    if found != expected:
      raise ConfigError(
        records.count_damage(path, f'{found} records', expected)
      )

  def _walk(self, position: int) -> str:
    """Notes the record at `position`; returns what is wrong, '' if nothing."""
    header_end = position + _HEADER.size
    if header_end > len(self._data):
      return 'is cut off'
    length, crc = _HEADER.unpack_from(self._data, position)
    if _masked_crc(self._data[position : position + 8]) != crc:
      return 'has a damaged length'
    if header_end + length + _FOOTER.size > len(self._data):
      return 'is cut off'
    self._places.append((header_end, header_end + length))
    return ''

  def record(self, place: int) -> tuple[bytes, bool]:
    """(data, whether the checksum is right)."""
    start, stop = self._places[place]
    data = self._data[start:stop]
    return data, _FOOTER.unpack_from(self._data, stop)[0] == _masked_crc(data)


def _masked_crc(data: bytes) -> int:
  """CRC-32C, rotated right by 15 bits, plus a constant."""
  crc = google_crc32c.value(data)
  return ((crc >> 15 | crc << 17) + _CRC_MASK_DELTA) & 0xFFFFFFFF
