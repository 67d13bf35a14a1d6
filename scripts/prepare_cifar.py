"""Builds the TFDS data set `cifar10` or `cifar100` from a file, offline.

Run:  python scripts/prepare_cifar.py --archive=cifar-10-binary.tar.gz
          [--data_dir=DIR]

The archive is cifar-10-binary.tar.gz or cifar-100-binary.tar.gz of
www.cs.toronto.edu/~kriz/cifar.html; its SHA-256 says which it is. TFDS's own
builder makes the result. `python scripts/prepare_tfds.py --name=cifar10`
downloads the same file. A second run does nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import pathlib
import sys
import tarfile
import tempfile
import types
from collections.abc import Mapping, Sequence

import tensorflow_datasets as tfds

from conadv_jax.base.errors import CommandError, ConfigError, DataError
from conadv_jax.data.sources.source import data_root

SHA256 = {  # of the archives
  'c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd': 'cifar10',
  '58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec': (
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
      f'--archive={archive!r}: no such file; download cifar-10-binary.tar.gz or'
      ' cifar-100-binary.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html'
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
    with tarfile.open(fileobj=io.BytesIO(contents)) as files:
      files.extractall(directory, filter='data')
    builder.download_and_prepare(
      download_dir=directory,
      download_config=tfds.download.DownloadConfig(try_download_gcs=False),
    )
  return str(builder.data_dir)


def _builder(
  name: str, directory: str, data_dir: str
) -> tfds.core.DatasetBuilder:
  """TFDS's own builder, reading the files in a directory."""

  class Local(tfds.builder_cls(name), skip_registration=True):
    def _split_generators(self, dl_manager):
      del dl_manager  # Nothing to download.
      there = types.SimpleNamespace(download_and_extract=lambda url: directory)
      return super()._split_generators(there)

  Local.name = name
  return Local(data_dir=data_dir, file_format='array_record')


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
