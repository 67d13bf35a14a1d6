"""Batches depend on the seed and the step only, on any number of hosts."""

import dataclasses
import itertools
import time

import helpers
import numpy as np
import pipelines
import pytest
import tensorflow as tf

from conadv_jax.base.errors import ConfigError
from conadv_jax.config import default_config, from_config_dict
from conadv_jax.data import pipeline, sampler
from conadv_jax.data.images import preprocess
from conadv_jax.data.sources import in_memory

SETTINGS = from_config_dict(default_config()).dataset


def make_source(num_examples=10, size=4, num_classes=10):
  """Images of random pixels from 1 to 255: zero is padding only."""
  rng = np.random.default_rng(0)
  shape = (num_examples, size, size, 2)
  return in_memory.InMemory(
    rng.integers(1, 256, shape, np.uint8),
    (np.arange(num_examples) % num_classes).astype(np.int32),
    num_classes,
  )


def train(source, *, crop_padding_px=2, random_flip=True, seed=5, **kwargs):
  settings = dataclasses.replace(
    SETTINGS, crop_padding_px=crop_padding_px, random_flip=random_flip
  )
  return pipelines.train(
    source, ('clean',), settings=settings, seed=seed, num_classes=10, **kwargs
  )


def evaluation(source, **kwargs):
  batches = pipeline.eval_batches(source, SETTINGS, num_classes=10, **kwargs)
  return list(batches)


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


def test_gpus_are_hidden_before_tensorflow_starts(monkeypatch):
  calls = []
  monkeypatch.setattr(
    tf.config, 'set_visible_devices', lambda *args: calls.append(args)
  )
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
  assert helpers.printed_by(code) == f'{loaded}\n'


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
