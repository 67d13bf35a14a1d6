"""One run per work directory: who gets the lock, and who loses it."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import multihost
import pytest
from etils import epath

from conadv_jax.base import errors, storage
from conadv_jax.base.errors import ConfigError, StorageError
from conadv_jax.run import lock
from conadv_jax.run.lock import RunLock


def owner_of(directory):
  return json.loads((directory / 'run.lock').read_text())


def write_owner(directory, **fields):
  """The lock file of a run that is alive on this machine, but for `fields`."""
  owner = lock._this_process() | {'token': 'other'} | fields
  (directory / 'run.lock').write_text(json.dumps(owner))
  return owner


def ended_process():
  process = subprocess.Popen([sys.executable, '-c', ''])
  process.wait()
  return process.pid


def until(condition):
  deadline = time.monotonic() + 20
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.001)


class Watching:
  """A `sleep` that returns at once, and notes or does what happens then."""

  def __init__(self, during=lambda: None):
    self.seconds = 0
    self._during = during

  def __call__(self, seconds):
    self.seconds += seconds
    self._during()


def test_a_second_run_is_refused_and_shown_the_owner(tmp_path, monkeypatch):
  flags = ['train.py', '--config=configs/x.py', '--workdir', 'runs/a']
  monkeypatch.setattr(sys, 'argv', [*flags, '--token=hidden'])
  with RunLock(tmp_path):
    owner = owner_of(tmp_path)
    with pytest.raises(ConfigError) as refused, RunLock(tmp_path):
      pass
    assert owner_of(tmp_path) == owner
  message = str(refused.value)
  assert f'workdir={str(tmp_path)!r}: in use since {owner["since"]}' in message
  assert f'process {os.getpid()} of {socket.gethostname()}' in message
  assert 'train.py --config=configs/x.py --workdir=runs/a' in message
  assert 'another --workdir' in message
  assert 'hidden' not in message + json.dumps(owner)


@pytest.mark.parametrize(
  'argv, said',
  [
    ([], ''),
    (['/a/b/train.py'], 'train.py'),
    (['x', '-config=c', '--workdir', 'd'], 'x -config=c --workdir=d'),
    (['x', '--config'], 'x --config='),
    (['x', '--config.dataset.data_dir=d', 'config', '--key', 'k'], 'x'),
    (['x', '--workdir=gs://b/x?sig=hidden'], 'x --workdir=gs://b/x?...'),
  ],
)
def test_the_command_that_is_shown_holds_no_other_flag(argv, said):
  assert lock._command(argv) == said


def test_the_lock_is_given_back_and_can_be_taken_again(tmp_path):
  for _ in range(2):
    with RunLock(tmp_path) as run_lock:
      assert owner_of(tmp_path)['pid'] == os.getpid()
      run_lock.release()  # as a signal does, before the context ends
      assert os.listdir(tmp_path) == []
  with pytest.raises(ZeroDivisionError), RunLock(tmp_path):
    raise ZeroDivisionError
  assert os.listdir(tmp_path) == []


def test_a_lock_whose_process_is_gone_is_taken_over_at_once(tmp_path, capsys):
  write_owner(tmp_path, pid=ended_process(), process_start='1')
  sleep = Watching()
  with RunLock(tmp_path, sleep=sleep):
    assert owner_of(tmp_path)['pid'] == os.getpid()
  assert sleep.seconds == 0
  (line,) = capsys.readouterr().out.splitlines()
  assert 'has ended; taken over' in line


def test_a_process_number_that_is_used_again_is_no_owner(tmp_path):
  with subprocess.Popen(
    [sys.executable, '-c', 'input()'], stdin=subprocess.PIPE
  ) as process:
    start = lock._process_start(process.pid)
    write_owner(tmp_path, pid=process.pid, process_start=start)
    with pytest.raises(ConfigError), RunLock(tmp_path):
      pass
    write_owner(tmp_path, pid=process.pid, process_start=f'{int(start) - 1}')
    with RunLock(tmp_path):
      assert owner_of(tmp_path)['pid'] == os.getpid()
    process.stdin.close()


def test_a_zombie_holds_no_lock(tmp_path):
  process = subprocess.Popen([sys.executable, '-c', ''], stdout=subprocess.PIPE)
  start = lock._process_start(process.pid)
  process.stdout.read()
  until(lambda: not lock._process_start(process.pid))  # nobody waits for it
  write_owner(tmp_path, pid=process.pid, process_start=start)
  with RunLock(tmp_path):
    pass
  process.communicate()


def another_machine(monkeypatch):
  monkeypatch.setattr(lock, '_machine', lambda: 'another machine')


def a_container(monkeypatch):
  monkeypatch.setattr(lock, '_PID_NAMESPACE', '/proc/self/ns/net')


def unknown_machines(monkeypatch):
  monkeypatch.setattr(lock, '_machine', lambda: '')


@pytest.mark.parametrize(
  'of_owner, of_all',
  [(another_machine, None), (a_container, None), (None, unknown_machines)],
)
def test_a_silent_run_of_another_machine_is_taken_over_after_the_lease(
  of_owner, of_all, tmp_path, monkeypatch, capsys
):
  if of_all:
    of_all(monkeypatch)
  # The number and its start are those of a process that is alive here.
  with monkeypatch.context() as there:
    if of_owner:
      of_owner(there)
    write_owner(tmp_path, host='far')
  sleep = Watching()
  with RunLock(tmp_path, lease_seconds=45, sleep=sleep):
    assert owner_of(tmp_path)['host'] == socket.gethostname()
  assert sleep.seconds == pytest.approx(45)
  watching, taken = capsys.readouterr().out.splitlines()
  assert 'watching it for 45 s' in watching
  assert 'of far' in watching and 'of far' in taken


def test_a_run_of_another_machine_that_gives_a_sign_of_life_is_not(tmp_path):
  far = {'machine': 'another machine', 'host': 'far'}
  write_owner(tmp_path, **far)
  sleep = Watching(lambda: write_owner(tmp_path, **far, renewed=1))
  with pytest.raises(ConfigError, match='of far'):
    RunLock(tmp_path, lease_seconds=45, sleep=sleep).__enter__()
  assert sleep.seconds < 45 / 4


def test_one_that_is_given_back_while_it_is_watched_is_free(tmp_path):
  write_owner(tmp_path, machine='another machine')
  path = tmp_path / 'run.lock'
  sleep = Watching(lambda: path.unlink(missing_ok=True))
  with RunLock(tmp_path, sleep=sleep):
    assert owner_of(tmp_path)['pid'] == os.getpid()
  assert sleep.seconds < 45 / 4


OWNER_WITHOUT_NUMBER = json.dumps(lock._this_process() | {'pid': 'x/y'})


@pytest.mark.parametrize(
  'text', ['', '{"pid": 1', '[]', '{}', 'null', OWNER_WITHOUT_NUMBER]
)
def test_a_damaged_lock_is_watched_like_one_of_another_machine(text, tmp_path):
  (tmp_path / 'run.lock').write_text(text)
  sleep = Watching()
  with RunLock(tmp_path, lease_seconds=45, sleep=sleep):
    assert owner_of(tmp_path)['pid'] == os.getpid()
  assert sleep.seconds == pytest.approx(45)


@pytest.mark.parametrize('hours', [-1, 1])
def test_clocks_decide_nothing(hours, tmp_path, monkeypatch):
  """This machine's clock is an hour off, and so is the other's file."""
  now = time.time
  monkeypatch.setattr(time, 'time', lambda: now() + 3600 * hours)
  monkeypatch.setattr(time, 'strftime', lambda *_: '1970-01-01T00:00:00+0000')
  far = {'machine': 'another machine'}
  write_owner(tmp_path, **far)
  os.utime(tmp_path / 'run.lock', (0, 0) if hours > 0 else (2**32, 2**32))
  sleep = Watching(lambda: write_owner(tmp_path, **far, renewed=1))
  with pytest.raises(ConfigError), RunLock(tmp_path, sleep=sleep):
    pass
  sleep = Watching()
  with RunLock(tmp_path, sleep=sleep):
    with pytest.raises(ConfigError), RunLock(tmp_path):
      pass
  assert sleep.seconds == pytest.approx(45)


@pytest.mark.parametrize('stale', [False, True])
def test_of_many_that_start_at_once_one_gets_the_lock(stale, tmp_path):
  gone = ended_process()
  for round_ in range(10):
    directory = tmp_path / str(round_)
    directory.mkdir()
    if stale:
      write_owner(directory, pid=gone, process_start='1')
    barrier, won, refused = threading.Barrier(6), [], []

    def start(directory=directory, barrier=barrier, won=won, refused=refused):
      run_lock = RunLock(directory)
      barrier.wait()
      try:
        run_lock._take()
        won.append(run_lock)
      except ConfigError as error:
        refused.append(error)

    threads = [threading.Thread(target=start) for _ in range(6)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    assert (len(won), len(refused)) == (1, 5)
    assert won[0]._is_ours()
    assert os.listdir(directory) == ['run.lock']


def test_the_new_lock_of_a_faster_run_is_put_back(tmp_path, monkeypatch):
  """Without turns, which another machine cannot take."""
  gone = write_owner(tmp_path, pid=ended_process(), process_start='1')
  slow = RunLock(tmp_path)
  write_owner(tmp_path)  # the faster one's
  new = (tmp_path / 'run.lock').read_text()
  monkeypatch.setattr(slow, '_read', lambda: json.dumps(gone))
  assert not slow._move_away(json.dumps(gone))
  assert (tmp_path / 'run.lock').read_text() == new
  assert os.listdir(tmp_path) == ['run.lock']


def test_a_file_system_without_hard_links_has_a_lock(tmp_path, monkeypatch):
  def refuse(*_):
    raise PermissionError(1, 'Operation not permitted')

  monkeypatch.setattr(os, 'link', refuse)
  with RunLock(tmp_path):
    with pytest.raises(ConfigError), RunLock(tmp_path):
      pass
    assert os.listdir(tmp_path) == ['run.lock']
  assert os.listdir(tmp_path) == []


def test_the_owner_renews_its_lock(tmp_path):
  with RunLock(tmp_path, lease_seconds=0.04):
    until(lambda: owner_of(tmp_path)['renewed'] >= 2)
    with pytest.raises(ConfigError):
      RunLock(tmp_path).__enter__()


def test_a_lock_removed_by_hand_is_made_again(tmp_path):
  with RunLock(tmp_path, lease_seconds=0.04) as run_lock:
    (tmp_path / 'run.lock').unlink()
    until(run_lock._is_ours)


def test_a_lock_that_was_lost_is_left_to_its_new_owner(tmp_path):
  with RunLock(tmp_path):
    other = write_owner(tmp_path)
  assert owner_of(tmp_path) == other


def test_renewal_survives_storage_that_fails(tmp_path, monkeypatch):
  monkeypatch.setattr(storage, '_sleep', lambda _: None)
  failures, read = [], RunLock._read

  def failing(self):
    if len(failures) < 3:
      failures.append(None)
      raise StorageError('gone')
    return read(self)

  with RunLock(tmp_path, lease_seconds=0.04):
    monkeypatch.setattr(RunLock, '_read', failing)
    until(lambda: owner_of(tmp_path)['renewed'])
  assert len(failures) == 3
  assert os.listdir(tmp_path) == []


def test_a_lock_that_may_not_be_read_is_an_error_of_storage(
  tmp_path, monkeypatch
):
  write_owner(tmp_path)

  def refuse(self):
    raise PermissionError(13, 'Permission denied')

  monkeypatch.setattr(type(epath.Path(tmp_path)), 'read_text', refuse)
  with pytest.raises(StorageError, match='run.lock: .*Permission'):
    RunLock(tmp_path).__enter__()


def test_a_lock_that_cannot_be_written_is_an_error_of_storage(tmp_path):
  with pytest.raises(StorageError, match='run.lock: cannot be written'):
    RunLock(tmp_path / 'none').__enter__()


class Bucket:
  """One object of a bucket: no links, no renames, and the last write counts."""

  def __init__(self, text=None):
    self.text = text
    self.parent, self.name = 'gs://bucket/run', 'run.lock'

  def __fspath__(self):
    return 'gs://bucket/run/run.lock'

  __str__ = __fspath__

  def read_text(self):
    if self.text is None:
      raise FileNotFoundError
    return self.text

  def write_text(self, text):
    self.text = text

  def unlink(self, missing_ok):
    assert missing_ok
    self.text = None


def on_bucket(bucket, during=lambda: None):
  run_lock = RunLock(epath.Path('gs://bucket/run'), sleep=Watching(during))
  run_lock._path = bucket
  return run_lock


def test_a_lock_on_a_bucket():
  bucket = Bucket()
  with on_bucket(bucket):
    assert json.loads(bucket.text)['pid'] == os.getpid()
    with pytest.raises(ConfigError, match='in use since'):
      on_bucket(bucket).__enter__()
  assert bucket.text is None


def test_on_a_bucket_the_last_that_wrote_has_the_lock():
  bucket = Bucket()
  other = json.dumps(lock._this_process())

  def other_writes():
    bucket.text = other

  with pytest.raises(ConfigError):
    on_bucket(bucket, other_writes).__enter__()
  assert bucket.text == other


def test_a_stale_lock_on_a_bucket_is_taken_over():
  owner = lock._this_process() | {'machine': 'another machine'}
  bucket = Bucket(json.dumps(owner))
  with on_bucket(bucket) as run_lock:
    assert run_lock._is_ours()
  assert bucket.text is None


# ---- Real processes --------------------------------------------------------

HOLDER = """
import sys
from conadv_jax.run.lock import RunLock
with RunLock(sys.argv[1], lease_seconds=float(sys.argv[2])):
  print('taken', flush=True)
  sys.stdin.read()
"""


class Holder:
  """A process that holds the lock until its context ends."""

  def __init__(self, directory, lease_seconds=45, code=HOLDER):
    self.process = subprocess.Popen(
      [sys.executable, '-c', code, str(directory), str(lease_seconds)],
      cwd=multihost.ROOT,
      env=os.environ | {'JAX_PLATFORMS': 'cpu'},
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )

  def __enter__(self):
    assert self.process.stdout.readline() == 'taken\n'
    return self.process

  def __exit__(self, *_):
    self.process.kill()
    self.process.communicate()


@pytest.mark.fault
def test_a_killed_run_leaves_a_lock_that_the_next_one_takes_over(
  tmp_path, capfd
):
  """Test 20: refused while the owner lives, even stopped; free when not."""
  with Holder(tmp_path) as process:
    for number in (None, signal.SIGSTOP):
      if number:
        process.send_signal(number)
      with pytest.raises(ConfigError, match=f'process {process.pid} of'):
        RunLock(tmp_path).__enter__()
    process.kill()
    process.wait()
    assert owner_of(tmp_path)['pid'] == process.pid
    with RunLock(tmp_path):
      assert owner_of(tmp_path)['pid'] == os.getpid()
  assert f'process {process.pid} of' in capfd.readouterr().out


@pytest.mark.fault
def test_a_run_that_lost_its_lock_ends_itself(tmp_path):
  with Holder(tmp_path, lease_seconds=0.2) as process:
    other = write_owner(tmp_path, machine='far away', host='far', pid=77)
    assert process.wait(timeout=20) == errors.STORAGE
    said = process.stderr.read()
    assert re.search(r'taken over by process 77 of far', said)
  assert owner_of(tmp_path) == other  # and it is not given back for the other


@pytest.mark.fault
def test_a_run_that_was_held_up_for_longer_than_the_lease_ends_itself(
  tmp_path, monkeypatch
):
  """Stopped by the system, it is taken for dead; going on, it sees that."""
  with Holder(tmp_path, lease_seconds=0.4) as process:
    monkeypatch.setattr(lock, '_machine', lambda: 'this is another machine')
    with pytest.raises(ConfigError):
      RunLock(tmp_path, lease_seconds=0.4).__enter__()  # it renews
    process.send_signal(signal.SIGSTOP)
    with RunLock(tmp_path, lease_seconds=0.4):
      process.send_signal(signal.SIGCONT)
      assert process.wait(timeout=20) == errors.STORAGE
      assert owner_of(tmp_path)['pid'] == os.getpid()


@pytest.mark.fault
def test_all_hosts_learn_that_the_directory_is_in_use(tmp_path):
  """Host 0 looks; the other one is told."""
  program = tmp_path / 'program.py'
  program.write_text(
    'import sys\n'
    'from conadv_jax import cli\n'
    'from conadv_jax.run.lock import RunLock\n'
    'def main(argv):\n'
    '  cli.start_hosts(argv)\n'
    f'  with RunLock({str(tmp_path)!r}):\n'
    '    print("taken", flush=True)\n'
    'cli.run(main)\n'
  )
  with RunLock(tmp_path):
    with multihost.Hosts(tmp_path / 'a', 2, [str(program)]) as refused:
      refused.ends_with(errors.USAGE)
      for host in (0, 1):
        assert f'in use since {owner_of(tmp_path)["since"]}' in refused.log(
          host
        )
        assert 'taken' not in refused.log(host)
  with multihost.Hosts(tmp_path / 'b', 2, [str(program)]) as run:
    run.ends_with(0)
    assert all('taken' in run.log(host) for host in (0, 1))
  assert not (tmp_path / 'run.lock').exists()
