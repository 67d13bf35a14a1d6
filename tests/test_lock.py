"""One run per directory: who is refused, and what is reclaimed."""

import json
import os
import pathlib
import subprocess
import sys
import time

import pytest
from etils import epath

from conadv_jax import exits
from conadv_jax.config import ConfigError
from conadv_jax.lock import RunLock

ROOT = pathlib.Path(__file__).resolve().parents[1]
HOLDER = """
import sys, time
from etils import epath
from conadv_jax.lock import RunLock
with RunLock(epath.Path(sys.argv[1]), lease_seconds=float(sys.argv[2])):
  print('taken', flush=True)
  time.sleep(60)
"""


def no_wait(seconds):
  """Stands in for the lease."""


def owner(workdir):
  return json.loads((workdir / 'run.lock').read_text())


def pretend(workdir, **changes):
  """Leaves the lock of another process there."""
  with RunLock(epath.Path(workdir)):
    content = owner(workdir)
  (workdir / 'run.lock').write_text(json.dumps(content | changes))


def hold(workdir, lease_seconds=45):
  process = subprocess.Popen(
    [sys.executable, '-c', HOLDER, str(workdir), str(lease_seconds)],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  assert process.stdout.readline() == 'taken\n', process.stderr.read()
  return process


def test_it_is_given_back(tmp_path):
  for _ in range(2):
    with RunLock(epath.Path(tmp_path)):
      assert owner(tmp_path)['pid'] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_second_run_is_refused_and_shown_the_owner(tmp_path):
  with hold(tmp_path) as holder:
    with pytest.raises(ConfigError, match=f'in use since .* {holder.pid} of'):
      RunLock(epath.Path(tmp_path)).__enter__()
    assert owner(tmp_path)['pid'] == holder.pid
    holder.kill()
    holder.wait()
    # Its process is gone: no waiting.
    with RunLock(epath.Path(tmp_path), sleep=pytest.fail):
      assert owner(tmp_path)['pid'] == os.getpid()
    holder.stdout.close()
    holder.stderr.close()


def test_a_number_that_another_process_has_now_is_not_the_owner(tmp_path):
  pretend(tmp_path, started='1')
  with RunLock(epath.Path(tmp_path), sleep=pytest.fail):
    assert owner(tmp_path)['started'] != '1'


def test_an_owner_elsewhere_without_a_sign_of_life_is_gone(tmp_path, capsys):
  pretend(tmp_path, boot='other', host='tpu-3', pid=7)
  with RunLock(epath.Path(tmp_path), sleep=no_wait):
    assert owner(tmp_path)['pid'] == os.getpid()
  said = capsys.readouterr().out
  assert 'waiting 45 s for a sign of life' in said
  assert 'process 7 of tpu-3 is gone' in said


def test_an_owner_elsewhere_that_renews_is_alive(tmp_path):
  pretend(tmp_path, boot='other', host='tpu-3', pid=7)

  def renewed(seconds):
    content = owner(tmp_path)
    (tmp_path / 'run.lock').write_text(
      json.dumps(content | {'renewed': content['renewed'] + 1})
    )

  with pytest.raises(ConfigError, match='process 7 of tpu-3'):
    RunLock(epath.Path(tmp_path), sleep=renewed).__enter__()


def test_clocks_do_not_matter(tmp_path):
  """A start in the future or long ago says nothing about being alive."""
  for since in ('1970-01-01 00:00:00 +0000', '2100-01-01 00:00:00 +0000'):
    pretend(tmp_path, boot='other', since=since)
    with RunLock(epath.Path(tmp_path), sleep=no_wait):
      pass


def test_it_is_renewed(tmp_path):
  with RunLock(epath.Path(tmp_path), lease_seconds=0.04):
    deadline = time.monotonic() + 10
    while owner(tmp_path)['renewed'] < 2:
      assert time.monotonic() < deadline
      time.sleep(0.01)


def test_a_run_that_lost_the_lock_ends_itself(tmp_path):
  with hold(tmp_path, lease_seconds=0.2) as holder:
    content = owner(tmp_path) | {'token': 'another', 'pid': 7}
    (tmp_path / 'new').write_text(json.dumps(content))
    os.replace(tmp_path / 'new', tmp_path / 'run.lock')
    assert holder.wait(timeout=20) == exits.STORAGE
    assert 'not ours any more, but of 7' in holder.stderr.read()
    assert owner(tmp_path)['token'] == 'another'


def test_of_two_that_start_together_one_is_refused(tmp_path):
  """Both find the lock of a dead owner."""
  pretend(tmp_path, started='1')
  outcomes = []
  locks = [RunLock(epath.Path(tmp_path)) for _ in range(2)]
  for lock in locks:
    try:
      lock.__enter__()
      outcomes.append('taken')
    except ConfigError:
      outcomes.append('refused')
  assert outcomes == ['taken', 'refused']
  locks[0].release()
