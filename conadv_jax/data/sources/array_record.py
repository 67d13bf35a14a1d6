"""Random access to the records of ArrayRecord files."""

from __future__ import annotations

import collections
import os
import resource
from collections.abc import Sequence

import numpy as np
from array_record.python import array_record_module

from conadv_jax.base import storage
from conadv_jax.data.sources import records

# What array_record's documentation advises for random access.
_OPTIONS = 'readahead_buffer_size:0,max_parallelism:0'
_BUFFER_BYTES = 32 * 1024
_SPARE_FILES = 256  # For checkpoints, sockets, log files and libraries.
# In each message about damaged contents, and in none about failing storage.
_DAMAGE = 'Riegeli/records file'
_REMOTE_HINT = (
  'mount the bucket with gcsfuse and name the mounted directory, or use the'
  ' TFRecord format'
)


class ArrayRecords(records.ShardedRecords):
  """Reads any record of the files at the same cost, from any thread.

  Files stay open, at most `max_open_files` of them, the last used first.
  """

  def __init__(
    self,
    paths: Sequence[os.PathLike | str],
    shard_lengths: Sequence[int],
    used: Sequence[tuple[int, int]] | None = None,
    *,
    num_threads: int = 16,
    max_open_files: int | None = None,
  ):
    """Opens each file and compares its number of records.

    Args:
      paths: as in `ShardedRecords`.
      shard_lengths: as there.
      used: as there.
      num_threads: files that are waited for at the same time.
      max_open_files: None is all, or as many as the process may have open; its
        soft limit is raised towards the hard one where that helps.

    Raises:
      ConfigError: a file is missing, damaged, shorter or longer than recorded.
      StorageError: the storage failed, in spite of some attempts.
    """
    self._max_open = max_open_files or _raise_open_files(len(paths))
    self._open: collections.OrderedDict[
      int, array_record_module.ArrayRecordReader
    ] = collections.OrderedDict()
    super().__init__(paths, shard_lengths, used, num_threads=num_threads)

  def _problem(self, shard: int, size: int) -> str:
    path, expected = self.paths[shard], int(self.file_lengths[shard])
    reader = self._reader(shard)
    found = reader.num_records()
    if found == expected and reader.ok():
      return ''
    reason = ''
    try:
      reader.read([0])
    except RuntimeError as error:
      # That there is no record 0 is no reason.
      reason = '' if reader.ok() else f' ({error})'
      if reason and storage.is_remote(path) and _DAMAGE not in reason:
        return f'{path}: cannot be opened{reason}; {_REMOTE_HINT}'
    return records.count_damage(path, f'{found} records{reason}', expected)

  def fetch(self, ids: np.ndarray) -> list[bytes]:
    """Reads records.

    Args:
      ids: int64 [n], in [0, num_examples).

    Returns:
      The n records; b'' for one whose checksum fails.

    Raises:
      StorageError: the storage failed, in spite of some attempts.
    """
    shards, places = self.locate(ids)
    output = [b''] * len(shards)

    def read(shard):
      where = np.flatnonzero(shards == shard)
      read = self._read(int(shard), places[where].tolist())
      for index, record in zip(where, read, strict=True):
        output[index] = record

    records.map_in_threads(
      self._pool, self._num_threads, read, np.unique(shards)
    )
    return output

  def _read(self, shard: int, places: list[int]) -> list[bytes]:
    """The records at `places` of one file."""

    def attempt() -> list[bytes] | None:
      try:
        return self._reader(shard).read(places)
      except RuntimeError as error:
        if _DAMAGE in str(error):
          damaged.append(str(error))
          return None
        self._forget(shard)
        raise OSError(str(error)) from error

    damaged: list[str] = []
    read = storage.read(attempt, self.paths[shard])
    if read is not None:
      return read
    if len(places) == 1:
      return [self._unreadable(shard, places[0], damaged[0])]
    return [self._read(shard, [place])[0] for place in places]

  def _reader(self, shard: int) -> array_record_module.ArrayRecordReader:
    with self._lock:
      if shard in self._open:
        self._open.move_to_end(shard)
        return self._open[shard]
    reader = array_record_module.ArrayRecordReader(
      self.paths[shard], options=_OPTIONS, file_reader_buffer_size=_BUFFER_BYTES
    )
    with self._lock:
      self._open[shard] = reader
      # The last thread that reads from an evicted file closes it, by dropping
      # its reference.
      while len(self._open) > self._max_open:
        self._open.popitem(last=False)
    return reader

  def _forget(self, shard: int) -> None:
    with self._lock:
      self._open.pop(shard, None)


def _raise_open_files(wanted: int) -> int:
  """How many of `wanted` files may stay open, having raised the soft limit."""
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  infinite = resource.RLIM_INFINITY
  needed = wanted + 2 * _SPARE_FILES
  if soft != infinite and soft < needed:
    soft = needed if hard == infinite else min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
  if soft == infinite:
    return wanted
  return max(1, min(wanted, soft - _SPARE_FILES))
