"""Clouds that tests rent machines of."""

import os
import pathlib
import signal
import subprocess
import sys

import fake_cloud
import pytest
from clouds import PROGRAMS, Fake

from conadv_jax.cloud import jobs
from conadv_jax.cloud.shell import Result, Shell


@pytest.fixture(scope='module')
def checkout(tmp_path_factory):
  """A repository with what a worker needs to install it."""
  root = tmp_path_factory.mktemp('checkout')
  (root / 'requirements.lock').write_text('jax==0.10.2\nuv==0.5.0\n')
  identity = ['-c', 'user.name=a', '-c', 'user.email=a@b']
  for arguments in (
    ['init', '-q'],
    ['add', '.'],
    [*identity, 'commit', '-q', '-m', 'a'],
  ):
    subprocess.run(['git', '-C', root, *arguments], check=True)
  return root


@pytest.fixture
def cloud(tmp_path, monkeypatch, checkout):
  """A cloud in the process of the test."""
  fake = Fake(tmp_path)
  real = Shell.run_all

  def interrupt():
    raise KeyboardInterrupt

  def run_all(self, commands, dry=b''):
    if self.dry_run or commands[0][0] not in PROGRAMS:
      return real(self, commands, dry)
    return [
      Result(*fake_cloud.call(tmp_path, program, arguments, interrupt))
      for program, *arguments in commands
    ]

  monkeypatch.setattr(Shell, 'run_all', run_all)
  monkeypatch.setattr(jobs, '_root', lambda: checkout)
  monkeypatch.chdir(tmp_path)
  yield fake
  for file in tmp_path.rglob('pid'):
    try:
      os.killpg(int(file.read_text()), signal.SIGKILL)
    except ProcessLookupError:
      pass


@pytest.fixture
def programs(cloud, monkeypatch):
  """The same cloud behind programs on the PATH."""
  folder = cloud.root / 'bin'
  folder.mkdir()
  source = pathlib.Path(fake_cloud.__file__).read_text(encoding='utf-8')
  for name in PROGRAMS:
    cloud.write(folder / name, f'#!{sys.executable} -IS\n{source}')
  monkeypatch.undo()
  monkeypatch.setenv('PATH', f'{folder}:{os.environ["PATH"]}')
  monkeypatch.setenv('FAKE_CLOUD', str(cloud.root))
  monkeypatch.chdir(cloud.root)
  return cloud
