"""scripts/prepare_imagenet.py: from the two tar files to what runs read."""

import dataclasses
import errno
import functools
import io
import os
import pathlib
import re
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import types

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.datasets.imagenet2012 import imagenet_common

from conadv_jax.base import errors, storage
from conadv_jax.base.errors import ConfigError, DataError, StorageError
from conadv_jax.config import Dataset
from conadv_jax.data import datasets
from scripts import make_fake_imagenet, prepare_imagenet

ROOT = pathlib.Path(__file__).resolve().parents[2]
TRAIN, VAL = 'ILSVRC2012_img_train.tar', 'ILSVRC2012_img_val.tar'
SYNSETS = make_fake_imagenet.synsets()
CMYK, PNG = 'n01739381_1309.JPEG', 'n02105855_2933.JPEG'
# {file name: synset}, of all 50,000.
VALIDATION = {
  f'ILSVRC2012_val_{number:08d}.JPEG': synset
  for number, synset in enumerate(
    tfds.core.tfds_path('datasets/imagenet2012/validation_labels.txt')
    .read_text()
    .split(),
    1,
  )
}
COUNTS = {'train': 1039, 'validation': 1000}
SHARDS = {'train': 7, 'validation': 3}
prepare = functools.partial(
  prepare_imagenet.prepare, counts=COUNTS, num_shards=SHARDS
)


def image(kind='JPEG', mode='RGB'):
  buffer = io.BytesIO()
  Image.new(mode, (4, 4)).save(buffer, kind)
  return buffer.getvalue()


IMAGE = image()


def contents(name):
  """An image whose bytes tell its name."""
  special = {CMYK: image('JPEG', 'CMYK'), PNG: image('PNG')}
  return special.get(name, IMAGE + name.encode())


def tar(members):
  buffer = io.BytesIO()
  with tarfile.open(fileobj=buffer, mode='w') as archive:
    for name, data in members:
      info = tarfile.TarInfo(name)
      info.size = len(data)
      archive.addfile(info, io.BytesIO(data))
  return buffer.getvalue()


def of_train(synset, label):
  """Names of the images of a class: one, or two in every 26th."""
  special = [name for name in (CMYK, PNG) if name.startswith(synset)]
  names = [f'{synset}_{7 * label + 10}.JPEG', f'{synset}_3.JPEG']
  return special or names[: 1 + (label % 26 == 0)]


@pytest.fixture(scope='module')
def tars(tmp_path_factory):
  """The two files, with one or two images of each class."""
  root = tmp_path_factory.mktemp('tars')
  classes = [
    (f'{s}.tar', tar((x, contents(x)) for x in of_train(s, label)))
    for label, s in enumerate(SYNSETS)
  ]
  (root / TRAIN).write_bytes(tar(classes))
  # Not in the order of their numbers.
  first = {synset: name for name, synset in reversed(VALIDATION.items())}
  members = [(first[s], contents(first[s])) for s in SYNSETS]
  (root / VAL).write_bytes(tar(members))
  return root


@pytest.fixture(scope='module')
def whole(tars, tmp_path_factory):
  root = tmp_path_factory.mktemp('whole')
  prepare(str(tars), str(root))
  return root


def files(root):
  return {
    x.name: x.read_bytes() for x in (root / 'imagenet2012/5.1.0').iterdir()
  }


def damaged(tars, tmp_path, name, change):
  """A directory in which one of the two files is changed."""
  copy = tmp_path / 'damaged'
  copy.mkdir()
  for each in (TRAIN, VAL):
    os.symlink(tars / each, copy / each)
  (copy / name).unlink()
  data = bytearray((tars / name).read_bytes())
  (copy / name).write_bytes(change(data))
  return str(copy)


def place(tars, name, what):
  return (tars / name).read_bytes().index(what)


def stopping(monkeypatch, after, error):
  """Makes the files after some fail; returns what was written."""
  written, write = [], prepare_imagenet.write_file

  def stop(path, records, file_format):
    if len(written) == after:
      pathlib.Path(path).write_bytes(b'half')
      raise error
    written.append(os.path.basename(path))
    write(path, records, file_format)

  monkeypatch.setattr(prepare_imagenet, 'write_file', stop)
  return written


def settings(root):
  return Dataset(name='imagenet2012', data_dir=str(root), image_size_px=32)


# ---- What is read back ------------------------------------------------------


@pytest.mark.parametrize('file_format', ['array_record', 'tfrecord'])
def test_our_reader_finds_each_image_under_its_label(
  file_format, tars, whole, tmp_path
):
  root = whole
  if file_format == 'tfrecord':
    root = tmp_path
    prepare(str(tars), str(root), file_format)
  spec = datasets.resolve(settings(root))
  assert dict(spec.splits) == COUNTS
  for part, split in (('train', 'train'), ('eval', 'validation')):
    source = spec.open(part, settings(root))
    assert source.class_names == SYNSETS
    labels = []
    for record in source.fetch(np.arange(COUNTS[split])):
      # The same bytes in any process: fields are in the order of their keys.
      keys = [record.index(key) for key in (b'file_name', b'image', b'label')]
      assert keys == sorted(keys)
      features = tf.train.Example.FromString(record).features.feature
      (name,) = features['file_name'].bytes_list.value
      (label,) = features['label'].int64_list.value
      (data,) = features['image'].bytes_list.value
      if name.decode() not in (CMYK, PNG):
        assert data == IMAGE + name
      assert Image.open(io.BytesIO(data)).mode == 'RGB'
      if split == 'train':
        assert name.startswith(SYNSETS[label].encode())
      labels.append(label)
    assert set(labels) == set(range(1000))
    # Mixed: the first file holds classes from all over.
    first = labels[: COUNTS[split] // SHARDS[split]]
    assert 350 < np.mean(first) < 650 and np.std(first) > 200
  image, label = source.parse(tf.constant(record), 0)
  assert (image.numpy(), label.numpy()) == (data, labels[-1])


def test_validation_labels_follow_the_number_in_the_name(whole):
  builder = tfds.builder_from_directory(str(whole / 'imagenet2012/5.1.0'))
  decoders = {'image': tfds.decode.SkipDecoding()}
  for x in builder.as_data_source('validation', decoders=decoders):
    assert SYNSETS[x['label']] == VALIDATION[x['file_name'].decode()]


@pytest.mark.parametrize('file_format', ['array_record', 'tfrecord'])
def test_files_are_those_of_tfds(file_format, tars, tmp_path, monkeypatch):
  # TFDS finds the labels of validation images only if all 50,000 are there.
  monkeypatch.setattr(
    imagenet_common, 'get_validation_labels', lambda path: VALIDATION
  )
  shards = {'train': 4, 'validation': 4}
  prepare(str(tars), str(tmp_path / 'ours'), file_format, num_shards=shards)
  builder = tfds.builder(
    'imagenet2012', data_dir=str(tmp_path / 'tfds'), file_format=file_format
  )
  builder.download_and_prepare(
    download_config=tfds.download.DownloadConfig(
      manual_dir=str(tars), try_download_gcs=False, num_shards=4
    )
  )
  theirs, ours = files(tmp_path / 'tfds'), files(tmp_path / 'ours')
  assert len(ours) == 2 * 4 + 3 and theirs.keys() == ours.keys()
  for name in ('features.json', 'label.labels.txt'):
    assert ours[name] == theirs[name]
  infos = [
    re.sub('"numBytes": "[0-9]+"', '', x['dataset_info.json'].decode())
    for x in (ours, theirs)
  ]
  assert infos[0] == infos[1]
  for split, count in COUNTS.items():
    sources = [
      dataclasses.replace(
        datasets.get_spec('imagenet2012'), splits=COUNTS, eval_split=split
      ).open('eval', settings(tmp_path / name))
      for name in ('ours', 'tfds')
    ]
    # TFDS leaves the order of the fields in a record open.
    mine, its = (
      map(tf.train.Example.FromString, source.fetch(np.arange(count)))
      for source in sources
    )
    assert all(a == b for a, b in zip(mine, its, strict=True))


# ---- Interruptions ----------------------------------------------------------


@pytest.mark.parametrize(
  'error', [KeyboardInterrupt(), OSError(errno.ENOSPC, 'No space left')]
)
def test_an_interrupted_one_resumes_to_the_same_bytes(
  error, tars, whole, tmp_path, monkeypatch
):
  with monkeypatch.context() as patch:
    done = stopping(patch, 4, error)
    expected = StorageError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as raised:
      prepare(str(tars), str(tmp_path))
  if expected is StorageError:
    assert f'{tmp_path}/imagenet2012/5.1.0/' in str(raised.value)
    assert 'free some space' in str(raised.value)
    assert 'run the same command again' in str(raised.value)
  assert set(files(tmp_path)) == {*done}
  with pytest.raises(ConfigError) as raised:
    datasets.get_spec('imagenet2012').open('train', settings(tmp_path))
  assert 'half-prepared' in str(raised.value)
  assert 'remove' not in str(raised.value)  # what is done is kept
  assert 'prepare_imagenet.py --tars=DIRECTORY' in str(raised.value)
  left = tmp_path / 'imagenet2012/5.1.0/incomplete.of_a_killed_one'
  left.mkdir()
  rest = stopping(monkeypatch, -1, None)
  prepare(str(tars), str(tmp_path))
  assert len(rest) == 6 and not {*rest} & {*done}
  assert files(tmp_path) == files(whole)


def test_a_file_that_was_removed_is_made_again(tars, whole, tmp_path, capsys):
  shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
  (lost,) = tmp_path.glob('imagenet2012/*/*validation*-00001-*')
  lost.unlink()
  capsys.readouterr()
  prepare(str(tars), str(tmp_path))
  assert 'writing 1 of 10 files' in capsys.readouterr().out
  assert files(tmp_path) == files(whole)
  prepare('gone', str(tmp_path))  # needs no tar file
  assert 'already prepared' in capsys.readouterr().out


@pytest.mark.parametrize('file_format', ['array_record', 'tfrecord'])
def test_a_disk_that_fills_up_in_the_writer_is_an_error(file_format, tmp_path):
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
  try:
    with pytest.raises((OSError, RuntimeError, tf.errors.OpError)) as raised:
      prepare_imagenet.write_file(
        str(tmp_path / 'x'), [os.urandom(50_000)] * 4, file_format
      )
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert storage.is_full(raised.value)


def test_a_disk_that_is_too_small_is_refused_at_the_start(
  tars, tmp_path, monkeypatch
):
  monkeypatch.setattr(
    shutil, 'disk_usage', lambda path: types.SimpleNamespace(free=1000)
  )
  with pytest.raises(StorageError, match='bytes are needed; 1,000 bytes free'):
    prepare(str(tars), str(tmp_path))
  assert not files(tmp_path)


def test_a_bucket_gets_whole_files(tars, whole, tmp_path, monkeypatch):
  monkeypatch.setattr(
    storage, 'is_remote', lambda path: str(path).startswith(str(tmp_path))
  )
  bucket = tmp_path / 'imagenet2012/5.1.0'
  bucket.mkdir(parents=True)
  monkeypatch.setattr(os, 'replace', None)
  prepare(str(tars), str(tmp_path))
  assert files(tmp_path) == files(whole)


@pytest.mark.fault
def test_one_that_is_killed_resumes_to_the_same_bytes(tars, tmp_path):
  shards = {'train': 300, 'validation': 3}
  arguments = (str(tars), str(tmp_path / 'killed'), 'tfrecord')
  script = (
    'from scripts import prepare_imagenet\n'
    f'prepare_imagenet.prepare(*{arguments}, counts={COUNTS},'
    f' num_shards={shards})'
  )
  process = subprocess.Popen([sys.executable, '-c', script], cwd=ROOT)
  directory = tmp_path / 'killed/imagenet2012/5.1.0'
  while len(list(directory.glob('imagenet2012-train*'))) < 20:
    assert process.poll() is None
    time.sleep(0.01)
  process.send_signal(signal.SIGKILL)
  process.wait()
  assert list(directory.glob('incomplete.*'))
  assert not (directory / 'dataset_info.json').exists()
  prepare(*arguments, num_shards=shards)
  prepare(str(tars), str(tmp_path / 'whole'), 'tfrecord', num_shards=shards)
  found, whole = files(tmp_path / 'killed'), files(tmp_path / 'whole')
  assert len(found) == 303 + 3
  assert [x for x in whole if found.get(x) != whole[x]] == []


# ---- Tar files that are not right -------------------------------------------


def cut_before_the_last_class(data):
  return data[: data.rindex(f'{SYNSETS[-1]}.tar'.encode())]


def without_the_last_class(data):
  return cut_before_the_last_class(data) + bytes(10240)


def with_a_damaged_header(data):
  data[data.index(f'{SYNSETS[5]}.tar'.encode()) + 150] ^= 1
  return data


def with_a_damaged_inner_header(data):
  data[data.index(f'{SYNSETS[5]}_'.encode()) + 150] ^= 1
  return data


def with_another_name(data):
  at = data.index(f'{SYNSETS[5]}.tar'.encode())
  header = tarfile.TarInfo('x' + SYNSETS[5][1:] + '.tar')
  header.size = tarfile.TarInfo.frombuf(
    bytes(data[at : at + 512]), 'utf-8', ''
  ).size
  data[at : at + 512] = header.tobuf()[:512]
  return data


@pytest.mark.parametrize(
  'name, change, message',
  [
    (TRAIN, without_the_last_class, f'lacks 1 classes, such as {SYNSETS[-1]}'),
    (TRAIN, cut_before_the_last_class, 'no end mark'),
    (TRAIN, lambda data: data[:-20_000], f'is cut in {SYNSETS[-1]}.tar'),
    (TRAIN, lambda data: data[: len(data) // 2], 'is cut'),
    (TRAIN, lambda data: data[:100], 'is cut or no tar'),
    (TRAIN, lambda data: b'', 'is cut or no tar'),
    (TRAIN, with_a_damaged_header, 'the header at byte'),
    (TRAIN, with_a_damaged_inner_header, 'the header at byte'),
    (TRAIN, with_another_name, 'is not in the original file'),
    (VAL, lambda data: data[: len(data) // 2], 'is cut'),
  ],
)  # fmt: skip
def test_a_damaged_tar_is_refused_before_anything_is_written(
  name, change, message, tars, tmp_path
):
  directory = damaged(tars, tmp_path, name, change)
  with pytest.raises(DataError, match=message) as raised:
    prepare(directory, str(tmp_path))
  assert str(raised.value).startswith(f'{directory}/{name}: ')
  assert 'md5sum' in str(raised.value)
  assert not files(tmp_path)


def test_a_damaged_image_is_named(tars, tmp_path):
  at = place(tars, TRAIN, IMAGE + f'{SYNSETS[7]}_59.JPEG'.encode())

  def change(data):
    data[at : at + 4] = b'\0\0\0\0'
    return data

  directory = damaged(tars, tmp_path, TRAIN, change)
  message = f'{TRAIN}: {SYNSETS[7]}_59.JPEG at byte {at:,} is no JPEG'
  with pytest.raises(DataError, match=message):
    prepare(directory, str(tmp_path))
  prepare(str(tars), str(tmp_path))  # With the right file, it goes on.


@pytest.mark.parametrize('split', ['train', 'validation'])
def test_a_wrong_count_is_refused(split, tars, tmp_path):
  counts = COUNTS | {split: 1111}
  with pytest.raises(
    DataError, match=f'has {COUNTS[split]:,} images, need 1,1'
  ):
    prepare_imagenet.prepare(
      str(tars), str(tmp_path), counts=counts, num_shards=SHARDS
    )


def test_the_counts_and_files_are_those_of_imagenet():
  spec = datasets.get_spec('imagenet2012')
  assert prepare_imagenet.COUNTS == dict(spec.splits)
  assert prepare_imagenet.SHARDS == {'train': 1024, 'validation': 64}


# ---- The command ------------------------------------------------------------


def test_a_tar_that_is_missing_is_named(tars, tmp_path, capsys):
  os.symlink(tars / TRAIN, tmp_path / TRAIN)
  arguments = [f'--tars={tmp_path}', f'--data_dir={tmp_path}']
  assert prepare_imagenet.main(arguments) == errors.USAGE
  assert f'has no file {VAL}' in capsys.readouterr().err


def test_another_data_set_is_left_alone(tars, whole, tmp_path):
  shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
  with pytest.raises(ConfigError, match='holds another imagenet2012'):
    prepare(str(tars), str(tmp_path), 'tfrecord')
  assert files(tmp_path) == files(whole)


def test_ctrl_c_says_how_to_go_on(tmp_path, monkeypatch, capsys):
  def stop(*args, **kwargs):
    raise KeyboardInterrupt

  monkeypatch.setattr(prepare_imagenet, 'prepare', stop)
  assert prepare_imagenet.main(['--tars=x']) == errors.INTERRUPTED
  assert 'run the same command again' in capsys.readouterr().err
