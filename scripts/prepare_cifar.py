"""Builds the TFDS data set `cifar10` or `cifar100` from a file, offline.

Run:  python scripts/prepare_cifar.py --archive=cifar-10-python.tar.gz
          [--data_dir=DIR]

The archive is cifar-10-python.tar.gz or cifar-100-python.tar.gz of
www.cs.toronto.edu/~kriz/cifar.html; its SHA-256 says which it is. TFDS's own
builder makes the result, from the batches as files of the binary version.
`python scripts/prepare_tfds.py --name=cifar10` downloads that version instead.
A second run does nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import pathlib
import pickle
import sys
import tarfile
import tempfile
import types
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from conadv_jax.base.errors import CommandError, ConfigError, DataError
from conadv_jax.data.sources.source import data_root


class Cifar(NamedTuple):
  """What differs between the two data sets.

  Attributes:
    archive: usual name of the file.
    batches: {member of the archive: file of the binary version}.
    meta: member with the names of the classes.
    labels: keys of the labels of a batch, in the order of the binary version.
    names: {key of class names in `meta`: file of the binary version}.
  """

  archive: str
  batches: Mapping[str, str]
  meta: str
  labels: Sequence[str]
  names: Mapping[str, str]


CIFAR = {
  'cifar10': Cifar(
    archive='cifar-10-python.tar.gz',
    batches={
      f'cifar-10-batches-py/{name}': f'cifar-10-batches-bin/{name}.bin'
      for name in (*(f'data_batch_{i}' for i in range(1, 6)), 'test_batch')
    },
    meta='cifar-10-batches-py/batches.meta',
    labels=('labels',),
    names={'label_names': 'cifar-10-batches-bin/batches.meta.txt'},
  ),
  'cifar100': Cifar(
    archive='cifar-100-python.tar.gz',
    batches={
      f'cifar-100-python/{name}': f'cifar-100-binary/{name}.bin'
      for name in ('train', 'test')
    },
    meta='cifar-100-python/meta',
    labels=('coarse_labels', 'fine_labels'),
    names={
      f'{kind}_label_names': f'cifar-100-binary/{kind}_label_names.txt'
      for kind in ('coarse', 'fine')
    },
  ),
}
SHA256 = {  # of the archives
  '6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce': 'cifar10',
  '85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7': (
    'cifar100'
  ),
}


def prepare(
  archive: str, data_dir: str = '', sha256: Mapping[str, str] = SHA256
) -> str:
  """Builds the data set unless it is there.

  Args:
    archive: the tar.gz file.
    data_dir: TFDS data directory; '' is TFDS's default.
    sha256: {SHA-256 of an archive: data set}.

  Returns:
    The directory of the prepared data set.

  Raises:
    ConfigError: there is no such file, or the output is half-prepared.
    DataError: the file is another one, or is damaged.
  """
  if not os.path.isfile(archive):
    raise ConfigError(
      f'--archive={archive!r}: no such file; download'
      f' {" or ".join(cifar.archive for cifar in CIFAR.values())} from'
      ' https://www.cs.toronto.edu/~kriz/cifar.html'
    )
  contents = pathlib.Path(archive).read_bytes()
  found = hashlib.sha256(contents).hexdigest()
  if found not in sha256:
    raise DataError(
      f'{archive}: has SHA-256 {found}, need one of'
      f' {", ".join(f"{digest} ({name})" for digest, name in sha256.items())};'
      ' it is another file or damaged: download it again'
    )
  name = sha256[found]
  with tempfile.TemporaryDirectory() as directory:
    builder = _builder(name, directory, str(data_root(data_dir)))
    if (builder.data_path / 'dataset_info.json').exists():
      print(f'already prepared: {builder.data_dir}')
      return str(builder.data_dir)
    if builder.data_path.exists():
      raise ConfigError(f'{builder.data_dir} is half-prepared: remove it first')
    _write_binary_version(CIFAR[name], contents, pathlib.Path(directory))
    builder.download_and_prepare(
      download_dir=directory,
      download_config=tfds.download.DownloadConfig(try_download_gcs=False),
    )
  return str(builder.data_dir)


def _builder(
  name: str, directory: str, data_dir: str
) -> tfds.core.DatasetBuilder:
  """TFDS's own builder, reading the binary version in a directory."""

  class Local(tfds.builder_cls(name), skip_registration=True):
    def _split_generators(self, dl_manager):
      del dl_manager  # Nothing to download.
      there = types.SimpleNamespace(download_and_extract=lambda url: directory)
      return super()._split_generators(there)

  Local.name = name
  return Local(data_dir=data_dir, file_format='array_record')


def _write_binary_version(
  cifar: Cifar, contents: bytes, directory: pathlib.Path
) -> None:
  """Writes the files of the binary version: rows of labels, then pixels."""
  with tarfile.open(fileobj=io.BytesIO(contents)) as archive:

    def load(member: str) -> dict[str, Any]:
      # The SHA-256 says that the pickle is the original. Python 2 made it.
      return pickle.load(archive.extractfile(member), encoding='latin1')

    for member, file_name in cifar.batches.items():
      batch = load(member)
      rows = np.column_stack([*(batch[x] for x in cifar.labels), batch['data']])
      path = directory / file_name
      path.parent.mkdir(exist_ok=True)
      path.write_bytes(rows.astype(np.uint8).tobytes())
    meta = load(cifar.meta)
    for key, file_name in cifar.names.items():
      (directory / file_name).write_text('\n'.join(meta[key]))


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    '--archive', type=os.path.expanduser, required=True, help='the tar.gz file'
  )
  parser.add_argument(
    '--data_dir',
    type=os.path.expanduser,
    default='',
    help='TFDS data directory (default: $TFDS_DATA_DIR or'
    ' ~/tensorflow_datasets)',
  )
  args = parser.parse_args(argv)
  try:
    print(prepare(args.archive, args.data_dir))
  except (CommandError, OSError) as error:
    print(f'error: {error}', file=sys.stderr)
    return getattr(error, 'exit_code', 1)
  return 0


if __name__ == '__main__':
  sys.exit(main())
