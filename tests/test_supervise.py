"""Runs that are started again, by processes that stand in for training."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest
from etils import epath

from conadv_jax import supervise

ROOT = pathlib.Path(__file__).resolve().parents[1]

# Ends with the next of the codes; 'save' before one stands for a checkpoint.
RUN = """
import os, pathlib, sys
directory = pathlib.Path(sys.argv[1])
trial = len(list(directory.glob('trial*')))
(directory / f'trial{trial}').touch()
save, code = sys.argv[2].split(',')[trial].split(':')
if save:
  (directory / 'checkpoints' / save).mkdir(parents=True)
code = int(code)
if code < 0:
  os.kill(os.getpid(), -code)
sys.exit(code)
"""


def run(tmp_path, plan):
  command = [sys.executable, '-c', RUN, str(tmp_path), plan]
  code = supervise.supervise(
    command, epath.Path(tmp_path / 'checkpoints'), first_pause_seconds=0.001
  )
  return code, len(list(tmp_path.glob('trial*')))


@pytest.mark.parametrize(
  'plan, expected',
  [
    (':0', (0, 1)),
    ('10:42,20:42,:0', (0, 3)),
    (':6,:8,:-9,:-6,:0', (0, 5)),  # hung, host lost, killed, aborted
    (':2', (2, 1)),
    (':4', (4, 1)),
    (':42,:4', (4, 2)),
  ],
)
def test_what_can_go_on_is_started_again(plan, expected, tmp_path):
  assert run(tmp_path, plan) == expected


def test_a_run_that_gets_nowhere_is_given_up(tmp_path, capfd):
  assert run(tmp_path, ','.join([':6'] * 9)) == (6, 5)
  assert 'without a newer checkpoint' in capfd.readouterr().err


def test_a_run_that_saves_is_never_given_up(tmp_path):
  plan = ','.join(f'{step}:6' for step in range(1, 12))
  assert run(tmp_path, plan + ',:0') == (0, 12)


def test_a_run_that_was_killed_too_often_ends_like_a_shell_says(tmp_path):
  assert run(tmp_path, ','.join([':-9'] * 5)) == (128 + 9, 5)


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_goes_to_the_run_and_is_the_end(number, tmp_path):
  code = """
import signal, sys, time
def handle(number, _):
  print('got', number, flush=True)
  sys.exit(42)
signal.signal(signal.SIGTERM, handle)
signal.signal(signal.SIGINT, handle)
print('ready', flush=True)
for _ in range(600):  # a signal just before a sleep does not end it
  time.sleep(0.1)
"""
  parent = f"""
import sys
from etils import epath
from conadv_jax import supervise
command = [sys.executable, '-c', {code!r}]
sys.exit(supervise.supervise(command, epath.Path({str(tmp_path)!r})))
"""
  with subprocess.Popen(
    [sys.executable, '-c', parent],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    text=True,
    start_new_session=True,
  ) as process:
    assert process.stdout.readline() == 'ready\n'
    os.killpg(process.pid, number)  # as a terminal does
    assert process.stdout.readline() == f'got {int(number)}\n'
    assert process.stdout.read() == ''  # once
    assert process.wait(timeout=30) == 42


def test_the_command_is_train_with_the_same_flags():
  arguments = ['--supervise', '--config=a.py', '--workdir=d']
  command = supervise.command(arguments)
  assert command[1:] == [
    '-m',
    'conadv_jax.train',
    '--config=a.py',
    '--workdir=d',
  ]


def test_a_missing_work_directory_is_wrong_usage(capsys):
  assert supervise.main(['supervise', '--config=a.py']) == 2
  assert '--workdir' in capsys.readouterr().err
