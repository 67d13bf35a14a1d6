"""Prepares imagenet2012 from the two tar files of image-net.org.

Run:  python scripts/prepare_imagenet.py --tars=DIR [--data_dir=DIR]
          [--file_format=tfrecord]

--tars holds ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar as they were
downloaded. The result has the records of TFDS's own builder, in the same order
and in files of the same names, so that either copy can replace the other.

The headers in the tar files are read first: name, place and size of each image.
The order is that of the MD5 of split and file name, as in TFDS. Then one file
after the other is written. Its images are read from where they lie in the tar
file, so that memory holds those of one file (140 MB). A file gets its name when
it is complete. After an interruption, run the same command again: it keeps the
files that are there.

The devkit is not needed: TFDS has the labels of the validation images.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import io
import itertools
import os
import re
import shutil
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent import futures
from typing import IO, NamedTuple

import tensorflow as tf
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from etils import epath
from PIL import Image
from tensorflow_datasets.datasets.imagenet2012 import (
  imagenet2012_dataset_builder,
)

from conadv_jax.base import errors, storage
from conadv_jax.base.errors import ConfigError, DataError
from conadv_jax.data.sources.source import data_root
from conadv_jax.run.timeline import Ticker

COUNTS = {'train': 1_281_167, 'validation': 50_000}
SHARDS = {'train': 1024, 'validation': 64}  # as in TFDS
_TARS = {  # {split: (file, the MD5 of the original)}
  'train': ('ILSVRC2012_img_train.tar', '1d675b47d978889d74fa0da5fadfb00e'),
  'validation': ('ILSVRC2012_img_val.tar', '29b22e2961454d5413ddabcf34fc5622'),
}
_VALIDATION_NAME = r'ILSVRC2012_val_(\d{8})\.JPEG'
_VALIDATION_LABELS = 'datasets/imagenet2012/validation_labels.txt'  # in TFDS
# The last one is what readers look for first.
_METADATA = ('label.labels.txt', 'features.json', 'dataset_info.json')
# At most, of a record without its image, and of a file without its records.
_RECORD_BYTES, _FILE_BYTES = 256, 128 * 1024
_READERS = 8  # A disk on a network answers each only after a while.


class Example(NamedTuple):
  """One image, by its place in a tar file."""

  name: str
  synset: str
  offset: int
  size: int


class Shard(NamedTuple):
  """One file to write."""

  tar: Tar
  path: epath.Path
  examples: Sequence[Example]

  @property
  def num_bytes(self) -> int:
    return _FILE_BYTES + sum(x.size + _RECORD_BYTES for x in self.examples)


class Tar:
  """One of the two tar files, which is that of a split."""

  def __init__(self, directory: str, split: str):
    name, self._md5 = _TARS[split]
    self.split, self.path = split, os.path.join(directory, name)
    if not os.path.isfile(self.path):
      raise ConfigError(
        f'--tars={directory!r}: has no file {name}; download it to a local disk'
        ' from https://image-net.org/download-images, and leave it packed'
      )

  def damage(self, what: str) -> DataError:
    return DataError(
      f'{self.path}: {what}; compare `md5sum {self.path}` with {self._md5}, and'
      ' download the file again if it differs'
    )

  def examples(self, synsets: list[str], count: int) -> list[Example]:
    """The images in the order of the data set; DataError if they are wrong."""
    print(f'reading the headers in {self.path}', flush=True)
    with open(self.path, 'rb') as file:
      split = self._train if self.split == 'train' else self._validation
      found = list(split(file))
    lacking = sorted({*synsets} - {example.synset for example in found})
    twice = len(found) - len({example.name for example in found})
    if lacking:
      raise self.damage(f'lacks {len(lacking)} classes, such as {lacking[0]}')
    if twice or len(found) != count:
      raise self.damage(
        f'has {len(found):,} images, need {count:,}; {twice:,} occur twice'
      )
    print(f'{self.split}: {count:,} images of {len(synsets):,} classes')
    salt = hashlib.md5(self.split.encode())

    def place(example: Example) -> bytes:
      md5 = salt.copy()
      md5.update(example.name.encode())
      return md5.digest()

    return sorted(found, key=place)

  def _train(self, file: IO[bytes]) -> Iterator[Example]:
    size = os.path.getsize(self.path)
    for inner in self._members(file, 0, size, r'n\d{8}\.tar'):
      synset, start = inner.name.removesuffix('.tar'), inner.offset_data
      stop, names = start + inner.size, rf'{synset}_\d+\.JPEG'
      for member in self._members(file, start, stop, names):
        yield Example(member.name, synset, member.offset_data, member.size)

  def _validation(self, file: IO[bytes]) -> Iterator[Example]:
    # One a line, in the order of the numbers in the names of the images.
    labels = tfds.core.tfds_path(_VALIDATION_LABELS).read_text().split()
    size = os.path.getsize(self.path)
    for member in self._members(file, 0, size, _VALIDATION_NAME):
      number = int(re.fullmatch(_VALIDATION_NAME, member.name)[1])
      if not 1 <= number <= len(labels):
        raise self.damage(f'{member.name} has no label')
      synset = labels[number - 1]
      yield Example(member.name, synset, member.offset_data, member.size)

  def _members(
    self, file: IO[bytes], start: int, stop: int, names: str
  ) -> list[tarfile.TarInfo]:
    """What is in the archive at the bytes start .. stop - 1 of a file."""
    file.seek(start)
    members = []
    try:
      with tarfile.open(fileobj=file, mode='r:') as archive:
        for member in archive:
          if not member.isreg() or not re.fullmatch(names, member.name):
            raise self.damage(f'{member.name!r} is not in the original file')
          if member.offset_data + member.size > stop:
            raise self.damage(f'is cut in {member.name}')
          members.append(member)
        end = archive.offset
    except tarfile.ReadError as error:
      raise self.damage(f'is cut or no tar: {error}') from error
    # To the module, a damaged header is the end of an archive.
    file.seek(end)
    block = file.read(tarfile.BLOCKSIZE)
    if end >= stop or len(block) < tarfile.BLOCKSIZE:
      raise self.damage(f'is cut at byte {end:,}, there is no end mark')
    if any(block):
      raise self.damage(f'the header at byte {end:,} is damaged')
    return members


def prepare(
  tars: str,
  data_dir: str = '',
  file_format: str = 'array_record',
  *,
  counts: Mapping[str, int] = COUNTS,
  num_shards: Mapping[str, int] = SHARDS,
) -> str:
  """Writes what is missing of DATA_DIR/imagenet2012/VERSION; returns that.

  Args:
    tars: directory of the two tar files.
    data_dir: TFDS data directory, local or in a bucket; '' is TFDS's default.
    file_format: 'array_record' or 'tfrecord'.
    counts: images that each split must have.
    num_shards: files of each split.

  Raises:
    ConfigError: a tar file is missing, or `data_dir` has another imagenet2012.
    DataError: a tar file is damaged or incomplete.
    StorageError: the disk is full, too small, or fails.
  """
  version = str(imagenet2012_dataset_builder.Builder.VERSION)
  directory = data_root(data_dir) / 'imagenet2012' / version
  paths = _paths(directory, file_format, num_shards)
  needed = {path.name for of_split in paths.values() for path in of_split}
  needed.update(_METADATA)
  present = storage.read(lambda: _present(directory, needed), directory)
  if present == needed:
    print(f'already prepared: {directory}')
    return str(directory)
  opened = {split: Tar(tars, split) for split in counts}
  with _work_directory(directory) as work:
    builder = tfds.builder(
      'imagenet2012', data_dir=work, file_format=file_format
    )
    synsets = builder.info.features['label'].names
    labels, shards = {name: i for i, name in enumerate(synsets)}, []
    for split, tar in opened.items():
      examples = tar.examples(synsets, counts[split])
      places = range(num_shards[split] + 1)
      cuts = [round(len(examples) * i / num_shards[split]) for i in places]
      shards += [
        Shard(tar, path, examples[start:stop])
        for path, start, stop in zip(paths[split], cuts, cuts[1:], strict=False)
      ]
    missing = [shard for shard in shards if shard.path.name not in present]
    _check_space(directory, missing, len(shards))
    _write_all(missing, work, labels, file_format)
    _describe(builder, shards, directory, work)
  return str(directory)


def _paths(
  directory: epath.Path, file_format: str, num_shards: Mapping[str, int]
) -> dict[str, list[epath.Path]]:
  """The record files of each split."""
  template = tfds.core.ShardedFileTemplate(
    directory, dataset_name='imagenet2012', filetype_suffix=file_format
  )
  return {
    split: template.replace(split=split).sharded_filepaths(num_shards=count)
    for split, count in num_shards.items()
  }


def _present(directory: epath.Path, needed: set[str]) -> set[str]:
  """What is there of `needed`; ConfigError if it is of another data set."""
  found = {x.name for x in directory.iterdir()} if directory.exists() else set()
  others = [x for x in found - needed if x.startswith('imagenet2012-')]
  if others and not needed <= found:
    raise ConfigError(
      f'--data_dir: {directory} holds another imagenet2012, with {min(others)};'
      ' choose another directory, or remove that one'
    )
  return found & needed


def _work_directory(directory: epath.Path) -> tempfile.TemporaryDirectory:
  """A local directory for files that are not complete yet."""
  if storage.is_remote(directory):
    return tempfile.TemporaryDirectory()

  def make():
    directory.mkdir(parents=True, exist_ok=True)
    for left in directory.glob('incomplete.*'):  # by a process that was killed
      shutil.rmtree(left)
    return tempfile.TemporaryDirectory(prefix='incomplete.', dir=directory)

  return storage.write(make, directory)


def _check_space(
  directory: epath.Path, missing: list[Shard], count: int
) -> None:
  """Says what is to be written; StorageError if the disk is too small."""
  need = sum(shard.num_bytes for shard in missing)
  what = f'{len(missing):,} of {count:,} files, at most {need / 1e9:,.3g} GB'
  print(f'writing {what}, to {directory}', flush=True)
  if storage.is_remote(directory):
    return
  if shutil.disk_usage(directory).free < need:
    full = OSError(errno.ENOSPC, f'{need:,} bytes are needed')
    raise storage.failure(full, directory)


def _write_all(
  shards: list[Shard],
  work: str,
  labels: Mapping[str, int],
  file_format: str,
) -> None:
  """Writes one file after the other, and says how long the others take."""
  total = sum(shard.num_bytes for shard in shards)
  done, ticker, began = 0, Ticker(), time.monotonic()
  with futures.ThreadPoolExecutor(_READERS) as pool:
    for number, shard in enumerate(shards, 1):
      records = _records(shard, labels, pool)
      temporary = os.path.join(work, shard.path.name)
      try:
        write_file(temporary, records, file_format)
      except (OSError, RuntimeError, tf.errors.OpError) as error:
        raise storage.failure(error, temporary) from error
      _publish(temporary, shard.path)
      done += shard.num_bytes
      if ticker.due() or number == len(shards):
        seconds = time.monotonic() - began
        print(
          f'{number:,} of {len(shards):,} files, {done / seconds / 1e6:.0f}'
          f' MB/s, {(total - done) * seconds / done / 60:.0f} minutes left',
          flush=True,
        )


def _records(
  shard: Shard,
  labels: Mapping[str, int],
  pool: futures.ThreadPoolExecutor,
) -> list[bytes]:
  """The records of a file; DataError for an image that is none."""
  with open(shard.tar.path, 'rb') as file:

    def read(example: Example) -> bytes:
      return storage.read(
        lambda: os.pread(file.fileno(), example.size, example.offset),
        shard.tar.path,
      )

    # Disks that turn are faster in the order of the tar file.
    laid = sorted(shard.examples, key=lambda example: example.offset)
    images = dict(zip(laid, pool.map(read, laid), strict=True))
  records = []
  for example in shard.examples:
    image = _repaired(example.name, images.pop(example))
    try:
      Image.open(io.BytesIO(image), formats=['JPEG']).close()
    except OSError as error:
      raise shard.tar.damage(
        f'{example.name} at byte {example.offset:,} is no JPEG'
      ) from error
    records.append(_record(example.name, image, labels[example.synset]))
  return records


def _record(name: str, image: bytes, label: int) -> bytes:
  """An example in TFDS's schema; the same bytes in any process."""
  example = tf.train.Example()
  feature = example.features.feature
  feature['file_name'].bytes_list.value.append(name.encode())
  feature['image'].bytes_list.value.append(image)
  feature['label'].int64_list.value.append(label)
  return example.SerializeToString(deterministic=True)


def _repaired(name: str, image: bytes) -> bytes:
  """The image as TFDS keeps it: in the tar, 22 are CMYK and one is a PNG."""
  if name in imagenet2012_dataset_builder.CMYK_IMAGES:
    return tfds.core.utils.jpeg_cmyk_to_rgb(image)
  if name in imagenet2012_dataset_builder.PNG_IMAGES:
    return tfds.core.utils.png_to_jpeg(image)
  return image


def write_file(path: str, records: list[bytes], file_format: str) -> None:
  """Writes a record file with TFDS's options, and waits for the disk."""
  if file_format == 'tfrecord':
    with tf.io.TFRecordWriter(path) as writer:
      for record in records:
        writer.write(record)
  else:
    writer = array_record_module.ArrayRecordWriter(path, 'group_size:1')
    for record in records:
      writer.write(record)
    writer.close()
  with open(path, 'rb') as file:
    os.fsync(file.fileno())


def _publish(temporary: str, path: epath.Path) -> None:
  """Gives a complete local file its name."""

  def publish():
    if storage.is_remote(path):  # An object appears when all of it is there.
      epath.Path(temporary).copy(path, overwrite=True)
      os.remove(temporary)
    else:
      os.replace(temporary, path)

  storage.write(publish, path)


def _describe(
  builder: tfds.core.DatasetBuilder,
  shards: list[Shard],
  directory: epath.Path,
  work: str,
) -> None:
  """Writes TFDS's description of the finished files."""
  splits = []
  for split, of_split in itertools.groupby(shards, lambda s: s.tar.split):
    files = [(len(s.examples), s.path.stat().length) for s in of_split]
    lengths, sizes = zip(*files, strict=True)
    splits.append(tfds.core.SplitInfo(split, [*lengths], sum(sizes)))
  builder.info.set_splits(tfds.core.SplitDict(splits))
  storage.write(lambda: builder.info.write_to_directory(work), directory)
  for name in _METADATA:
    _publish(os.path.join(work, name), directory / name)


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    '--tars',
    type=os.path.expanduser,
    required=True,
    help='local directory of the two tar files',
  )
  parser.add_argument(
    '--data_dir',
    type=os.path.expanduser,
    default='',
    help='where to write, local or gs://BUCKET/DIR (default: $TFDS_DATA_DIR or'
    ' ~/tensorflow_datasets)',
  )
  parser.add_argument(
    '--file_format',
    default='array_record',
    choices=['array_record', 'tfrecord'],
  )
  only = 'images that there must be; only to test this script'
  parser.add_argument(
    '--num_train', type=int, default=COUNTS['train'], help=only
  )
  parser.add_argument(
    '--num_eval', type=int, default=COUNTS['validation'], help=only
  )
  args = parser.parse_args(argv)
  counts = {'train': args.num_train, 'validation': args.num_eval}
  try:
    print(prepare(args.tars, args.data_dir, args.file_format, counts=counts))
  except errors.CommandError as error:
    print(f'error: {error}', file=sys.stderr)
    return error.exit_code
  except KeyboardInterrupt:
    print('stopped; run the same command again to go on', file=sys.stderr)
    return errors.INTERRUPTED
  return 0


if __name__ == '__main__':
  sys.exit(main())
