"""Data sets of small images of one size, held in memory."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from conadv_jax.base.errors import ConfigError
from conadv_jax.config import Dataset
from conadv_jax.data import slices
from conadv_jax.data.sources.source import (
  BadExamples,
  Batch,
  ExampleFn,
  Share,
  sampled_order,
  sha256_digits,
)

if TYPE_CHECKING:
  import tensorflow as tf

  from conadv_jax.data.spec import DatasetSpec


@dataclasses.dataclass(frozen=True, eq=False)
class InMemory:
  """A `Source` of arrays, addressed by id 0 .. N - 1.

  Attributes:
    images: uint8 [N, H, W, C].
    labels: int32 [N], in [0, num_classes).
    num_classes: classes of the data set.
    class_names: as in `Source`.

  Raises:
    ConfigError: wrong types or shapes, or a label out of range; names the first
      such example.
  """

  images: np.ndarray
  labels: np.ndarray
  num_classes: int
  class_names: tuple[str, ...] = ()

  def __post_init__(self):
    for array, name, dtype, ndim in (
      (self.images, 'images', np.uint8, 4),
      (self.labels, 'labels', np.int32, 1),
    ):
      if array.dtype != dtype or array.ndim != ndim:
        raise ConfigError(
          f'{name}: need {np.dtype(dtype)} with {ndim} dimensions, got'
          f' {array.dtype} {list(array.shape)}'
        )
    if len(self.images) != len(self.labels):
      raise ConfigError(
        f'{len(self.images)} images but {len(self.labels)} labels'
      )
    bad = np.flatnonzero((self.labels < 0) | (self.labels >= self.num_classes))
    if bad.size:
      raise ConfigError(
        f'example {bad[0]} has label {self.labels[bad[0]]}, outside'
        f' [0, {self.num_classes}); {bad.size} such examples'
      )

  @property
  def num_examples(self) -> int:
    return len(self.images)

  @functools.cached_property
  def digest(self) -> str:
    return sha256_digits((self.images, self.labels))

  @property
  def content(self) -> str:
    return self.digest

  @property
  def in_windows(self) -> bool:
    return False

  def order(self, share: Share) -> tf.data.Dataset:
    return sampled_order(self.num_examples, share)

  def batches(
    self,
    order: tf.data.Dataset,
    example: ExampleFn,
    size: int,
    bad: BadExamples,
  ) -> Iterator[Batch]:
    """See `Source.batches`; no example in memory is bad."""
    import tensorflow as tf

    del bad

    def one(place):
      image, label = self.lookup(tf.maximum(place['id'], 0))
      made = example(image, label, place['id'], place['epoch'])
      return {**made, 'id': place['id']}

    dataset = order.map(
      one, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True
    )
    options = tf.data.Options()
    options.deterministic = True
    dataset = dataset.batch(size, drop_remainder=True).prefetch(2)
    return dataset.with_options(options).as_numpy_iterator()

  def rows(self, ids: np.ndarray) -> Batch:
    """The examples of some ids as they are; -1 is padding, of any content."""
    return {'clean': self.images[ids], 'label': self.labels[ids], 'id': ids}

  def describe(self, example_id: int) -> str:
    del example_id
    return '-'  # It has no file.

  def lookup(self, example_id):
    """Reads one example inside `tf.data.Dataset.map`.

    Args:
      example_id: int64 scalar tensor in [0, N).

    Returns:
      (image, label): uint8 [H, W, C] and int32 scalar tensors.
    """
    images, labels = self._tensors
    return images[example_id], labels[example_id]

  @functools.cached_property
  def _tensors(self):
    import tensorflow as tf

    # Outside the graph being traced, which would hold them as constants.
    with tf.init_scope():
      return tf.constant(self.images), tf.constant(self.labels)


class Arrays:
  """A `Store` of arrays in memory."""

  def __init__(
    self,
    load: Callable[[], Mapping[str, tuple[np.ndarray, np.ndarray]]],
    class_names: Sequence[str] = (),
  ):
    """Calls nothing.

    Args:
      load: returns {split: (images, labels)}, see `splits`; is called once,
        when they are first used.
      class_names: in the order of the labels; () if they have none.
    """
    self._load = load
    self._class_names = tuple(class_names)

  @functools.cached_property
  def splits(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{split: (images uint8 [N, H, W, C], labels int32 [N])}.

    Images [N, H, W] get a channel.

    Raises:
      ConfigError: wrong types or shapes, or a negative label.
    """
    splits = {}
    for name, (images, labels) in self._load().items():
      images, labels = np.asarray(images), np.asarray(labels)
      if images.ndim == 3:
        images = images[..., None]
      if np.issubdtype(labels.dtype, np.integer):
        labels = labels.astype(np.int32)
      InMemory(images, labels, 1 + int(labels.max(initial=0)))
      splits[name] = images, labels
    shapes = {images.shape[1:] for images, _ in splits.values()}
    if len(shapes) > 1:
      raise ConfigError(f'images of different splits have shapes {shapes}')
    return splits

  def resolve(self, spec: DatasetSpec, data_dir: str) -> DatasetSpec:
    """The spec as it is.

    Raises:
      ConfigError: for a directory, from which nothing would be read.
    """
    if data_dir:
      raise ConfigError(
        f'dataset.data_dir={data_dir!r}: {spec.name!r} is read from no files;'
        " set it to '', or dataset.name to what is there"
      )
    return spec

  def version(self, data_dir: str) -> str:
    del data_dir
    return ''

  def open(
    self, spec: DatasetSpec, pieces: tuple[slices.Piece, ...], config: Dataset
  ) -> InMemory:
    parts = [
      [array[p.start : p.stop] for array in self.splits[p.split]]
      for p in pieces
    ]
    images, labels = map(np.concatenate, zip(*parts, strict=True))
    return InMemory(
      pooled(images, config.pool), labels, spec.num_classes, self._class_names
    )


def read(
  builder,
  pieces: tuple[slices.Piece, ...],
  num_classes: int,
  pool: int = 1,
  records: Sequence[bytes] | None = None,
) -> InMemory:
  """Pieces of a prepared TFDS data set, in file order; images are `pooled`.

  Args:
    builder: of TFDS.
    pieces: what to read.
    num_classes: labels are below it.
    pool: see `pooled`.
    records: of `pieces`, where TFDS has no tf.data of the file format.

  Raises:
    ConfigError: the files are damaged, or a label is out of range.
  """
  import tensorflow as tf

  split, features = slices.to_text(pieces), builder.info.features
  if records is None:
    dataset = _in_file_order(builder, split)
  else:
    dataset = tf.data.Dataset.from_tensor_slices(records)
    dataset = dataset.map(features.deserialize_example)
  dataset = dataset.map(lambda example: (example['image'], example['label']))
  num_examples, height, width, channels = (
    slices.count(pieces),
    *features['image'].shape,
  )
  shape = (num_examples, height // pool, width // pool, channels)
  images = np.empty(shape, np.uint8)
  labels = np.empty(num_examples, np.int32)
  start = 0
  try:
    for image_batch, label_batch in dataset.batch(1024).as_numpy_iterator():
      stop = start + len(label_batch)
      images[start:stop] = pooled(image_batch, pool)
      labels[start:stop] = label_batch
      start = stop
  except tf.errors.OpError as error:
    raise ConfigError(
      f'{builder.data_dir}, split {split}: cannot be read after about {start}'
      f' of {num_examples} examples: {error.message}'
    ) from error
  try:
    names = tuple(features['label'].names)
    return InMemory(images, labels, num_classes, names)
  except ConfigError as error:
    raise ConfigError(f'{builder.data_dir}, split {split}: {error}') from error


def _in_file_order(builder, split: str) -> tf.data.Dataset:
  import tensorflow as tf
  import tensorflow_datasets as tfds

  options = tf.data.Options()
  options.deterministic = True
  return builder.as_dataset(
    split=split,
    shuffle_files=False,
    read_config=tfds.ReadConfig(
      options=options,
      try_autocache=False,
      interleave_cycle_length=1,  # One file after the other.
    ),
  )


def pooled(images: np.ndarray, pool: int) -> np.ndarray:
  """Means over blocks of pool x pool pixels, rounded half up.

  Args:
    images: uint8 [N, H, W, C]; `pool` divides H and W.
    pool: side of a block in pixels; 1 returns the images as they are.

  Returns:
    uint8 [N, H / pool, W / pool, C].
  """
  if pool == 1:
    return images
  count, height, width, channels = images.shape
  blocks = images.reshape(
    count, height // pool, pool, width // pool, pool, channels
  )
  sums = blocks.sum((2, 4), dtype=np.uint32)
  return ((2 * sums + pool**2) // (2 * pool**2)).astype(np.uint8)
