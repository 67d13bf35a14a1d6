#!/usr/bin/env python
"""Writes a small fake imagenet2012, to try configs and measure the input.

python scripts/make_fake_imagenet.py --data_dir=/tmp/fake --num_train=2000

It has TFDS's own schema and needs no network. The images are windows of the two
sample photographs of scikit-learn, encoded at the sizes and in the quality
range that are typical of ImageNet. The class is a tint that `class_of` reads
back from the pixels after any crop, flip or resize, so that a test sees a wrong
label.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Iterator
from typing import Literal

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from PIL import Image
from tensorflow_datasets.datasets.imagenet2012 import (
  imagenet2012_dataset_builder,
)

from conadv_jax.base import storage
from conadv_jax.base.errors import ConfigError

CLASSES = tuple(range(0, 1000, 111))  # 0, 111, ..., 999: both ends are used.

_SIZES_PX = (  # (width, height); the first is the commonest of ImageNet.
  *[(500, 375)] * 6,
  *[(375, 500)] * 2,
  *[(500, 333)] * 2,
  (300, 300),
  (400, 600),
  (640, 480),
)
_QUALITIES = (85, 96, 98, 99)
_MIN_WINDOW = 0.8  # Side of a window, as a share of the largest that fits.
_TINT = 45.0  # Length of a class's (Cb, Cr), in grey levels.
_PHOTO_CHROMA = 0.1  # What is left of the photograph's own colours.
_GREY_RANGE = (16.0, 239.0)  # Black and white could not carry a tint.
_ROOM = 90.0  # Greys nearer to black or white get less tint: none is clipped.


def prepare(
  root: str,
  file_format: Literal['array_record', 'tfrecord'] = 'array_record',
  num_train: int = 200,
  num_eval: int = 50,
  num_shards: int = 8,
  seed: int = 0,
) -> str:
  """Writes `root`/imagenet2012/VERSION, for `tfds.builder_from_directory`.

  Each split goes round `CLASSES`. Several processes may prepare the same root
  at once.

  Args:
    root: a local TFDS data directory, made if missing.
    file_format: of the records.
    num_train: examples of the split 'train'.
    num_eval: examples of the split 'validation'.
    num_shards: files of each split; at most its examples.
    seed: keys windows, sizes and qualities.

  Returns:
    The directory of the prepared data set.

  Raises:
    ConfigError: an argument is out of range, `root` is remote, or it holds
      another imagenet2012, which is left as it is.
  """
  _check(root, num_train, num_eval, num_shards)
  identity = (
    f'Fake imagenet2012: {file_format}, num_train={num_train},'
    f' num_eval={num_eval}, num_shards={num_shards}, seed={seed}.'
  )
  parent = pathlib.Path(root) / 'imagenet2012'
  directory = parent / str(_FakeImagenet2012.VERSION)
  parent.mkdir(parents=True, exist_ok=True)
  work = tempfile.mkdtemp(prefix='incomplete.', dir=parent)
  try:
    if not _is_prepared(directory, identity):
      built = _build(
        work, file_format, num_shards, identity, num_train, num_eval, seed
      )
      with contextlib.suppress(OSError):  # Another process was first.
        os.rename(built, directory)
      if not _is_prepared(directory, identity):
        raise OSError(f'cannot rename {built} to {directory}')
  finally:
    shutil.rmtree(work)
  return str(directory)


def write_folder(
  root: str, num_train: int = 200, num_eval: int = 50, seed: int = 0
) -> str:
  """Writes the images of `prepare` as root/{train,val}/SYNSET/NAME.JPEG.

  Labels of such a folder are 0 .. 9, places in `CLASSES`.

  Args:
    root: a local directory that does not exist yet.
    num_train: images under train/; 10 or more, so that no class is empty.
    num_eval: images under val/, likewise.
    seed: as in `prepare`.

  Returns:
    `root`.

  Raises:
    ConfigError: `root` exists, or a count is too small.
  """
  _check(root, num_train, num_eval, 1)
  if min(num_train, num_eval) < len(CLASSES):
    raise ConfigError(
      f'num_train={num_train}, num_eval={num_eval}: a folder needs'
      f' {len(CLASSES)} images or more in each split, one for each class'
    )
  target = pathlib.Path(root)
  if target.exists():
    raise ConfigError(f'{root} exists; remove it or name another')
  target.parent.mkdir(parents=True, exist_ok=True)
  work = tempfile.mkdtemp(prefix='incomplete.', dir=target.parent)
  try:
    for split, name, count in (
      ('train', 'train', num_train),
      ('validation', 'val', num_eval),
    ):
      for file_name, synset, data in _images(split, count, seed):
        path = pathlib.Path(work, name, synset, file_name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    os.chmod(work, 0o755)
    os.rename(work, target)
  except BaseException:
    shutil.rmtree(work, ignore_errors=True)
    raise
  return root


def class_of(image: np.ndarray) -> int:
  """The label of a fake image, from the direction of its mean (Cb, Cr).

  Args:
    image: uint8 [H, W, 3]: an image of this data set or any crop, flip or
      resize of one, without changes of colour.

  Returns:
    One of `CLASSES`.
  """
  red, green, blue = image.reshape(-1, 3).mean(axis=0, dtype=np.float64)
  cb = -0.168736 * red - 0.331264 * green + 0.5 * blue
  cr = 0.5 * red - 0.418688 * green - 0.081312 * blue
  turn = np.arctan2(cr, cb) / (2 * np.pi)
  return CLASSES[round(turn * len(CLASSES)) % len(CLASSES)]


@functools.cache
def synsets() -> tuple[str, ...]:
  """The 1,000 class names of ImageNet, in the order of the labels."""
  path = imagenet2012_dataset_builder.imagenet_common.label_names_file()
  return tuple(path.read_text().split())


def _check(root: str, num_train: int, num_eval: int, num_shards: int) -> None:
  if storage.is_remote(root):
    raise ConfigError(f'{root}: need a local directory')
  if min(num_train, num_eval, num_shards) < 1:
    raise ConfigError(
      f'num_train={num_train}, num_eval={num_eval}, num_shards={num_shards}:'
      ' must be 1 or more'
    )
  if num_shards > min(num_train, num_eval):
    raise ConfigError(
      f'num_shards={num_shards}: must be at most the examples of each split,'
      f' {num_train} and {num_eval}'
    )


def _is_prepared(directory: pathlib.Path, identity: str) -> bool:
  """Whether `directory` is there; ConfigError if the root is taken."""
  names = [path.name for path in directory.parent.iterdir()]
  names = [name for name in names if not name.startswith('incomplete.')]
  if not names:
    return False
  info = directory / 'dataset_info.json'
  if names != [directory.name] or identity not in info.read_text():
    raise ConfigError(
      f'{directory.parent} holds another imagenet2012; choose another directory'
      f' or remove it, if it is fake too (wanted: {identity})'
    )
  return True


class _FakeImagenet2012(
  imagenet2012_dataset_builder.Builder, skip_registration=True
):
  """TFDS's builder of imagenet2012, with our examples in its schema."""

  name = 'imagenet2012'
  # TFDS takes a script for a directory of descriptions.
  pkg_dir_path = epath.Path(__file__).parent

  def __init__(self, identity, num_train, num_eval, seed, **kwargs):
    self._identity = identity
    self._counts = {'train': num_train, 'validation': num_eval}
    self._seed = seed
    super().__init__(**kwargs)

  def _info(self):
    real = super()._info()
    return tfds.core.DatasetInfo(
      builder=self,
      description=self._identity,
      features=real.features,
      supervised_keys=real.supervised_keys,
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # Nothing to download.
    return {
      split: self._generate_examples(split, count)
      for split, count in self._counts.items()
    }

  def _generate_examples(self, split, count):
    for name, synset, data in _images(split, count, self._seed):
      example = {'image': io.BytesIO(data), 'label': synset, 'file_name': name}
      yield name, example


def _build(
  work: str, file_format: str, num_shards: int, *arguments: str | int
) -> str:
  """Builds under `work`; returns the data set's directory there."""
  tfds.disable_progress_bar()
  builder = _FakeImagenet2012(
    *arguments, data_dir=work, file_format=file_format
  )
  # TFDS prints that it downloads, and names the temporary directory.
  with contextlib.redirect_stdout(io.StringIO()):
    builder.download_and_prepare(
      download_config=tfds.download.DownloadConfig(
        try_download_gcs=False, num_shards=num_shards
      )
    )
  return str(builder.data_dir)


def _images(
  split: str, count: int, seed: int
) -> Iterator[tuple[str, str, bytes]]:
  """(file name, synset, JPEG) of each example of a split."""
  for index in range(count):
    words = np.random.Philox(
      key=np.array([seed, 2 * index + (split == 'train')], np.uint64)
    ).random_raw(6)
    label = CLASSES[index % len(CLASSES)]
    synset = synsets()[label]
    name = (
      f'{synset}_{index}.JPEG'
      if split == 'train'
      else f'ILSVRC2012_val_{index + 1:08d}.JPEG'
    )
    yield name, synset, _jpeg(label, words)


def _jpeg(label: int, words: np.ndarray) -> bytes:
  """A random window of a photograph in the tint of `label`, as JPEG."""
  photo, size, quality = (
    choices[int(word % len(choices))]
    for choices, word in zip(
      (_photos(), _SIZES_PX, _QUALITIES), words, strict=False
    )
  )
  share, left, top = words[3:] / 2.0**64
  largest = min(photo.width / size[0], photo.height / size[1])
  scale = largest * (_MIN_WINDOW + (1 - _MIN_WINDOW) * share)
  width, height = size[0] * scale, size[1] * scale
  left *= photo.width - width
  top *= photo.height - height
  window = photo.resize(
    size, Image.Resampling.BICUBIC, (left, top, left + width, top + height)
  )
  buffer = io.BytesIO()
  _tint(window, label).save(buffer, 'JPEG', quality=quality)
  return buffer.getvalue()


def _tint(image: Image.Image, label: int) -> Image.Image:
  """Moves all colours of a YCbCr image to the hue of `label`."""
  angle = 2 * np.pi * CLASSES.index(label) / len(CLASSES)
  grey, *chroma = (np.asarray(band, np.float32) for band in image.split())
  low, high = _GREY_RANGE
  grey = low + grey * ((high - low) / 255)
  room = np.minimum(1, np.minimum(grey, 255 - grey) / _ROOM)
  bands = [grey]
  for band, tint in zip(chroma, (np.cos(angle), np.sin(angle)), strict=True):
    colour = _PHOTO_CHROMA * (band - 128) + _TINT * tint
    bands.append(128 + room * colour)
  return Image.merge(
    'YCbCr',
    [Image.fromarray(np.rint(band).astype(np.uint8)) for band in bands],
  )


@functools.cache
def _photos() -> tuple[Image.Image, ...]:
  from sklearn import datasets  # Over a second, and needed only here.

  return tuple(
    Image.fromarray(photo).convert('YCbCr')
    for photo in datasets.load_sample_images().images
  )


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument(
    '--data_dir', type=os.path.expanduser, required=True, help='where to write'
  )
  parser.add_argument(
    '--file_format',
    default='array_record',
    choices=['array_record', 'tfrecord'],
  )
  parser.add_argument('--num_train', type=int, default=200)
  parser.add_argument('--num_eval', type=int, default=50)
  parser.add_argument('--num_shards', type=int, default=8, help='of each split')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument(
    '--folder',
    action='store_true',
    help='write DATA_DIR/{train,val}/SYNSET/*.JPEG, not a TFDS data set',
  )
  args = parser.parse_args()
  try:
    if args.folder:
      directory = write_folder(
        args.data_dir, args.num_train, args.num_eval, args.seed
      )
    else:
      directory = prepare(
        args.data_dir,
        args.file_format,
        args.num_train,
        args.num_eval,
        args.num_shards,
        args.seed,
      )
  except ConfigError as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  print(directory)
  return 0


if __name__ == '__main__':
  sys.exit(main())
