"""Ends a run that hangs, or whose other hosts are lost, in bounded time.

The main thread tells `Watchdog.phase` what it begins, and a thread measures how
long that takes. With several hosts it also looks at what `peers` has read of
the others.

Time is counted in ticks during which the process ran. So a process that was
stopped for a while, or a clock that jumps, ends nothing.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from typing import NoReturn

from conadv_jax import hosts
from conadv_jax.base import errors
from conadv_jax.base.errors import HostError
from conadv_jax.hosts import join, leaving
from conadv_jax.hosts.peers import Peers, place, places

_TICK_SECONDS = 0.25
_AWAKE_SECONDS = 1.0  # the most that counts between two ticks
_READ_SECONDS = 2.0
_REARM_SECONDS = 10.0
# Python that does not come to run is ended this much later than a phase is.
_STUCK_SECONDS = 600
# So long a host that hears of a failure has to end by itself; a save, until the
# writer has confirmed it.
_GRACE_SECONDS = 3.0
_GRACE_SAVE_SECONDS = 60.0
# How errors of collectives begin, of type RuntimeError or ValueError.
_REMOTE_ERRORS = (
  'ABORTED:', 'CANCELLED:', 'DEADLINE_EXCEEDED:', 'INTERNAL:', 'UNAVAILABLE:',
  'UNKNOWN:',
)  # fmt: skip


class _AwakeClock:
  """Seconds in which this process ran."""

  def __init__(self, clock: Callable[[], float]):
    self._clock = clock
    self._last = clock()
    self.seconds = 0.0

  def tick(self) -> float:
    now = self._clock()
    self.seconds += min(max(now - self._last, 0.0), _AWAKE_SECONDS)
    self._last = now
    return self.seconds


class Watchdog:
  """In this context, the process ends if a phase takes too long.

  Its exit code is then `errors.HANG`. With several hosts it also ends within
  seconds if another host failed (`leaving.abandon`), with the exit code of that
  host; and with `errors.HOST` if one gives no sign of life for
  `join.peer_timeout_seconds()`. The message names the host and what it did.
  """

  def __init__(
    self, timeout_seconds: int, clock: Callable[[], float] = time.monotonic
  ):
    """Makes a watchdog; entering its context starts it.

    Args:
      timeout_seconds: of a phase; 0 is no limit.
      clock: as time.monotonic.
    """
    self._timeout_seconds = timeout_seconds
    self._clock = _AwakeClock(clock)
    self._phase: tuple[str, int | None, bool] = ('start', None, False)
    self._seen, self._since = self._phase, 0.0
    self._rearmed = -_REARM_SECONDS
    self._failed_since: float | None = None
    self._peers: Peers | None = None
    self._stop = threading.Event()

  def phase(
    self, name: str, step: int | None = None, limited: bool = True
  ) -> None:
    """Notes that the main thread begins `name`, which restarts the limit.

    Args:
      name: 'input', 'step', 'save', 'restore', 'evaluate', 'compile', 'data'.
      step: of the run, if it belongs to one.
      limited: whether the time limit holds. It does not for what may take as
        long as it likes, such as compiling.
    """
    self._phase = (name, step, limited)

  def __enter__(self) -> Watchdog:
    if hosts.count() > 1:
      self._peers = Peers(lambda: self._phase, join.peer_timeout_seconds())
      self._peers.start()
    self._thread = threading.Thread(
      target=self._run, name='watchdog', daemon=True
    )
    self._thread.start()
    return self

  def __exit__(self, kind, error: BaseException | None, trace) -> None:
    self.verdict(kind, error, trace)
    self._stop.set()
    self._thread.join()
    if self._timeout_seconds:
      faulthandler.cancel_dump_traceback_later()
    if self._peers is not None:
      self._peers.stop()

  def verdict(self, _, error: BaseException | None, __) -> None:
    """Ends the process if `error` is there because another host is lost.

    A collective fails when a host dies. The arguments are those of an exit
    callback, for contexts inside of this one that would wait for the lost host
    when they are left.
    """
    if self._peers is None or not _may_be_of_another(error):
      return
    lines = str(error).splitlines() or ['']
    _say(
      f'{type(error).__name__}: {lines[0][:300]}; waiting for '
      f'{self._peers.suspect():.0f} s whether another host is lost'
    )
    # The watchdog's thread ends the process if it is.
    self._stop.wait(self._peers.suspect() + 2 * _READ_SECONDS)

  def _run(self) -> None:
    while not self._stop.wait(_TICK_SECONDS):
      self.check()

  def check(self) -> None:
    """One look at everything; the watchdog's thread calls it all the time."""
    now = self._clock.tick()
    if self._seen is not self._phase:
      self._seen, self._since = self._phase, now
    if self._timeout_seconds and now - self._rearmed >= _REARM_SECONDS:
      self._rearmed = now
      # For the case that a library keeps Python itself from running: a thread
      # of C, which needs no lock.
      faulthandler.dump_traceback_later(
        self._timeout_seconds + _STUCK_SECONDS, exit=True, file=2
      )
    if self._peers is not None:
      self._check_peers(now)
    name, step, limited = self._seen
    seconds = now - self._since
    if limited and 0 < self._timeout_seconds < seconds:
      where = place({'phase': name, 'step': step})
      message = (
        f'no progress for {seconds:.0f} s in {where} (limit '
        f'{self._timeout_seconds} s, hang_timeout_seconds)'
      )
      _say(message)
      _dump_stacks()
      if self._peers is not None:
        leaving.within(_READ_SECONDS, self._peers.read)
        _say(f'what the hosts last reported: {places(self._peers.beats)}')
        leaving.abandon(message, errors.HANG)
        # While this process is there, the others hang where they are, and show
        # it; the end of one breaks collectives.
        time.sleep(self._peers.listening_seconds)
      _end(message, errors.HANG)

  def _check_peers(self, now: float) -> None:
    failure = self._peers.failure
    if failure is not None:
      if self._failed_since is None:
        self._failed_since = now
        if failure.exit_code == errors.HANG:
          _say(str(failure))
          _dump_stacks()
      grace = _GRACE_SAVE_SECONDS if self._seen[0] == 'save' else _GRACE_SECONDS
      # Unless the main thread, which may have heard it too, ends before.
      if now - self._failed_since >= grace:
        _say(f'error: {failure}')
        leaving.leave(failure.exit_code)
    elif lost := self._peers.lost(now):
      message, absent = lost
      _say(f'error: {message}')
      _end(message, errors.HOST, absent)


def _may_be_of_another(error: BaseException | None) -> bool:
  """Whether `error` may come from a collective whose other end is gone."""
  while error is not None and not isinstance(error, HostError):
    if isinstance(error, (RuntimeError, ValueError)):
      if str(error).startswith(_REMOTE_ERRORS):
        return True
    error = error.__cause__ or error.__context__
  return False


def _say(text: str) -> None:
  # Not print: a thread that hangs may hold its lock.
  os.write(2, f'{hosts.label()}{text}\n'.encode())


def _dump_stacks() -> None:
  _say('stacks of all threads:')
  # The main one apart: of the others, faulthandler shows the newest hundred.
  # Without lines of the source, as a file system may be what hangs.
  main = sys._current_frames().get(threading.main_thread().ident)
  for frame, line in traceback.walk_stack(main):
    code = frame.f_code
    _say(f'main: File "{code.co_filename}", line {line} in {code.co_name}')
  faulthandler.dump_traceback(file=2, all_threads=True)
  _say('end of the stacks')


def _end(message: str, code: int, absent: Iterable[int] = ()) -> NoReturn:
  if 0 not in absent:
    leaving.abandon(message, code)
  leaving.leave(code, tuple(absent))
