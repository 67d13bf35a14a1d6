"""Examples that cannot be used are replaced, left out, counted and named."""

import json
import shutil

import helpers
import numpy as np
import odd_images
import pytest
import tensorflow as tf
from PIL import Image
from pipelines import evaluation, load, train

from conadv_jax.base.errors import DataError
from conadv_jax.data import sampler
from conadv_jax.data.quarantine import Quarantine
from conadv_jax.data.sources import cache
from conadv_jax.data.sources.source import Encoded

pytestmark = pytest.mark.usefixtures('few_small_graphs')


class Folder(Encoded):
  """Files in memory, with the interface of the readers."""

  def __init__(self, files, labels=None):
    self._files = list(files)
    self._labels = [0] * len(self._files) if labels is None else labels
    self.num_examples = len(self._files)

  def fetch(self, ids):
    return [self._files[i] for i in ids]

  def parse(self, record, example_id):
    return record, tf.gather(tf.constant(self._labels, tf.int32), example_id)

  def describe(self, example_id):
    return f'file{example_id}'

  @property
  def nbytes(self):
    return sum(map(len, self._files))


def plain(grey):
  return odd_images.encode(Image.new('RGB', (50, 40), (grey,) * 3))


GREYS = [10 * i for i in range(1, 13)]


def damaged(*bad):
  return Folder([b'nonsense' if i in bad else plain(g)
                 for i, g in enumerate(GREYS)])  # fmt: skip


def greys(batch):
  return [round(float(image.mean()) / 10) - 1 for image in batch['clean']]


def test_a_bad_example_is_replaced_by_the_next_good_one(tmp_path):
  quarantine = Quarantine(tmp_path / 'q.jsonl', max_share=0.5)
  batches = train(
    damaged(4, 7, 8, 11), ('clean',), num_steps=6, quarantine=quarantine
  )
  instead = {4: 5, 7: 9, 8: 9, 11: 0}
  for batch in batches:
    expected = [instead.get(i, i) for i in batch['id'].tolist()]
    assert greys(batch) == expected
  rows = [json.loads(x) for x in (tmp_path / 'q.jsonl').read_text().split('\n')
          if x]  # fmt: skip
  assert {row['id'] for row in rows} == {4, 7, 8, 11} and len(rows) == 4
  for row in rows:
    assert row['split'] == 'train' and row['place'] == f'file{row["id"]}'
    assert 'neither JPEG, PNG nor WebP' in row['reason']
  # On two hosts, and from the middle, the same.
  for positions in ([0, 1], [2, 3]):
    half = train(
      damaged(4, 7, 8, 11), ('clean',), start_step=1, num_steps=5,
      positions=np.array(positions), quarantine=quarantine,
    )  # fmt: skip
    for got, expected in zip(half, batches[1:], strict=True):
      np.testing.assert_array_equal(got['clean'], expected['clean'][positions])
  assert len(quarantine) == 4


def test_the_run_stops_when_too_many_are_bad(tmp_path):
  for bad, share in (((2, 3, 4, 5), 0.1), (range(12), 0.99)):
    quarantine = Quarantine(max_share=share)
    with pytest.raises(DataError, match='dataset.max_bad_share'):
      train(damaged(*bad), ('clean',), quarantine=quarantine)
  with pytest.raises(DataError, match='1 of the 12 examples'):
    train(damaged(2), ('clean',))


@pytest.mark.slow
def test_the_quarantine_goes_on_after_a_restart(tmp_path):
  path = tmp_path / 'q.jsonl'
  train(damaged(1, 2), ('clean',), quarantine=Quarantine(path, max_share=0.2))
  again = Quarantine(path, max_share=0.2)
  assert len(again) == again.count('train') == 2
  train(damaged(1, 2), ('clean',), quarantine=again)
  with pytest.raises(DataError, match='4 of the 12'):
    train(damaged(1, 2, 3, 4), ('clean',), quarantine=again)


def test_a_label_out_of_range_is_a_bad_example():
  files = [plain(grey) for grey in GREYS]
  labels = [0] * 12
  labels[5], labels[6] = 3, -1
  quarantine = Quarantine(max_share=0.5)
  batches = train(
    Folder(files, labels), ('clean',), num_classes=3, quarantine=quarantine
  )
  assert len(quarantine) == 2
  for batch in batches:
    assert not batch['label'].any()
    assert 5 not in greys(batch) and 6 not in greys(batch)


class Flaky(Folder):
  """Storage that fails once."""

  failures = 1

  def fetch(self, ids):
    if self.failures and 4 in ids:
      self.failures -= 1
      return [b''] * len(ids)
    return super().fetch(ids)


@pytest.mark.slow
def test_an_example_that_can_be_read_later_is_used():
  files = [plain(grey) for grey in GREYS]
  expected = train(Folder(files), ('clean',), num_steps=3)
  helpers.assert_batches_equal(
    train(Flaky(files), ('clean',), num_steps=3), expected
  )
  expected = evaluation(Folder(files), batch_size=12)
  helpers.assert_batches_equal(
    evaluation(Flaky(files), batch_size=12), expected
  )


def test_evaluation_leaves_bad_examples_out_and_names_them():
  quarantine = Quarantine(max_share=0.5)
  batches = evaluation(damaged(2, 9), batch_size=5, quarantine=quarantine)
  left = [i for b in batches for i in b['id'][b['mask']].tolist()]
  assert sorted(left) == [i for i in range(12) if i not in (2, 9)]
  assert quarantine.count('eval') == 2
  with pytest.raises(DataError):
    evaluation(damaged(2), batch_size=5)


@pytest.mark.parametrize('size', [1, 33])
def test_any_batch_size_keeps_the_places(size):
  quarantine = Quarantine(max_share=0.5)
  (batch, *_) = train(
    damaged(3), ('clean',), batch_size=size, quarantine=quarantine
  )
  ids, _ = sampler.example_ids(3, 0, size, 12)
  assert batch['id'].tolist() == ids.tolist()
  assert greys(batch) == [4 if i == 3 else i for i in ids]


def test_a_short_tfrecord_file_stops_the_run(fake_dirs, tmp_path):
  shutil.copytree(fake_dirs / 'tfrecord', tmp_path / 'data')
  paths = sorted(tmp_path.glob('data/imagenet2012/*/*train.tfrecord*'))
  records = [r.numpy() for r in tf.data.TFRecordDataset(str(paths[1]))]
  with tf.io.TFRecordWriter(str(paths[1])) as writer:
    for record in records[:-1]:
      writer.write(record)
  quarantine = Quarantine(max_share=0.9)
  with pytest.raises(DataError, match=paths[1].name):
    train(load(tmp_path / 'data'), num_steps=12, quarantine=quarantine)


@pytest.mark.slow
def test_a_bad_example_stays_bad_in_a_cache(tmp_path):
  source = damaged(2)
  for kind in ('raw', 'decoded'):
    quarantine = Quarantine(max_share=0.5)
    cached = cache.Cached(source, kind)
    batches = train(cached, ('clean',), quarantine=quarantine)
    helpers.assert_batches_equal(
      batches, train(source, ('clean',), quarantine=quarantine)
    )
    assert len(quarantine) == 1
