"""Registered data sets, and reading a prepared one into memory.

Importing this file needs no tensorflow; `load` and `Source.lookup` do.
Nothing here downloads: a data set that is not prepared is an error that says
which command prepares it.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import shlex
from typing import Literal

import numpy as np
from etils import epath

from conadv_jax import config


@dataclasses.dataclass(frozen=True)
class DatasetSpec:
  """What the project knows of a data set before reading it.

  Attributes:
    name: the value of `dataset.name`.
    tfds_name: its directory under the TFDS data directory.
    num_classes: labels are 0 .. num_classes - 1.
    train_split: TFDS split that is trained on.
    eval_split: TFDS split that accuracy is reported on.
    num_train: examples in the train split.
    num_eval: examples in the eval split.
    image_shape: (H, W, C) in pixels and channels.
    mean_px: mean of the train split per channel, grey levels of 255.
    std_px: standard deviation likewise.
    allows_flip: whether a mirrored image keeps its label.
    prepare_command: shell command that prepares it in `{data_dir}`; empty for
      an embedded data set.
    embedded: whether `load` prepares it by itself, without a network.
  """

  name: str
  tfds_name: str
  num_classes: int
  train_split: str
  eval_split: str
  num_train: int
  num_eval: int
  image_shape: tuple[int, int, int]
  mean_px: tuple[float, ...]
  std_px: tuple[float, ...]
  allows_flip: bool
  prepare_command: str
  embedded: bool


DATASETS = {
  spec.name: spec
  for spec in (
    DatasetSpec(
      name='digits',
      tfds_name='digits',
      num_classes=10,
      train_split='train',
      eval_split='test',
      num_train=1437,
      num_eval=360,
      image_shape=(8, 8, 1),
      mean_px=(77.8,),
      std_px=(95.9,),
      allows_flip=False,
      prepare_command='',
      embedded=True,
    ),
    DatasetSpec(
      name='fashion_mnist',
      tfds_name='fashion_mnist',
      num_classes=10,
      train_split='train',
      eval_split='test',
      num_train=60_000,
      num_eval=10_000,
      image_shape=(28, 28, 1),
      mean_px=(72.9,),
      std_px=(90.0,),
      allows_flip=True,
      prepare_command=(
        'python scripts/prepare_fashion_mnist.py --data_dir={data_dir}'
      ),
      embedded=False,
    ),
    DatasetSpec(
      name='cifar10',
      tfds_name='cifar10',
      num_classes=10,
      train_split='train',
      eval_split='test',
      num_train=50_000,
      num_eval=10_000,
      image_shape=(32, 32, 3),
      mean_px=(125.3, 123.0, 113.9),
      std_px=(63.0, 62.1, 66.7),
      allows_flip=True,
      prepare_command='tfds build cifar10 --data_dir={data_dir}',
      embedded=False,
    ),
    DatasetSpec(
      name='cifar100',
      tfds_name='cifar100',
      num_classes=100,
      train_split='train',
      eval_split='test',
      num_train=50_000,
      num_eval=10_000,
      image_shape=(32, 32, 3),
      mean_px=(129.3, 124.1, 112.4),
      std_px=(68.2, 65.4, 70.4),
      allows_flip=True,
      prepare_command='tfds build cifar100 --data_dir={data_dir}',
      embedded=False,
    ),
  )
}


def get_spec(name: str) -> DatasetSpec:
  """The registered data set `name`; ConfigError names the nearest known one."""
  if name not in DATASETS:
    raise config.unknown('dataset.name', name, DATASETS)
  return DATASETS[name]


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
  """The examples of one split, in memory, addressed by id 0 .. N - 1.

  The pipeline uses `num_examples` and `lookup` only.

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
        raise config.ConfigError(
          f'{name}: need {np.dtype(dtype)} with {ndim} dimensions, got'
          f' {array.dtype} {list(array.shape)}'
        )
    if len(self.images) != len(self.labels):
      raise config.ConfigError(
        f'{len(self.images)} images but {len(self.labels)} labels'
      )
    bad = np.flatnonzero((self.labels < 0) | (self.labels >= self.num_classes))
    if bad.size:
      raise config.ConfigError(
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


def hide_gpus() -> None:
  """Keeps tensorflow off the GPUs, which belong to JAX."""
  import tensorflow as tf

  tf.config.set_visible_devices([], 'GPU')


def load(
  spec: DatasetSpec, split: Literal['train', 'eval'], data_dir: str
) -> Source:
  """Reads one split of a prepared data set, in the order of its files.

  Args:
    spec: from `get_spec`.
    split: 'train' or 'eval'.
    data_dir: TFDS data directory; '' is TFDS's own default, `$TFDS_DATA_DIR` or
      ~/tensorflow_datasets.

  Returns:
    All examples of the split.

  Raises:
    ConfigError: the data set is missing, half-prepared or damaged, or is not
      the one that `spec` describes.
  """
  name, num_examples = {
    'train': (spec.train_split, spec.num_train),
    'eval': (spec.eval_split, spec.num_eval),
  }[split]
  root = _resolve(data_dir)
  if spec.embedded:
    from conadv_jax.data import digits

    hide_gpus()  # Encoding images starts tensorflow.
    directory = epath.Path(digits.prepare(str(root)))
  else:
    directory = _find(spec, root)
  builder = _open(spec, name, root, directory)
  _check_info(spec, builder.info, name, num_examples, directory)
  images, labels = _read(builder, name, spec, num_examples)
  try:
    return Source(images, labels, spec.num_classes)
  except config.ConfigError as error:
    raise config.ConfigError(f'{directory}, split {name}: {error}') from error


def _resolve(data_dir: str) -> epath.Path:
  default = os.environ.get('TFDS_DATA_DIR', '~/tensorflow_datasets')
  path = epath.Path(data_dir or default).expanduser()
  return path if '://' in str(path) else path.absolute()


def _find(spec: DatasetSpec, root: epath.Path) -> epath.Path:
  """The directory of the newest prepared version."""
  parent = root / spec.tfds_name
  names = [path.name for path in parent.iterdir()] if parent.exists() else []
  versions = [name for name in names if re.fullmatch(r'\d+\.\d+\.\d+', name)]
  if not versions:
    state = 'an unfinished preparation is' if names else 'nothing is'
    raise config.ConfigError(
      f'dataset.name={spec.name!r}: not prepared, {state} in {parent};'
      f' {_remedy(spec, root)}'
    )
  return parent / max(versions, key=lambda v: [int(n) for n in v.split('.')])


def _remedy(spec: DatasetSpec, root: epath.Path) -> str:
  if spec.embedded:
    return 'run the same command again'
  command = spec.prepare_command.format(data_dir=shlex.quote(str(root)))
  return f'set dataset.data_dir, or prepare it with:\n  {command}'


def _open(
  spec: DatasetSpec, split: str, root: epath.Path, directory: epath.Path
):
  """The TFDS builder of `directory`, once all files of the split are there."""

  def half_prepared(what: str) -> config.ConfigError:
    return config.ConfigError(
      f'dataset.name={spec.name!r}: {directory} is half-prepared, {what};'
      f' remove that directory, then {_remedy(spec, root)}'
    )

  for name in ('dataset_info.json', 'features.json'):
    if not (directory / name).exists():
      raise half_prepared(f'it has no {name}')

  import tensorflow_datasets as tfds
  from google.protobuf import json_format

  try:
    builder = tfds.builder_from_directory(str(directory))
  except (OSError, ValueError, json_format.ParseError) as error:
    raise half_prepared(f'its metadata is not readable ({error})') from error
  if split not in builder.info.splits:
    raise half_prepared(f'it has no split {split!r}')
  for path in builder.info.splits[split].filepaths:
    if not path.exists():
      raise half_prepared(f'{path.name} is missing')
  return builder


def _check_info(
  spec: DatasetSpec, info, split: str, num_examples: int, directory: epath.Path
) -> None:
  features = info.features
  for what, found, needed in (
    ('classes', features['label'].num_classes, spec.num_classes),
    ('image shape', tuple(features['image'].shape), spec.image_shape),
    (f'{split} examples', info.splits[split].num_examples, num_examples),
  ):
    if found != needed:
      raise config.ConfigError(
        f'dataset.name={spec.name!r}: {directory} has {what} {found}, need'
        f' {needed}; it is another data set, or was prepared in part'
      )


def _read(builder, split: str, spec: DatasetSpec, num_examples: int):
  """All (images uint8 [N, H, W, C], labels int32 [N]) in file order."""
  import tensorflow as tf
  import tensorflow_datasets as tfds

  hide_gpus()
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
  images = np.empty((num_examples, *spec.image_shape), np.uint8)
  labels = np.empty(num_examples, np.int32)
  start = 0
  try:
    for image_batch, label_batch in dataset.batch(1024).as_numpy_iterator():
      stop = start + len(label_batch)
      images[start:stop] = image_batch
      labels[start:stop] = label_batch
      start = stop
  except tf.errors.OpError as error:
    raise config.ConfigError(
      f'{builder.data_dir}, split {split}: cannot be read after about {start}'
      f' of {num_examples} examples: {error.message}'
    ) from error
  return images, labels
