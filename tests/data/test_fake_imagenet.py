"""The fake imagenet2012: TFDS's schema, ImageNet's sizes, a readable class."""

import collections
import io
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.datasets.imagenet2012 import (
  imagenet2012_dataset_builder,
)

from conadv_jax.base.errors import ConfigError
from scripts import make_fake_imagenet

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope='module', params=['array_record', 'tfrecord'])
def builder(request, tmp_path_factory):
  root = tmp_path_factory.mktemp('fake')
  return tfds.builder_from_directory(
    make_fake_imagenet.prepare(
      str(root), request.param, num_train=60, num_eval=20
    )
  )


def examples(builder, split):
  arguments = {
    'split': split,
    'decoders': {'image': tfds.decode.SkipDecoding()},
  }
  if builder.info.file_format.value == 'array_record':
    return list(builder.as_data_source(**arguments))
  return list(tfds.as_numpy(builder.as_dataset(**arguments)))


def decode(data):
  return np.asarray(Image.open(io.BytesIO(data)).convert('RGB'))


def test_the_schema_is_that_of_tfds(builder, tmp_path):
  real = imagenet2012_dataset_builder.Builder(data_dir=str(tmp_path))
  assert builder.name == real.name
  assert builder.version == real.version
  ours, theirs = builder.info.features, real.info.features
  assert ours.to_json() == theirs.to_json()
  assert ours['label'].names == theirs['label'].names
  assert builder.info.supervised_keys == real.info.supervised_keys


def test_both_splits_have_the_counts_and_files_asked_for(builder):
  splits = builder.info.splits
  assert {name: split.num_examples for name, split in splits.items()} == {
    'train': 60,
    'validation': 20,
  }
  assert [split.num_shards for split in splits.values()] == [8, 8]


@pytest.mark.parametrize('split', ['train', 'validation'])
def test_file_names_and_labels_belong_together(builder, split):
  found = examples(builder, split)
  labels = collections.Counter(int(example['label']) for example in found)
  assert set(labels) == set(make_fake_imagenet.CLASSES)
  assert {0, 999} <= set(labels)
  names = [example['file_name'].decode() for example in found]
  assert len(set(names)) == len(names)
  for name, example in zip(names, found, strict=True):
    if split == 'train':
      synset = builder.info.features['label'].names[example['label']]
      assert name.startswith(f'{synset}_')
    else:
      assert name.startswith('ILSVRC2012_val_')


@pytest.mark.parametrize('split', ['train', 'validation'])
def test_the_class_is_read_from_any_crop(builder, split):
  rng = np.random.RandomState(0)
  for example in examples(builder, split):
    image = decode(example['image'])
    assert make_fake_imagenet.class_of(image) == example['label']
    height, width = image.shape[:2]
    for _ in range(20):
      aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
      area = rng.uniform(0.08, 0.2) * height * width
      h = min(height, round(np.sqrt(area / aspect)))
      w = min(width, round(np.sqrt(area * aspect)))
      top, left = rng.randint(height - h + 1), rng.randint(width - w + 1)
      crop = image[top : top + h, left : left + w, ::1][:, ::-1]
      small = Image.fromarray(crop).resize((32, 32), Image.Resampling.BICUBIC)
      assert make_fake_imagenet.class_of(np.asarray(small)) == example['label']


def test_a_class_keeps_away_from_its_neighbours():
  """The mean hue of a crop stays nearer than 0.4 of the way to the next."""
  rng = np.random.RandomState(1)
  worst = 0.0
  for index, (_, _, data) in enumerate(
    make_fake_imagenet._images('train', 60, 5)
  ):
    image = decode(data).astype(float)
    height, width = image.shape[:2]
    for _ in range(10):
      h, w = int(height * 0.28), int(width * 0.28)
      top, left = rng.randint(height - h + 1), rng.randint(width - w + 1)
      r, g, b = image[top : top + h, left : left + w].mean((0, 1))
      y = 0.299 * r + 0.587 * g + 0.114 * b
      turn = np.arctan2((r - y) / 1.402, (b - y) / 1.772) / (2 * np.pi) * 10
      worst = max(worst, abs((turn - index + 5) % 10 - 5))
  assert worst < 0.4


@pytest.mark.slow
def test_sizes_and_quality_are_like_those_of_imagenet():
  images = [data for _, _, data in make_fake_imagenet._images('train', 200, 0)]
  sizes = collections.Counter(
    Image.open(io.BytesIO(data)).size for data in images
  )
  assert sizes.most_common(1)[0][0] == (500, 375)
  assert {(375, 500), (500, 333), (300, 300), (400, 600), (640, 480)} < set(
    sizes
  )
  assert 75_000 < np.mean([len(data) for data in images]) < 120_000
  tables = {
    tuple(Image.open(io.BytesIO(data)).quantization[0]) for data in images
  }
  assert len(tables) == 4


def test_images_depend_on_the_seed_and_on_nothing_else():
  def images(split, count, seed):
    return list(make_fake_imagenet._images(split, count, seed))

  assert images('train', 12, 3)[:5] == images('train', 5, 3)
  hashes = {
    data
    for split in ('train', 'validation')
    for seed in (3, 4)
    for _, _, data in images(split, 5, seed)
  }
  assert len(hashes) == 20


def test_preparing_twice_writes_once(tmp_path):
  arguments = {'num_train': 8, 'num_eval': 8, 'num_shards': 2}
  directory = make_fake_imagenet.prepare(str(tmp_path), **arguments)
  before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')}
  assert make_fake_imagenet.prepare(str(tmp_path), **arguments) == directory
  after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')}
  # A directory that comes and goes touches its parent.
  parent = pathlib.Path(directory).parent
  assert before.pop(parent) <= after.pop(parent)
  assert before == after


def test_another_imagenet_is_left_as_it_is(tmp_path):
  other = tmp_path / 'imagenet2012' / '5.0.0'
  other.mkdir(parents=True)
  (other / 'dataset_info.json').write_text('{}')
  with pytest.raises(ConfigError, match='another imagenet2012'):
    make_fake_imagenet.prepare(str(tmp_path))
  assert [path.name for path in other.parent.iterdir()] == ['5.0.0']


def test_other_counts_are_another_imagenet(tmp_path):
  make_fake_imagenet.prepare(str(tmp_path), num_train=8, num_eval=8)
  with pytest.raises(ConfigError, match='num_train=9'):
    make_fake_imagenet.prepare(str(tmp_path), num_train=9, num_eval=8)


def test_a_failed_preparation_leaves_nothing(tmp_path, monkeypatch):
  def images(split, count, seed):
    raise KeyboardInterrupt

  monkeypatch.setattr(make_fake_imagenet, '_images', images)
  with pytest.raises(KeyboardInterrupt):
    make_fake_imagenet.prepare(str(tmp_path))
  assert list((tmp_path / 'imagenet2012').iterdir()) == []
  with pytest.raises(KeyboardInterrupt):
    make_fake_imagenet.write_folder(str(tmp_path / 'folder'))
  assert [path.name for path in tmp_path.iterdir()] == ['imagenet2012']


def test_the_folder_holds_the_same_images(builder, tmp_path):
  root = make_fake_imagenet.write_folder(
    str(tmp_path / 'folder'), num_train=60, num_eval=20
  )
  names = builder.info.features['label'].names
  for split, directory in (('train', 'train'), ('validation', 'val')):
    expected = {
      (names[e['label']], e['file_name'].decode()): e['image']
      for e in examples(builder, split)
    }
    found = {
      (path.parent.name, path.name): path.read_bytes()
      for path in pathlib.Path(root, directory).rglob('*.JPEG')
    }
    assert found == expected


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ({'num_train': 0}, 'num_train=0'),
    ({'num_eval': 4, 'num_shards': 5}, 'num_shards=5'),
    ({'root': 'gs://bucket/data'}, 'local directory'),
  ],
)
def test_arguments_out_of_range_are_named(tmp_path, arguments, message):
  with pytest.raises(ConfigError, match=message):
    make_fake_imagenet.prepare(**{'root': str(tmp_path), **arguments})


def test_a_folder_needs_each_class_and_a_new_directory(tmp_path):
  with pytest.raises(ConfigError, match='num_eval=9'):
    make_fake_imagenet.write_folder(str(tmp_path / 'new'), num_eval=9)
  with pytest.raises(ConfigError, match='exists'):
    make_fake_imagenet.write_folder(str(tmp_path))


@pytest.mark.slow
def test_the_command_prints_the_directory_and_nothing_else(tmp_path):
  command = [
    sys.executable,
    'scripts/make_fake_imagenet.py',
    f'--data_dir={tmp_path}',
    '--num_train=8',
    '--num_eval=8',
    '--file_format=tfrecord',
  ]
  done = subprocess.run(
    command, cwd=ROOT, capture_output=True, text=True, check=True
  )
  directory = pathlib.Path(done.stdout.rstrip('\n'))
  info = json.loads((directory / 'dataset_info.json').read_text())
  assert info['fileFormat'] == 'tfrecord'
  assert directory.parent == tmp_path / 'imagenet2012'
