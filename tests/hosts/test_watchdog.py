"""Runs that hang and hosts that are lost: bounded ends with a reason."""

import ctypes
import faulthandler
import json
import re
import signal
import subprocess
import sys
import time

import jax
import multihost
import pytest

from conadv_jax import hosts
from conadv_jax.base import errors
from conadv_jax.base.errors import HostError
from conadv_jax.hosts import leaving, peers, watchdog
from conadv_jax.hosts.watchdog import Watchdog

# ---- One host, with a clock of the test ------------------------------------


class Ended(Exception):
  """In place of the end of the process."""


class Clock:
  def __init__(self):
    self.now = 1000.0

  def __call__(self):
    return self.now


class Bench:
  """A watchdog whose ticks the test makes, 0.5 s apart."""

  def __init__(self, timeout_seconds):
    self.clock = Clock()
    self.dog = Watchdog(timeout_seconds, clock=self.clock)

  def runs(self, seconds):
    for _ in range(int(seconds / 0.5)):
      self.clock.now += 0.5
      self.dog.check()

  def ends_within(self, seconds):
    """Ticks until the end of the process; returns its exit code."""
    with pytest.raises(Ended) as raised:
      self.runs(seconds)
    return raised.value.args[-1]


@pytest.fixture
def bench(monkeypatch):
  """Makes benches; what would end the process raises `Ended`."""

  def end(*args):
    raise Ended(*args)

  monkeypatch.setattr(leaving, 'abandon', lambda *_: None)
  monkeypatch.setattr(leaving, 'leave', lambda code, _=(): end(code))
  yield Bench
  faulthandler.cancel_dump_traceback_later()


def test_a_phase_that_takes_too_long_ends_the_process(bench, capfd):
  a = bench(60)
  a.dog.phase('input', 18)
  a.runs(60)
  assert a.ends_within(1) == errors.HANG
  lines = capfd.readouterr().err.splitlines()
  assert re.fullmatch(
    r'no progress for 6\d s in input of step 18 \(limit 60 s, '
    r'hang_timeout_seconds\)',
    lines[0],
  )
  assert lines[1] == 'stacks of all threads:'
  # This test runs in the main thread, whatever else there is.
  assert lines[2].startswith('main: File') and 'watchdog.py' in lines[2]
  assert any('in test_a_phase_that' in line for line in lines[2:-1])
  assert lines[-1] == 'end of the stacks'


def test_progress_restarts_the_limit_even_if_it_has_the_same_name(bench):
  a = bench(60)
  for _ in range(5):
    a.dog.phase('evaluate', 3)
    a.runs(55)
  assert a.ends_within(10) == errors.HANG


@pytest.mark.parametrize('timeout_seconds, limited', [(60, False), (0, True)])
def test_what_has_no_limit_may_take_for_ever(bench, timeout_seconds, limited):
  a = bench(timeout_seconds)
  a.dog.phase('compile', limited=limited)
  a.runs(10_000)


def test_before_the_first_phase_there_is_no_limit(bench):
  bench(60).runs(10_000)


def test_a_process_that_was_stopped_is_not_ended_for_it(bench):
  """The clock may jump, too; only time between ticks counts."""
  a = bench(60)
  a.dog.phase('step', 4)
  a.runs(30)
  for jump in (3600, -7200):
    a.clock.now += jump
    a.runs(10)
  a.runs(5)
  assert a.ends_within(10) == errors.HANG


def test_the_context_starts_a_thread_and_ends_it():
  with Watchdog(60) as dog:
    thread = dog._thread
    assert thread.is_alive() and thread.daemon
  assert not thread.is_alive()


# ---- Other hosts, without any ----------------------------------------------


class Store:
  """Stands for the key-value store and the three hosts that use it."""

  def __init__(self):
    self.values = {
      h: {'count': 0, 'phase': 'step', 'step': 7} for h in range(3)
    }
    self.failure = None
    self.answers = True

  def send(self, key, text):
    assert key.endswith('/0')
    if not self.answers:
      raise jax.errors.JaxRuntimeError('UNAVAILABLE')
    self.values[0] = json.loads(text)

  def others_beat(self, *which, **new):
    for host in which:
      value = self.values[host]
      self.values[host] = value | {'count': value['count'] + 1} | new


@pytest.fixture(name='of_host_0')
def _of_host_0(monkeypatch):
  """Peers of host 0 of three, a round each 2 s, lost after 20 s."""
  store = Store()
  monkeypatch.setattr(hosts, 'count', lambda: 3)
  monkeypatch.setattr(hosts, 'coordinator', lambda: '10.0.0.2:8476')
  monkeypatch.setattr(hosts, 'send', store.send)
  monkeypatch.setattr(peers, '_read_beats', lambda: dict(store.values))
  monkeypatch.setattr(hosts, 'failure', lambda: store.failure)
  made = peers.Peers(lambda: ('step', 7, True), 20)
  made.store, made.now = store, 0.0

  def rounds(count, *beating):
    """Rounds of 2 s in which the hosts `beating` beat; what is lost."""
    for _ in range(count):
      store.others_beat(*beating)
      made.now += 2
      if store.answers:
        made._talk()
      if lost := made.lost(made.now):
        return lost
    return None

  made.rounds = rounds
  return made


def test_a_silent_host_is_named_with_what_it_did_last(of_host_0):
  assert of_host_0.rounds(5, 1, 2) is None
  of_host_0.store.others_beat(1, phase='input', step=17)
  assert of_host_0.rounds(10, 2) is None
  message, absent = of_host_0.rounds(1, 2)
  assert message == (
    'host 1 gave no sign of life for 20 s (last: input of step 17)'
  )
  assert absent == [1]


def test_all_silent_hosts_are_named(of_host_0):
  assert of_host_0.rounds(10) is None
  message, absent = of_host_0.rounds(1)
  assert 'hosts 1-2 gave no sign of life for 20 s' in message
  assert 'hosts 1-2: step 7' in message and absent == [1, 2]


def test_a_host_that_said_goodbye_is_not_lost(of_host_0):
  of_host_0.store.others_beat(1, phase='ended', step=None)
  assert of_host_0.rounds(50, 2) is None


def test_a_host_without_progress_is_not_lost_while_it_beats(of_host_0):
  """Such as one that compiles for an hour."""
  assert of_host_0.rounds(2000, 1, 2) is None


def test_after_a_failed_collective_a_host_is_lost_sooner(of_host_0):
  assert of_host_0.rounds(1, 1, 2) is None
  assert of_host_0.suspect() == 10
  assert of_host_0.rounds(4, 2) is None
  message, _ = of_host_0.rounds(1, 2)
  assert 'host 1 gave no sign of life for 10 s' in message


def test_a_coordinator_that_does_not_answer_is_named(of_host_0):
  assert of_host_0.rounds(2, 1, 2) is None
  of_host_0.store.answers = False
  assert of_host_0.rounds(10) is None
  assert of_host_0.rounds(1) == (
    'host 0 at 10.0.0.2:8476 does not answer for 22 s',
    [0],
  )


def test_time_without_answers_is_not_silence_of_other_hosts(of_host_0):
  """Nobody can beat while the coordinator is stopped."""
  assert of_host_0.rounds(2, 1, 2) is None
  of_host_0.store.answers = False
  assert of_host_0.rounds(9) is None
  of_host_0.store.answers = True
  assert of_host_0.rounds(3) is None
  assert of_host_0.rounds(5, 1, 2) is None


def test_hosts_are_grouped_by_where_they_are():
  beats = {
    0: {'phase': 'step', 'step': 18},
    1: {'phase': 'input', 'step': 18},
    2: {'phase': 'step', 'step': 18},
    3: {'phase': 'compile', 'step': None},
  }
  assert peers.places(beats) == (
    'hosts 0, 2: step 18; host 1: input of step 18; host 3: compile'
  )


@pytest.mark.parametrize('phase, seconds', [('step', 3), ('save', 60)])
def test_a_failure_of_another_host_ends_this_one(
  phase, seconds, bench, of_host_0, capfd
):
  """After a pause in which the main thread may end by itself."""
  a = bench(1800)
  a.dog._peers = of_host_0
  a.dog.phase(phase, 7)
  of_host_0.rounds(1, 1, 2)
  of_host_0.store.failure = HostError('host 2 stopped: no disk', 7)
  of_host_0.rounds(1, 1, 2)
  a.runs(seconds)
  assert a.ends_within(1) == 7
  assert 'host 0 of 3: error: host 2 stopped: no disk' in capfd.readouterr().err


@pytest.mark.parametrize(
  'error, expected',
  [
    (None, False),
    (ValueError('x'), False),
    (jax.errors.JaxRuntimeError('INTERNAL: Gloo AllReduce failed'), True),
    (ValueError('UNKNOWN: Gloo AllGather failed: Connection closed'), True),
    (jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: out of memory'), False),
    (HostError('host 1 stopped: x'), False),
  ],
)
def test_only_errors_of_collectives_raise_the_question(error, expected):
  assert watchdog._may_be_of_another(error) == expected


def test_a_collective_that_fails_asks_for_a_verdict_and_goes_on(
  of_host_0, capfd
):
  dog = Watchdog(60)
  dog._peers = of_host_0
  dog._stop.set()  # does not wait
  dog.verdict(None, ValueError('UNKNOWN: Gloo failed\nmore'), None)
  assert capfd.readouterr().err == (
    'host 0 of 3: ValueError: UNKNOWN: Gloo failed; waiting for 10 s whether '
    'another host is lost\n'
  )
  assert of_host_0._suspecting


def test_an_error_that_hides_that_of_a_collective_raises_it_too():
  error = ValueError('while closing')
  error.__context__ = jax.errors.JaxRuntimeError('UNKNOWN: Connection reset')
  assert watchdog._may_be_of_another(error)


# ---- Processes -------------------------------------------------------------


def test_python_that_cannot_run_is_ended_with_its_stacks():
  """By a thread of C, as this program keeps the lock of Python."""
  assert ctypes.PyDLL(None).usleep  # a call of PyDLL keeps the lock
  code = """
import ctypes
from conadv_jax.hosts import watchdog
watchdog._STUCK_SECONDS = 0.2
with watchdog.Watchdog(1) as dog:
  dog.phase('input', 3)
  dog.check()
  for _ in range(60):
    ctypes.PyDLL(None).usleep(900_000)
"""
  started = time.monotonic()
  done = subprocess.run(
    [sys.executable, '-c', code],
    capture_output=True, text=True, timeout=60, cwd=multihost.ROOT,
  )  # fmt: skip
  assert done.returncode == 1
  assert 'Timeout' in done.stderr and 'line 9 in <module>' in done.stderr
  assert time.monotonic() - started < 30


# A run of several hosts: rounds of a collective, as many as are asked for.
PROGRAM = """
import os, sys, time
import numpy as np
from conadv_jax import hosts
from conadv_jax.base import faults
from conadv_jax.hosts import join, leaving, watchdog

flags = dict(a[2:].split('=') for a in sys.argv[1:])
join.start(
  flags['coordinator'], int(flags['num_hosts']), int(flags['host_index']),
  peer_timeout_seconds=int(flags['peer']),
)
try:
  with watchdog.Watchdog(int(flags['limit'])) as dog:
    print('compiled', hosts.gather_arrays(np.ones(1)).sum(), flush=True)
    for step in range(int(flags['steps'])):
      dog.phase('input', step)
      faults.point('input', step)
      time.sleep(0.1)
      dog.phase('step', step)
      hosts.gather_arrays(np.ones(1))
      if step % 5 == 0:
        print('step', step, flush=True)
except OSError as error:
  print('OSError', error, flush=True)
  leaving.abandon(f'OSError: {error}', 7)
  leaving.leave(7)
print('done', flush=True)
"""


def program(logs, count=2, peer=10, limit=300, steps=100_000, **options):
  flags = (f'--peer={peer}', f'--limit={limit}', f'--steps={steps}')
  return multihost.Hosts(logs, count, ['-c', PROGRAM, *flags], **options)


def fault_on(host, text):
  return {'environment_of_host': {host: {'CONADV_FAULTS': text}}}


@pytest.mark.fault
@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize('victim', [0, 1])
def test_a_lost_host_ends_the_others_in_time_with_its_name(
  victim, number, tmp_path
):
  """JAX aborts the others itself, at once, when host 0 is killed."""
  other = 1 - victim
  aborted = victim == 0 and number == signal.SIGKILL
  with program(tmp_path) as run:
    run.wait_for(0, 'step 20')  # a sign of life from the steps is out
    run.send(victim, number)
    started = time.monotonic()
    code = -signal.SIGABRT if aborted else errors.HOST
    run.ends_with(code, 60, hosts=[other])
    seconds = time.monotonic() - started
    log = run.log(other)
  print(f'host {victim} {number.name}: out after {seconds:.1f} s')
  assert seconds < 10 + 5
  if aborted:
    assert 'leader task was preempted/died' in log
  elif victim == 0:
    assert f'host 0 at 127.0.0.1:{run.port} does not answer' in log
  else:
    assert re.search(
      r'host 1 gave no sign of life for \d+ s \(last: (step|input of step) \d',
      log,
    )


@pytest.mark.fault
@pytest.mark.parametrize('victim', [0, 1])
def test_a_host_that_hangs_shows_its_stacks_and_ends_all(victim, tmp_path):
  """It sleeps outside of the collective in which the other waits."""
  with program(tmp_path, limit=3, **fault_on(victim, 'hang@input:4')) as run:
    run.ends_with(errors.HANG, 60)
    logs = [run.log(host) for host in (0, 1)]
  log = logs[victim]
  assert f'host {victim} of 2: no progress for 3 s in input of step 4' in log
  assert f'host {victim} of 2: stacks of all threads:' in log
  assert 'faults.py' in log and 'in point' in log
  assert f'host {victim}: input of step 4' in log
  assert 'gather_arrays' in logs[1 - victim]


@pytest.mark.fault
@pytest.mark.parametrize('victim', [0, 1])
def test_an_error_of_one_host_ends_those_that_wait_for_it(victim, tmp_path):
  with program(tmp_path, **fault_on(victim, 'oserror@input:4')) as run:
    run.wait_for(victim, 'OSError')
    started = time.monotonic()
    run.ends_with(7, 60)
    seconds = time.monotonic() - started
    log = run.log(1 - victim)
  print(f'host {victim} fails: out after {seconds:.1f} s')
  assert f'error: host {victim} stopped: OSError:' in log
  assert seconds < 10


@pytest.mark.fault
@pytest.mark.parametrize('victim', [0, 1])
def test_a_host_that_is_stopped_for_a_while_goes_on(victim, tmp_path):
  """Longer than its own limit of a phase, shorter than those of the other."""
  with program(
    tmp_path, peer=30, steps=40, of_host={victim: ['--limit=4']}
  ) as run:
    run.wait_for(0, 'step 5')
    run.send(victim, signal.SIGSTOP)
    time.sleep(6)
    run.send(victim, signal.SIGCONT)
    run.ends_with(0, 60)
    assert all('done' in run.log(host) for host in (0, 1))


@pytest.mark.fault
def test_a_host_that_ends_before_the_others_is_not_missed(tmp_path):
  """Host 1 has fewer steps, and host 0 works on for twice the timeout."""
  late = """
if hosts.index() == 0:
  with watchdog.Watchdog(60):
    time.sleep(8)
  print('worked on', flush=True)
"""
  flags = ('--peer=4', '--limit=60', '--steps=3')
  with multihost.Hosts(tmp_path, 2, ['-c', PROGRAM + late, *flags]) as run:
    run.ends_with(0, 60)
    assert 'worked on' in run.log(0)


def train(logs, workdir, *more, **options):
  arguments = [
    multihost.TINY, 'train', '--config=configs/digits.py:batch_size=32',
    f'--workdir={workdir}', '--config.model=tiny', '--config.bn_group_size=8',
    '--config.max_steps=9000', '--config.log_every_steps=1',
    '--config.eval.every_steps=0', '--config.checkpoint.every_steps=2',
    '--config.plots=False', *more,
  ]  # fmt: skip
  return multihost.Hosts(logs, 2, arguments, **options)


@pytest.mark.fault
@pytest.mark.parametrize('victim', [0, 1])
def test_training_goes_on_from_its_checkpoint_after_a_lost_host(
  victim, tmp_path
):
  """The same command again resumes."""
  other = 1 - victim
  workdir = tmp_path / 'run'
  fault = fault_on(victim, 'kill@train/step:7')
  with train(tmp_path / 'first', workdir, **fault) as run:
    run.ends_with(-signal.SIGKILL, 120, hosts=[victim])
    started = time.monotonic()
    code = errors.HOST if victim else -signal.SIGABRT
    run.ends_with(code, 90, hosts=[other])
    seconds = time.monotonic() - started
    log = run.log(other)
  print(f'training, host {victim} killed: out after {seconds:.1f} s')
  assert seconds < 60 + 5
  if victim:
    assert 'host 0 of 2: error: host 1 ' in log
  with train(tmp_path / 'again', workdir, '--config.max_steps=8') as run:
    run.ends_with(0, 120)
    assert re.search(r'resumed at step [46]', run.log(0))


@pytest.mark.fault
def test_training_in_which_one_host_hangs_ends_with_stacks(tmp_path):
  with train(
    tmp_path / 'logs', tmp_path / 'run', '--config.hang_timeout_seconds=10',
    **fault_on(1, 'hang@train/input:5'),
  ) as run:  # fmt: skip
    run.ends_with(errors.HANG, 120)
    logs = [run.log(host) for host in (0, 1)]
  assert 'host 1: input of step 5' in logs[0] + logs[1]
  assert 'host 1 of 2: stacks of all threads' in logs[1]
  assert 'in point' in logs[1]
