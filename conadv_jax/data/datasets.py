"""Registered data sets, and what a configuration makes of them.

Importing this file needs no tensorflow; `DatasetSpec.open` does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from conadv_jax.base.errors import ConfigError, unknown
from conadv_jax.config import Dataset
from conadv_jax.data import imagenet_sets
from conadv_jax.data.sources import digits
from conadv_jax.data.sources.image_folder import Folder
from conadv_jax.data.sources.in_memory import Arrays
from conadv_jax.data.sources.prepared import Prepared
from conadv_jax.data.spec import DatasetSpec

# Means and deviations of ImageNet in [0, 1], as torchvision and timm use them.
_IMAGENET_MEAN = tuple(255 * x for x in (0.485, 0.456, 0.406))
_IMAGENET_STD = tuple(255 * x for x in (0.229, 0.224, 0.225))
_BY_TFDS = (
  'python scripts/prepare_tfds.py --name={name} --data_dir={{data_dir}}'
)

# {dataset.name: the spec, or a function that makes it when it is asked for}.
DATASETS: dict[str, DatasetSpec | Callable[[], DatasetSpec]] = {
  spec.name: spec
  for spec in (
    DatasetSpec(
      name='digits',
      num_classes=10,
      splits={'train': 1437, 'test': 360},
      train_split='train',
      eval_split='test',
      image_shape=(8, 8, 1),
      mean=(77.8,),
      std=(95.9,),
      allows_flip=False,
      store=Arrays(digits.load, class_names=tuple('0123456789')),
    ),
    DatasetSpec(
      name='fashion_mnist',
      num_classes=10,
      splits={'train': 60_000, 'test': 10_000},
      train_split='train',
      eval_split='test',
      image_shape=(28, 28, 1),
      mean=(72.9,),
      std=(90.0,),
      allows_flip=True,
      store=Prepared(
        'fashion_mnist',
        'python scripts/prepare_fashion_mnist.py --data_dir={data_dir}',
      ),
    ),
    DatasetSpec(
      name='cifar10',
      num_classes=10,
      splits={'train': 50_000, 'test': 10_000},
      train_split='train',
      eval_split='test',
      image_shape=(32, 32, 3),
      mean=(125.3, 123.0, 113.9),
      std=(63.0, 62.1, 66.7),
      allows_flip=True,
      store=Prepared('cifar10', _BY_TFDS.format(name='cifar10')),
    ),
    DatasetSpec(
      name='cifar100',
      num_classes=100,
      splits={'train': 50_000, 'test': 10_000},
      train_split='train',
      eval_split='test',
      image_shape=(32, 32, 3),
      mean=(129.3, 124.1, 112.4),
      std=(68.2, 65.4, 70.4),
      allows_flip=True,
      store=Prepared('cifar100', _BY_TFDS.format(name='cifar100')),
    ),
    DatasetSpec(
      name='imagenet2012',
      num_classes=1000,
      splits={'train': 1_281_167, 'validation': 50_000},
      train_split='train',
      eval_split='validation',
      image_shape=(0, 0, 3),
      mean=_IMAGENET_MEAN,
      std=_IMAGENET_STD,
      allows_flip=True,
      store=Prepared(
        'imagenet2012',
        'python scripts/prepare_imagenet.py --tars=DIRECTORY_OF_THE_TAR_FILES'
        ' --data_dir={data_dir}\nas docs/data.md explains',
        resumes=True,
        first_label='n01440764',
        last_label='n15075141',
      ),
      encoded=True,
    ),
    # Its classes and sizes are those of the folder.
    DatasetSpec(
      name='image_folder',
      num_classes=0,
      splits={},
      train_split='train',
      eval_split='val',
      image_shape=(0, 0, 3),
      mean=_IMAGENET_MEAN,
      std=_IMAGENET_STD,
      allows_flip=True,
      store=Folder(),
      encoded=True,
    ),
  )
}
DATASETS |= {
  spec.name: spec for spec in imagenet_sets.specs(DATASETS['imagenet2012'])
}
# The same examples in another order: of each class one in any ten.
DATASETS['fashion_mnist_balanced'] = dataclasses.replace(
  DATASETS['fashion_mnist'],
  name='fashion_mnist_balanced',
  store=Prepared(
    'fashion_mnist_balanced',
    'python scripts/prepare_fashion_mnist.py --balanced --data_dir={data_dir}',
  ),
)


def get_spec(name: str) -> DatasetSpec:
  """The registered data set `name`; ConfigError names the nearest known one."""
  if name not in DATASETS:
    raise unknown('dataset.name', name, DATASETS)
  if not isinstance(DATASETS[name], DatasetSpec):
    DATASETS[name] = DATASETS[name]()
  return DATASETS[name]


def from_arrays(
  name: str,
  train: tuple[np.ndarray, np.ndarray],
  test: tuple[np.ndarray, np.ndarray],
  *,
  mean: tuple[float, ...] | None = None,
  std: tuple[float, ...] | None = None,
  allows_flip: bool = False,
  class_names: Sequence[str] = (),
) -> DatasetSpec:
  """Makes a data set of arrays, for `DATASETS[name] = ...`.

  Its splits are 'train' and 'test'. A run keeps a checksum of the arrays, and
  refuses to resume with others.

  Args:
    name: the value of `dataset.name`.
    train: images, uint8 [N, H, W, C] or [N, H, W]; labels, integers [N] from 0.
    test: likewise.
    mean: per channel in grey levels of 255; None is that of `train`.
    std: standard deviation, likewise.
    allows_flip: whether a mirrored image keeps its label.
    class_names: in the order of the labels; () if they have none.

  Raises:
    ConfigError: wrong types or shapes, or a negative label.
  """
  store = Arrays(lambda: {'train': train, 'test': test}, class_names)
  images, _ = store.splits['train']
  pixels = images.reshape(-1, images.shape[-1])
  num_classes = 1 + max(int(y.max()) for _, y in store.splits.values())
  if class_names and len(class_names) != num_classes:
    raise ConfigError(
      f'class_names: {len(class_names)} names for {num_classes} classes; give '
      'one for each label'
    )
  return DatasetSpec(
    name=name,
    num_classes=num_classes,
    splits={split: len(x) for split, (x, _) in store.splits.items()},
    train_split='train',
    eval_split='test',
    image_shape=images.shape[1:],
    mean=tuple(map(float, pixels.mean(0) if mean is None else mean)),
    std=tuple(map(float, pixels.std(0) if std is None else std)),
    allows_flip=allows_flip,
    store=store,
  )


def resolve(config: Dataset, *, eval_only: bool = False) -> DatasetSpec:
  """The data set that `config` describes.

  Sizes are those of the files where they are there, else the published ones;
  the image shape follows `image_size_px` and `pool`.

  Args:
    config: names it, and where it is.
    eval_only: whether the files of the training split are not looked for.

  Raises:
    ConfigError: an unknown name, a size, slice or `pool` that does not fit the
      data set, or a folder that is not there.
  """
  spec = _described(config)
  if eval_only:
    spec = dataclasses.replace(spec, train_split=spec.eval_split)
  found = spec.store.resolve(spec, config.data_dir)
  for split, published in spec.splits.items():
    if found.splits[split] != published:
      print(
        f'{spec.name}: found {found.splits[split]:,} examples in {split!r}, of'
        f' {published:,} in the published data set'
      )
  for part in ('eval', 'train'):  # With `eval_only` both are the former.
    found.pieces(part)  # Raises for a wrong slice.
  return found


def recorded(config: Dataset, data: Mapping[str, Any]) -> DatasetSpec:
  """The data set that a run was trained on, without a look at its files.

  Args:
    config: names it.
    data: what the run's config.json says of it: `num_classes` and `splits`. An
      older run lacks them; then the files are looked at after all.

  Raises:
    ConfigError: an unknown name, or a size or `pool` that does not fit.
  """
  if 'splits' not in data:
    return resolve(config)
  known = {name: data[name] for name in ('num_classes', 'splits')}
  return dataclasses.replace(_described(config), **known)


def _described(config: Dataset) -> DatasetSpec:
  """The registered data set, with the splits and image shape of `config`."""
  spec = get_spec(config.name)
  if not spec.encoded:
    _check_not_encoded(spec, config)
  return dataclasses.replace(
    spec,
    train_split=config.train_split or spec.train_split,
    eval_split=config.eval_split or spec.eval_split,
    image_shape=_image_shape(spec, config),
  )


def _check_not_encoded(spec: DatasetSpec, config: Dataset) -> None:
  """Refuses what only files of images of any size have."""
  if config.cache != 'none':
    raise ConfigError(
      f'dataset.cache={config.cache!r}: {spec.name!r} is in memory anyway;'
      " set it to 'none'"
    )
  for field in ('interpolation', 'antialias', 'eval_crop_ratio'):
    value, default = getattr(config, field), getattr(Dataset, field)
    if value != default:
      raise ConfigError(
        f'dataset.{field}={value!r}: images of {spec.name!r} are of one size,'
        f' and not resized; leave it at {default!r}'
      )


def _image_shape(spec: DatasetSpec, config: Dataset) -> tuple[int, int, int]:
  """(H, W, C) of the images that the network sees."""
  size, pool = config.image_size_px, config.pool
  height, width, channels = spec.image_shape
  if not spec.encoded:
    if size:
      raise ConfigError(
        f'dataset.image_size_px={size}: images of {spec.name!r} are'
        f' {height} px and used as they are; set it to 0'
      )
    if height % pool or width % pool:
      raise ConfigError(
        f'dataset.pool={pool}: images of {spec.name!r} are {height} x {width}'
        ' px, which it does not divide; set it to 1'
      )
    return height // pool, width // pool, channels
  if not size:
    raise ConfigError(
      f'dataset.image_size_px=0: images of {spec.name!r} are of any size; set'
      ' the height and width of the crops, such as 224'
    )
  for field, value, off in (
    ('crop_padding_px', config.crop_padding_px, 0),
    ('pool', pool, 1),
  ):
    if value != off:
      raise ConfigError(
        f'dataset.{field}={value}: images of {spec.name!r} are cropped to'
        f' dataset.image_size_px; set it to {off}'
      )
  return size, size, channels
