"""Registered data sets, and opening a prepared one.

Importing this file needs no tensorflow; `load` does. Nothing here downloads: a
data set that is not prepared is an error that says which command prepares it.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import re
import shlex
from typing import Any, Literal

from etils import epath

from conadv_jax.base.errors import ConfigError, unknown
from conadv_jax.config import Dataset


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
    image_shape: (H, W, C) in pixels and channels; H and W are 0 in the registry
      where images are of any size, until `resolve` puts the size of the crop.
    mean: mean of the train split per channel, grey levels of 255.
    std: standard deviation likewise.
    allows_flip: whether a mirrored image keeps its label.
    prepare_command: shell command that prepares it in `{data_dir}`; empty for
      an embedded data set.
    embedded: whether `load` prepares it by itself, without a network.
    encoded: whether examples are JPEG or PNG files of any size, which stay
      encoded until they are cropped; otherwise all images are kept in memory.
    first_label: name of label 0 and of the last one, which tell an offset or
    last_label: another order of the classes; '' is not checked.
  """

  name: str
  tfds_name: str
  num_classes: int
  train_split: str
  eval_split: str
  num_train: int
  num_eval: int
  image_shape: tuple[int, int, int]
  mean: tuple[float, ...]
  std: tuple[float, ...]
  allows_flip: bool
  prepare_command: str
  embedded: bool
  encoded: bool = False
  first_label: str = ''
  last_label: str = ''


# Means and deviations of ImageNet in [0, 1], as torchvision and timm use them.
_IMAGENET_MEAN = tuple(255 * x for x in (0.485, 0.456, 0.406))
_IMAGENET_STD = tuple(255 * x for x in (0.229, 0.224, 0.225))
_FOLDER = 'image_folder'

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
      mean=(77.8,),
      std=(95.9,),
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
      mean=(72.9,),
      std=(90.0,),
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
      mean=(125.3, 123.0, 113.9),
      std=(63.0, 62.1, 66.7),
      allows_flip=True,
      prepare_command=(
        'python scripts/prepare_tfds.py --name=cifar10 --data_dir={data_dir}'
      ),
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
      mean=(129.3, 124.1, 112.4),
      std=(68.2, 65.4, 70.4),
      allows_flip=True,
      prepare_command=(
        'python scripts/prepare_tfds.py --name=cifar100 --data_dir={data_dir}'
      ),
      embedded=False,
    ),
    DatasetSpec(
      name='imagenet2012',
      tfds_name='imagenet2012',
      num_classes=1000,
      train_split='train',
      eval_split='validation',
      num_train=1_281_167,
      num_eval=50_000,
      image_shape=(0, 0, 3),
      mean=_IMAGENET_MEAN,
      std=_IMAGENET_STD,
      allows_flip=True,
      prepare_command=(
        'python scripts/prepare_tfds.py --name=imagenet2012'
        ' --data_dir={data_dir} --manual_dir=DIRECTORY_OF_THE_TAR_FILES\n'
        'as scripts/prepare_imagenet.md explains'
      ),
      embedded=False,
      encoded=True,
      first_label='n01440764',
      last_label='n15075141',
    ),
    # Classes and sizes are those of the folder: see `resolve`.
    DatasetSpec(
      name=_FOLDER,
      tfds_name='',
      num_classes=0,
      train_split='train',
      eval_split='val',
      num_train=0,
      num_eval=0,
      image_shape=(0, 0, 3),
      mean=_IMAGENET_MEAN,
      std=_IMAGENET_STD,
      allows_flip=True,
      prepare_command='',
      embedded=False,
      encoded=True,
    ),
  )
}


def get_spec(name: str) -> DatasetSpec:
  """The registered data set `name`; ConfigError names the nearest known one."""
  if name not in DATASETS:
    raise unknown('dataset.name', name, DATASETS)
  return DATASETS[name]


def resolve(settings: Dataset) -> DatasetSpec:
  """The data set that `settings` describe.

  The image shape of encoded data sets comes from `image_size_px`, and
  everything about a folder of images from listing it.

  Raises:
    ConfigError: an unknown name, a size that does not fit the data set, or a
      folder that is not there.
  """
  spec = get_spec(settings.name)
  size = settings.image_size_px
  if not spec.encoded and size:
    raise ConfigError(
      f'dataset.image_size_px={size}: images of {spec.name!r} are'
      f' {spec.image_shape[0]} px and used as they are; set it to 0'
    )
  if spec.encoded:
    if not size:
      raise ConfigError(
        f'dataset.image_size_px=0: images of {spec.name!r} are of any size; set'
        ' the height and width of the crops, such as 224'
      )
    if settings.crop_padding_px:
      raise ConfigError(
        f'dataset.crop_padding_px={settings.crop_padding_px}: images of'
        f' {spec.name!r} are cropped to dataset.image_size_px; set it to 0'
      )
    spec = dataclasses.replace(spec, image_shape=(size, size, 3))
  elif settings.cache != 'none':
    raise ConfigError(
      f'dataset.cache={settings.cache!r}: {spec.name!r} is in memory anyway;'
      " set it to 'none'"
    )
  if spec.name == _FOLDER:
    from conadv_jax.data.sources import image_folder

    directory = str(_resolve(settings.data_dir))
    folder = image_folder.scan(directory, (spec.train_split, spec.eval_split))
    spec = dataclasses.replace(
      spec,
      num_classes=len(folder[spec.train_split].class_names),
      num_train=folder[spec.train_split].num_examples,
      num_eval=folder[spec.eval_split].num_examples,
    )
  return spec


def hide_gpus() -> None:
  """Keeps tensorflow off the GPUs, which belong to JAX."""
  import tensorflow as tf

  tf.config.set_visible_devices([], 'GPU')


def load(
  spec: DatasetSpec,
  split: Literal['train', 'eval'],
  data_dir: str,
  *,
  window_shards: int = 8,
) -> Any:
  """Opens one split of a prepared data set; reads it if it is a small one.

  Args:
    spec: from `resolve`.
    split: 'train' or 'eval'.
    data_dir: TFDS data directory; '' is TFDS's own default, `$TFDS_DATA_DIR` or
      ~/tensorflow_datasets. Of a folder of images: that folder.
    window_shards: TFRecord files that are shuffled together.

  Returns:
    `InMemory`, or for encoded data sets `ArrayRecords`, `TfRecords` or
    `ImageFolder`; ids are places in the order of the files.

  Raises:
    ConfigError: the data set is missing, half-prepared or damaged, or is not
      the one that `spec` describes.
  """
  name, num_examples = {
    'train': (spec.train_split, spec.num_train),
    'eval': (spec.eval_split, spec.num_eval),
  }[split]
  root = _resolve(data_dir)
  if spec.name == _FOLDER:
    from conadv_jax.data.sources import image_folder

    source = image_folder.ImageFolder(str(root), name)
    if source.num_ignored:
      print(f'{root}/{name}: {source.num_ignored} entries are no images')
    return source
  if spec.embedded:
    from conadv_jax.data.sources import digits

    hide_gpus()  # Encoding images starts tensorflow.
    directory = epath.Path(digits.prepare(str(root)))
  else:
    directory = _find(spec, root)
  builder = _open(spec, name, root, directory)
  _check_info(spec, builder.info, name, num_examples, directory)
  hide_gpus()
  if not spec.encoded:
    from conadv_jax.data.sources import in_memory

    return in_memory.read(builder, name, spec.num_classes)
  return _records(spec, builder, name, window_shards)


def version(spec: DatasetSpec, data_dir: str) -> str:
  """Version of the prepared data that `load` opens; '' if it has none."""
  if spec.embedded or spec.name == _FOLDER:
    return ''
  return _find(spec, _resolve(data_dir)).name


def _records(spec: DatasetSpec, builder, split: str, window_shards: int):
  info = builder.info.splits[split]
  file_format = builder.info.file_format.value
  if file_format == 'array_record':
    from conadv_jax.data.sources import array_record

    return array_record.ArrayRecords(info.filepaths, info.shard_lengths)
  if file_format == 'tfrecord':
    from conadv_jax.data.sources import tfrecord

    return tfrecord.TfRecords(
      info.filepaths, info.shard_lengths, window_shards=window_shards
    )
  raise ConfigError(
    f'dataset.name={spec.name!r}: {builder.data_dir} holds {file_format} files;'
    ' need array_record or tfrecord; see scripts/prepare_imagenet.md'
  )


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
    raise ConfigError(
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

  def half_prepared(what: str) -> ConfigError:
    return ConfigError(
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
  paths = builder.info.splits[split].filepaths
  # A thousand look-ups in a bucket, one after the other, would take a minute.
  with concurrent.futures.ThreadPoolExecutor(32) as pool:
    there = list(pool.map(lambda path: path.exists(), paths))
  missing = [p.name for p, found in zip(paths, there, strict=True) if not found]
  if missing:
    others = f' and {len(missing) - 1} others are' if missing[1:] else ' is'
    raise half_prepared(f'{missing[0]}{others} missing')
  return builder


def _check_info(
  spec: DatasetSpec, info, split: str, num_examples: int, directory: epath.Path
) -> None:
  """Compares the data set's own description with `spec`."""
  label, image = info.features['label'], info.features['image']
  field = 'num_train' if split == spec.train_split else 'num_eval'
  shape = tuple(None if spec.encoded else size for size in spec.image_shape[:2])
  checks = [
    ('classes', label.num_classes, spec.num_classes, ''),
    ('image shape', tuple(image.shape), (*shape, spec.image_shape[2]), ''),
    (
      f'{split} examples',
      info.splits[split].num_examples,
      num_examples,
      f'. If you want it as it is, set dataset.{field} to that number',
    ),
  ]
  if spec.first_label:
    checks += [
      ('first label', label.names[0], spec.first_label, ''),
      ('last label', label.names[-1], spec.last_label, ''),
    ]
  for what, found, needed, hint in checks:
    if found != needed:
      raise ConfigError(
        f'dataset.name={spec.name!r}: {directory} has {what} {found}, need'
        f' {needed}; it is another data set, or was prepared in part{hint}'
      )
