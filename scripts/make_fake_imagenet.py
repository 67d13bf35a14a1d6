#!/usr/bin/env python
"""Writes a small fake imagenet2012, to try configs and measure the input.

python scripts/make_fake_imagenet.py --data_dir=/tmp/fake --num_train=2000
"""

import argparse
import sys

from conadv_jax.base.errors import ConfigError
from conadv_jax.data import fake_imagenet


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--data_dir', required=True, help='where to write')
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
      directory = fake_imagenet.write_folder(
        args.data_dir, args.num_train, args.num_eval, args.seed
      )
    else:
      directory = fake_imagenet.prepare(
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
