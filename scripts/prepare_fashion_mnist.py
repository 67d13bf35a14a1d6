"""Builds the TFDS data set `fashion_mnist` from local IDX files, offline.

Run:  python scripts/prepare_fashion_mnist.py [--idx_dir=DIR] [--data_dir=DIR]
          [--balanced]

The files are those of github.com/zalandoresearch/fashion-mnist, gzipped or not;
on Debian and Ubuntu, `apt install dataset-fashion-mnist` puts them where
--idx_dir looks by default. The result is what `tfds.load('fashion_mnist')`
reads. A second run does nothing.

With --balanced, the result is `fashion_mnist_balanced`: the same examples, but
class i at the places i, 10 + i, 20 + i, ..., within a class in the order of the
IDX files. So any slice whose bounds are multiples of ten has as many examples
of each class.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import gzip
import hashlib
import math
import os
import pathlib
import struct
import sys
import tempfile
import zlib
from collections.abc import Mapping, Sequence

import tensorflow_datasets as tfds

DEFAULT_IDX_DIR = '/usr/share/datasets/fashion-mnist'


class IdxError(ValueError):
  """An input file is missing, damaged or of another data set."""


@dataclasses.dataclass(frozen=True)
class IdxFile:
  """What an IDX file must hold.

  Attributes:
    shape: dimensions of its array of bytes; examples come first.
    sha256: of the file after gunzip.
  """

  shape: tuple[int, ...]
  sha256: str


# MNIST has files of the same names and sizes: only the hashes tell.
FILES = {
  'train-images-idx3-ubyte': IdxFile(
    (60_000, 28, 28),
    'c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888',
  ),
  'train-labels-idx1-ubyte': IdxFile(
    (60_000,),
    'bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9',
  ),
  't10k-images-idx3-ubyte': IdxFile(
    (10_000, 28, 28),
    '5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b',
  ),
  't10k-labels-idx1-ubyte': IdxFile(
    (10_000,),
    '0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34',
  ),
}


class LocalFashionMnist(
  tfds.builder_cls('fashion_mnist'), skip_registration=True
):
  """TFDS's own builder, reading IDX files of a directory."""

  name = 'fashion_mnist'

  def __init__(self, *, raw_dir: str, files: Mapping[str, IdxFile], **kwargs):
    self._raw_dir = pathlib.Path(raw_dir)
    self._files = files
    super().__init__(**kwargs)

  def _split_generators(self, dl_manager):
    del dl_manager  # Nothing to download.
    return {'train': self._examples('train'), 'test': self._examples('t10k')}

  def _examples(self, prefix: str):
    images, labels = (
      f'{prefix}-images-idx3-ubyte',
      f'{prefix}-labels-idx1-ubyte',
    )
    return self._generate_examples(
      num_examples=self._files[images].shape[0],
      data_path=str(self._raw_dir / images),
      label_path=str(self._raw_dir / labels),
    )


class BalancedFashionMnist(LocalFashionMnist, skip_registration=True):
  """The same examples in an order in which the classes take turns."""

  name = 'fashion_mnist_balanced'

  def _info(self):
    usual = super()._info()
    return tfds.core.DatasetInfo(
      builder=self,
      description=f'{usual.description} In this order the classes take turns.',
      features=usual.features,
      supervised_keys=usual.supervised_keys,
      homepage=usual.homepage,
      citation=usual.citation,
      disable_shuffling=True,  # The order is that of the keys.
    )

  def _examples(self, prefix: str):
    seen = collections.Counter()
    for _, example in super()._examples(prefix):
      label = int(example['label'])
      yield 10 * seen[label] + label, example
      seen[label] += 1


def find_files(idx_dir: str, names: Sequence[str]) -> dict[str, pathlib.Path]:
  """The path of each file, gzipped or not; IdxError lists the missing ones."""
  found, missing = {}, []
  for name in names:
    paths = [pathlib.Path(idx_dir) / f'{name}{end}' for end in ('.gz', '')]
    present = [path for path in paths if path.is_file()]
    if present:
      found[name] = present[0]
    else:
      missing.append(f'{name}.gz')
  if missing:
    raise IdxError(
      f'not in {idx_dir}: {", ".join(missing)}; run `apt install'
      ' dataset-fashion-mnist`, or copy the files there from'
      ' github.com/zalandoresearch/fashion-mnist, or give their --idx_dir'
    )
  return found


def read_checked(path: pathlib.Path, expected: IdxFile) -> bytes:
  """The bytes of an IDX file after gunzip; IdxError if it is not `expected`."""
  try:
    data = path.read_bytes()
    data = gzip.decompress(data) if path.suffix == '.gz' else data
  except (OSError, EOFError, zlib.error) as error:
    raise IdxError(f'{path} cannot be read: {error}') from error
  ndim = len(expected.shape)
  header = struct.pack(f'>HBB{ndim}I', 0, 8, ndim, *expected.shape)
  if not data.startswith(header):
    raise IdxError(f'{path} is not an IDX file of {list(expected.shape)} bytes')
  size = len(header) + math.prod(expected.shape)
  if len(data) != size:
    raise IdxError(f'{path} has {len(data)} bytes after gunzip, need {size}')
  sha256 = hashlib.sha256(data).hexdigest()
  if sha256 != expected.sha256:
    raise IdxError(
      f'{path} is damaged, or of another data set with the same file names:'
      f' SHA-256 {sha256} after gunzip, need {expected.sha256}'
    )
  return data


def prepare(
  idx_dir: str,
  data_dir: str,
  files: Mapping[str, IdxFile] = FILES,
  *,
  balanced: bool = False,
) -> str:
  """Builds the data set unless it is there.

  Args:
    idx_dir: directory of the four IDX files.
    data_dir: TFDS data directory; '' is TFDS's default.
    files: what the four files must hold, by name.
    balanced: whether the classes take turns; another data set by name.

  Returns:
    The directory of the prepared data set.

  Raises:
    IdxError: an input file is wrong, or the output directory is half-prepared.
  """
  with tempfile.TemporaryDirectory() as raw_dir:
    made = BalancedFashionMnist if balanced else LocalFashionMnist
    builder = made(raw_dir=raw_dir, files=files, data_dir=data_dir or None)
    if (builder.data_path / 'dataset_info.json').exists():
      print(f'already prepared: {builder.data_dir}')
      return builder.data_dir
    if builder.data_path.exists():
      raise IdxError(f'{builder.data_dir} is half-prepared: remove it first')
    for name, path in find_files(idx_dir, list(files)).items():
      print(f'checking {path}')
      data = read_checked(path, files[name])
      (pathlib.Path(raw_dir) / name).write_bytes(data)
    builder.download_and_prepare(
      download_dir=raw_dir,
      download_config=tfds.download.DownloadConfig(try_download_gcs=False),
    )
  return builder.data_dir


def main(argv: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    '--idx_dir',
    type=os.path.expanduser,
    default=DEFAULT_IDX_DIR,
    help='directory of the four IDX files (default: %(default)s)',
  )
  parser.add_argument(
    '--data_dir',
    type=os.path.expanduser,
    default='',
    help='TFDS data directory (default: $TFDS_DATA_DIR or'
    ' ~/tensorflow_datasets)',
  )
  parser.add_argument(
    '--balanced',
    action='store_true',
    help='make fashion_mnist_balanced, in which the classes take turns',
  )
  args = parser.parse_args(argv)
  try:
    prepare(args.idx_dir, args.data_dir, balanced=args.balanced)
  except (IdxError, OSError) as error:
    parser.error(str(error))


if __name__ == '__main__':
  main(sys.argv[1:])
