"""Saves on storage that fails or is full."""

import errno
import os
import pathlib
import subprocess
import sys

import pytest
from saved import (
  DROPS_COROUTINES,
  abstract,
  assert_is,
  finish,
  make_state,
  restored,
)

from conadv_jax.base import faults
from conadv_jax.base.errors import StorageError
from conadv_jax.checkpoints import checkpoint
from conadv_jax.checkpoints import files as checkpoint_files
from conadv_jax.checkpoints.checkpoint import Checkpoints

pytestmark = DROPS_COROUTINES


@pytest.fixture
def fault(monkeypatch):
  return lambda text: monkeypatch.setattr(
    faults, '_faults', faults._parse(text)
  )


def test_a_failed_save_shows_at_once_and_the_next_state_is_saved(fault, two):
  fault('oserror@checkpoint/before_commit:3')
  checkpoints = Checkpoints(two, keep=1)
  checkpoints.save(3, make_state(3))
  assert finish(checkpoints)
  assert checkpoints.steps() == [1, 2]  # nothing was removed for it
  checkpoints.save(4, make_state(4))
  assert not finish(checkpoints)
  assert checkpoints.steps() == [4]
  checkpoints.close()
  assert_is(restored(two), 4)


def test_the_same_step_is_saved_again_after_a_failure(fault, two, waits):
  fault('oserror*2@checkpoint/before_commit')
  checkpoints = Checkpoints(two, keep=1)
  for _ in range(2):
    checkpoints.save(3, make_state(3))
    assert finish(checkpoints)
  checkpoints.save(3, make_state(3))
  assert not finish(checkpoints)
  assert checkpoints.steps() == [3]
  assert waits == [1, 4]
  checkpoints.close()
  assert_is(restored(two), 3)


def test_a_save_that_could_not_be_restored_costs_no_earlier_one(
  two, monkeypatch
):
  """As if orbax had lost a file on the way: the checks are a restore's."""
  finalize = checkpoint._TemporaryPath.finalize

  async def losing(self):
    if self.get_final().name in ('3', '4'):
      (self.get() / 'state' / 'manifest.ocdbt').unlink()
    await finalize(self)

  checkpoints = Checkpoints(two, keep=1)
  monkeypatch.setattr(checkpoint._TemporaryPath, 'finalize', losing)
  checkpoints.save(3, make_state(3))
  with pytest.raises(StorageError, match=r'step 3 .*manifest.ocdbt is missing'):
    checkpoints.wait(3)
  assert checkpoints.steps() == [1, 2]
  with pytest.raises(StorageError, match='manifest.ocdbt is missing'):
    checkpoints.save_now(4, make_state(4))  # tries again, and does not give in
  assert checkpoints.steps() == [1, 2]
  checkpoints.close()
  assert_is(restored(two), 2)


def test_the_last_state_of_a_run_is_saved_in_spite_of_a_failure(fault, two):
  fault('oserror*2@checkpoint/before_commit')
  checkpoints = Checkpoints(two, keep=1)
  checkpoints.save_now(3, make_state(3))
  assert checkpoints.steps() == [3]
  checkpoints.close()
  assert_is(restored(two), 3)


def test_a_save_waits_for_the_one_before(two):
  checkpoints = Checkpoints(two, keep=2)
  for step in (3, 4, 5):
    checkpoints.save(step, make_state(step))
  checkpoints.wait(5)
  assert checkpoints.steps() == [4, 5]
  checkpoints.close()


def test_a_failed_save_does_not_spoil_the_next_one(fault, two, capsys):
  fault('oserror@checkpoint/before_commit:3')
  checkpoints = Checkpoints(two, keep=1)
  checkpoints.save(3, make_state(3))
  checkpoints.save(4, make_state(4))
  assert not finish(checkpoints)
  assert checkpoints.steps() == [4]
  assert 'step 3 could not be saved' in capsys.readouterr().out
  checkpoints.close()


def test_the_end_does_not_hide_that_a_save_failed(fault, two):
  fault('oserror@checkpoint/before_commit:3')
  checkpoints = Checkpoints(two, keep=1)
  checkpoints.save(3, make_state(3))
  with pytest.raises(StorageError, match='step 3 could not be saved'):
    checkpoints.close()


def test_one_that_cannot_be_removed_is_no_failed_save(fault, two, capsys):
  fault('oserror*9@checkpoint/mid_removal:1')
  checkpoints = Checkpoints(two, keep=1)
  checkpoints.save(3, make_state(3))
  assert not finish(checkpoints)
  assert checkpoints.steps() == [3]
  assert 'checkpoints/1: cannot be written' in capsys.readouterr().out
  checkpoints.close()
  assert_is(restored(two), 3)
  assert not (two / 'checkpoints' / '1').exists()


def test_files_that_cannot_be_read_are_not_taken_for_damaged(
  monkeypatch, two, waits
):
  check, blips = checkpoint_files._check_files, []

  def flaky(*arguments):
    if blips:
      raise blips.pop()
    check(*arguments)

  monkeypatch.setattr(checkpoint_files, '_check_files', flaky)
  checkpoints = Checkpoints(two, keep=5)
  blips += [OSError(errno.EIO, os.strerror(errno.EIO))] * 4
  assert_is(checkpoints.restore(abstract(make_state())), 2)
  assert len(waits) == 4
  for lasting in ([OSError(errno.EIO, 'x')] * 9, [PermissionError(13, 'x')]):
    blips[:] = lasting
    with pytest.raises(StorageError, match='cannot be read'):
      checkpoints.restore(abstract(make_state()))
  assert checkpoints.steps() == [1, 2]
  checkpoints.close()


def test_storage_that_fails_for_good_ends_the_run(fault, two):
  fault('oserror*9@checkpoint/before_commit')
  checkpoints = Checkpoints(two, keep=1)
  for step in (3, 4):
    checkpoints.save(step, make_state(step))
    assert finish(checkpoints)
  checkpoints.save(5, make_state(5))
  with pytest.raises(StorageError, match='step 5 could not be saved'):
    finish(checkpoints)
  assert checkpoints.steps() == [1, 2]


def test_a_full_disk_is_an_error_with_path_and_free_bytes(fault, two):
  fault('nospace@checkpoint/before_commit:3')
  checkpoints = Checkpoints(two, keep=1)
  checkpoints.save(3, make_state(3))
  with pytest.raises(StorageError, match='checkpoints: .* bytes free'):
    finish(checkpoints)
  assert_is(restored(two), 2)


def test_a_lost_last_save_is_an_error(fault, two):
  fault('oserror@checkpoint/before_commit:3')
  checkpoints = Checkpoints(two, keep=1)
  checkpoints.save(3, make_state(3))
  with pytest.raises(StorageError, match='step 3 could not be saved'):
    checkpoints.wait(3)


FULL = """
import resource, signal, sys
sys.path[:0] = [{tests!r}, {tests!r} + '/checkpoints']
import jax
jax.config.update('jax_platforms', 'cpu')
import saved as t
from pathlib import Path
from conadv_jax.base.errors import StorageError
workdir = Path(sys.argv[1])
checkpoints = t.Checkpoints(workdir, keep=1)
t.save(checkpoints, 1)
{fill}
checkpoints.save(2, t.make_state(2))
try:
  t.finish(checkpoints)
except StorageError as error:
  print('StorageError:', error)
print(checkpoints.steps(), flush=True)
"""


def steps_after_a_full_disk(workdir, fill):
  code = FULL.format(tests=str(pathlib.Path(__file__).parents[1]), fill=fill)
  root = str(pathlib.Path(__file__).resolve().parents[2])
  ended = subprocess.run(
    [sys.executable, '-c', code, str(workdir)],
    capture_output=True,
    text=True,
    env=os.environ | {'PYTHONPATH': root},
  )
  assert 'StorageError: step 2 could not be saved' in ended.stdout, (
    ended.stdout + ended.stderr
  )
  assert 'bytes free' in ended.stdout
  return ended.stdout.splitlines()[-1]


@pytest.mark.fault
def test_files_that_cannot_grow_cost_no_earlier_checkpoint(tmp_path):
  fill = (
    'signal.signal(signal.SIGXFSZ, signal.SIG_IGN); '
    'resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))'
  )
  assert steps_after_a_full_disk(tmp_path, fill) == '[1]'


@pytest.mark.fault
def test_a_full_file_system_costs_no_earlier_checkpoint(tmp_path):
  mount = ['mount', '-t', 'tmpfs', '-o', 'size=2m', 'tmpfs', str(tmp_path)]
  if subprocess.run(mount, capture_output=True).returncode:
    pytest.skip('mounting a small file system needs root')
  try:
    fill = (
      'file = open(workdir / "fill", "wb", buffering=0)\n'
      'try:\n  [file.write(bytes(4096)) for _ in range(9**9)]\n'
      'except OSError:\n  pass'
    )
    assert steps_after_a_full_disk(tmp_path, fill) == '[1]'
  finally:
    subprocess.run(['umount', '-l', str(tmp_path)], check=True)
