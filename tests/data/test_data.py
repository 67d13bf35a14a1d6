"""Data sets are read whole or refused; batches depend on (seed, step) only."""

import dataclasses
import functools
import gzip
import hashlib
import importlib.util
import itertools
import pathlib
import shutil
import socket
import struct
import subprocess
import sys
import time

import helpers
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from etils import epath
from sklearn import datasets as sklearn_datasets

from conadv_jax.base.errors import ConfigError
from conadv_jax.config import default_config, from_config_dict
from conadv_jax.data import datasets, pipeline, sampler
from conadv_jax.data.images import preprocess
from conadv_jax.data.sources import digits, in_memory
from conadv_jax.data.sources.prepared import Prepared
from conadv_jax.data.sources.source import Share

REPOSITORY = pathlib.Path(__file__).parents[2]
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


@pytest.fixture
def no_network(monkeypatch):
  def refuse(*args, **kwargs):
    raise AssertionError('opened a socket')

  monkeypatch.setattr(socket, 'socket', refuse)
  monkeypatch.setattr(socket, 'create_connection', refuse)
  monkeypatch.setattr(socket, 'getaddrinfo', refuse)


def make_source(num_examples=10, size=4, num_classes=10):
  """Images of random pixels from 1 to 255: zero is padding only."""
  rng = np.random.default_rng(0)
  shape = (num_examples, size, size, 2)
  return in_memory.InMemory(
    rng.integers(1, 256, shape, np.uint8),
    (np.arange(num_examples) % num_classes).astype(np.int32),
    num_classes,
  )


SETTINGS = from_config_dict(default_config()).dataset


def load(spec, part, data_dir, **changes):
  config = dataclasses.replace(SETTINGS, data_dir=str(data_dir), **changes)
  return spec.open(part, config)


def train(
  source,
  *,
  crop_padding_px=2,
  random_flip=True,
  seed=5,
  batch_size=4,
  start_step=0,
  num_steps=8,
  positions=None,
):
  config = dataclasses.replace(
    SETTINGS, crop_padding_px=crop_padding_px, random_flip=random_flip
  )
  steps = range(start_step, start_step + num_steps)
  batches = pipeline.train_batches(
    source,
    config,
    Share(seed, batch_size, steps, positions),
    image_views=('clean',),
    num_classes=10,
  )
  return list(batches)


def evaluation(source, **kwargs):
  batches = pipeline.eval_batches(source, SETTINGS, num_classes=10, **kwargs)
  return list(batches)


def printed_by(code):
  """What `code` prints in a process of its own."""
  return subprocess.run(
    [sys.executable, '-c', code],
    cwd=REPOSITORY,
    capture_output=True,
    text=True,
    check=True,
  ).stdout


# ---- Data sets --------------------------------------------------------------


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
  train_source = load(spec, 'train', data_dir)
  eval_source = load(spec, 'eval', data_dir)
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
  assert load(MANUAL, 'eval', '').num_examples == 360
  monkeypatch.delenv('TFDS_DATA_DIR')
  monkeypatch.setenv('HOME', '/somewhere')
  with pytest.raises(ConfigError, match='/somewhere/tensorflow_data'):
    load(MANUAL, 'eval', '')


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
      load(datasets.get_spec(name), 'train', tmp_path)
    assert f'{tmp_path}/{name}' in str(error.value)
    assert f'{command}{tmp_path}' in str(error.value)
  assert time.monotonic() - start < 5


@pytest.mark.parametrize('inside', ['digits', 'digits/1.0.0'])
def test_the_data_sets_own_directory_is_not_the_data_dir(inside, data_dir):
  with pytest.raises(ConfigError) as error:
    load(MANUAL, 'train', data_dir / inside)
  message = str(error.value)
  assert message.startswith(f"dataset.data_dir='{data_dir}/{inside}': ")
  assert message.endswith(f'the directory that holds digits/, use {data_dir}')


def test_interrupted_preparation_is_reported(tmp_path):
  (tmp_path / 'digits' / 'incomplete.ABC_1.0.0').mkdir(parents=True)
  with pytest.raises(ConfigError, match='unfinished preparation') as e:
    load(MANUAL, 'train', tmp_path)
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
    load(MANUAL, 'train', root)
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
    load(MANUAL, 'train', broken_dir.parents[1])
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
    load(spec, 'train', data_dir)


def test_the_newest_version_is_read(broken_dir):
  root = broken_dir.parents[1]
  (root / 'digits' / '0.9.0').mkdir()
  broken_dir.rename(root / 'digits' / '0.10.0')
  assert load(MANUAL, 'eval', root).num_examples == 360
  (root / 'digits' / '0.10.1').mkdir()
  with pytest.raises(ConfigError, match=r'digits/0\.10\.1 is half'):
    load(MANUAL, 'eval', root)


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


# ---- Augmentation -----------------------------------------------------------


def per_seed(function, count):
  """[function(seed of example 0), function(seed of example 1), ..]"""

  def of_example(example_id):
    epoch = tf.constant(0, tf.int64)
    return function(preprocess.example_seed(0, epoch, example_id))

  return list(tf.data.Dataset.range(count).map(of_example).as_numpy_iterator())


def test_example_seeds_differ_in_each_argument():
  big = 2**32
  values = [0, 1, 2, big, big + 1]
  made = {
    tuple(
      preprocess.example_seed(
        seed, tf.constant(epoch, tf.int64), tf.constant(i, tf.int64)
      ).numpy()
    )
    for seed, epoch, i in itertools.product(values, repeat=3)
  }
  assert len(made) == len(values) ** 3


def test_golden_example_seed():
  """Fails if a TensorFlow release changes the stream of a seed."""
  seed = preprocess.example_seed(
    1, tf.constant(2, tf.int64), tf.constant(3, tf.int64)
  )
  assert seed.dtype == tf.int32
  assert seed.numpy().tolist() == [-92544939, 1528043550]
  assert preprocess.op_seed(seed, 1).numpy().tolist() == [
    -8119626956730371523,
    1,
  ]


def test_crop_is_one_of_the_windows_of_the_padded_image():
  padded = np.array(
    [[0, 0, 0, 0], [0, 1, 2, 0], [0, 3, 4, 0], [0, 0, 0, 0]], np.uint8
  )
  windows = {
    padded[y : y + 2, x : x + 2].tobytes(): 0
    for y in range(3)
    for x in range(3)
  }
  image = tf.constant(padded[1:3, 1:3, None])
  for crop in per_seed(
    lambda seed: preprocess.random_crop_with_padding(image, 1, seed), 900
  ):
    assert crop.shape == (2, 2, 1)
    windows[crop.tobytes()] += 1
  assert len(windows) == 9
  # Mean 100, standard deviation 9.4.
  assert min(windows.values()) > 55
  assert max(windows.values()) < 145


def test_crop_keeps_the_shape_of_an_oblong_image():
  image = tf.zeros([3, 5, 2], tf.uint8)
  crop = preprocess.random_crop_with_padding(image, 4, tf.constant([1, 2]))
  assert crop.shape == (3, 5, 2)


def test_flip_mirrors_half_of_the_images():
  image = np.arange(6, dtype=np.uint8).reshape(2, 3, 1)
  flips = 0
  for out in per_seed(
    lambda seed: preprocess.random_flip(tf.constant(image), seed), 400
  ):
    flipped = out[0, 0, 0] == 2
    np.testing.assert_array_equal(out, image[:, ::-1] if flipped else image)
    flips += flipped
  # Mean 200, standard deviation 10.
  assert 150 < flips < 250


def test_crop_and_flip_are_independent():
  """All shifts and directions of a row of two pixels are equally likely."""
  source = in_memory.InMemory(
    np.array([[[[1], [2]]]], np.uint8), np.zeros(1, np.int32), 10
  )
  counts = {}
  for batch in train(source, batch_size=200, num_steps=6, crop_padding_px=1):
    for image in batch['clean']:
      counts[image.tobytes()] = counts.get(image.tobytes(), 0) + 1
  # A third of the crops hold the row: then 3 shifts and 2 directions.
  for row in ([1, 2], [2, 1], [0, 1], [1, 0], [2, 0], [0, 2]):
    # Mean 67, standard deviation 8.
    assert 35 < counts[bytes(row)] < 105


# ---- Training batches -------------------------------------------------------


def test_batches_hold_the_examples_of_the_sampler():
  source = make_source(10)
  batches = train(source, crop_padding_px=0, random_flip=False)
  for step, batch in enumerate(batches):
    ids, _ = sampler.example_ids(5, step, 4, 10)
    assert batch['clean'].dtype == np.uint8
    assert batch['label'].dtype == np.int32
    np.testing.assert_array_equal(batch['clean'], source.images[ids])
    np.testing.assert_array_equal(batch['label'], source.labels[ids])


def test_images_are_flipped_only_when_asked():
  source = make_source(10)
  mirrored = 0
  for step, batch in enumerate(train(source, crop_padding_px=0)):
    ids, _ = sampler.example_ids(5, step, 4, 10)
    for image, original in zip(batch['clean'], source.images[ids], strict=True):
      same = (image == original).all()
      assert same or (image == original[:, ::-1]).all()
      mirrored += not same
  assert 0 < mirrored < 32
  for step, batch in enumerate(train(source, random_flip=False)):
    ids, _ = sampler.example_ids(5, step, 4, 10)
    for image, original in zip(batch['clean'], source.images[ids], strict=True):
      padded = np.pad(original, [(2, 2), (2, 2), (0, 0)])
      assert any(
        (image == padded[y : y + 4, x : x + 4]).all()
        for y in range(5)
        for x in range(5)
      )


def test_each_op_has_a_stream_of_its_own(monkeypatch):
  streams = []
  op_seed = preprocess.op_seed

  def record(seed, stream):
    streams.append(stream)
    return op_seed(seed, stream)

  monkeypatch.setattr(preprocess, 'op_seed', record)
  monkeypatch.setattr(pipeline, 'uses_tensorflow', lambda *_: True)
  train(make_source(3), num_steps=1)
  assert len(streams) == len(set(streams)) == 2


def test_two_runs_are_equal_and_two_seeds_are_not():
  source = make_source(50)
  first = train(source, batch_size=16, num_steps=12)
  helpers.assert_batches_equal(
    train(source, batch_size=16, num_steps=12), first
  )
  other = train(source, batch_size=16, num_steps=12, seed=6)
  assert (other[0]['clean'] != first[0]['clean']).any()


@pytest.mark.slow
def test_resumed_batches_are_the_tail():
  source = make_source(10)  # Epochs end in the middle of step 2, after step 4.
  whole = train(source)
  for start in range(8):
    tail = train(source, start_step=start, num_steps=8 - start)
    helpers.assert_batches_equal(tail, whole[start:])


def test_a_late_step_starts_at_once():
  source = make_source(10)
  start = time.monotonic()
  batches = train(source, batch_size=8, start_step=2**40, num_steps=2)
  assert len(batches) == 2
  assert time.monotonic() - start < 5


@pytest.mark.parametrize('num_hosts', [1, 2, 4])
def test_hosts_split_the_same_global_batch(num_hosts):
  source = make_source(10)
  whole = train(source, batch_size=8, num_steps=4)
  places = np.arange(8).reshape(-1, num_hosts).T
  hosts = [
    train(source, batch_size=8, num_steps=4, positions=host) for host in places
  ]
  for step, batch in enumerate(whole):
    for host, positions in zip(hosts, places, strict=True):
      for key, values in batch.items():
        np.testing.assert_array_equal(host[step][key], values[positions])


def test_augmentation_is_keyed_by_epoch_and_id_not_by_place():
  source = make_source(10)

  def by_key(batch_size, num_steps):
    images = {}
    batches = train(source, batch_size=batch_size, num_steps=num_steps)
    for step, batch in enumerate(batches):
      ids, epochs = sampler.example_ids(5, step, batch_size, 10)
      for i, epoch, image in zip(ids, epochs, batch['clean'], strict=True):
        images[i, epoch] = image.tobytes()
    return images

  small, large = by_key(3, 20), by_key(30, 2)
  assert len(small) == 60
  assert small == large
  # An example looks different in most epochs.
  assert len({small[0, epoch] for epoch in range(6)}) >= 4


def test_slow_examples_keep_their_places(monkeypatch):
  monkeypatch.setattr(pipeline, 'uses_tensorflow', lambda *_: True)

  class SlowSource(in_memory.InMemory):
    def lookup(self, example_id):
      def read(i):
        time.sleep(0.02 * (i % 2))
        return np.full((2, 2, 1), i, np.uint8), np.int32(i)

      image, label = tf.numpy_function(read, [example_id], [tf.uint8, tf.int32])
      return tf.ensure_shape(image, (2, 2, 1)), tf.ensure_shape(label, ())

  images, labels = np.zeros((20, 2, 2, 1), np.uint8), np.zeros(20, np.int32)
  source = SlowSource(images, labels, 10)
  for step, batch in enumerate(train(source, crop_padding_px=0)):
    ids, _ = sampler.example_ids(5, step, 4, 20)
    assert batch['label'].tolist() == ids.tolist()
    assert batch['clean'][:, 0, 0, 0].tolist() == ids.tolist()


def test_a_batch_may_exceed_the_data_set():
  batches = train(make_source(3), batch_size=10, num_steps=3)
  labels = np.concatenate([batch['label'] for batch in batches])
  assert np.bincount(labels).tolist() == [10, 10, 10]


def test_batch_of_one():
  batches = train(make_source(3), batch_size=1, num_steps=3)
  assert sorted(int(batch['label'][0]) for batch in batches) == [0, 1, 2]


def test_gpus_are_hidden_before_tensorflow_starts(data_dir, monkeypatch):
  calls = []
  monkeypatch.setattr(
    tf.config, 'set_visible_devices', lambda *args: calls.append(args)
  )
  read = in_memory.read
  monkeypatch.setattr(
    in_memory, 'read', lambda *args: calls.append('read') or read(*args)
  )
  load(MANUAL, 'eval', data_dir)
  assert calls == [([], 'GPU'), 'read']
  del calls[:]
  monkeypatch.setattr(pipeline, 'uses_tensorflow', lambda *_: True)
  train(make_source(3), num_steps=1)
  assert calls == [([], 'GPU')]


@pytest.mark.parametrize('views, loaded', [('clean', False), ('aa', True)])
def test_images_in_memory_need_no_tensorflow(views, loaded):
  code = f"""
import sys
import numpy as np
from conadv_jax.config import Dataset
from conadv_jax.data import pipeline
from conadv_jax.data.sources.in_memory import InMemory
from conadv_jax.data.sources.source import Share

images, labels = np.zeros((3, 2, 2, 3), np.uint8), np.arange(3, dtype=np.int32)
source, config = InMemory(images, labels, 3), Dataset(crop_padding_px=1)
next(pipeline.eval_batches(source, config, num_classes=3, batch_size=2))
next(pipeline.train_batches(
  source, config, Share(0, 2, range(2)), num_classes=3, image_views=[{views!r}]
))
print('tensorflow' in sys.modules)
"""
  assert printed_by(code) == f'{loaded}\n'


@pytest.mark.parametrize('positions', [None, [11, 1, 4]])
@pytest.mark.parametrize('seed', [5, 2**63 - 1])
@pytest.mark.parametrize('padding, flip', [(0, False), (3, False), (2, True)])
def test_crops_and_flips_equal_those_of_tensorflow(
  padding, flip, seed, positions, monkeypatch
):
  def batches():
    return train(
      make_source(40),
      crop_padding_px=padding,
      random_flip=flip,
      seed=seed,
      batch_size=12,
      start_step=2**33,
      num_steps=5,
      positions=positions,
    )

  found = batches()
  monkeypatch.setattr(pipeline, 'uses_tensorflow', lambda *_: True)
  assert found[0].keys() == {'clean', 'label', 'id'}
  helpers.assert_batches_equal(found, batches())


@pytest.mark.parametrize('positions', [[-1], [4], [0, 0], []])
def test_wrong_positions_are_refused(positions):
  with pytest.raises(ValueError, match=r'in \[0, 4\)'):
    train(make_source(3), positions=np.array(positions))
  with pytest.raises(ValueError, match=r'in \[0, 4\)'):
    evaluation(make_source(3), batch_size=4, positions=positions)


def test_a_wrong_seed_is_a_config_error():
  with pytest.raises(ConfigError, match='seed=-1'):
    train(make_source(3), seed=-1)


# ---- Evaluation batches -----------------------------------------------------


@pytest.mark.parametrize('num_examples', [1, 7, 8])
@pytest.mark.parametrize(
  ('batch_size', 'num_hosts'), [(1, 1), (4, 1), (4, 2), (20, 1), (20, 4)]
)
def test_evaluation_sees_each_example_once(num_examples, batch_size, num_hosts):
  source = make_source(num_examples)
  seen = []
  for positions in np.arange(batch_size).reshape(num_hosts, -1):
    batches = evaluation(source, batch_size=batch_size, positions=positions)
    assert len(batches) == -(-num_examples // batch_size)
    for batch in batches:
      mask, ids = batch['mask'], batch['id']
      assert mask.dtype == bool
      assert ids.dtype == np.int64
      assert mask.shape == ids.shape == batch['label'].shape == positions.shape
      np.testing.assert_array_equal(mask, ids >= 0)
      np.testing.assert_array_equal(
        batch['clean'][mask], source.images[ids[mask]]
      )
      np.testing.assert_array_equal(
        batch['label'][mask], source.labels[ids[mask]]
      )
      assert not batch['clean'][~mask].any()
      assert not batch['label'][~mask].any()
      assert (ids[~mask] == -1).all()
      seen += ids[mask].tolist()
  assert sorted(seen) == list(range(num_examples))


def test_evaluation_feeds_all_positions_by_default():
  batches = evaluation(make_source(5), batch_size=3)
  assert [batch['id'].tolist() for batch in batches] == [[0, 1, 2], [3, 4, -1]]


def test_evaluation_of_a_part_sees_its_examples_in_order():
  source, part = make_source(9), np.array([7, 2, 3, 8, 0])
  batches = evaluation(
    source, batch_size=4, positions=np.array([1, 3]), example_ids=part
  )
  assert [batch['id'].tolist() for batch in batches] == [[2, 8], [-1, -1]]
  np.testing.assert_array_equal(batches[0]['label'], source.labels[[2, 8]])
  assert not batches[1]['mask'].any()


# ---- scripts/prepare_fashion_mnist.py ---------------------------------------


@pytest.fixture(scope='module')
def script():
  path = REPOSITORY / 'scripts' / 'prepare_fashion_mnist.py'
  spec = importlib.util.spec_from_file_location('prepare_fashion_mnist', path)
  module = importlib.util.module_from_spec(spec)
  sys.modules[spec.name] = module
  spec.loader.exec_module(module)
  yield module
  del sys.modules[spec.name]


def idx_bytes(array):
  header = struct.pack(f'>HBB{array.ndim}I', 0, 8, array.ndim, *array.shape)
  return header + array.tobytes()


@pytest.fixture
def idx(script, tmp_path):
  """(directory of four small IDX files, what they hold, their arrays)."""
  rng = np.random.default_rng(0)
  directory = tmp_path / 'idx'
  directory.mkdir()
  files, arrays = {}, {}
  for prefix, count in (('train', 7), ('t10k', 3)):
    for name, array in (
      (f'{prefix}-images-idx3-ubyte', rng.integers(0, 256, (count, 28, 28))),
      (f'{prefix}-labels-idx1-ubyte', rng.integers(0, 10, count)),
    ):
      arrays[name] = array.astype(np.uint8)
      data = idx_bytes(arrays[name])
      files[name] = script.IdxFile(
        array.shape, hashlib.sha256(data).hexdigest()
      )
      (directory / f'{name}.gz').write_bytes(gzip.compress(data))
  return directory, files, arrays


def sorted_pairs(images, labels):
  return sorted(
    (image.tobytes(), int(label))
    for image, label in zip(images, labels, strict=True)
  )


def test_fashion_mnist_is_built_from_idx_files(
  script, idx, tmp_path, no_network, capsys
):
  directory, files, arrays = idx
  plain = directory / 't10k-labels-idx1-ubyte'  # One of them not gzipped.
  packed = plain.with_name(f'{plain.name}.gz')
  plain.write_bytes(gzip.decompress(packed.read_bytes()))
  packed.unlink()
  made = script.prepare(str(directory), str(tmp_path / 'tfds'), files)
  assert made == str(tmp_path / 'tfds' / 'fashion_mnist' / '3.0.1')
  spec = dataclasses.replace(
    datasets.get_spec('fashion_mnist'), splits={'train': 7, 'test': 3}
  )
  for split, prefix in (('train', 'train'), ('eval', 't10k')):
    source = load(spec, split, str(tmp_path / 'tfds'))
    # TFDS orders by a hash of the index.
    assert sorted_pairs(source.images, source.labels) == sorted_pairs(
      arrays[f'{prefix}-images-idx3-ubyte'],
      arrays[f'{prefix}-labels-idx1-ubyte'],
    )
  capsys.readouterr()
  shutil.rmtree(directory)
  assert script.prepare(str(directory), str(tmp_path / 'tfds'), files) == made
  assert capsys.readouterr().out == f'already prepared: {made}\n'


@pytest.mark.parametrize('file_format', ['tfrecord', 'array_record'])
def test_classes_take_turns_in_the_balanced_order(
  script, idx, tmp_path, no_network, monkeypatch, file_format
):
  directory, files, arrays = idx
  usual = functools.partialmethod(
    script.BalancedFashionMnist.__init__, file_format=file_format
  )
  monkeypatch.setattr(script.BalancedFashionMnist, '__init__', usual)
  data_dir = str(tmp_path / 'tfds')
  made = script.prepare(str(directory), data_dir, files, balanced=True)
  assert made == str(tmp_path / 'tfds' / 'fashion_mnist_balanced' / '3.0.1')
  assert len(list(pathlib.Path(made).glob(f'*.{file_format}*'))) == 2
  spec = dataclasses.replace(
    datasets.get_spec('fashion_mnist_balanced'), splits={'train': 7, 'test': 3}
  )
  labels = arrays['train-labels-idx1-ubyte'].tolist()
  turns = [(labels[:i].count(label), label) for i, label in enumerate(labels)]
  order = sorted(range(7), key=turns.__getitem__)
  assert order != list(range(7)) and max(turns)[0] > 0
  source = load(spec, 'train', data_dir)
  images = arrays['train-images-idx3-ubyte']
  np.testing.assert_array_equal(source.images[..., 0], images[order])
  np.testing.assert_array_equal(source.labels, np.array(labels)[order])
  # A slice is one of this order.
  part = dataclasses.replace(spec, train_split='train[2:5]')
  source = load(part, 'train', data_dir)
  np.testing.assert_array_equal(source.images[..., 0], images[order[2:5]])


def test_missing_idx_files_are_listed(script, tmp_path, capsys):
  (tmp_path / 'train-images-idx3-ubyte.gz').touch()
  with pytest.raises(SystemExit) as error:
    script.main([f'--idx_dir={tmp_path}', f'--data_dir={tmp_path}/tfds'])
  assert error.value.code == 2
  message = capsys.readouterr().err
  assert f'not in {tmp_path}: train-labels-idx1-ubyte.gz, t10k' in message
  assert 'apt install dataset-fashion-mnist' in message
  assert not (tmp_path / 'tfds').exists()


def of_another_data_set(data):
  return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (of_another_data_set, 'SHA-256'),
    (lambda data: data[:-1], 'has 5503 bytes after gunzip, need 5504'),
    (lambda data: b'\x00' + data, r'not an IDX file of \[7, 28, 28\]'),
  ],
)
def test_wrong_idx_files_are_refused(script, idx, tmp_path, change, message):
  directory, files, _ = idx
  path = directory / 'train-images-idx3-ubyte.gz'
  path.write_bytes(gzip.compress(change(gzip.decompress(path.read_bytes()))))
  with pytest.raises(script.IdxError, match=message) as error:
    script.prepare(str(directory), str(tmp_path / 'tfds'), files)
  assert str(path) in str(error.value)


def test_truncated_gzip_is_refused(script, idx, tmp_path):
  directory, files, _ = idx
  path = directory / 'train-images-idx3-ubyte.gz'
  path.write_bytes(path.read_bytes()[:-20])
  with pytest.raises(script.IdxError, match='cannot be read'):
    script.prepare(str(directory), str(tmp_path / 'tfds'), files)


def test_half_prepared_fashion_mnist_is_not_reused(script, idx, tmp_path):
  directory, files, _ = idx
  (tmp_path / 'tfds' / 'fashion_mnist' / '3.0.1').mkdir(parents=True)
  with pytest.raises(script.IdxError, match='half-prepared'):
    script.prepare(str(directory), str(tmp_path / 'tfds'), files)


@pytest.mark.slow
def test_the_packaged_fashion_mnist_is_complete(script, tmp_path):
  if not pathlib.Path(script.DEFAULT_IDX_DIR).is_dir():
    pytest.skip('needs `apt install dataset-fashion-mnist`')
  script.prepare(script.DEFAULT_IDX_DIR, str(tmp_path))
  spec = datasets.get_spec('fashion_mnist')
  source = load(spec, 'train', tmp_path)
  assert np.bincount(source.labels).tolist() == [6000] * 10
  assert abs(source.images.mean() - spec.mean[0]) < 0.1
  assert abs(source.images.std() - spec.std[0]) < 0.1
  source = load(spec, 'eval', tmp_path)
  assert np.bincount(source.labels).tolist() == [1000] * 10


@pytest.mark.slow
def test_slices_of_the_balanced_fashion_mnist_are_balanced(script, tmp_path):
  if not pathlib.Path(script.DEFAULT_IDX_DIR).is_dir():
    pytest.skip('needs `apt install dataset-fashion-mnist`')
  script.main(['--balanced', f'--data_dir={tmp_path}'])
  spec = datasets.get_spec('fashion_mnist_balanced')
  source = load(spec, 'train', tmp_path)
  assert source.labels.tolist() == list(range(10)) * 6000
  usual = script.read_checked(
    pathlib.Path(script.DEFAULT_IDX_DIR) / 'train-images-idx3-ubyte.gz',
    script.FILES['train-images-idx3-ubyte'],
  )
  images = [usual[start : start + 784] for start in range(16, len(usual), 784)]
  assert sorted(images) == sorted(image.tobytes() for image in source.images)
  for split, each in (('train[:10240]', 1024), ('train[10240:20240]', 1000)):
    part = dataclasses.replace(spec, train_split=split)
    labels = load(part, 'train', tmp_path).labels
    assert np.bincount(labels).tolist() == [each] * 10
