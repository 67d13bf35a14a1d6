"""ImageNet's input: data set, order, views, evaluation and cache."""

import itertools
import shutil
import time

import helpers
import hypothesis
import numpy as np
import odd_images
import pytest
import record_files
import tensorflow as tf
from hypothesis import strategies as st
from pipelines import (
  FORMATS,
  NUM_EVAL,
  NUM_TRAIN,
  evaluation,
  load,
  settings_of,
  train,
)

from conadv_jax.base.errors import ConfigError
from conadv_jax.data import datasets, pipeline, sampler
from conadv_jax.data.prefetch import Prefetcher
from conadv_jax.data.quarantine import Quarantine
from conadv_jax.data.sources import cache, image_folder, in_memory
from conadv_jax.data.sources.source import Share
from scripts import make_fake_imagenet

# TFRecord every time, ArrayRecord too where slow tests are run.
EACH_FORMAT = (
  'tfrecord',
  pytest.param('array_record', marks=pytest.mark.slow),
)

pytestmark = pytest.mark.usefixtures('few_small_graphs')


@pytest.fixture(scope='module')
def batches(fake_dirs, few_small_graphs):
  """What `train` makes of the ArrayRecord files."""
  return train(load(fake_dirs / 'array_record'))


def by_id(batches):
  """{id: bytes of all views}, of batches that lie within an epoch."""
  return {
    example_id: [batch[v][i].tobytes() for v in ('clean', 'aa') if v in batch]
    for batch in batches
    for i, example_id in enumerate(batch['id'].tolist())
  }


# ---- Data set ---------------------------------------------------------------


@pytest.mark.parametrize('name', EACH_FORMAT)
def test_batches_hold_the_labels_of_their_images(fake_dirs, name):
  for batch in train(load(fake_dirs / name)):
    assert batch['clean'].shape == batch['aa'].shape == (4, 32, 32, 3)
    assert batch['clean'].dtype == batch['aa'].dtype == np.uint8
    assert batch['label'].dtype == np.int32
    classes = [make_fake_imagenet.class_of(image) for image in batch['clean']]
    assert batch['label'].tolist() == classes
  (batch,) = evaluation(load(fake_dirs / name, 'eval'), batch_size=NUM_EVAL)
  classes = [make_fake_imagenet.class_of(image) for image in batch['clean']]
  assert batch['label'].tolist() == classes
  assert {0, 999} <= set(classes)


def test_a_folder_is_a_data_set_of_its_classes(fake_dirs):
  settings = settings_of(
    name='image_folder', data_dir=str(fake_dirs / 'folder')
  )
  spec = datasets.resolve(settings)
  assert (spec.num_classes, spec.num_train, spec.num_eval) == (
    10, NUM_TRAIN, NUM_EVAL,
  )  # fmt: skip
  for batch in train(spec.open('train', settings)):
    classes = [make_fake_imagenet.class_of(image) for image in batch['clean']]
    assert [make_fake_imagenet.CLASSES[i] for i in batch['label']] == classes


@pytest.mark.parametrize('kind', ['none', 'raw', 'decoded'])
@pytest.mark.parametrize('name', [*FORMATS, 'folder'])
@pytest.mark.slow
def test_webp_files_are_read_as_their_pixels(name, kind, tmp_path):
  """Beside a damaged one, as PNG files are; from all that holds files."""
  photos = [odd_images.photo(40 + i, 50) for i in range(3)]
  made = {}
  for file_format, options in (('PNG', {}), ('WEBP', {'lossless': True})):
    images = [odd_images.encode(x, file_format, **options) for x in photos]
    images.append(images[0][:-9])
    source = source_of(name, images, tmp_path / file_format)
    cached = source if kind == 'none' else cache.Cached(source, kind)
    quarantine = Quarantine(max_share=0.5)
    made[file_format] = train(
      cached,
      settings=settings_of(cache=kind),
      num_steps=2,
      quarantine=quarantine,
    )
    assert len(quarantine) == 1
  helpers.assert_batches_equal(made['PNG'], made['WEBP'])


def source_of(name, images, root):
  """Image files of label 0, in a folder or in one file of records."""
  root.mkdir()
  if name == 'folder':
    directory = root / 'train/a'
    directory.mkdir(parents=True)
    for i, data in enumerate(images):
      (directory / f'{i}.webp').write_bytes(data)
    return image_folder.ImageFolder(str(root), 'train')
  records = [
    tf.train.Example(
      features=tf.train.Features(
        feature={
          'image': tf.train.Feature(
            bytes_list=tf.train.BytesList(value=[data])
          ),
          'label': tf.train.Feature(int64_list=tf.train.Int64List(value=[0])),
        }
      )
    ).SerializeToString()
    for data in images
  ]
  open_source, write = record_files.FORMATS[name]
  write(root / 'records', records)
  return open_source([root / 'records'], [len(records)])


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'image_size_px': 0}, 'image_size_px=0: images .* are of any size'),
    ({'crop_padding_px': 4}, 'crop_padding_px=4'),
    (
      {'train_split': 'train[:24]'},
      r'24 is out of range; .* train \(23\), validation \(13\)',
    ),
    ({'eval_split': 'test'}, "dataset.eval_split='test': there is no split"),
    ({'pool': 2}, 'dataset.pool=2: .* cropped to dataset.image_size_px'),
    (
      {'name': 'digits', 'image_size_px': 0, 'pool': 3},
      'dataset.pool=3: .* 8 x 8 px, which it does not divide',
    ),
    ({'name': 'digits'}, "image_size_px=32: images of 'digits' are 8 px"),
    (
      {'name': 'digits', 'image_size_px': 0, 'cache': 'raw'},
      "cache='raw'.*in memory anyway",
    ),
  ],
)
def test_settings_that_do_not_fit_the_data_set(fake_dirs, changes, message):
  with pytest.raises(ConfigError, match=message):
    load(fake_dirs / 'array_record', **changes)
    load(fake_dirs / 'array_record', 'eval', **changes)


def test_another_order_of_the_classes_is_refused(fake_dirs, tmp_path):
  shutil.copytree(fake_dirs / 'array_record', tmp_path / 'data')
  (labels,) = tmp_path.glob('data/imagenet2012/*/label.labels.txt')
  names = labels.read_text().split()
  labels.write_text('\n'.join(['background', *names[:-1]]))
  with pytest.raises(ConfigError, match='first label background'):
    load(tmp_path / 'data')


def test_a_missing_imagenet_says_how_to_prepare_it(tmp_path):
  with pytest.raises(ConfigError, match=r'prepare_imagenet\.py --tars='):
    load(tmp_path)
  with pytest.raises(ConfigError, match=str(tmp_path / 'none')):
    load(tmp_path / 'none', name='image_folder')


# ---- Order ------------------------------------------------------------------


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(
  seed=st.integers(0, 2**31 - 1),
  num_examples=st.integers(1, 40),
  num_hosts=st.sampled_from([1, 2, 3, 4]),
  per_host=st.integers(1, 12),
  epoch=st.integers(0, 3),
)
def test_each_id_once_per_epoch_on_any_number_of_hosts(
  seed, num_examples, num_hosts, per_host, epoch
):
  """Of the order itself; the next test runs it through tf.data."""
  batch_size = num_hosts * per_host
  first = epoch * num_examples // batch_size
  last = -(-(epoch + 1) * num_examples // batch_size)
  seen = []
  for step in range(first, last):
    ids, epochs = sampler.example_ids(seed, step, batch_size, num_examples)
    hosts = np.split(np.arange(batch_size), num_hosts)
    assert sorted(np.concatenate(hosts)) == list(range(batch_size))
    for host in hosts:
      seen += ids[host][epochs[host] == epoch].tolist()
  assert sorted(seen) == list(range(num_examples))


def check_hosts(seed, num_examples, num_hosts, per_host, start, depth):
  """The global batches of `num_hosts` hosts through tf.data and prefetching."""
  images = np.arange(num_examples, dtype=np.uint8).reshape(-1, 1, 1, 1)
  source = in_memory.InMemory(images, np.zeros(num_examples, np.int32), 1)
  batch_size, steps = num_hosts * per_host, 3

  def host_batches(positions):
    batches = pipeline.train_batches(
      source,
      settings_of(image_size_px=0, random_flip=False),
      Share(seed, batch_size, range(start, start + steps), positions),
      image_views=('clean',),
      num_classes=1,
    )
    return list(Prefetcher(batches, lambda x: x, depth, expected=steps))

  whole = np.split(np.arange(batch_size), num_hosts)
  hosts = [host_batches(positions) for positions in whole]
  for step in range(steps):
    ids = np.concatenate([host[step]['id'] for host in hosts])
    expected, _ = sampler.example_ids(
      seed, start + step, batch_size, num_examples
    )
    np.testing.assert_array_equal(ids, expected)
    clean = np.concatenate([host[step]['clean'] for host in hosts])
    np.testing.assert_array_equal(clean[:, 0, 0, 0], expected)


CASES = dict(
  seed=st.integers(0, 2**31 - 1),
  num_examples=st.integers(1, 40),
  num_hosts=st.sampled_from([1, 2, 3]),
  per_host=st.integers(1, 6),
  start=st.integers(0, 50),
  depth=st.integers(0, 3),
)


@pytest.mark.slow
@hypothesis.settings(max_examples=10, deadline=None)
@hypothesis.given(**CASES)
def test_hosts_share_one_order(**case):
  check_hosts(**case)


@pytest.mark.slow
@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(**CASES)
def test_hosts_share_one_order_in_many_cases(**case):
  check_hosts(**case)


def test_two_runs_give_the_same_bytes(fake_dirs, batches):
  helpers.assert_batches_equal(train(load(fake_dirs / 'array_record')), batches)


@pytest.mark.parametrize('name', EACH_FORMAT)
def test_a_fresh_pipeline_from_any_step_gives_the_tail(fake_dirs, name):
  steps = dict(batch_size=13, views=('clean',))  # of 23: from epoch 0 to 2
  whole = train(load(fake_dirs / name), num_steps=4, **steps)
  for start in range(1, 4):
    source = load(fake_dirs / name)
    tail = train(source, start_step=start, num_steps=4 - start, **steps)
    helpers.assert_batches_equal(tail, whole[start:])


@pytest.mark.parametrize('name', EACH_FORMAT)
def test_an_image_is_the_same_on_any_number_of_hosts(fake_dirs, name):
  # 5 batches of 4 are within the first epoch of 23, on each of two hosts too.
  steps = dict(num_steps=5, views=('clean',))
  one = by_id(train(load(fake_dirs / name), **steps))
  two = {}
  for host in range(2):
    positions = np.arange(4).reshape(2, 2)[host]
    batches = train(
      load(fake_dirs / name),
      positions=positions,
      host=host,
      num_hosts=2,
      **steps,
    )
    mine = by_id(batches)
    assert not mine.keys() & two.keys()
    two |= mine
  assert len(one) == len(two) == 20  # each id at most once
  both = one.keys() & two.keys()
  assert len(both) == 20 if name == 'array_record' else len(both) >= 17
  assert all(one[key] == two[key] for key in both)


def test_both_formats_give_the_same_image_for_an_id(fake_dirs, batches):
  one = by_id(batches[:5])  # within an epoch
  other = by_id(train(load(fake_dirs / 'tfrecord'), num_steps=5))
  both = one.keys() & other.keys()
  assert len(both) >= 17
  assert all(one[key] == other[key] for key in both)


def test_a_slow_file_does_not_change_the_order(fake_dirs, batches):
  """Threads finish in another order than they start."""
  source = load(fake_dirs / 'array_record')
  fetch = source.fetch

  def slow(ids):
    time.sleep(0.05 * (int(ids[0]) % 3))
    return fetch(ids)

  source.fetch = slow
  helpers.assert_batches_equal(train(source), batches)


# ---- Views ------------------------------------------------------------------


@pytest.mark.slow
def test_views_have_crops_of_their_own_unless_shared(fake_dirs, batches):
  source = load(fake_dirs / 'array_record')
  alone = train(source, views=('clean',))
  shared = train(source, settings=settings_of(aa_shares_crop=True))
  for a, b, c in zip(batches, alone, shared, strict=True):
    # The clean view does not depend on what else is made.
    np.testing.assert_array_equal(a['clean'], b['clean'])
    np.testing.assert_array_equal(a['clean'], c['clean'])
  assert 'aa' not in alone[0]
  images = np.concatenate([x['clean'] for x in shared]).reshape(32, -1)
  augmented = np.concatenate([x['aa'] for x in shared]).reshape(32, -1)
  # Sub-policies do nothing at all now and then: then a shared crop is equal.
  assert 0 < (images == augmented).all(1).sum() < 32


@pytest.mark.slow
def test_the_policy_of_the_settings_is_applied(fake_dirs, batches):
  made = {'v0': batches}
  for policy in ('reduced_imagenet', 'randaugment'):
    source = load(fake_dirs / 'array_record')
    made[policy] = train(source, settings=settings_of(autoaugment=policy))
  for one, other in itertools.combinations(made.values(), 2):
    for a, b in zip(one, other, strict=True):
      np.testing.assert_array_equal(a['clean'], b['clean'])
      assert (a['aa'] != b['aa']).any()


# ---- Evaluation -------------------------------------------------------------


@pytest.mark.parametrize(
  ('name', 'batch_size', 'num_hosts'),
  [
    ('array_record', 40, 2),
    pytest.param('array_record', 6, 3, marks=pytest.mark.slow),
    ('tfrecord', 4, 2),
  ],
)
def test_evaluation_sees_each_example_once(
  fake_dirs, name, batch_size, num_hosts
):
  source, seen = load(fake_dirs / name, 'eval'), []
  for positions in np.arange(batch_size).reshape(num_hosts, -1):
    batches = evaluation(source, batch_size=batch_size, positions=positions)
    assert len(batches) == -(-NUM_EVAL // batch_size)
    for batch in batches:
      mask = batch['mask']
      np.testing.assert_array_equal(mask, batch['id'] >= 0)
      assert not batch['clean'][~mask].any()
      classes = [make_fake_imagenet.class_of(x) for x in batch['clean'][mask]]
      assert batch['label'][mask].tolist() == classes
      seen += batch['id'][mask].tolist()
  assert sorted(seen) == list(range(NUM_EVAL))


# ---- Cache ------------------------------------------------------------------


@pytest.mark.parametrize('kind', ['raw', 'decoded'])
def test_a_cache_changes_no_pixel(fake_dirs, batches, kind):
  cached = load(fake_dirs / 'array_record', cache=kind)
  helpers.assert_batches_equal(train(cached), batches)


@pytest.mark.slow
def test_a_cache_changes_no_pixel_of_the_evaluation(fake_dirs):
  root = fake_dirs / 'array_record'
  cached = evaluation(load(root, 'eval', cache='decoded'))
  helpers.assert_batches_equal(cached, evaluation(load(root, 'eval')))


def test_a_cache_gives_tfrecords_the_order_of_random_access(fake_dirs, batches):
  cached = load(fake_dirs / 'tfrecord', cache='raw')
  helpers.assert_batches_equal(train(cached), batches)


def test_a_cache_that_does_not_fit_is_refused(fake_dirs, monkeypatch):
  monkeypatch.setattr(cache, 'available_bytes', lambda: 10_000)
  for kind in ('raw', 'decoded'):
    with pytest.raises(ConfigError, match=f"dataset.cache='{kind}'.*GB"):
      load(fake_dirs / 'array_record', cache=kind)
