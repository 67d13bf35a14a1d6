"""What every source of examples offers; `DatasetSpec.open` returns one.

`InMemory` looks its examples up inside the tf.data graph. `Encoded` is the base
of sources that read records of encoded images by id: from ArrayRecord
files, a folder, or a cache. TFRecord files, which have no index, are streamed
in an order of their own.
"""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from etils import epath

from conadv_jax.base import storage
from conadv_jax.data import sampler
from conadv_jax.data.quarantine import Quarantine

if TYPE_CHECKING:
  import tensorflow as tf

Batch = dict[str, np.ndarray]
# (image, label, id, epoch) -> the arrays of one example, of static shape.
ExampleFn = Callable[..., 'dict[str, tf.Tensor]']


@dataclasses.dataclass(frozen=True, eq=False)
class Share:
  """One host's share of the training examples: which, and in which order.

  Attributes:
    seed: keys order and augmentation, 0 <= seed < 2**63.
    batch_size: examples in the global batch, B.
    steps: a batch is made for each of these.
    positions: int64 [L], places in the global batch that this host feeds; None
      is all of [0, B).
    host: in [0, num_hosts); for files without random access.
    num_hosts: hosts that share the examples.

  Raises:
    ValueError: a position is repeated or out of range.
  """

  seed: int
  batch_size: int
  steps: range
  positions: np.ndarray | None = None
  host: int = 0
  num_hosts: int = 1

  def __post_init__(self):
    checked = check_positions(self.positions, self.batch_size)
    object.__setattr__(self, 'positions', checked)


@dataclasses.dataclass(frozen=True)
class BadExamples:
  """Which examples cannot be used, and what becomes of them.

  Attributes:
    split: 'train' or 'eval', for the quarantine.
    num_classes: a label outside of [0, num_classes) makes an example bad.
    quarantine: is told of each, and ends the run if there are too many; None
      allows none.
    replace: whether the next usable example stands in for one that is not.
  """

  split: str
  num_classes: int
  quarantine: Quarantine | None
  replace: bool


class Source(Protocol):
  """Examples 0 .. N - 1 of a split or a part of it.

  Attributes:
    num_examples: N.
    class_names: in the order of the labels; () if the files do not name them.
    digest: tells these examples from others, in their order: the first 12
      digits of a SHA-256 of the arrays, or of the listing of the files.
    content: likewise, tells files of the same names apart, by the bytes of some
      or the sizes of all. It may change where a file is damaged.
    in_windows: whether `order` shuffles in windows of some files, not as a
      whole.
  """

  num_examples: int
  class_names: tuple[str, ...]
  digest: str
  content: str
  in_windows: bool

  def order(self, share: Share) -> tf.data.Dataset:
    """The examples of a host, one by one: a function of `share` alone.

    Returns:
      Data set of {'id': int64, 'epoch': int64} scalars, L for each step. A
      source that streams adds the string `record`.

    Raises:
      ConfigError: a number in `share` is out of range.
    """

  def batches(
    self,
    order: tf.data.Dataset,
    example: ExampleFn,
    size: int,
    bad: BadExamples,
  ) -> Iterator[Batch]:
    """Batches of `size` examples.

    Args:
      order: from `order`, or of any ids; -1 is padding.
      example: decodes and augments one example.
      size: must divide the number of examples in `order`.
      bad: what to do about examples that cannot be used.

    Yields:
      The arrays of `example`, and int64 'id'. Unless `bad.replace`, an example
      that cannot be used is zero, and bool 'usable' says which are not.

    Raises:
      DataError: too many bad examples, or files that lack records.
      StorageError: the storage failed in spite of retries.
    """

  def describe(self, example_id: int) -> str:
    """The place of an example: its file, and where in it."""


class Encoded(abc.ABC):
  """A `Source` that reads encoded images by id.

  Attributes:
    num_examples: N.
    class_names, digest, content, in_windows: as in `Source`.
    nbytes: bytes of all examples, approximately.
    failure: the error that ended a stream; tf.data raises an OpError instead.
  """

  num_examples: int
  nbytes: int
  digest: str
  content: str
  class_names: tuple[str, ...] = ()
  in_windows: bool = False
  failure: Exception | None = None

  @abc.abstractmethod
  def fetch(self, ids: np.ndarray) -> list[bytes]:
    """Reads the records of some ids, from any thread; b'' is a damaged one."""

  @abc.abstractmethod
  def parse(self, record, example_id):
    """(encoded or decoded image, int32 label) of a record, in the graph."""

  @abc.abstractmethod
  def describe(self, example_id: int) -> str:
    """See `Source`."""

  def why_unreadable(self, example_id: int) -> str:
    """Why `fetch` gave b'' for an example; '' if that is not known."""
    del example_id
    return ''

  def order(self, share: Share) -> tf.data.Dataset:
    return sampled_order(self.num_examples, share)

  def batches(
    self,
    order: tf.data.Dataset,
    example: ExampleFn,
    size: int,
    bad: BadExamples,
  ) -> Iterator[Batch]:
    from conadv_jax.data.sources.reader import Reader

    return Reader(self, example, bad).batches(order, size)


def sampled_order(num_examples: int, share: Share) -> tf.data.Dataset:
  """`Source.order` by `sampler.example_ids`, for random access."""
  import tensorflow as tf

  positions = share.positions

  def local_ids(step):
    ids, epochs = sampler.example_ids(
      share.seed, int(step), share.batch_size, num_examples
    )
    return ids[positions], epochs[positions]

  local_ids(share.steps.start)  # A bad argument fails here, not in a thread.

  def ids_of_step(step):
    outputs = tf.numpy_function(local_ids, [step], [tf.int64, tf.int64])
    ids, epochs = (tf.ensure_shape(x, positions.shape) for x in outputs)
    return {'id': ids, 'epoch': epochs}

  dataset = tf.data.Dataset.range(share.steps.start, share.steps.stop)
  return dataset.map(ids_of_step).unbatch()


def check_positions(
  positions: np.ndarray | None, batch_size: int
) -> np.ndarray:
  """Places in a batch, int64 [L]; None stands for all of them.

  Raises:
    ValueError: a place is repeated or out of range, or there is none.
  """
  if positions is None:
    return np.arange(batch_size, dtype=np.int64)
  positions = np.asarray(positions, np.int64)
  inside = (positions >= 0) & (positions < batch_size)
  distinct = len(np.unique(positions)) == len(positions)
  if not len(positions) or not inside.all() or not distinct:
    raise ValueError(
      f'positions: need one or more, distinct and in [0, {batch_size}), got'
      f' {positions}'
    )
  return positions


def data_root(data_dir: Any) -> epath.Path:
  """`dataset.data_dir` as an absolute path; '' is TFDS's own default."""
  default = os.environ.get('TFDS_DATA_DIR', '~/tensorflow_datasets')
  path = storage.expand(data_dir or default)
  return path if storage.is_remote(path) else path.absolute()


def sha256_digits(parts: Iterable[str | bytes | np.ndarray]) -> str:
  """The first 12 digits of the SHA-256 of texts, bytes and arrays."""
  sha = hashlib.sha256()
  for part in parts:
    if isinstance(part, np.ndarray):
      sha.update(f'{part.dtype} {part.shape}'.encode())
      sha.update(np.ascontiguousarray(part))
    else:
      sha.update(os.fsencode(part) + b'\0')
  return sha.hexdigest()[:12]


def hide_gpus() -> None:
  """Keeps tensorflow off the GPUs, which belong to JAX."""
  import tensorflow as tf

  tf.config.set_visible_devices([], 'GPU')
