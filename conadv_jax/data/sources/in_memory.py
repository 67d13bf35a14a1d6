"""Data sets of small images of one size, held in memory."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from conadv_jax.base.errors import ConfigError


@dataclasses.dataclass(frozen=True, eq=False)
class InMemory:
  """The examples of one split, in memory, addressed by id 0 .. N - 1.

  Attributes:
    images: uint8 [N, H, W, C].
    labels: int32 [N], in [0, num_classes).
    num_classes: classes of the data set.

  Raises:
    ConfigError: wrong types or shapes, or a label out of range; names the first
      such example.
  """

  images: np.ndarray
  labels: np.ndarray
  num_classes: int

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


def read(builder, split: str, num_classes: int) -> InMemory:
  """All examples of a split of a prepared TFDS data set, in file order.

  Raises:
    ConfigError: the files are damaged, or a label is out of range.
  """
  import tensorflow as tf
  import tensorflow_datasets as tfds

  options = tf.data.Options()
  options.deterministic = True
  dataset = builder.as_dataset(
    split=split,
    shuffle_files=False,
    read_config=tfds.ReadConfig(
      options=options,
      try_autocache=False,
      interleave_cycle_length=1,  # One file after the other.
    ),
  )
  dataset = dataset.map(lambda example: (example['image'], example['label']))
  num_examples = builder.info.splits[split].num_examples
  shape = tuple(builder.info.features['image'].shape)
  images = np.empty((num_examples, *shape), np.uint8)
  labels = np.empty(num_examples, np.int32)
  start = 0
  try:
    for image_batch, label_batch in dataset.batch(1024).as_numpy_iterator():
      stop = start + len(label_batch)
      images[start:stop] = image_batch
      labels[start:stop] = label_batch
      start = stop
  except tf.errors.OpError as error:
    raise ConfigError(
      f'{builder.data_dir}, split {split}: cannot be read after about {start}'
      f' of {num_examples} examples: {error.message}'
    ) from error
  try:
    return InMemory(images, labels, num_classes)
  except ConfigError as error:
    raise ConfigError(f'{builder.data_dir}, split {split}: {error}') from error
