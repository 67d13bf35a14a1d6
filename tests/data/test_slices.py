"""Slices of splits: TFDS's notation, for every kind of source."""

import dataclasses
import shutil

import helpers
import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import example, given
from hypothesis import strategies as st

from conadv_jax.base.errors import ConfigError
from conadv_jax.config import Dataset, default_config, from_config_dict
from conadv_jax.data import datasets, pipeline, slices
from conadv_jax.data.sources import in_memory
from conadv_jax.data.sources.source import Share
from scripts import make_fake_imagenet

NUM_TRAIN, NUM_EVAL = 23, 13
SIZES = {'train': 1437, 'test': 360}
CONFIG = from_config_dict(default_config()).dataset


@pytest.fixture(scope='module')
def fake_dirs(tmp_path_factory):
  root = tmp_path_factory.mktemp('fake')
  for name in ('array_record', 'tfrecord'):
    make_fake_imagenet.prepare(str(root / name), name, NUM_TRAIN, NUM_EVAL, 3)
  make_fake_imagenet.write_folder(str(root / 'folder'), NUM_TRAIN, NUM_EVAL)
  return root


def config_of(root, kind, **changes):
  if kind == 'digits':
    return dataclasses.replace(CONFIG, **changes)
  return dataclasses.replace(
    CONFIG,
    name='image_folder' if kind == 'folder' else 'imagenet2012',
    data_dir=str(root / kind),
    image_size_px=32,
    **changes,
  )


KINDS = ('digits', 'array_record', 'tfrecord', 'folder')


def evaluated(config):
  """The eval split as {view: array}, and its spec."""
  spec = datasets.resolve(config)
  (batch,) = pipeline.eval_batches(
    spec.open('eval', config),
    config,
    num_classes=spec.num_classes,
    batch_size=spec.num_eval,
  )
  assert batch['mask'].all()
  assert batch['id'].tolist() == list(range(spec.num_eval))
  return batch


NUMBERS = st.just('') | st.integers(-1437, 1437).map(str)
PERCENT = st.just('') | st.integers(-100, 100).map(lambda value: f'{value}%')
BOUNDS = st.tuples(NUMBERS, NUMBERS) | st.tuples(PERCENT, PERCENT)


@given(st.sampled_from(sorted(SIZES)), BOUNDS)
@example('train', ('', '-50%'))  # 718.5 examples
def test_slices_are_those_of_tfds(split, bounds):
  start, stop = bounds
  text = f'{split}[{start}:{stop}]'
  splits = tfds.core.splits.SplitDict(
    [
      tfds.core.SplitInfo(name=name, shard_lengths=[size], num_bytes=0)
      for name, size in SIZES.items()
    ]
  )
  try:
    (theirs,) = tfds.core.ReadInstruction.from_spec(text).to_absolute(splits)
  except (ValueError, AssertionError):
    expected = (split, 0, SIZES[split]) if text == f'{split}[:]' else None
  else:
    last = SIZES[split] if theirs.to is None else theirs.to
    expected = (split, theirs.from_ or 0, last)
  if expected is None or expected[1] >= expected[2]:  # TFDS gives empty ones.
    with pytest.raises(ConfigError):
      slices.parse(text, SIZES, 'dataset.train_split')
  else:
    assert slices.parse(text, SIZES, 'dataset.train_split') == (expected,)


def test_pieces_follow_each_other():
  pieces = slices.parse(' test[:3] + train + test[-1:] ', SIZES, 'x')
  assert pieces == (('test', 0, 3), ('train', 0, 1437), ('test', 359, 360))
  assert slices.count(pieces) == 1441
  assert slices.parse(slices.to_text(pieces), SIZES, 'x') == pieces
  assert slices.names(' test[:3] + train + test[-1:] ') == ('test', 'train')


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('trian', "there is no split 'trian'"),
    ('train[:1438]', '1438 is out of range'),
    ('train[-1438:]', '-1438 is out of range'),
    ('train[:101%]', '101% is out of range'),
    ('train[5:5]', 'selects no example'),
    ('train[9:5]', 'selects no example'),
    ('train[1:10%]', 'mixes percentages with numbers'),
    ('train[5]', 'not a part of a split'),
    ('train[a:]', "'a' is neither"),
    ('train+', 'not a part of a split'),
    ('', 'not a part of a split'),
  ],
)
def test_a_wrong_slice_names_field_value_and_splits(text, message):
  with pytest.raises(ConfigError, match=message) as error:
    slices.parse(text, SIZES, 'dataset.train_split')
  assert str(error.value).startswith(f'dataset.train_split={text!r}: ')
  assert str(error.value).endswith('train (1,437), test (360)')


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.slow
def test_a_slice_holds_those_examples_of_the_split(fake_dirs, kind):
  train, test = {
    'digits': ('train', 'test'),
    'folder': ('train', 'val'),
  }.get(kind, ('train', 'validation'))
  whole = {
    split: evaluated(config_of(fake_dirs, kind, eval_split=split))
    for split in (train, test)
  }
  for text, parts in (
    (f'{test}[:5]', [(test, slice(5))]),
    (f'{train}[3:17]', [(train, slice(3, 17))]),
    (f'{train}[:10%]', [(train, slice(round(len(whole[train]['id']) / 10)))]),
    (f'{train}[-9:-1]', [(train, slice(-9, -1))]),
    (
      f'{train}[:9]+{test}[3:]+{train}[7:10]',
      [(train, slice(9)), (test, slice(3, None)), (train, slice(7, 10))],
    ),
  ):
    found = evaluated(config_of(fake_dirs, kind, eval_split=text))
    for name in ('clean', 'label'):
      expected = np.concatenate([whole[s][name][part] for s, part in parts])
      np.testing.assert_array_equal(found[name], expected, err_msg=text)


@pytest.mark.parametrize(
  ('kind', 'cache'),
  [
    ('array_record', 'none'),
    ('tfrecord', 'none'),
    ('tfrecord', 'decoded'),
    ('folder', 'none'),
    ('folder', 'raw'),
  ],
)
@pytest.mark.slow
def test_training_sees_each_example_of_a_slice_once(fake_dirs, kind, cache):
  config = config_of(
    fake_dirs,
    kind,
    train_split='train[3:17]',
    cache=cache,
    shuffle_window_shards=1 if (kind, cache) == ('tfrecord', 'none') else 8,
  )
  spec = datasets.resolve(config)
  assert spec.num_train == 14
  source = spec.open('train', config)
  _, expected = zip(*sorted(labels_of(source, range(14))), strict=True)
  assert len(source.class_names) == spec.num_classes
  epochs = [[], []]
  for host in range(2):
    share = Share(1, 2, range(14), np.array([host]), host, 2)
    batches = pipeline.train_batches(
      source,
      config,
      share,
      image_views=('clean',),
      num_classes=spec.num_classes,
    )
    found = [(int(b['id'][0]), int(b['label'][0])) for b in batches]
    epochs[0] += found[:7]
    epochs[1] += found[7:]
  for epoch in epochs:
    ids, labels = zip(*sorted(epoch), strict=True)
    assert ids == tuple(range(14))
    assert labels == expected


def labels_of(source, ids):
  for i, record in zip(ids, source.fetch(np.array(ids)), strict=True):
    yield i, int(source.parse(record, np.int64(i))[1])


def test_files_outside_of_a_slice_are_not_needed(fake_dirs, tmp_path):
  """Record 0 of the slice is named by its place in the file."""
  config = config_of(fake_dirs, 'tfrecord', train_split='train[9:12]')
  source = datasets.resolve(config).open('train', config)
  assert len(source.paths) == 1
  assert source.describe(0).endswith('-00001-of-00003, record 1')
  assert source.nbytes < 60_000 * 12


@pytest.mark.parametrize('kind', ['array_record', 'tfrecord'])
def test_files_that_are_not_read_need_not_be_there(kind, fake_dirs, tmp_path):
  shutil.copytree(fake_dirs / kind, tmp_path / kind)
  (last,) = tmp_path.glob(f'{kind}/*/*/*-train.*-00002-*')
  last.unlink()
  config = config_of(tmp_path, kind, train_split='train[:9]')
  source = datasets.resolve(config).open('train', config)
  assert all(source.fetch(np.arange(9)))
  config = config_of(tmp_path, kind)
  with pytest.raises(
    ConfigError, match=f'{last.name} is missing, of 3 .*what is there is kept'
  ):
    datasets.resolve(config).open('train', config)


def test_a_slice_without_the_data_set_has_the_published_size(tmp_path):
  config = config_of(
    tmp_path, 'none', train_split='train[:10%]', eval_split='validation[:500]'
  )
  spec = datasets.resolve(config)
  assert (spec.num_train, spec.num_eval) == (128_117, 500)


def test_a_folder_without_the_split_lists_its_directories(fake_dirs):
  config = config_of(fake_dirs, 'folder', train_split='trian[:5]')
  with pytest.raises(
    ConfigError, match=r"trian: .*train_split='trian\[:5\]'.*"
  ):
    datasets.resolve(config)


# ---- Pooling ----------------------------------------------------------------


def test_pooling_is_the_mean_rounded_half_up():
  rng = np.random.default_rng(0)
  for pool in (1, 2, 3):
    images = rng.integers(0, 256, (50, 6, 12, 2), np.uint8)
    blocks = images.reshape(50, 6 // pool, pool, 12 // pool, pool, 2)
    expected = np.floor(blocks.mean((2, 4)) + 0.5)
    np.testing.assert_array_equal(in_memory.pooled(images, pool), expected)
  half = np.array([0, 1, 1, 0], np.uint8).reshape(1, 2, 2, 1)
  assert in_memory.pooled(half, 2).item() == 1


def test_pooled_digits_have_a_quarter_of_the_pixels():
  whole = evaluated(CONFIG)
  config = dataclasses.replace(CONFIG, pool=2)
  assert datasets.resolve(config).image_shape == (4, 4, 1)
  found = evaluated(config)
  np.testing.assert_array_equal(
    found['clean'], in_memory.pooled(whole['clean'], 2)
  )
  np.testing.assert_array_equal(found['label'], whole['label'])


# ---- Arrays -----------------------------------------------------------------


def arrays(count=20, seed=0):
  rng = np.random.default_rng(seed)
  images = rng.integers(0, 256, (count, 6, 4), np.uint8)
  return images, np.arange(count) % 3


@pytest.fixture
def mine(monkeypatch):
  made = []

  def make():
    made.append(datasets.from_arrays('mine', arrays(), arrays(8, 1)))
    return made[-1]

  monkeypatch.setitem(datasets.DATASETS, 'mine', make)
  yield dataclasses.replace(CONFIG, name='mine')
  assert len(made) == 1  # made when asked for, and once


def test_arrays_are_a_data_set(mine):
  spec = datasets.resolve(mine)
  images, labels = arrays()
  assert (spec.num_train, spec.num_eval, spec.num_classes) == (20, 8, 3)
  assert spec.image_shape == (6, 4, 1)
  np.testing.assert_allclose(spec.mean, images.mean())
  np.testing.assert_allclose(spec.std, images.std())
  batch = evaluated(mine)
  np.testing.assert_array_equal(batch['clean'][..., 0], arrays(8, 1)[0])
  config = dataclasses.replace(mine, train_split='train[5:10]+test[:2]', pool=2)
  source = datasets.resolve(config).open('train', config)
  np.testing.assert_array_equal(source.labels, [*labels[5:10], 0, 1])
  assert source.images.shape == (7, 3, 2, 1)
  assert source.describe(0) == '-'


def test_the_digest_tells_arrays_apart():
  def version(train, test):
    spec = datasets.from_arrays('mine', train, test)
    config = Dataset(name='mine')
    return tuple(spec.open(part, config).digest for part in ('train', 'eval'))

  images, labels = arrays()
  one = version((images, labels), arrays(8, 1))
  assert one == version((images.copy(), labels), arrays(8, 1))
  other = images.copy()
  other[3, 2, 1] ^= 1
  assert len({
    one,
    version((other, labels), arrays(8, 1)),
    version((images, labels[::-1]), arrays(8, 1)),
    version(arrays(8, 1), (images, labels)),
  }) == 4  # fmt: skip


@pytest.mark.parametrize(
  ('images', 'labels', 'message'),
  [
    (np.zeros((4, 6, 4), np.float32), np.zeros(4, int), 'images: need uint8'),
    (np.zeros((4, 6, 4), np.uint8), np.zeros(4), 'labels: need int32'),
    (np.zeros((4, 6, 4), np.uint8), np.full(4, -1), 'example 0 has label -1'),
    (np.zeros((4, 6, 4), np.uint8), np.zeros(5, int), '4 images but 5 labels'),
    (np.zeros((4, 4, 4), np.uint8), np.zeros(4, int), 'have shapes'),
  ],
)
def test_wrong_arrays_are_refused(images, labels, message):
  with pytest.raises(ConfigError, match=message):
    datasets.from_arrays('mine', (images, labels), arrays())


def test_hosts_of_arrays_share_one_order(mine):
  spec = datasets.resolve(mine)
  source = spec.open('train', mine)

  def batches(positions):
    share = Share(4, 6, range(5), positions)
    return list(
      pipeline.train_batches(
        source, mine, share, image_views=('clean', 'aa'), num_classes=3
      )
    )

  whole = batches(None)
  assert whole[0]['aa'].shape == (6, 6, 4, 1)
  half = batches(np.array([3, 4, 5]))
  helpers.assert_batches_equal(
    half, [{k: v[3:] for k, v in batch.items()} for batch in whole]
  )
