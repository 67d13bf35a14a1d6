"""Fashion-MNIST is built from its four IDX files, or they are refused."""

import dataclasses
import functools
import gzip
import hashlib
import pathlib
import shutil
import struct

import numpy as np
import pytest
from helpers import load_part

from conadv_jax.data import datasets
from scripts import prepare_fashion_mnist as script


def idx_bytes(array):
  header = struct.pack(f'>HBB{array.ndim}I', 0, 8, array.ndim, *array.shape)
  return header + array.tobytes()


@pytest.fixture
def idx(tmp_path):
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
  idx, tmp_path, no_network, capsys
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
    source = load_part(spec, split, str(tmp_path / 'tfds'))
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
  idx, tmp_path, no_network, monkeypatch, file_format
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
  source = load_part(spec, 'train', data_dir)
  images = arrays['train-images-idx3-ubyte']
  np.testing.assert_array_equal(source.images[..., 0], images[order])
  np.testing.assert_array_equal(source.labels, np.array(labels)[order])
  # A slice is one of this order.
  part = dataclasses.replace(spec, train_split='train[2:5]')
  source = load_part(part, 'train', data_dir)
  np.testing.assert_array_equal(source.images[..., 0], images[order[2:5]])


def test_missing_idx_files_are_listed(tmp_path, capsys):
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
def test_wrong_idx_files_are_refused(idx, tmp_path, change, message):
  directory, files, _ = idx
  path = directory / 'train-images-idx3-ubyte.gz'
  path.write_bytes(gzip.compress(change(gzip.decompress(path.read_bytes()))))
  with pytest.raises(script.IdxError, match=message) as error:
    script.prepare(str(directory), str(tmp_path / 'tfds'), files)
  assert str(path) in str(error.value)


def test_truncated_gzip_is_refused(idx, tmp_path):
  directory, files, _ = idx
  path = directory / 'train-images-idx3-ubyte.gz'
  path.write_bytes(path.read_bytes()[:-20])
  with pytest.raises(script.IdxError, match='cannot be read'):
    script.prepare(str(directory), str(tmp_path / 'tfds'), files)


def test_half_prepared_fashion_mnist_is_not_reused(idx, tmp_path):
  directory, files, _ = idx
  (tmp_path / 'tfds' / 'fashion_mnist' / '3.0.1').mkdir(parents=True)
  with pytest.raises(script.IdxError, match='half-prepared'):
    script.prepare(str(directory), str(tmp_path / 'tfds'), files)


@pytest.mark.slow
def test_the_packaged_fashion_mnist_is_complete(tmp_path):
  if not pathlib.Path(script.DEFAULT_IDX_DIR).is_dir():
    pytest.skip('needs `apt install dataset-fashion-mnist`')
  script.prepare(script.DEFAULT_IDX_DIR, str(tmp_path))
  spec = datasets.get_spec('fashion_mnist')
  source = load_part(spec, 'train', tmp_path)
  assert np.bincount(source.labels).tolist() == [6000] * 10
  assert abs(source.images.mean() - spec.mean[0]) < 0.1
  assert abs(source.images.std() - spec.std[0]) < 0.1
  source = load_part(spec, 'eval', tmp_path)
  assert np.bincount(source.labels).tolist() == [1000] * 10


@pytest.mark.slow
def test_slices_of_the_balanced_fashion_mnist_are_balanced(tmp_path):
  if not pathlib.Path(script.DEFAULT_IDX_DIR).is_dir():
    pytest.skip('needs `apt install dataset-fashion-mnist`')
  script.main(['--balanced', f'--data_dir={tmp_path}'])
  spec = datasets.get_spec('fashion_mnist_balanced')
  source = load_part(spec, 'train', tmp_path)
  assert source.labels.tolist() == list(range(10)) * 6000
  usual = script.read_checked(
    pathlib.Path(script.DEFAULT_IDX_DIR) / 'train-images-idx3-ubyte.gz',
    script.FILES['train-images-idx3-ubyte'],
  )
  images = [usual[start : start + 784] for start in range(16, len(usual), 784)]
  assert sorted(images) == sorted(image.tobytes() for image in source.images)
  for split, each in (('train[:10240]', 1024), ('train[10240:20240]', 1000)):
    part = dataclasses.replace(spec, train_split=split)
    labels = load_part(part, 'train', tmp_path).labels
    assert np.bincount(labels).tolist() == [each] * 10
