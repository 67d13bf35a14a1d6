"""What the readers of record files share: ids, file checks, TFDS's schema."""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent import futures
from typing import Any

import numpy as np
from etils import epath

from conadv_jax.base import storage
from conadv_jax.base.errors import ConfigError
from conadv_jax.data.slices import Piece
from conadv_jax.data.sources.source import Encoded, sha256_digits


class ShardedRecords(Encoded):
  """Records 0 .. N-1, laid over files in the order of their names.

  Record `id` is number `id - starts[s] + firsts[s]` of file s, with starts[s]
  <= id < starts[s + 1]. A file may occur more than once, with other records.

  Attributes:
    paths: the F files.
    file_lengths: int64 [F], records in each.
    firsts: int64 [F], place of the first one that is used.
    lengths: int64 [F], how many are used, in a row.
    starts: int64 [F + 1], sums of `lengths`.
    num_examples: N.
    nbytes: bytes of what is used of the files; a little more than those of the
      records.
    label: the feature of TFDS's schema that is the label.
  """

  label = 'label'

  def __init__(
    self,
    paths: Sequence[os.PathLike | str],
    shard_lengths: Sequence[int],
    used: Sequence[tuple[int, int]] | None = None,
    *,
    num_threads: int,
  ):
    """Checks all files, several at a time.

    Args:
      paths: local or gs://; `builder.info.splits[split].filepaths` of TFDS.
      shard_lengths: records in each file, as `.shard_lengths` there.
      used: places (first, stop) of those that are used; None is all of them.
      num_threads: threads that wait for files.

    Raises:
      ConfigError: a file is missing or differs from its recorded length; names
        the first such file and the fix.
      StorageError: the storage failed, in spite of some attempts.
    """
    self.paths = tuple(os.fspath(path) for path in paths)
    self.file_lengths = np.array(shard_lengths, np.int64)
    if not self.paths or self.file_lengths.shape != (len(self.paths),):
      raise ValueError(
        f'{len(self.paths)} files but lengths {self.file_lengths.shape}'
      )
    if used is None:
      used = [(0, length) for length in self.file_lengths]
    self.firsts, stops = np.array(used, np.int64).T
    self.lengths = stops - self.firsts
    self.starts = np.concatenate([[0], np.cumsum(self.lengths)])
    self.num_examples = int(self.starts[-1])
    self._pool = futures.ThreadPoolExecutor(num_threads)
    self._num_threads = num_threads
    self._reasons: dict[int, str] = {}
    self._lock = threading.Lock()
    sizes = list(self._pool.map(self._size, range(len(self.paths))))
    of_files = np.array([size for size, _ in sizes], np.int64)
    share = self.lengths / np.maximum(self.file_lengths, 1)
    self.nbytes = int((of_files * np.where(self.file_lengths, share, 1)).sum())
    names = map(os.path.basename, self.paths)
    self.digest = sha256_digits(
      (*names, self.file_lengths, self.firsts, self.lengths)
    )
    self.content = sha256_digits((of_files,))
    problems = [problem for _, problem in sizes if problem]
    if problems:
      raise ConfigError(
        f'{len(problems)} of {len(self.paths)} files cannot be used, the first'
        f' is {problems[0]}'
      )

  def _size(self, shard: int) -> tuple[int, str]:
    """(bytes, what is wrong or '') of one file."""
    try:
      size = file_size(self.paths[shard])
    except FileNotFoundError:
      return 0, damage(self.paths[shard], 'is missing')
    except OSError as error:
      reason = error.strerror or error
      return 0, f'{self.paths[shard]}: {reason}; see that this user can read it'
    return size, self._problem(shard, size)

  def _problem(self, shard: int, size: int) -> str:
    """What is wrong with a file of `size` bytes, '' if nothing."""
    raise NotImplementedError

  def locate(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(file, place in it) of each id, int64 [n] both.

    Raises:
      IndexError: an id is outside [0, N).
    """
    ids = np.asarray(ids, np.int64)
    if ids.size and not (0 <= ids.min() and ids.max() < self.num_examples):
      raise IndexError(f'ids {ids}: must be in [0, {self.num_examples})')
    shards = np.searchsorted(self.starts, ids, side='right') - 1
    return shards, ids - self.starts[shards] + self.firsts[shards]

  def parse(self, record, example_id):
    """The image and label of one TFDS record, inside `tf.data.Dataset.map`.

    Args:
      record: string scalar tensor: a tf.train.Example with 'image' and `label`.
      example_id: int64 scalar tensor, not used.

    Returns:
      (data, label): the encoded image, string scalar, and int32 scalar; b'' and
      -1 for what the record lacks, so also for an empty one. A record that is
      no tf.train.Example at all fails with InvalidArgumentError.
    """
    import tensorflow as tf

    del example_id
    features = tf.io.parse_single_example(
      record,
      {
        'image': tf.io.FixedLenFeature([], tf.string, default_value=''),
        self.label: tf.io.FixedLenFeature([], tf.int64, default_value=-1),
      },
    )
    return features['image'], tf.cast(features[self.label], tf.int32)

  def describe(self, example_id: int) -> str:
    """File and place of a record."""
    (shard,), (place,) = self.locate(np.array([example_id]))
    return f'{self.paths[shard]}, record {place}'

  def why_unreadable(self, example_id: int) -> str:
    return self._reasons.get(int(example_id), '')

  def _unreadable(self, shard: int, place: int, reason: str) -> bytes:
    """Keeps the reason for `why_unreadable`; the record is b''."""
    example_id = int(self.starts[shard] - self.firsts[shard]) + place
    self._reasons[example_id] = reason
    return b''


def parts_of(
  paths: Sequence[os.PathLike | str], lengths: Sequence[int], piece: Piece
) -> list[tuple[os.PathLike | str, int, tuple[int, int]]]:
  """(path, length, (first, stop)) of the files that hold a piece of a split.

  Args:
    paths: all files of the split.
    lengths: records in each.
    piece: what is used of them.
  """
  parts, start = [], 0
  for path, length in zip(paths, lengths, strict=True):
    first = max(piece.start - start, 0)
    stop = min(piece.stop - start, length)
    # An empty file is kept within a piece: it has its place in the order.
    if first < stop or first == stop == length == 0:
      parts.append((path, length, (first, stop)))
    start += length
  return parts


def damage(path: str, what: str) -> str:
  """The text of an error about one file, with its fix."""
  return (
    f'{path}: {what}; copy that file again from its source, or prepare the data'
    ' set again (scripts/prepare_imagenet.md)'
  )


def count_damage(path: str, found: str, expected: int) -> str:
  return damage(
    path, f'holds {found}, but dataset_info.json records {expected} records'
  )


def file_size(path: str) -> int:
  """Bytes of a file, local or remote.

  Raises:
    OSError, StorageError: as `storage.read`.
  """
  if storage.is_remote(path):
    return storage.read(lambda: epath.Path(path).stat().length, path)
  return storage.read(lambda: os.stat(path).st_size, path)


def read_bytes(path: str) -> bytes:
  """Contents of a file, local or remote.

  Raises:
    OSError, StorageError: as `storage.read`; also OSError at once for a pipe,
      which would be waited for, or a device, which may have no end.
  """
  if storage.is_remote(path):
    return storage.read(lambda: epath.Path(path).read_bytes(), path)
  mode = storage.read(lambda: os.stat(path).st_mode, path)
  if not stat.S_ISREG(mode):
    raise OSError(errno.EINVAL, 'is no regular file', path)

  def read():
    with open(path, 'rb') as file:
      return file.read()

  return storage.read(read, path)


def map_in_threads(
  pool: futures.ThreadPoolExecutor,
  num_threads: int,
  function: Callable[[Any], None],
  items: Iterable[Any],
) -> None:
  """Calls `function` with each item, in as few tasks as keep all threads busy.

  Raises:
    Exception: what `function` raised first, once all tasks have ended.
  """
  items = list(items)
  if len(items) < 2:
    for item in items:
      function(item)
    return

  def run(part):
    for item in part:
      function(item)

  tasks = [
    pool.submit(run, items[start::num_threads])
    for start in range(min(num_threads, len(items)))
  ]
  futures.wait(tasks)
  for task in tasks:
    task.result()
