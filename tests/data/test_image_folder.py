"""A folder of class sub-folders: order, labels, and odd files."""

import errno
import io
import json
import os
import pathlib
import subprocess
import sys
import threading

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from etils import epath

from conadv_jax.base import storage
from conadv_jax.base.errors import ConfigError, StorageError
from conadv_jax.data.quarantine import Quarantine
from conadv_jax.data.sources import cache, image_folder, records
from conadv_jax.data.sources.source import sha256_digits
from scripts import make_fake_imagenet


@pytest.fixture(scope='module')
def fake(tmp_path_factory):
  root = str(tmp_path_factory.mktemp('folder') / 'fake')
  return make_fake_imagenet.write_folder(root, num_train=30, num_eval=10)


def write(root, *paths):
  for path in paths:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(path.encode())
  return str(root)


def test_files_and_labels_are_those_of_tfds(fake):
  folder = image_folder.ImageFolder(fake, 'train')
  theirs = tfds.ImageFolder(fake)
  assert list(folder.class_names) == theirs.info.features['label'].names
  dataset = theirs.as_dataset(
    split='train', decoders={'image': tfds.decode.SkipDecoding()}
  )
  expected = {
    e['image/filename'].decode(): (e['image'], e['label'])
    for e in tfds.as_numpy(dataset)
  }
  ids = np.arange(folder.num_examples)
  found = {
    folder.path(i): (data, label)
    for i, data, label in zip(
      ids, folder.fetch(ids), folder.labels, strict=True
    )
  }
  assert found == expected


def test_the_order_is_that_of_the_names_not_of_the_disk(tmp_path):
  names = ['b/10.jpg', 'b/9.jpg', 'a/z.png', 'a/é.jpeg', 'B/x.JPG']
  root = write(tmp_path, *(f'train/{name}' for name in names))
  folder = image_folder.ImageFolder(root, 'train')
  assert folder.class_names == ('B', 'a', 'b')
  paths = [os.path.relpath(folder.path(i), root) for i in range(5)]
  assert paths == [
    'train/B/x.JPG',
    'train/a/z.png',
    'train/a/é.jpeg',
    'train/b/10.jpg',
    'train/b/9.jpg',
  ]
  assert folder.labels.tolist() == [0, 1, 1, 2, 2]
  assert folder.labels.dtype == np.int32
  assert folder.fetch([4, 0]) == [b'train/b/9.jpg', b'train/B/x.JPG']
  assert folder.nbytes == sum(len(f'train/{name}'.encode()) for name in names)


def test_what_is_no_image_is_counted_and_hidden_files_are_not(tmp_path):
  root = write(
    tmp_path,
    'train/a/1.jpg',
    'train/a/notes.txt',
    'train/a/2.jpg.part',
    'train/a/deeper/3.jpg',
    'train/README',
    'train/a/.DS_Store',
    'train/.cache/x.jpg',
  )
  folder = image_folder.ImageFolder(root, 'train')
  assert (folder.num_examples, folder.num_ignored) == (2, 3)
  assert folder.class_names == ('a',)


def test_nested_files_have_the_order_of_torchvision(tmp_path):
  names = [
    'a/2.jpg', 'a/x/1.jpg', 'a/x/y/0.webp', 'a/x-y/3.png', 'a/z/.trash/4.jpg',
    'a/.thumbs/5.jpg', 'a/x.jpg/6.JPEG', 'b/x/7.jpg', 'b/notes/readme.txt',
  ]  # fmt: skip
  root = write(tmp_path, *(f'train/{name}' for name in names))
  (tmp_path / 'train/b/empty/deep').mkdir(parents=True)
  (tmp_path / 'elsewhere').mkdir()
  (tmp_path / 'elsewhere/8.jpg').touch()
  (tmp_path / 'train/b/linked').symlink_to(tmp_path / 'elsewhere')
  folder = image_folder.ImageFolder(root, 'train')
  # DatasetFolder.make_dataset, but for hidden names, which it reads.
  expected = [
    os.path.join(directory, name)
    for label in 'ab'
    for directory, _, found in sorted(
      os.walk(tmp_path / 'train' / label, followlinks=True)
    )
    for name in sorted(found)
    if not name.endswith('txt') and '/.' not in f'{directory}/{name}'
  ]
  assert [folder.path(i) for i in range(len(expected))] == expected
  assert folder.labels.tolist() == [0] * 5 + [1] * 2
  assert folder.num_ignored == 1


def test_the_digest_is_that_of_the_paths_in_order(tmp_path):
  root = write(tmp_path, 'train/a/1.jpg', 'train/a/x/2.jpg', 'train/b/1.jpg')
  folder = image_folder.ImageFolder(root, 'train')
  expected = sha256_digits(['train:', 'a/', '1.jpg', 'x/2.jpg', 'b/', '1.jpg'])
  assert folder.digest == expected
  (tmp_path / 'train/a/x').rename(tmp_path / 'train/a/y')
  assert image_folder.ImageFolder(root, 'train').digest != expected


@pytest.mark.parametrize(
  ('link', 'target', 'named'),
  [
    ('a/x/up', 'a', 'a/x/up'),
    ('a/again', 'a', 'a/again'),
    ('a/x/all', '.', 'a/x/all/a'),
  ],
)
def test_a_link_to_a_directory_around_it_is_named(
  link, target, named, tmp_path
):
  root = write(tmp_path, 'train/a/1.jpg', 'train/a/x/2.jpg')
  train = (tmp_path / 'train').resolve()
  (train / link).symlink_to(train / target)
  with pytest.raises(ConfigError, match=f'train/{named}: is a link to {train}'):
    image_folder.ImageFolder(root, 'train')


def test_two_links_to_each_other_are_named(tmp_path):
  root = write(tmp_path, 'train/a/1.jpg', 'train/b/1.jpg')
  (tmp_path / 'train/a/b').symlink_to(tmp_path / 'train/b')
  (tmp_path / 'train/b/a').symlink_to(tmp_path / 'train/a')
  with pytest.raises(ConfigError, match='a/b/a: is a link to'):
    image_folder.ImageFolder(root, 'train')


def test_links_without_a_file_are_bad_examples_if_named_like_one(tmp_path):
  root = write(tmp_path, 'train/a/1.jpg')
  for name in ('2.jpg', 'self'):
    (tmp_path / 'train/a' / name).symlink_to(tmp_path / 'train/a' / name)
  (tmp_path / 'train/a/3.jpg').symlink_to('nowhere')
  folder = image_folder.ImageFolder(root, 'train')
  assert (folder.num_examples, folder.num_ignored) == (3, 1)
  assert folder.fetch([0, 1, 2]) == [b'train/a/1.jpg', b'', b'']
  assert folder.why_unreadable(1) == os.strerror(errno.ELOOP)
  assert folder.why_unreadable(2) == os.strerror(errno.ENOENT)


def test_a_pipe_or_a_device_is_a_bad_example_and_is_not_waited_for(tmp_path):
  root = write(tmp_path, 'train/a/1.jpg')
  os.mkfifo(tmp_path / 'train/a/2.jpg')
  (tmp_path / 'train/a/3.jpg').symlink_to('/dev/zero')
  code = (
    'from conadv_jax.data.sources import image_folder; import resource;'
    ' resource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32));'
    f' f = image_folder.ImageFolder({root!r}, "train");'
    ' assert f.fetch([0, 1, 2]) == [b"train/a/1.jpg", b"", b""];'
    ' assert f.nbytes == 13;'
    ' print(f.why_unreadable(1), f.why_unreadable(2), sep=", ")'
  )
  done = subprocess.run(
    [sys.executable, '-c', code],
    capture_output=True,
    text=True,
    check=True,
    timeout=120,
  )
  assert done.stdout == 'is no regular file, is no regular file\n'


def test_a_bucket_lists_each_directory_once(tmp_path, monkeypatch):
  root = write(
    tmp_path, 'train/a/1.jpg', 'train/a/x/2.jpg', 'train/b/3.jpg', 'train/b/4.x'
  )
  local = image_folder.ImageFolder(root, 'train')
  listed = []
  path_type = type(epath.Path(root))
  iterdir = path_type.iterdir

  def counted(path):
    listed.append(str(path))
    return iterdir(path)

  monkeypatch.setattr(path_type, 'iterdir', counted)
  monkeypatch.setattr(storage, 'is_remote', lambda path: True)
  folder = image_folder.ImageFolder(root, 'train')
  assert folder.digest == local.digest
  train = f'{root}/train'
  assert sorted(listed) == [train, f'{train}/a', f'{train}/a/x', f'{train}/b']


def test_scan_lists_all_splits_without_reading(fake, monkeypatch):
  monkeypatch.setattr(records, 'read_bytes', None)
  monkeypatch.setattr(records, 'file_size', None)
  splits = image_folder.scan(fake)
  counts = {name: split.num_examples for name, split in splits.items()}
  assert counts == {'train': 30, 'val': 10}
  assert [len(names) for names in splits['train'].file_names] == [3] * 10
  synsets = [
    make_fake_imagenet.synsets()[label] for label in make_fake_imagenet.CLASSES
  ]
  assert list(splits['val'].class_names) == sorted(synsets)


def test_scan_leaves_out_splits_that_are_not_named(tmp_path):
  root = write(tmp_path, 'train/a/1.jpg', 'val/a/2.jpg', 'test/3.jpg')
  assert list(image_folder.scan(root, ['train', 'val'])) == ['train', 'val']
  with pytest.raises(ConfigError, match='test: has no sub-directories'):
    image_folder.scan(root)


@pytest.mark.parametrize(
  ('files', 'message'),
  [
    (['other/a/1.jpg'], 'train: no such directory'),
    (['train/1.jpg'], 'train: has no sub-directories, one for each class'),
    (
      ['train/a/1.jpg', 'train/b/1.txt', 'train/b/x/.hidden.jpg'],
      "train: 1 classes have no image .*'b'",
    ),
  ],
)
def test_a_folder_of_another_layout_is_named(tmp_path, files, message):
  root = write(tmp_path, *files)
  with pytest.raises(ConfigError, match=message):
    image_folder.ImageFolder(root, 'train')


def test_a_missing_or_empty_root_is_named(tmp_path):
  with pytest.raises(ConfigError, match='dataset.data_dir='):
    image_folder.scan(str(tmp_path / 'none'))
  with pytest.raises(ConfigError, match='SPLIT/CLASS'):
    image_folder.scan(str(tmp_path))


@pytest.mark.parametrize(
  ('lacks', 'missing'), [('val', 'train'), ('train', 'val')]
)
def test_splits_of_different_classes_are_refused(tmp_path, lacks, missing):
  root = write(
    tmp_path, 'train/a/1.jpg', 'val/a/1.jpg', f'{missing}/only/1.jpg'
  )
  with pytest.raises(ConfigError, match=f"{lacks}: lacks 1 .*'only'"):
    image_folder.scan(root)


def test_an_unreadable_file_is_empty_and_says_why(tmp_path):
  root = write(tmp_path, 'train/a/1.jpg', 'train/a/2.jpg', 'train/a/3.jpg')
  folder = image_folder.ImageFolder(root, 'train')
  (tmp_path / 'train/a/1.jpg').unlink()
  (tmp_path / 'train/a/2.jpg').write_bytes(b'')
  assert folder.fetch([0, 1, 2]) == [b'', b'', b'train/a/3.jpg']
  reasons = [folder.why_unreadable(i) for i in range(3)]
  assert reasons == ['No such file or directory', 'the file is empty', '']
  for i in range(3):
    assert folder.describe(i).endswith(f'a/{i + 1}.jpg')


@pytest.mark.parametrize('kind', ['raw', 'decoded'])
def test_a_file_that_is_gone_is_one_bad_example_of_a_cache(kind, tmp_path):
  """As without a cache, whose size nobody asks for."""
  root = str(tmp_path / 'fake')
  make_fake_imagenet.write_folder(root, num_train=10, num_eval=10)
  folder = image_folder.ImageFolder(root, 'train')
  lost = pathlib.Path(folder.path(1))
  lost.unlink()
  lost.symlink_to('nowhere.jpg')
  cached = cache.Cached(folder, kind)
  assert cached.num_examples == folder.num_examples
  assert cached.why_unreadable(1) == 'No such file or directory'


def test_a_name_that_is_no_text_is_shown_escaped(tmp_path):
  name = os.fsdecode(b'br\xfcke.jpg')
  (tmp_path / 'train/a').mkdir(parents=True)
  (tmp_path / 'train/a' / name).write_bytes(b'')
  folder = image_folder.ImageFolder(str(tmp_path), 'train')
  quarantine = Quarantine(tmp_path / 'bad.jsonl', max_share=1.0)
  assert folder.fetch([0]) == [b'']
  quarantine.add('train', 0, folder.describe(0), 'empty', of=10)
  shown = json.loads((tmp_path / 'bad.jsonl').read_text())['place']
  assert shown.endswith(r'a/br\xfcke.jpg')
  assert shown.encode()  # what a terminal and TensorBoard are given


def test_a_failing_disk_is_asked_again(tmp_path, monkeypatch):
  monkeypatch.setattr(storage, '_sleep', lambda seconds: None)
  root = write(tmp_path, 'train/a/1.jpg')
  folder = image_folder.ImageFolder(root, 'train')
  calls = []

  def failing_open(path, mode):
    calls.append(path)
    if len(calls) < 3 or len(calls) > 3:
      raise OSError(5, 'Input/output error')
    return io.BytesIO(b'data')

  monkeypatch.setattr(records, 'open', failing_open, raising=False)
  assert folder.fetch([0]) == [b'data']
  with pytest.raises(StorageError, match='a/1.jpg: .*output error'):
    folder.fetch([0])
  assert not folder.why_unreadable(0)  # it is no bad example
  assert len(calls) == 3 + 5


def test_ids_out_of_range_are_refused(fake):
  folder = image_folder.ImageFolder(fake, 'val')
  for example_id in (-1, 10):
    with pytest.raises(IndexError, match=r'must be in \[0, 10\)'):
      folder.fetch([example_id])


def test_parse_gives_label_minus_one_to_what_is_empty(fake):
  folder = image_folder.ImageFolder(fake, 'train')

  def example(example_id):
    record = tf.numpy_function(
      lambda i: folder.fetch([i])[0] if i % 2 else b'', [example_id], tf.string
    )
    return folder.parse(tf.ensure_shape(record, []), example_id)

  dataset = tf.data.Dataset.range(folder.num_examples).map(example)
  for i, (data, label) in enumerate(dataset.as_numpy_iterator()):
    assert label.dtype == np.int32
    assert (data, label) == (
      (folder.fetch([i])[0], folder.labels[i]) if i % 2 else (b'', -1)
    )


def test_threads_read_the_same_bytes(fake):
  folder = image_folder.ImageFolder(fake, 'train')
  expected = [folder.fetch([i])[0] for i in range(30)]
  ids = np.random.RandomState(0).randint(30, size=(8, 100))
  output = [None] * 8

  def run(thread):
    output[thread] = folder.fetch(ids[thread])

  threads = [threading.Thread(target=run, args=(i,)) for i in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert output == [[expected[i] for i in row] for row in ids]


def test_a_folder_is_scanned_without_tensorflow(fake):
  code = (
    'import sys; from conadv_jax.data.sources import image_folder;'
    f' f = image_folder.ImageFolder({fake!r}, "val"); f.fetch([0]); f.nbytes;'
    ' assert "tensorflow" not in sys.modules'
  )
  subprocess.run([sys.executable, '-c', code], check=True)
