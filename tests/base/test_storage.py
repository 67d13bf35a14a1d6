"""Storage that fails: what is tried again, what ends a run, what is said."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shutil
import subprocess
import types

import helpers
import multihost
import numpy as np
import pytest
import tensorflow as tf
from etils import epath

from conadv_jax.base import errors, faults, storage
from conadv_jax.base.errors import DataError, StorageError, redact
from conadv_jax.checkpoints.checkpoint import Checkpoints
from conadv_jax.data.quarantine import Quarantine
from conadv_jax.data.sources.reader import Reader
from conadv_jax.data.sources.source import BadExamples
from conadv_jax.run import metrics, workdir

PASSING = (
  errno.EIO, errno.ETIMEDOUT, errno.ESTALE, errno.EAGAIN, errno.ECONNRESET,
  errno.ENOTCONN, errno.EBUSY,
)  # fmt: skip
LASTING = (
  errno.ENOENT, errno.EACCES, errno.EISDIR, errno.ENOTDIR, errno.EROFS,
  errno.ENOSPC, errno.EDQUOT, errno.EFBIG,
)  # fmt: skip
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@pytest.fixture
def waits(monkeypatch):
  """The seconds that would have been waited, each time."""
  seconds = []
  monkeypatch.setattr(storage, '_sleep', seconds.append)
  return seconds


class Failing:
  """Raises `error` for the first `failures` calls; then returns 'done'."""

  def __init__(self, error, failures):
    self._error = error
    self._failures = failures
    self.calls = 0

  def __call__(self):
    self.calls += 1
    if self.calls <= self._failures:
      raise self._error
    return 'done'


def os_error(number):
  return OSError(number, os.strerror(number))


# ---- What is tried again ----------------------------------------------------


@pytest.mark.parametrize('number', PASSING, ids=errno.errorcode.get)
@pytest.mark.parametrize('call', [storage.read, storage.write])
def test_what_may_pass_is_tried_again(call, number, waits, capsys):
  before = storage.num_retries()
  function = Failing(os_error(number), 4)
  assert call(function, '/data/x') == 'done'
  assert function.calls == 5
  assert storage.num_retries() - before == 4
  said = capsys.readouterr()
  assert said.out == ''
  lines = said.err.splitlines()
  assert len(lines) == 4
  for attempt, line in enumerate(lines, start=2):
    assert line.startswith(f'/data/x: {os.strerror(number)}; ')
    assert f'(attempt {attempt} of 5)' in line


def test_attempts_end_in_less_than_ten_seconds(waits):
  for _ in range(50):
    waits.clear()
    function = Failing(os_error(errno.EIO), 99)
    with pytest.raises(StorageError, match='^/data/x: cannot be read: Input/'):
      storage.read(function, '/data/x')
    assert function.calls == 5
    assert 5 < sum(waits) < 10
    assert sorted(waits) == waits and len(set(waits)) == 4


def test_hosts_do_not_come_back_together(waits):
  for _ in range(2):
    storage.read(Failing(os_error(errno.EIO), 1), 'x')
  assert waits[0] != waits[1]


@pytest.mark.parametrize('number', LASTING, ids=errno.errorcode.get)
def test_what_will_not_pass_is_not_tried_again(number, waits):
  error = os_error(number)
  function = Failing(error, 1)
  with pytest.raises(OSError) as info:
    storage.read(function, 'x')
  assert info.value is error
  function = Failing(error, 1)
  with pytest.raises(StorageError, match=os.strerror(number)):
    storage.write(function, 'x')
  assert function.calls == 1 and not waits


@pytest.mark.parametrize(
  'error', [FileNotFoundError('x'), PermissionError(), ZeroDivisionError()]
)
def test_other_errors_and_those_without_a_number_are_not(error, waits):
  with pytest.raises(type(error)):
    storage.read(Failing(error, 1), 'x')
  assert not waits


@pytest.mark.parametrize(
  'kind', ['Unavailable', 'DeadlineExceeded', 'Aborted', 'Internal', 'Unknown']
)
def test_what_buckets_raise_is_tried_again(kind, waits, capsys):
  error = getattr(tf.errors, f'{kind}Error')(None, None, 'come back later')
  assert storage.read(Failing(error, 4), 'gs://b/x') == 'done'
  assert 'come back later' in capsys.readouterr().err
  with pytest.raises(StorageError, match='gs://b/x: .*come back later'):
    storage.write(Failing(error, 5), 'gs://b/x')


@pytest.mark.parametrize(
  'kind, expected',
  [
    ('NotFound', FileNotFoundError),
    ('PermissionDenied', PermissionError),
    ('Unauthenticated', PermissionError),
    ('DataLoss', tf.errors.DataLossError),
    ('InvalidArgument', tf.errors.InvalidArgumentError),
  ],
)
def test_what_buckets_will_go_on_to_refuse_is_not(kind, expected, waits):
  error = getattr(tf.errors, f'{kind}Error')(None, None, 'no')
  with pytest.raises(expected, match='no'):
    storage.read(Failing(error, 1), 'gs://b/x')
  assert not waits


def test_too_many_requests_are_no_full_disk(waits):
  busy = tf.errors.ResourceExhaustedError(None, None, 'rate limit')
  assert storage.write(Failing(busy, 1), 'gs://b/x') == 'done'
  full = tf.errors.ResourceExhaustedError(
    None, None, '/x; No space left on device'
  )
  with pytest.raises(StorageError, match='No space left .*free some space'):
    storage.write(Failing(full, 1), '/x')
  assert len(waits) == 1


def test_faults_on_purpose_are_failures_of_storage(monkeypatch, waits):
  plan = faults._parse('oserror*2@storage/read,nospace@storage/write')
  monkeypatch.setattr(faults, '_faults', plan)
  assert storage.read(lambda: 'done', 'x') == 'done'
  assert len(waits) == 2
  with pytest.raises(StorageError, match='No space left'):
    storage.write(lambda: 'done', 'x')


# ---- What is said -----------------------------------------------------------


@pytest.mark.parametrize('number', FULL, ids=errno.errorcode.get)
def test_a_full_disk_is_said_with_path_and_free_bytes(
  number, tmp_path, monkeypatch
):
  usage = types.SimpleNamespace(free=12345)
  monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage)
  path = tmp_path / 'not' / 'there' / 'yet'
  with pytest.raises(StorageError) as info:
    storage.write(Failing(os_error(number), 1), path)
  assert str(info.value) == (
    f'{path}: cannot be written: {os.strerror(number)}; 12,345 bytes free '
    'there; free some space, or raise the quota, then run the same command '
    'again'
  )


def test_the_space_is_that_of_the_nearest_directory(tmp_path):
  free = shutil.disk_usage(tmp_path).free
  text = storage.space(tmp_path / 'none' / 'x')
  found = int(
    re.fullmatch(r'([\d,]+) bytes free there', text)[1].replace(',', '')
  )
  assert found == pytest.approx(free, rel=0.1)
  assert storage.space('gs://bucket/x') == ''


def test_signatures_are_not_said(waits, capsys):
  path = 'gs://user:password@b/x?X-Goog-Signature=abc'
  with pytest.raises(StorageError) as info:
    storage.read(Failing(OSError(f'{path} timed out'), 9), path)
  said = str(info.value) + capsys.readouterr().err
  assert 'gs://b/x?...' in said
  assert not re.search('abc|password', said)


@pytest.mark.parametrize(
  'text, expected',
  [
    ('gs://b/x', 'gs://b/x'),
    ('gs://b/x?sig=abc rest', 'gs://b/x?... rest'),
    ("'https://u:p@h.org/x?a=b&c=d'", "'https://h.org/x?...'"),
    ('S3://key:secret@b/a@b', 'S3://b/a@b'),
    ('/data/what?/x@y', '/data/what?/x@y'),
    ('why? gs://b/x: gone', 'why? gs://b/x: gone'),
    ('', ''),
  ],
)
def test_urls_are_cut_down_to_what_names_a_file(text, expected):
  assert redact(text) == expected


# ---- Reading examples -------------------------------------------------------


class Source:
  """Twelve numbers; the `failing` calls of fetch raise what storage raises."""

  num_examples = 12
  failure = None

  def __init__(self, failing=(), error=None):
    self._failing, self._error, self._calls = failing, error, 0

  def fetch(self, ids):
    return storage.read(lambda: self._fetch(ids), 'shard')

  def _fetch(self, ids):
    self._calls += 1
    if self._calls in self._failing:
      raise self._error
    return [b'%d' % i for i in ids]

  def parse(self, record, example_id):
    return tf.strings.to_number(record, tf.int32), tf.constant(0)

  def describe(self, example_id):
    return f'number {example_id}'


def batches(source, quarantine=None):
  def example(image, label, example_id, epoch):
    return {'value': image, 'label': label}

  order = tf.data.Dataset.range(source.num_examples).map(
    lambda i: {'id': i, 'epoch': tf.constant(0, tf.int64)}
  )
  bad = BadExamples('train', 1, quarantine, replace=True)
  reader = Reader(source, example, bad)
  return list(reader.batches(order, 3))


def test_storage_that_comes_back_changes_no_batch(waits):
  expected = batches(Source())
  values = np.concatenate([batch['value'] for batch in expected])
  assert values.tolist() == list(range(12))
  unsteady = Source((2, 3, 5), os_error(errno.EIO))
  helpers.assert_batches_equal(batches(unsteady), expected)
  assert len(waits) == 3


def test_storage_that_does_not_ends_the_run_and_not_the_epoch(waits):
  gone = Source(range(2, 99), os_error(errno.EIO))
  quarantine = Quarantine(max_share=0.9)
  with pytest.raises(StorageError, match='shard: cannot be read: Input/'):
    batches(gone, quarantine)
  assert len(quarantine) == 0


def test_a_file_that_is_gone_is_an_error_of_the_data(waits):
  gone = Source(range(2, 99), os_error(errno.ENOENT))
  with pytest.raises(DataError, match='No such file'):
    batches(gone, Quarantine(max_share=0.9))


# ---- Writing ----------------------------------------------------------------


@pytest.fixture
def little_space():
  """Sets the largest size of a file for this process, in bytes."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)

  def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

  yield limit
  resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_config_json_survives_a_full_disk(tmp_path, little_space):
  path = epath.Path(tmp_path) / 'config.json'
  workdir.write_json(path, {'a': 1})
  little_space(100)
  with pytest.raises(StorageError, match='config.json: .*bytes free there'):
    workdir.write_json(path, {'a': 'x' * 200})
  assert json.loads(path.read_text()) == {'a': 1}


def test_metrics_on_a_full_disk_are_an_error_that_keeps_the_lines_before(
  tmp_path, little_space
):
  writer = metrics.MetricWriter(tmp_path, 0)
  writer.write(1, 'train', {'loss': 1.0})
  little_space((tmp_path / 'metrics.jsonl').stat().st_size + 10)
  with pytest.raises(StorageError, match='metrics.jsonl: .*bytes free there'):
    writer.write(2, 'train', {'loss': 2.0})
  little_space(resource.RLIM_INFINITY)
  writer.close()
  assert [row['step'] for row in metrics.read_metrics(tmp_path)] == [1]


def test_tensorboard_on_a_full_disk_is_an_error(tmp_path, little_space):
  writer = metrics.MetricWriter(tmp_path, 0)
  writer._lines.append = lambda line: None  # metrics.jsonl has all the room
  little_space(3000)
  with pytest.raises(StorageError, match=r'events\.out\..*bytes free there'):
    for step in range(1, 200):
      writer.write(step, 'train', {f'{i}' * 20: 1.0 for i in range(9)})
  little_space(resource.RLIM_INFINITY)
  writer.close()


def test_a_line_that_is_written_again_is_there_once(tmp_path, waits):
  writer = metrics.MetricWriter(tmp_path, 0)
  lines = writer._lines
  file, failures = lines._file, [None, None]

  def write(line):
    if failures:
      failures.pop()
      file.write(line[:10])
      raise os_error(errno.EIO)
    return file.write(line[:7])  # and the rest, if it is asked to

  lines._file = types.SimpleNamespace(
    write=write, truncate=file.truncate, fileno=file.fileno, close=file.close
  )
  for step in (1, 2):
    writer.write(step, 'train', {'loss': 0.5})
  writer.close()
  rows = metrics.read_metrics(tmp_path)
  assert [row['step'] for row in rows] == [1, 2]
  assert len((tmp_path / 'metrics.jsonl').read_text().splitlines()) == 2
  assert len(waits) == 2


def test_the_quarantine_on_a_full_disk_is_an_error(tmp_path, little_space):
  quarantine = Quarantine(tmp_path / 'q.jsonl', max_share=0.5)
  quarantine.add('train', 0, 'here', 'bad', of=10)
  before = (tmp_path / 'q.jsonl').read_text()
  little_space(len(before) + 10)
  with pytest.raises(StorageError, match='q.jsonl'):
    quarantine.add('train', 1, 'here', 'bad', of=10)
  assert (tmp_path / 'q.jsonl').read_text() == before


# ---- Whole runs -------------------------------------------------------------


def flags(directory, **fields):
  fields = {
    'model': 'tiny', 'bn_group_size': 8, 'max_steps': 6, 'log_every_steps': 1,
    'eval.attack': 'none', 'checkpoint.every_steps': 2, 'plots': False,
  } | fields  # fmt: skip
  return [
    '--config=configs/digits.py:batch_size=64,method=conadv',
    f'--workdir={directory}',
    *(f'--config.{name}={value}' for name, value in fields.items()),
  ]


def run(directory, log, plan='', **fields):
  arguments = [multihost.TINY, 'train', *flags(directory, **fields)]
  return multihost.run(arguments, log, {'CONADV_FAULTS': plan})


def losses(directory):
  rows = metrics.read_metrics(directory)
  return [row['loss'] for row in rows if row['split'] == 'train']


@pytest.mark.fault
def test_storage_that_blinks_changes_no_run(tmp_path):
  """Test 25."""
  steady, unsteady = tmp_path / 'steady', tmp_path / 'unsteady'
  assert run(steady, tmp_path / 'log') == 0
  plan = 'oserror*3@storage/write,oserror*3@storage/read'
  assert run(unsteady, tmp_path / 'log', plan) == 0
  assert (tmp_path / 'log').read_text().count('again in') == 6
  assert losses(unsteady) == losses(steady) and len(losses(steady)) == 6


@pytest.mark.fault
def test_an_input_that_fails_costs_no_step(tmp_path):
  """Test 25: the state is saved before the run ends."""
  fields = {'max_steps': 50, 'checkpoint.every_steps': 50,
            'eval.every_steps': 0}  # fmt: skip
  with multihost.Hosts(
    tmp_path / 'first',
    1,
    [multihost.TINY, 'train', *flags(tmp_path / 'run', **fields)],
    environment={'INPUT_FAILS_AT': '7'},
  ) as running:
    running.ends_with(errors.STORAGE)
    assert 'error: shard-00007: cannot be read' in running.log(0)
  (saved,) = Checkpoints(tmp_path / 'run', read_only=True).steps()
  assert saved == len(losses(tmp_path / 'run')) and saved in (5, 6)


@pytest.mark.fault
def test_storage_that_fails_for_good_ends_the_run_with_its_code(tmp_path):
  """Test 25."""
  plan = 'oserror*99@storage/write'
  code = run(tmp_path / 'run', tmp_path / 'log', plan)
  assert code == errors.STORAGE
  (line,) = re.findall('^error: .*', (tmp_path / 'log').read_text(), re.M)
  assert str(tmp_path / 'run') in line and 'bytes free there' in line


@pytest.mark.fault
def test_a_full_disk_ends_the_run_and_room_lets_it_go_on(tmp_path):
  """Test 9, on a small file system of its own."""
  disk = tmp_path / 'disk'
  disk.mkdir()
  mount = ['mount', '-t', 'tmpfs', '-o', 'size=4m', 'none', str(disk)]
  if subprocess.run(mount, capture_output=True, check=False).returncode:
    pytest.skip('may not mount')
  try:
    log = tmp_path / 'log'
    # No evaluation at the end: its pictures would need more room than there is.
    assert run(disk / 'run', log, 'kill@train/step:5') == -9
    before = losses(disk / 'run')
    with open(disk / 'fill', 'wb', buffering=0) as fill, pytest.raises(OSError):
      while fill.write(bytes(256)):
        pass
    assert run(disk / 'run', log) == errors.STORAGE
    (line,) = re.findall('^error: .*', log.read_text(), re.M)
    assert str(disk / 'run') in line and re.search(r'\d bytes free', line)
    (disk / 'fill').unlink()
    assert run(disk / 'run', log, 'kill@train/last_evaluation') == -9
    assert 'resumed at step ' in log.read_text()
    assert losses(disk / 'run')[: len(before) - 1] == before[:-1]
    assert len(losses(disk / 'run')) == 6
  finally:
    subprocess.run(['umount', str(disk)], check=True)
