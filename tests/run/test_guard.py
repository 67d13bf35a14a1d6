"""What the loop tells its guard, and what a run does every n steps."""

import signal

import pytest

from conadv_jax.base import faults
from conadv_jax.base.errors import HostError, Preempted, StorageError
from conadv_jax.devices import mesh
from conadv_jax.hosts.stop import Stopped, StopRequest
from conadv_jax.run.guard import Guard
from conadv_jax.run.hooks import every

INPUT_FAILED = Stopped(None)


class Leaves(StopRequest):
  """Notes what would end the process."""

  def __init__(self):
    super().__init__()
    self.said = []

  def leave_at_once(self, reason):
    super().leave_at_once(reason)
    self.said.append(reason)

  def save_first(self):
    super().save_first()
    self.said.append('save first')


@pytest.fixture
def request_and_guard():
  request = Leaves()
  return request, Guard(0, request)


@pytest.mark.parametrize(
  'phase, limited',
  [('data', False), ('compile', False), ('input', True), ('step', True)],
)
def test_a_phase_reaches_the_watchdog_and_the_faults(
  phase, limited, request_and_guard, monkeypatch
):
  points = []
  monkeypatch.setattr(faults, 'point', lambda *point: points.append(point))
  _, guard = request_and_guard
  guard.enter(phase, 7)
  assert guard._watchdog._phase == (phase, 7, limited)
  assert points == [(f'train/{phase}', 7)]


def test_a_signal_stops_before_an_input_or_an_evaluation_only(
  request_and_guard,
):
  request, guard = request_and_guard
  guard.nothing_to_save()
  guard.start_steps(mesh.make_mesh(16, 2), lambda: False)
  assert request.said[-1] == 'save first'
  guard.enter('input', 1)
  request.signal = signal.SIGTERM
  for phase in ('step', 'save', 'last_evaluation', 'pictures'):
    guard.enter(phase, 1)
  for phase in ('input', 'evaluate'):
    with pytest.raises(Stopped, match='SIGTERM'):
      guard.enter(phase, 2)


def test_before_the_steps_nothing_is_stopped(request_and_guard):
  request, guard = request_and_guard
  request.signal = signal.SIGTERM
  guard.enter('input')


def test_an_input_that_fails_stops_the_steps(request_and_guard):
  _, guard = request_and_guard
  failed = []
  guard.start_steps(mesh.make_mesh(16, 2), lambda: bool(failed))
  guard.enter('input', 1)
  failed.append(True)
  with pytest.raises(Stopped, match='the input failed'):
    guard.enter('input', 2)


def test_what_ends_a_run_that_stopped(request_and_guard, monkeypatch, capsys):
  _, guard = request_and_guard
  error = guard.error_of(Stopped(signal.SIGTERM), 'saved step 3 of 9', None)
  assert isinstance(error, Preempted)
  assert str(error) == (
    'SIGTERM: saved step 3 of 9; run the same command again to resume'
  )
  own = StorageError('shard-7: cannot be read')
  assert guard.error_of(INPUT_FAILED, 'saved step 3', own) is own
  assert capsys.readouterr().out == 'saved step 3, as the input failed\n'
  told = ['host 1 of 2: shard-7', 7]
  monkeypatch.setattr('conadv_jax.hosts.first', lambda *_: told)
  error = guard.error_of(INPUT_FAILED, 'saved step 3', None)
  assert isinstance(error, HostError)
  assert (str(error), error.exit_code) == tuple(told)


def steps_of(hook_of):
  done = []
  hook = hook_of(lambda step, *_: done.append(step))
  for step in range(1, 11):
    hook(step, 'state', 'batch', 'values')
  return done


def test_hooks_are_called_every_n_steps():
  assert steps_of(lambda hook: every(3, hook)) == [3, 6, 9]
  assert steps_of(lambda hook: every(3, hook, also_at=10)) == [3, 6, 9, 10]
  assert steps_of(lambda hook: every(5, hook, before=10)) == [5]
  assert steps_of(lambda hook: every(0, hook)) == []
  assert steps_of(lambda hook: every(0, hook, also_at=10)) == [10]


def test_a_hook_gets_what_the_step_made():
  got = []
  every(1, lambda *args: got.append(args))(4, 'state', 'batch', 'values')
  assert got == [(4, 'state', 'batch', 'values')]
