"""ArrayRecord files: any record at any time."""

from __future__ import annotations

import collections
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from array_record.python import array_record_module

from conadv_jax.config import ConfigError
from conadv_jax.data import shards


class ArrayRecords(shards.Shards):
  """Records of ArrayRecord files, read by id."""

  def __init__(
    self, paths: Sequence[Any], lengths: Sequence[int], num_classes: int
  ):
    """Opens every file once, in threads, to count its records.

    Args:
      paths: files of the split, local.
      lengths: records of each, as the data set's own description says.
      num_classes: labels are 0 .. num_classes - 1.

    Raises:
      ConfigError: a path is remote, or a file lacks records or is not readable.
    """
    super().__init__(paths, lengths, num_classes)
    self._lock = threading.Lock()
    self._readers: collections.OrderedDict[int, Any] = collections.OrderedDict()
    self._max_open = _files_to_keep_open(len(self._paths))
    remote = next((p for p in self._paths if '://' in str(p)), None)
    if remote is not None:
      raise ConfigError(
        f'dataset.data_dir: {remote}: array_record reads local files only;'
        ' mount the bucket with gcsfuse and name the mounted directory, or'
        ' prepare the data set with --file_format=tfrecord'
      )
    found = shards.in_threads(self._count, range(len(self._paths)))
    for path, count, length in zip(self._paths, found, lengths, strict=True):
      if count != length:
        raise ConfigError(
          f'{path} has {count} readable records, need {length}: it is cut or'
          ' damaged; copy it again, or prepare the data set again'
        )

  def fetch(self, ids: np.ndarray) -> list[bytes]:
    """The record of each id; b'' for one that cannot be read."""
    found, places = self._locate(np.asarray(ids))
    records = [b''] * len(found)
    for shard in np.unique(found):
      slots = np.flatnonzero(found == shard)
      read = self._read(int(shard), places[slots].tolist())
      for slot, record in zip(slots, read, strict=True):
        records[slot] = record
    return records

  def _read(self, shard: int, places: list[int]) -> list[bytes]:
    reader = self._reader(shard)
    try:
      return reader.read(places)
    except RuntimeError as error:
      if len(places) == 1:
        self._reasons[int(self._starts[shard]) + places[0]] = str(error)
        return [b'']
    # One damaged record fails all of them.
    return [record for place in places for record in self._read(shard, [place])]

  def _count(self, shard: int) -> int:
    """Records of a file; 0 also where it is no ArrayRecord file."""
    try:
      with self._paths[shard].open('rb'):
        pass
    except OSError as error:
      raise ConfigError(
        f'{self._paths[shard]}: cannot be read: {error}'
      ) from error
    return self._reader(shard).num_records()

  def _reader(self, shard: int) -> Any:
    with self._lock:
      if shard in self._readers:
        self._readers.move_to_end(shard)
        return self._readers[shard]
    # Reading ahead would be wasted, as records are read in random order.
    reader = array_record_module.ArrayRecordReader(
      str(self._paths[shard]), options='readahead_buffer_size:0'
    )
    with self._lock:
      self._readers[shard] = reader
      # It is closed when the last thread that reads from it drops it.
      while len(self._readers) > self._max_open:
        self._readers.popitem(last=False)
    return reader


def _files_to_keep_open(wanted: int) -> int:
  """`wanted`, or fewer where the system allows no more; raises its limit."""
  try:
    import resource
  except ImportError:  # Windows
    return min(wanted, 256)
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  needed = wanted + 512  # for everything else
  if soft != resource.RLIM_INFINITY and soft < needed:
    soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return max(1, min(wanted, soft - 512))
  return wanted
