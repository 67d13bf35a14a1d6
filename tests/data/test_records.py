"""Record files of both formats: what is read, and what damage does."""

import threading

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from record_files import FORMATS, RECORDS, flip, write

from conadv_jax.base.errors import ConfigError
from conadv_jax.data.sources import records
from scripts import make_fake_imagenet


@pytest.fixture(scope='module', params=FORMATS)
def files(request, tmp_path_factory):
  """(format, paths, lengths), not to be changed."""
  directory = tmp_path_factory.mktemp(request.param)
  return request.param, *write(directory, request.param)


def open_files(files, **kwargs):
  name, paths, lengths = files
  return FORMATS[name][0](paths, lengths, **kwargs)


def test_fetch_returns_each_record(files):
  source = open_files(files)
  assert source.num_examples == len(RECORDS)
  ids = np.array([18, 0, 4, 5, 7, 8, 8, 14, 15])
  assert source.fetch(ids) == [RECORDS[i] for i in ids]
  assert source.fetch(np.arange(19)) == RECORDS
  assert source.fetch(np.array([], np.int64)) == []


def test_nbytes_is_the_size_of_the_files(files):
  _, paths, _ = files
  size = sum(path.stat().st_size for path in paths)
  assert open_files(files).nbytes == size
  assert size > sum(len(record) for record in RECORDS)


def test_describe_names_file_and_place(files):
  source = open_files(files)
  _, paths, _ = files
  assert source.describe(7) == f'{paths[1]}, record 2'
  assert source.describe(8) == f'{paths[3]}, record 0'


@pytest.mark.parametrize('example_id', [-1, 19])
def test_ids_out_of_range_are_refused(files, example_id):
  with pytest.raises(IndexError, match=r'must be in \[0, 19\)'):
    open_files(files).fetch(np.array([0, example_id]))


def test_threads_read_the_same_bytes(files):
  kwargs = {
    'tfrecord': {'cached_shards': 2},
    'array_record': {'max_open_files': 2, 'num_threads': 3},
  }[files[0]]
  source = open_files(files, **kwargs)
  ids = np.random.RandomState(0).randint(19, size=(8, 50, 5))
  wrong = []

  def run(thread):
    for row in ids[thread]:
      if source.fetch(row) != [RECORDS[i] for i in row]:
        wrong.append(row)

  threads = [threading.Thread(target=run, args=(i,)) for i in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert wrong == []


@pytest.mark.parametrize('name', FORMATS)
def test_the_fake_imagenet_is_parsed_to_images_and_labels(name, tmp_path):
  directory = make_fake_imagenet.prepare(
    str(tmp_path), name, num_train=20, num_eval=8, num_shards=3
  )
  split = tfds.builder_from_directory(directory).info.splits['train']
  source = FORMATS[name][0](split.filepaths, split.shard_lengths)

  def example(example_id):
    record = tf.numpy_function(
      lambda i: source.fetch(np.array([i]))[0], [example_id], tf.string
    )
    return source.parse(tf.ensure_shape(record, []), example_id)

  dataset = tf.data.Dataset.range(20).map(example)
  found = sorted((y, x) for x, y in dataset.as_numpy_iterator())
  synsets = make_fake_imagenet.synsets()
  assert found == sorted(
    (synsets.index(synset), data)
    for _, synset, data in make_fake_imagenet._images('train', 20, 0)
  )
  assert found[0][0].dtype == np.int32


@pytest.mark.parametrize(
  'record', [b'', tf.train.Example().SerializeToString()], ids=['b""', 'bare']
)
def test_a_record_without_image_and_label_is_empty(files, record):
  data, label = open_files(files).parse(tf.constant(record), tf.constant(0))
  assert (data.numpy(), label.numpy()) == (b'', -1)


@pytest.mark.parametrize('name', FORMATS)
def test_a_damaged_record_is_empty_and_the_others_survive(name, tmp_path):
  paths, lengths = write(tmp_path, name)
  flip(paths[3], paths[3].read_bytes().index(RECORDS[10][:20]) + 5)
  source = open_files((name, paths, lengths))
  expected = [b'' if i == 10 else record for i, record in enumerate(RECORDS)]
  assert source.fetch(np.arange(19)) == expected
  assert source.fetch(np.array([10])) == [b'']
  what = {'tfrecord': 'checksum', 'array_record': 'hash mismatch'}[name]
  assert source.describe(10) == f'{paths[3]}, record 2'
  assert what in source.why_unreadable(10)
  assert not source.why_unreadable(11)


@pytest.mark.parametrize('name', FORMATS)
def test_a_missing_shard_is_named_at_once(name, tmp_path):
  paths, lengths = write(tmp_path, name)
  paths[1].unlink()
  with pytest.raises(ConfigError) as error:
    open_files((name, paths, lengths))
  message = str(error.value)
  assert f'1 of 5 files cannot be used, the first is {paths[1]}' in message
  assert 'is missing' in message
  assert 'prepare_imagenet.md' in message


def test_a_file_that_may_not_be_read_is_named(files, monkeypatch):
  def refuse(path):
    raise PermissionError(13, 'Permission denied')

  monkeypatch.setattr(records, 'file_size', refuse)
  with pytest.raises(ConfigError, match='Permission denied; see that'):
    open_files(files)


def test_a_record_of_another_kind_fails_in_parse(files):
  with pytest.raises(tf.errors.InvalidArgumentError):
    open_files(files).parse(tf.constant(b'no Example'), tf.constant(0))


@pytest.mark.parametrize('name', FORMATS)
def test_an_empty_file_is_named_at_once(name, tmp_path):
  paths, lengths = write(tmp_path, name)
  paths[3].write_bytes(b'')
  with pytest.raises(ConfigError, match='records 7 records') as error:
    open_files((name, paths, lengths))
  assert str(paths[3]) in str(error.value)


def test_paths_and_lengths_must_match(files):
  name, paths, lengths = files
  with pytest.raises(ValueError, match='5 files but lengths'):
    open_files((name, paths, lengths[:-1]))
