"""The checks before a run starts: each finds what it looks for, and says it."""

import dataclasses
import math
import threading
import types
from concurrent.futures import Future

import multihost
import pytest
from PIL import Image

from conadv_jax import cli
from conadv_jax.base import storage
from conadv_jax.base.errors import ConfigError
from conadv_jax.data import datasets
from conadv_jax.hosts import private
from conadv_jax.preflight import checks, command
from conadv_jax.preflight.checks import CHECKS, Check, Subject
from conadv_jax.preflight.command import FAILED, OK, SKIPPED, Line
from conadv_jax.run import wandb_log, workdir
from conadv_jax.run.lock import RunLock
from scripts import make_fake_imagenet

# The machine of the tests may do other things, too.
PATIENT = """
import dataclasses
from conadv_jax.preflight import checks, command
patient = [dataclasses.replace(c, seconds=120) for c in checks.CHECKS]
checks.CHECKS = tuple(patient)
command._CHECKS_SECONDS = command._END_SECONDS = 200
"""
CHECKS_SECONDS = command._CHECKS_SECONDS
BY_NAME = {c.name: dataclasses.replace(c, seconds=120) for c in CHECKS}
DIGITS = ('--config=digits:batch_size=64', '--config.bn_group_size=8')


@pytest.fixture(autouse=True)
def patient(monkeypatch):
  monkeypatch.setattr(checks, '_INPUT_SECONDS', 0)
  monkeypatch.setattr(checks, 'CHECKS', tuple(BY_NAME.values()))
  monkeypatch.setattr(command, '_CHECKS_SECONDS', 200)


def subject_of(*argv, step_seconds=None):
  return Subject(['preflight', *argv], step_seconds)


def find(name, subject):
  """(mark, text) of one check."""
  line = command.line_of(BY_NAME[name], subject, math.inf)
  assert line.name == name
  return line.mark, line.text


def found(subject, *names):
  """`subject` after checks that must be good."""
  for name in names:
    mark, text = find(name, subject)
    assert mark == OK, text
  return subject


@pytest.fixture
def digits(tmp_path):
  """A run on digits, found good as far as the batch."""
  subject = subject_of(*DIGITS, f'--workdir={tmp_path / "run"}')
  return found(subject, 'config', 'devices', 'versions', 'data set', 'batch')


def fails(name, subject, *texts):
  mark, text = find(name, subject)
  assert mark == FAILED
  for part in texts:
    assert part in text


# ---- All together ----------------------------------------------------------


def test_a_run_that_can_start_has_no_cross(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(checks, '_images_per_sec', lambda *_: 100.0)
  path = tmp_path / 'new' / 'run'
  subject = subject_of(*DIGITS, f'--workdir={path}')
  assert command.check_all(subject) == 0
  printed = capsys.readouterr().out
  assert printed.count(OK) == len(CHECKS) and FAILED not in printed
  assert '1,437 examples' in printed and 'a new one begins' in printed
  assert not list(path.iterdir())


def test_all_checks_run_when_the_first_one_fails(tmp_path, capsys):
  (tmp_path / 'file').write_text('')
  directory = f'--workdir={tmp_path}/file/run'
  subject = subject_of('--config=digits', '--config.sed=1', directory)
  assert command.check_all(subject) == 2  # and the work directory
  lines = capsys.readouterr().out.splitlines()[1:]
  assert [line.split()[1] for line in lines] == [
    name.split()[0] for name in BY_NAME
  ]
  assert [line[0] for line in lines] == [
    *(FAILED, OK, OK), *4 * SKIPPED, FAILED, *2 * SKIPPED
  ]  # fmt: skip
  assert "did you mean 'seed'" in lines[0]


def test_the_command_ends_with_2(tmp_path, monkeypatch, capsys):
  ended = []
  monkeypatch.setattr(command, 'check_all', lambda subject: 3)
  monkeypatch.setattr(command.leaving, 'leave', ended.append)
  monkeypatch.setattr(cli, 'start_hosts', lambda argv: argv)
  monkeypatch.setattr(command.feed, 'prepare', lambda: None)
  command.preflight(['preflight', '--step_seconds=0.5'])
  assert ended == [2] and '3 checks failed' in capsys.readouterr().err


@pytest.mark.parametrize('value', ['0', '-1', 'x', 'inf', 'nan'])
def test_a_wrong_time_of_a_step_is_refused(value):
  with pytest.raises(ConfigError, match=f"--step_seconds='{value}'.*above 0"):
    command.preflight(['preflight', f'--step_seconds={value}'])


# ---- One check -------------------------------------------------------------


def test_a_check_that_hangs_is_left_behind():
  never = threading.Event()
  check = Check('slow', lambda _: never.wait(), 0.05, 'kick it')
  line = command.line_of(check, subject_of(), math.inf)
  assert (line.mark, line.text) == (FAILED, 'no answer in 0 s; kick it')
  never.set()


def test_when_the_time_of_all_is_over_each_has_a_second():
  never = threading.Event()
  check = Check('slow', lambda _: never.wait(), 60, 'kick it')
  line = command.line_of(check, subject_of(), 0)
  assert line.text == 'no answer in 1 s; kick it'
  never.set()


def test_when_every_check_hangs_the_command_ends_in_under_a_minute(
  monkeypatch, capsys
):
  """With the limits that users have, and a clock that jumps to them."""
  now, never = [0.0], threading.Event()

  def wait(_, seconds):
    now[0] += seconds

  hung = [dataclasses.replace(c, find=lambda _: never.wait()) for c in CHECKS]
  monkeypatch.setattr(checks, 'CHECKS', hung)
  monkeypatch.setattr(command, '_CHECKS_SECONDS', CHECKS_SECONDS)
  monkeypatch.setattr(
    command, 'futures', types.SimpleNamespace(Future=Future, wait=wait)
  )
  monkeypatch.setattr(
    command, 'time', types.SimpleNamespace(monotonic=lambda: now[0])
  )
  assert command.check_all(subject_of()) == len(CHECKS)
  never.set()
  assert capsys.readouterr().out.count('no answer in') == len(CHECKS)
  between_hosts = 3  # a second for each check, as the time of all is over
  assert now[0] > CHECKS_SECONDS
  assert now[0] + between_hosts < command._END_SECONDS < 60


def test_an_error_without_a_remedy_gets_that_of_its_check():
  def find(_):
    raise TimeoutError('https://user:secret@host/x: late')

  line = command.line_of(Check('x', find, 5, 'kick it'), subject_of(), math.inf)
  assert line.mark == FAILED
  assert line.text == 'TimeoutError: https://host/x: late; kick it'


def test_a_tpu_machine_without_its_tpus(monkeypatch):
  monkeypatch.setattr(private, 'on_tpu_vm', lambda: True)
  assert find('devices', subject_of())[0] == OK  # the tests ask for the CPU
  cpu = types.SimpleNamespace(
    local_devices=checks.jax.local_devices,
    config=types.SimpleNamespace(jax_platforms=None),
  )
  monkeypatch.setattr(checks, 'jax', cpu)
  fails('devices', subject_of(), 'found cpu only', "pip install -e '.[tpu]'")


def test_a_machine_without_devices(monkeypatch):
  def find():
    raise RuntimeError('Unable to initialize backend')

  none = types.SimpleNamespace(local_devices=find)
  monkeypatch.setattr(checks, 'jax', none)
  fails('devices', subject_of(), 'Unable to', 'end what else uses the devices')


def test_a_log_whose_package_is_not_there(monkeypatch):
  subject = subject_of(*DIGITS, '--config.wandb_project=x', '--workdir=w')
  found(subject, 'config', 'devices')
  monkeypatch.setattr(wandb_log.importlib.util, 'find_spec', lambda _: None)
  fails('versions', subject, "wandb_project='x'", 'pip install')


def test_a_tpu_machine_without_libtpu(monkeypatch):
  real = workdir.versions()
  real.pop('libtpu', None)
  monkeypatch.setattr(workdir, 'versions', lambda: real)
  assert find('versions', subject_of())[0] == OK
  monkeypatch.setattr(private, 'on_tpu_vm', lambda: True)
  fails('versions', subject_of(), 'no libtpu', "pip install -e '.[tpu]'")


def test_a_data_set_that_is_not_there(tmp_path):
  subject = subject_of(
    '--config=imagenet_resnet50', '--workdir=w',
    f'--config.dataset.data_dir={tmp_path}',
  )  # fmt: skip
  found(subject, 'config')
  fails('data set', subject, 'not prepared', 'set dataset.data_dir')
  assert find('input', subject)[0] == SKIPPED


def test_a_data_set_that_is_not_whole(digits, monkeypatch):
  more = {'train': 2000, 'test': 360}
  published = dataclasses.replace(digits.spec, splits=more)
  monkeypatch.setattr(datasets, 'get_spec', lambda _: published)

  def sliced(text):
    spec = dataclasses.replace(digits.spec, train_split=text)
    monkeypatch.setattr(datasets, 'resolve', lambda _: spec)
    return digits

  fails(
    'data set', sliced('train'), "1,437 examples in 'train', of 2,000",
    "dataset.train_split='train'", 'prepare all of it (docs/data.md)',
    "'--config.dataset.train_split=train[0:1437]'",
  )  # fmt: skip
  fails('data set', sliced('test+train[:50%]'), 'train_split=test[0:360]+train')
  for text in ('train[0:1437]', 'train[:900]', 'test'):
    assert find('data set', sliced(text))[0] == OK
  more['test'] = 361  # is not read twice
  fails('data set', sliced('train[:900]'), 'of 361 in', 'dataset.eval_split')


@pytest.mark.slow
def test_a_data_set_of_which_files_are_missing(tmp_path):
  make_fake_imagenet.prepare(str(tmp_path), 'array_record', 23, 13, 3)
  (last,) = tmp_path.glob('*/*/*-train.*-00002-*')
  last.unlink()
  argv = [
    '--config=imagenet_resnet50', '--config.dataset.train_split=train[:9]',
    '--config.dataset.eval_split=validation[:13]', '--workdir=w',
    f'--config.dataset.data_dir={tmp_path}',
  ]  # fmt: skip
  subject = found(subject_of(*argv), 'config')
  assert find('data set', subject)[1].startswith('9 examples to train on, 13')
  subject = subject_of(*argv, '--config.dataset.train_split=train[:23]')
  fails('data set', found(subject, 'config'), last.name, 'prepare_imagenet.py')


def test_a_batch_that_does_not_divide(tmp_path):
  subject = subject_of('--config=digits:batch_size=63', '--workdir=w')
  found(subject, 'config', 'devices', 'data set')
  fails('batch', subject, 'does not divide over 8 devices', 'nearest')


def test_the_input_is_fast_enough_for_a_slow_step_only(digits, monkeypatch):
  monkeypatch.setattr(checks, '_images_per_sec', lambda *_: 100.0)
  digits.step_seconds = 0.5
  fails('input', digits, '100 images/s on this host, a step takes 128 (0.5 s',
        'dataset.cache')  # fmt: skip
  digits.step_seconds = 0.7
  assert find('input', digits)[0] == OK


def test_the_need_of_a_step_is_that_of_the_devices(digits, monkeypatch):
  monkeypatch.setattr(checks, '_images_per_sec', lambda *_: 33.0)
  assert 'is not known' in find('input', digits)[1]
  peak = digits.run.flops_per_device()  # so that a step takes 1 s at the peak
  monkeypatch.setattr(checks, 'peak_flops_per_sec', lambda _: peak)
  mark, text = find('input', digits)
  assert mark == OK and 'a step takes 32 (2 s at 50 % of the peak)' in text
  monkeypatch.setattr(checks, '_images_per_sec', lambda *_: 31.0)
  fails('input', digits, 'faster storage')


@pytest.mark.slow
def test_images_that_cannot_be_read(tmp_path):
  for place in ('train/a', 'val/a'):
    (tmp_path / place).mkdir(parents=True)
    for i in range(8):
      Image.new('RGB', (9, 9)).save(tmp_path / place / f'{i}.jpg')
  (tmp_path / 'train/a/3.jpg').write_bytes(b'no image')
  subject = subject_of(
    '--config=imagenet_resnet50:batch_size=8', '--workdir=w',
    '--config.dataset.name=image_folder', '--config.dataset.image_size_px=32',
    f'--config.dataset.data_dir={tmp_path}', '--config.bn_group_size=1',
    '--config.dataset.max_bad_share=0.0',
  )  # fmt: skip
  found(subject, 'config', 'devices', 'data set', 'batch')
  fails('input', subject, '3.jpg', 'dataset.max_bad_share')


def test_a_device_that_is_too_small(digits):
  stats = {'bytes_limit': 1000}
  digits.local = [types.SimpleNamespace(memory_stats=lambda: stats)]
  fails('memory', digits, 'of 1000 B on each device', 'shard_optimizer')
  stats['bytes_limit'] = 2**30
  assert find('memory', digits)[0] == OK


def test_a_work_directory_that_cannot_be_written(tmp_path):
  (tmp_path / 'file').write_text('')
  subject = subject_of(f'--workdir={tmp_path}/file/run')
  fails('workdir', subject, 'cannot be written', 'check that the storage')
  fails('workdir', subject_of(f'--workdir={tmp_path}/a*'), 'a pattern')
  fails('workdir', subject_of(), 'missing --workdir')


def test_a_disk_that_is_too_small(digits, monkeypatch):
  found(digits, 'workdir', 'disk')
  monkeypatch.setattr(storage, 'free_bytes', lambda _: 10)
  fails('disk', digits, '10 B free', '3 + 1 checkpoints', 'checkpoint.keep')
  monkeypatch.setattr(storage, 'free_bytes', lambda _: None)  # a bucket
  assert find('disk', digits)[0] == OK


# ---- A run that is there ---------------------------------------------------


def begun(subject, *steps):
  """A run with checkpoints in the work directory of `subject`."""
  found(subject, 'workdir')
  workdir.write_config(subject.path, subject.run, subject.data)
  for step in steps:
    directory = subject.path / 'checkpoints' / str(step)
    directory.mkdir(parents=True)
    (directory / 'commit_success.txt').write_text('')
  return subject


def test_a_run_that_is_there_resumes(digits):
  begun(digits, 5, 7)
  assert find('run', digits) == (OK, f'resumes at step 7 of {898}')
  begun(digits, 898)
  assert find('run', digits)[1].endswith('898, the last one')


def test_a_run_of_other_settings(digits):
  begun(digits)
  digits.run = dataclasses.replace(
    digits.run, config=dataclasses.replace(digits.config, seed=7)
  )
  fails('run', digits, 'seed: 0 -> 7', 'use another --workdir')


def test_a_run_of_other_examples(digits):
  begun(digits)
  digits.data |= {'train_digest': 'other'}
  fails('run', digits, 'data.train_digest', 'use another --workdir')


def test_a_run_that_is_past_its_end(digits):
  begun(digits, 899)
  fails('run', digits, 'already at step 899', 'or more steps')


def test_a_run_that_is_alive(digits):
  found(digits, 'workdir')
  with RunLock(digits.path):
    fails('run', digits, 'in use since', 'stop that run')
  assert find('run', digits)[0] == OK


# ---- Between hosts ---------------------------------------------------------


def test_a_directory_that_is_not_shared(digits, monkeypatch):
  found(digits, 'workdir')
  monkeypatch.setattr(workdir.time, 'sleep', lambda _: None)
  own = digits.token
  assert 'of 1 hosts' in command._shared(digits, [own, ''])  # it has a line
  with pytest.raises(ConfigError, match='hosts 1-2 wrote .* not seen here; '):
    command._shared(digits, [own, 'one', 'two'])


def test_hosts_that_differ():
  facts = {'version jax': '1', 'config seed': 0}
  assert 'are the same' in command.same([facts, dict(facts)])
  with pytest.raises(ConfigError, match='version jax: "1" on host 0, "2" on'):
    command.same([facts, facts | {'version jax': '2'}])
  with pytest.raises(checks.Skipped, match='on host 1'):
    command.same([facts, None])


def test_clocks_that_differ():
  assert command.close([100.0, 99.5, 101.2], 100.0, 101.0) == 'within 1.5 s'
  with pytest.raises(ConfigError, match='hosts 1-2: up to 62 s .*chrony'):
    command.close([100.0, 38.0, 130.0], 100.0, 101.0)


def test_lines_of_hosts_are_one_where_they_are_equal():
  def of_host(*, speed, mark=OK):
    return [Line('devices', OK, '8'), Line('input', mark, speed)]

  rows = [of_host(speed='9/s') for _ in range(9)]
  rows[0].append(Line('run', OK, 'new'))
  assert command.merge(rows) == [
    Line('devices', OK, '8'), Line('input', OK, '9/s'), Line('run', OK, 'new')
  ]  # fmt: skip
  rows[4] = rows[5] = of_host(speed='1/s', mark=FAILED)
  assert command.merge(rows)[1:3] == [
    Line('input', FAILED, 'hosts 4-5: 1/s'),
    Line('input', OK, 'hosts 0-3, 6-8: 9/s'),
  ]


def test_many_different_lines_are_cut():
  rows = [[Line('input', OK, f'{i}/s')] for i in range(9)]
  rows[8] = [Line('input', FAILED, 'slow')]
  merged = command.merge(rows)
  assert len(merged) == 5 and merged[0].text == 'host 8: slow'
  assert merged[-1].mark == OK and 'on 5 more hosts' in merged[-1].text
  rows = [[Line('input', FAILED, f'{i}/s')] for i in range(9)]
  assert command.merge(rows)[-1].mark == FAILED


CODE = (
  f'{PATIENT}\nfrom conadv_jax.preflight.__main__ import console\nconsole()'
)


@pytest.mark.slow
def test_two_hosts(tmp_path):
  argv = ['-c', CODE, *DIGITS]
  shared = [*argv, f'--workdir={tmp_path}/run']
  with multihost.Hosts(tmp_path / 'good', 2, shared) as run:
    run.ends_with(0)
    printed = run.log(0)
  assert FAILED not in printed and printed.count(OK) >= len(CHECKS) + 3
  assert 'sees the files of 2 hosts' in printed
  own = {
    0: [f'--workdir={tmp_path}/run'],
    1: [f'--workdir={tmp_path}/other', '--config.seed=3'],
  }
  with multihost.Hosts(tmp_path / 'bad', 2, argv, of_host=own) as run:
    run.ends_with(2)
    printed = run.log(0)
    assert '2 checks failed' in run.log(1)
  assert f'{FAILED} shared    host 0: what host 1 wrote' in printed
  assert 'config seed: 0 on host 0, 3 on host 1' in printed
  assert not list(tmp_path.glob('*/.preflight*'))
