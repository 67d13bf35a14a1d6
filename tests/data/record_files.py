"""Files of the same records in both formats, for tests that read them."""

import numpy as np
import pytest
import tensorflow as tf
from array_record.python import array_record_module

from conadv_jax.base import storage
from conadv_jax.data.sources import array_record, tfrecord

LENGTHS = (5, 3, 0, 7, 4)


def contents(number):
  """A record of some length; zeros at its end must survive."""
  size = 40 + number * 7919 % 60
  return np.random.RandomState(number).bytes(size) + b'\0' * (number % 3)


RECORDS = [contents(number) for number in range(sum(LENGTHS))]


def write_tfrecord(path, data):
  with tf.io.TFRecordWriter(str(path)) as writer:
    for record in data:
      writer.write(record)


def write_array_record(path, data):
  writer = array_record_module.ArrayRecordWriter(str(path), 'group_size:1')
  for record in data:
    writer.write(record)
  writer.close()


FORMATS = {
  'tfrecord': (tfrecord.TfRecords, write_tfrecord),
  'array_record': (array_record.ArrayRecords, write_array_record),
}


def write(directory, name, lengths=LENGTHS):
  """Files of `RECORDS`; (paths, lengths)."""
  paths, stops = [], np.cumsum(lengths).tolist()
  for shard, (length, stop) in enumerate(zip(lengths, stops, strict=True)):
    paths.append(directory / f'x.{name}-{shard:05d}-of-{len(lengths):05d}')
    FORMATS[name][1](paths[-1], RECORDS[stop - length : stop])
  return paths, list(lengths)


@pytest.fixture(scope='module')
def tf_paths(tmp_path_factory):
  return write(tmp_path_factory.mktemp('tfrecord'), 'tfrecord')[0]


@pytest.fixture
def no_delay(monkeypatch):
  monkeypatch.setattr(storage, '_sleep', lambda seconds: None)


def flip(path, position, bit=3):
  data = bytearray(path.read_bytes())
  data[position] ^= 1 << bit
  path.write_bytes(data)
