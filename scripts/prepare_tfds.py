"""Prepares a data set with its TFDS builder.

  python scripts/prepare_tfds.py --name=cifar10 [--data_dir=DIR]
  python scripts/prepare_tfds.py --name=imagenet2012 --manual_dir=TARS
      [--data_dir=DIR] [--file_format=array_record]

Does what `tfds build` does, without the further packages that that command
imports. Downloads what the builder downloads: CIFAR, but not ImageNet, whose
tar files must be in --manual_dir.
"""

import argparse
import os
import sys

import tensorflow_datasets as tfds


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--name', required=True)
  parser.add_argument(
    '--data_dir', type=os.path.expanduser, help="default: TFDS's own"
  )
  parser.add_argument(
    '--manual_dir',
    type=os.path.expanduser,
    help='files that you downloaded yourself',
  )
  parser.add_argument(
    '--file_format',
    choices=['array_record', 'tfrecord'],
    default='array_record',
  )
  args = parser.parse_args()
  try:
    builder = tfds.builder(
      args.name, data_dir=args.data_dir, file_format=args.file_format
    )
    builder.download_and_prepare(
      download_config=tfds.download.DownloadConfig(
        manual_dir=args.manual_dir, try_download_gcs=False
      )
    )
  except (AssertionError, OSError, tfds.core.DatasetNotFoundError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  print(builder.data_dir)
  return 0


if __name__ == '__main__':
  sys.exit(main())
