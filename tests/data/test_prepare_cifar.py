"""scripts/prepare_cifar.py, and Imagenette as a folder of images."""

import hashlib
import io
import tarfile

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from conadv_jax.base import errors
from conadv_jax.base.errors import ConfigError, DataError
from conadv_jax.config import Dataset
from conadv_jax.data import datasets
from scripts import prepare_cifar

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 3072), np.uint8)


FILES = {  # of the archive; the last ones are for testing
  'cifar10': [
    f'cifar-10-batches-bin/{name}.bin'
    for name in (*(f'data_batch_{i}' for i in range(1, 6)), 'test_batch')
  ],
  'cifar100': [f'cifar-100-binary/{name}.bin' for name in ('train', 'test')],
}
NAMES = {
  'cifar10': {'cifar-10-batches-bin/batches.meta.txt': 10},
  'cifar100': {
    'cifar-100-binary/coarse_label_names.txt': 20,
    'cifar-100-binary/fine_label_names.txt': 100,
  },
}


def members(name):
  """(member, contents) of a tiny archive, with one image in each file."""
  for place, member in enumerate(FILES[name]):
    labels = [place] if name == 'cifar10' else [place, place + 10]
    yield member, bytes(labels) + IMAGES[place].tobytes()
  for member, count in NAMES[name].items():
    kind = member.rpartition('/')[2].partition('.')[0]
    yield member, '\n'.join(f'{kind}{i}' for i in range(count)).encode()


@pytest.fixture(params=['cifar10', 'cifar100'])
def archive(request, tmp_path):
  """(data set, archive, {its SHA-256: data set})."""
  path = tmp_path / 'some name.tar.gz'
  with tarfile.open(path, 'w:gz') as file:
    for name, data in members(request.param):
      info = tarfile.TarInfo(name)
      info.size = len(data)
      file.addfile(info, io.BytesIO(data))
  digest = hashlib.sha256(path.read_bytes()).hexdigest()
  return request.param, str(path), {digest: request.param}


def test_our_reader_finds_the_images_and_fine_labels(archive, tmp_path, capsys):
  name, path, sha256 = archive
  directory = prepare_cifar.prepare(path, str(tmp_path), sha256)
  settings = Dataset(name=name, data_dir=str(tmp_path))
  spec = datasets.resolve(settings)
  assert spec.splits == {'train': len(FILES[name]) - 1, 'test': 1}
  shift = 10 if name == 'cifar100' else 0
  for part in ('train', 'eval'):
    source = spec.open(part, settings)
    key = 'fine_label_names' if shift else 'batches'
    assert source.class_names[:1] == (f'{key}0',)
    for image, label in zip(source.images, source.labels, strict=True):
      expected = IMAGES[label - shift].reshape(3, 32, 32).transpose(1, 2, 0)
      np.testing.assert_array_equal(image, expected)
  ids = [
    x['id'].decode()
    for x in tfds.builder_from_directory(directory).as_data_source('train')
  ]
  assert sorted(ids) == [f'train_{i:05d}' for i in range(len(ids))]
  real = tfds.builder(name, data_dir=str(tmp_path))
  assert str(real.data_dir) == directory
  assert prepare_cifar.prepare(path, str(tmp_path), sha256) == directory
  assert 'already prepared' in capsys.readouterr().out


def test_another_file_is_refused(archive, tmp_path, capsys):
  _, path, _ = archive
  with pytest.raises(DataError, match='download it again'):
    prepare_cifar.prepare(path, str(tmp_path))
  assert prepare_cifar.main(['--archive', path]) == errors.DATA
  assert 'SHA-256' in capsys.readouterr().err


def test_a_missing_file_says_where_it_comes_from(tmp_path):
  with pytest.raises(ConfigError, match=r'cifar-10-binary\.tar\.gz'):
    prepare_cifar.prepare(str(tmp_path / 'gone'), str(tmp_path))


def test_half_a_data_set_is_left_alone(archive, tmp_path):
  name, path, sha256 = archive
  (tmp_path / name / '3.0.2').mkdir(parents=True)
  with pytest.raises(ConfigError, match='half-prepared: remove it'):
    prepare_cifar.prepare(path, str(tmp_path), sha256)


def test_imagenette_is_a_folder_of_images(tmp_path):
  # imagenette2-320.tgz: train/ and val/, and a file beside them.
  synsets = [f'n0{i}000000' for i in range(10)]
  root = tmp_path / 'imagenette2-320'
  for split, number in (('train', 2), ('val', 1)):
    for synset in synsets:
      (root / split / synset).mkdir(parents=True)
      for i in range(number):
        path = root / split / synset / f'ILSVRC2012_val_{i:08d}.JPEG'
        Image.new('RGB', (8, 8)).save(path)
  (root / 'noisy_imagenette.csv').write_text('path\n')
  settings = Dataset(name='image_folder', data_dir=str(root), image_size_px=32)
  spec = datasets.resolve(settings)
  assert spec.num_classes == 10 and spec.splits == {'train': 20, 'val': 10}
  source = spec.open('train', settings)
  assert source.class_names == tuple(synsets)
  assert source.labels.tolist() == sorted([*range(10)] * 2)
  assert all(source.fetch(np.arange(20)))
