"""What TFDS record files of both formats share: places and their content."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

_THREADS = 32


class Shards:
  """The records of a split: id i is the i-th in the order of the files.

  Attributes:
    num_examples: N, records of all files.
    num_classes: labels are 0 .. num_classes - 1.
  """

  def __init__(
    self, paths: Sequence[Any], lengths: Sequence[int], num_classes: int
  ):
    self._paths = [epath.Path(path) for path in paths]
    self._lengths = np.array(lengths, np.int64)
    # Of the first record of each file, and after the last one.
    self._starts = np.concatenate([[0], np.cumsum(self._lengths)])
    self._reasons: dict[int, str] = {}
    self.num_examples = int(self._starts[-1])
    self.num_classes = num_classes

  @property
  def nbytes(self) -> int:
    """Bytes of all files."""
    return sum(in_threads(lambda path: path.stat().length, self._paths))

  def parse(self, record, example_id):
    """(encoded image, label) of a record, in the graph; b'' gives b'', -1."""
    import tensorflow as tf

    del example_id
    features = tf.io.parse_single_example(
      record,
      {
        'image': tf.io.FixedLenFeature([], tf.string, ''),
        'label': tf.io.FixedLenFeature([], tf.int64, -1),
      },
    )
    return features['image'], tf.cast(features['label'], tf.int32)

  def describe(self, example_id: int) -> str:
    """File and record, and why it could not be read if it could not."""
    (shard,), (index,) = self._locate(np.array([example_id]))
    place = f'{self._paths[shard].name}, record {index}'
    reason = self._reasons.get(int(example_id))
    return f'{place}: {reason}' if reason else place

  def _locate(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """File of each id, and place in it."""
    shards = np.searchsorted(self._starts, ids, side='right') - 1
    return shards, ids - self._starts[shards]


def in_threads(function, *arguments) -> list[Any]:
  """`map` in threads, for calls that wait for storage."""
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    return list(pool.map(function, *arguments))
