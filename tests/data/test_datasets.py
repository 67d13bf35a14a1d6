"""A data set is read whole, and is the one that was asked for, or refused."""

import dataclasses
import pathlib
import shutil
import time

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from etils import epath
from helpers import load_part, printed_by
from sklearn import datasets as sklearn_datasets

from conadv_jax.base.errors import ConfigError
from conadv_jax.data import datasets
from conadv_jax.data.sources import digits, in_memory
from conadv_jax.data.sources.prepared import Prepared

DIGITS = datasets.get_spec('digits')
# The same files, treated as a data set that users prepare themselves.
MANUAL = dataclasses.replace(
  DIGITS, store=Prepared('digits', 'make-digits --to={data_dir}')
)


class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """The digits as users would prepare them."""

  name = 'digits'
  VERSION = tfds.core.Version('1.0.0')
  pkg_dir_path = epath.Path(__file__).parent

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(
        {
          'image': tfds.features.Image(shape=(8, 8, 1), dtype=np.uint8),
          'label': tfds.features.ClassLabel(num_classes=10),
        }
      ),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager):
    return {name: self._generate_examples(name) for name in digits.load()}

  def _generate_examples(self, split):
    for i, (image, label) in enumerate(zip(*digits.load()[split], strict=True)):
      yield i, {'image': image[..., None], 'label': label}


@pytest.fixture(scope='session')
def data_dir(tmp_path_factory):
  path = tmp_path_factory.mktemp('tfds')
  Builder(data_dir=str(path)).download_and_prepare()
  return path


@pytest.fixture
def broken_dir(data_dir, tmp_path):
  """A copy of the prepared digits, for a test to damage."""
  shutil.copytree(data_dir / 'digits', tmp_path / 'digits')
  return tmp_path / 'digits' / '1.0.0'


def test_the_registry_needs_no_tensorflow():
  code = (
    'import sys\n'
    'from conadv_jax.data import datasets, sampler\n'
    'datasets.get_spec("digits")\n'
    'heavy = {"tensorflow", "tensorflow_datasets", "sklearn", "jax"}\n'
    'print(sorted(heavy & set(sys.modules)))\n'
  )
  assert printed_by(code) == '[]\n'


def test_registered_specs_are_consistent():
  for name, spec in datasets.DATASETS.items():
    assert spec.name == name
    assert len(spec.mean) == len(spec.std) == spec.image_shape[-1]
    assert all(1 < value < 255 for value in spec.mean + spec.std)
    prepared = type(spec.store) is Prepared
    assert prepared == (name not in ('digits', 'image_folder'))
    assert not prepared or '{data_dir}' in spec.store.command
    assert spec.encoded == (spec.image_shape[:2] == (0, 0))


def test_unknown_data_set_names_the_nearest():
  with pytest.raises(ConfigError) as error:
    datasets.get_spec('cifar_10')
  assert "unknown dataset.name 'cifar_10'; did you mean 'cifar10'?" in str(
    error.value
  )


@pytest.mark.parametrize('spec', [DIGITS, MANUAL], ids=['arrays', 'prepared'])
def test_digits_are_those_of_scikit_learn(spec, data_dir, no_network):
  train_source = load_part(spec, 'train', data_dir)
  eval_source = load_part(spec, 'eval', data_dir)
  assert train_source.num_examples == DIGITS.num_train == 1437
  assert eval_source.num_examples == DIGITS.num_eval == 360
  reference = sklearn_datasets.load_digits()
  is_eval = np.arange(1797) % 5 == 0
  for source, chosen in ((train_source, ~is_eval), (eval_source, is_eval)):
    assert source.images.dtype == np.uint8
    assert source.labels.dtype == np.int32
    assert source.images.shape[1:] == DIGITS.image_shape
    assert source.images.min() == 0
    assert source.images.max() == 255
    np.testing.assert_array_equal(source.labels, reference.target[chosen])
    np.testing.assert_allclose(
      source.images[..., 0] * (16 / 255), reference.images[chosen], atol=0.04
    )
    assert np.bincount(source.labels).min() >= 26
  assert abs(train_source.images.mean() - DIGITS.mean[0]) < 0.1
  assert abs(train_source.images.std() - DIGITS.std[0]) < 0.1


def test_data_dir_defaults_to_that_of_tfds(data_dir, monkeypatch):
  monkeypatch.setenv('TFDS_DATA_DIR', str(data_dir))
  assert load_part(MANUAL, 'eval', '').num_examples == 360
  monkeypatch.delenv('TFDS_DATA_DIR')
  monkeypatch.setenv('HOME', '/somewhere')
  with pytest.raises(ConfigError, match='/somewhere/tensorflow_data'):
    load_part(MANUAL, 'eval', '')


def test_missing_data_set_says_how_to_make_it(tmp_path, no_network):
  start = time.monotonic()
  for name, command in (
    ('cifar10', 'prepare_tfds.py --name=cifar10 --data_dir='),
    ('cifar100', 'prepare_tfds.py --name=cifar100 --data_dir='),
    ('fashion_mnist', 'python scripts/prepare_fashion_mnist.py --data_dir='),
    (
      'fashion_mnist_balanced',
      'scripts/prepare_fashion_mnist.py --balanced --data_dir=',
    ),
  ):
    with pytest.raises(ConfigError) as error:
      load_part(datasets.get_spec(name), 'train', tmp_path)
    assert f'{tmp_path}/{name}' in str(error.value)
    assert f'{command}{tmp_path}' in str(error.value)
  assert time.monotonic() - start < 5


@pytest.mark.parametrize('inside', ['digits', 'digits/1.0.0'])
def test_the_data_sets_own_directory_is_not_the_data_dir(inside, data_dir):
  with pytest.raises(ConfigError) as error:
    load_part(MANUAL, 'train', data_dir / inside)
  message = str(error.value)
  assert message.startswith(f"dataset.data_dir='{data_dir}/{inside}': ")
  assert message.endswith(f'the directory that holds digits/, use {data_dir}')


def test_interrupted_preparation_is_reported(tmp_path):
  (tmp_path / 'digits' / 'incomplete.ABC_1.0.0').mkdir(parents=True)
  with pytest.raises(ConfigError, match='unfinished preparation') as e:
    load_part(MANUAL, 'train', tmp_path)
  assert f'make-digits --to={tmp_path}' in str(e.value)


@pytest.mark.parametrize(
  ('name', 'damage', 'message'),
  [
    ('dataset_info.json', pathlib.Path.unlink, 'no dataset_info.json'),
    ('features.json', pathlib.Path.unlink, 'no features.json'),
    (
      'dataset_info.json',
      lambda path: path.write_text('{"name": '),
      'metadata is not readable',
    ),
    (
      'dataset_info.json',
      lambda path: path.write_text(path.read_text().replace('"train"', '"x"')),
      "no split 'train'",
    ),
    (
      'digits-train.tfrecord-00000-of-00001',
      pathlib.Path.unlink,
      'digits-train.tfrecord-00000-of-00001 is missing',
    ),
  ],
)
def test_half_prepared_data_set_is_refused(
  broken_dir, no_network, name, damage, message
):
  damage(broken_dir / name)
  root = broken_dir.parents[1]
  start = time.monotonic()
  with pytest.raises(ConfigError, match=message) as error:
    load_part(MANUAL, 'train', root)
  assert time.monotonic() - start < 5
  assert f'{broken_dir} is half-prepared' in str(error.value)
  assert f'make-digits --to={root}' in str(error.value)


def cut_at_record(path):
  """Drops the last records whole: no check sum can tell."""
  records = [r.numpy() for r in tf.data.TFRecordDataset(str(path))]
  with tf.io.TFRecordWriter(str(path)) as writer:
    for record in records[:-3]:
      writer.write(record)


def repeat_record(path):
  records = [r.numpy() for r in tf.data.TFRecordDataset(str(path))]
  with tf.io.TFRecordWriter(str(path)) as writer:
    for record in [*records, records[0]]:
      writer.write(record)


def flip_byte(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


@pytest.mark.parametrize('damage', [cut_at_record, repeat_record, flip_byte])
def test_damaged_records_are_refused(broken_dir, damage):
  damage(broken_dir / 'digits-train.tfrecord-00000-of-00001')
  with pytest.raises(ConfigError, match='cannot be read') as error:
    load_part(MANUAL, 'train', broken_dir.parents[1])
  assert str(broken_dir) in str(error.value)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'num_classes': 11}, 'classes 10, need 11'),
    (
      {'splits': {'train': 1436, 'test': 360}},
      'train examples 1437, need 1436',
    ),
    ({'image_shape': (8, 8, 3)}, r'image shape \(8, 8, 1\), need \(8, 8, 3\)'),
  ],
)
def test_another_data_set_of_that_name_is_refused(data_dir, change, message):
  spec = dataclasses.replace(MANUAL, **change)
  with pytest.raises(ConfigError, match=message):
    load_part(spec, 'train', data_dir)


def test_the_newest_version_is_read(broken_dir):
  root = broken_dir.parents[1]
  (root / 'digits' / '0.9.0').mkdir()
  broken_dir.rename(root / 'digits' / '0.10.0')
  assert load_part(MANUAL, 'eval', root).num_examples == 360
  (root / 'digits' / '0.10.1').mkdir()
  with pytest.raises(ConfigError, match=r'digits/0\.10\.1 is half'):
    load_part(MANUAL, 'eval', root)


@pytest.mark.parametrize('label', [-1, 10])
def test_a_label_out_of_range_names_its_example(label):
  labels = np.array([0, 9, label, 3], np.int32)
  with pytest.raises(
    ConfigError, match=rf'example 2 has label {label}, .*\[0, 10\)'
  ):
    in_memory.InMemory(np.zeros((4, 2, 2, 1), np.uint8), labels, 10)


@pytest.mark.parametrize(
  ('images', 'labels', 'message'),
  [
    (np.zeros((2, 3, 3, 1), np.float32), np.zeros(2, np.int32), 'images'),
    (np.zeros((2, 3, 3), np.uint8), np.zeros(2, np.int32), 'images'),
    (np.zeros((2, 3, 3, 1), np.uint8), np.zeros(2, np.int64), 'labels'),
    (np.zeros((2, 3, 3, 1), np.uint8), np.zeros(3, np.int32), '2 images'),
  ],
)
def test_a_source_of_wrong_arrays_is_refused(images, labels, message):
  with pytest.raises(ConfigError, match=message):
    in_memory.InMemory(images, labels, 10)


def test_gpus_are_hidden_before_tensorflow_reads(data_dir, monkeypatch):
  calls = []
  monkeypatch.setattr(
    tf.config, 'set_visible_devices', lambda *args: calls.append(args)
  )
  read = in_memory.read
  monkeypatch.setattr(
    in_memory, 'read', lambda *args: calls.append('read') or read(*args)
  )
  load_part(MANUAL, 'eval', data_dir)
  assert calls == [([], 'GPU'), 'read']
