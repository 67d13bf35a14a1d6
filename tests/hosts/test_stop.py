"""Signals: remembered, agreed on by hosts, or the end at once."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from conadv_jax.devices import mesh
from conadv_jax.hosts import stop

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_a_second_ctrl_c_quits_at_once_and_a_second_sigterm_does_not():
  before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
  with stop.StopRequest() as request:
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    assert request.signal == signal.SIGTERM
    with pytest.raises(KeyboardInterrupt):
      os.kill(os.getpid(), signal.SIGINT)
      time.sleep(1)
  after = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
  assert after == before


def test_requests_can_be_nested():
  with stop.StopRequest() as outer:
    with stop.StopRequest() as inner:
      os.kill(os.getpid(), signal.SIGTERM)
    assert inner.signal == signal.SIGTERM and outer.signal is None
    os.kill(os.getpid(), signal.SIGTERM)
    assert outer.signal == signal.SIGTERM
  assert signal.set_wakeup_fd(-1) == -1


INPUT = 'input'


def agreed(agreement, input_failed=False):
  try:
    agreement.check(input_failed)
  except stop.Stopped as stopped:
    return stopped.signal or INPUT
  return None


def test_hosts_agree_on_a_signal_at_most_two_steps_later(monkeypatch):
  """The way of several hosts, on the devices of one."""
  monkeypatch.setattr(stop.hosts, 'count', lambda: 2)
  request = stop.StopRequest()
  agreement = stop.Agreement(request, mesh.make_mesh(16, 2))
  assert [agreed(agreement) for _ in range(3)] == [None] * 3
  request.signal = signal.SIGTERM
  assert [agreed(agreement) for _ in range(2)] == [None, signal.SIGTERM]
  # What came before the first step stops the run before it.
  agreement = stop.Agreement(request, mesh.make_mesh(16, 2))
  assert agreed(agreement) == signal.SIGTERM


def test_one_host_stops_before_the_next_step():
  request = stop.StopRequest()
  agreement = stop.Agreement(request, mesh.make_mesh(16, 2))
  assert agreed(agreement) is None
  request.signal = signal.SIGINT
  assert agreed(agreement) == signal.SIGINT


def test_an_input_that_fails_stops_all_and_comes_before_signals(monkeypatch):
  """Two checks after it is known: as many batches must be left."""
  request = stop.StopRequest()
  agreement = stop.Agreement(request, mesh.make_mesh(16, 2))
  assert agreed(agreement, input_failed=True) == INPUT
  monkeypatch.setattr(stop.hosts, 'count', lambda: 2)
  assert agreed(agreement) is None
  request.signal = signal.SIGTERM
  assert agreed(agreement, input_failed=True) is None
  assert agreed(agreement, input_failed=True) == INPUT


# The main thread is in C, as in a compiler, and sees no signal for minutes.
PROGRAM = """
import hashlib
from conadv_jax.hosts import stop
with stop.StopRequest() as request:
  {before}
  request.before_leaving(lambda: print('last', flush=True))
  request.leave_at_once('nothing to save')
  print('ready', flush=True)
  hashlib.pbkdf2_hmac('sha256', b'', b'', 2 * 10**9)
"""


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_at_once_what_has_nothing_to_save(number):
  with subprocess.Popen(
    [sys.executable, '-c', PROGRAM.format(before='')],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  ) as process:
    assert process.stdout.readline() == 'ready\n'
    process.send_signal(number)
    assert process.wait(timeout=20) == 42
    said = process.stdout.read()
  assert 'last' in said
  assert f'{number.name}: nothing to save; run the same command again' in said


def test_a_signal_that_came_before_ends_it_too():
  before = 'import os, signal; os.kill(os.getpid(), signal.SIGTERM)'
  code = PROGRAM.format(before=before)
  ended = subprocess.run(
    [sys.executable, '-c', code],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert ended.returncode == 42
  assert 'ready' not in ended.stdout
