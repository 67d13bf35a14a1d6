"""What keeps a run alive and stops it, as one object beside the loop."""

from __future__ import annotations

from collections.abc import Callable

import jax

from conadv_jax import cli, hosts
from conadv_jax.base import faults
from conadv_jax.base.errors import HostError, Preempted
from conadv_jax.hosts.stop import (
  NOTHING_TO_SAVE,
  Agreement,
  Stopped,
  StopRequest,
)
from conadv_jax.hosts.watchdog import Watchdog
from conadv_jax.run.timeline import Timeline

# Phases that may take as long as they like.
_UNLIMITED = ('build', 'data', 'compile', 'warm_up', 'diagnosis')
# Phases before which all hosts may stop, with a state that can be saved.
_STOPPABLE = ('input', 'evaluate')


class Guard:
  """In this context, hangs, lost hosts and signals end the command.

  A command calls `enter` for everything that it begins. A training run also
  tells what a signal does: before its first step and after its last one it
  ends the process at once (`nothing_to_save`); in between, all hosts stop
  before the same step (`start_steps`).

  Attributes:
    timeline: of the phases that belong to no step.
  """

  def __init__(
    self,
    hang_timeout_seconds: int,
    stop_request: StopRequest | None = None,
    timeline: Timeline | None = None,
  ):
    """Makes a guard; entering its context starts the watchdog.

    Args:
      hang_timeout_seconds: of each phase; 0 is no limit.
      stop_request: of a command that handles signals.
      timeline: of a command that has begun before; None begins now.
    """
    self._watchdog = Watchdog(hang_timeout_seconds)
    self._stop_request = stop_request
    self.timeline = timeline or Timeline()
    self._agreement: Agreement | None = None
    self._input_failed: Callable[[], bool] = lambda: False

  def __enter__(self) -> Guard:
    self._watchdog.__enter__()
    return self

  def __exit__(self, *error) -> None:
    self._watchdog.__exit__(*error)

  def enter(self, phase: str, step: int | None = None) -> None:
    """Begins `phase`: checks for a stop, restarts the time limit.

    Faults on purpose have the name 'train/PHASE'.

    Args:
      phase: 'build', 'data', 'restore', 'compile', 'warm_up', 'input', 'step',
        'save', 'evaluate', 'last_evaluation', 'pictures', 'diagnosis'.
      step: of the run, if the phase belongs to one.

    Raises:
      Stopped: on every host in the same call, before an input or a batch of an
        evaluation between steps.
    """
    if self._agreement is not None and phase in _STOPPABLE:
      self._agreement.check(self._input_failed())
    if step is None:
      self.timeline.enter(phase)
    self._watchdog.phase(phase, step, limited=phase not in _UNLIMITED)
    faults.point(f'train/{phase}', step)

  def nothing_to_save(self, reason: str = NOTHING_TO_SAVE) -> None:
    """From now on a signal ends the process at once; `reason` is for users."""
    self._stop_request.leave_at_once(reason)

  def before_leaving(self, last: Callable[[], None]) -> None:
    """Calls `last` before a signal ends the process at once."""
    self._stop_request.before_leaving(last)

  def start_steps(
    self, mesh: jax.sharding.Mesh, input_failed: Callable[[], bool]
  ) -> None:
    """From now on a signal or a failed input stops all hosts in `enter`.

    Args:
      mesh: of the run.
      input_failed: whether this host will soon have no more batches.
    """
    self._agreement = Agreement(self._stop_request, mesh)
    self._input_failed = input_failed
    self._stop_request.save_first()

  def error_of(
    self, stopped: Stopped, saved: str, input_error: Exception | None
  ) -> Exception:
    """Returns what ends a run that has saved its state, on each host.

    Args:
      stopped: why all hosts stopped.
      saved: what is saved, for the user.
      input_error: of this host's input, if that failed.
    """
    if stopped.signal:
      return Preempted(
        f'{stopped.signal.name}: {saved}; run the same command again to resume'
      )
    hosts.say(f'{saved}, as the input failed')
    told = None
    if input_error is not None:
      told = [f'{hosts.label()}{input_error}', cli.exit_code(input_error)]
    message, code = hosts.first('the failed input', told)
    return input_error or HostError(message, code)

  def verdict(self, kind, error: BaseException | None, trace) -> None:
    """Ends the process if `error` is there because another host is lost.

    It has the arguments of an exit callback, for contexts inside of this one
    that would wait for the lost host when they are left.
    """
    self._watchdog.verdict(kind, error, trace)
