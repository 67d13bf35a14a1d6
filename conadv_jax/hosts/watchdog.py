"""Ends a run that hangs, or whose other hosts are lost, in bounded time.

The main thread says by `Watchdog.phase` what it begins. Of two threads beside
it, one measures how long that takes; the other, with several hosts, exchanges
signs of life with them through the key-value store of JAX's coordinator, as
its calls may wait for ever. Every 2 s (or a tenth of the peer timeout, if that
is less) a host writes one key and reads one, and host 0 reads the signs of life
of all: for 256 hosts 256 small calls a second.

Time is counted in ticks that the process was awake for, so that a process that
was stopped for a while, or a clock that jumps, ends nothing.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import jax

from conadv_jax import hosts
from conadv_jax.base import errors
from conadv_jax.base.errors import HostError

_TICK_SECONDS = 0.25
_AWAKE_SECONDS = 1.0  # the most that counts between two ticks
_BEAT_SECONDS = 2.0
_REARM_SECONDS = 10.0
# Python that does not come to run is ended this much later than a phase is.
_STUCK_SECONDS = 600
# So long a host that hears of a failure has to end by itself; a save, until the
# writer has confirmed it.
_GRACE_SECONDS = 3.0
_GRACE_SAVE_SECONDS = 60.0
# After a failed collective, a host is lost if it misses this many beats.
_MISSED_BEATS = 5
_ENDED = 'ended'  # the phase of a host that said goodbye
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

  With several hosts it also ends, within seconds, if another host said by
  `hosts.abandon` that it failed, and after `hosts.peer_timeout_seconds()` if
  one gives no sign of life; `errors.HANG`, the code of the other host, and
  `errors.HOST` are the exit codes. The message names the host and what it did.
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
    self._peers: _Peers | None = None
    self._stop = threading.Event()

  def phase(
    self, name: str, step: int | None = None, limited: bool = True
  ) -> None:
    """The main thread begins `name`: progress, which restarts the limit.

    Args:
      name: 'input', 'step', 'save', 'restore', 'evaluate', 'compile', 'data'.
      step: of the run, if it belongs to one.
      limited: whether the time limit holds. It does not for what may take as
        long as it likes, such as compiling.
    """
    self._phase = (name, step, limited)

  def __enter__(self) -> Watchdog:
    if hosts.count() > 1:
      self._peers = _Peers(lambda: self._phase, hosts.peer_timeout_seconds())
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
    """Tells whether `error` is there because another host is lost.

    A collective fails when a host dies, and the process ends here if one is
    found. It has the arguments of an exit callback, for contexts inside of this
    one that would wait for the lost host when they are left.
    """
    if self._peers is None or not _may_be_of_another(error):
      return
    lines = str(error).splitlines() or ['']
    _say(
      f'{type(error).__name__}: {lines[0][:300]}; waiting for '
      f'{self._peers.suspect():.0f} s whether another host is lost'
    )
    # The watchdog's thread ends the process if it is.
    self._stop.wait(self._peers.suspect() + 2 * _BEAT_SECONDS)

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
      place = _place({'phase': name, 'step': step})
      message = (
        f'no progress for {seconds:.0f} s in {place} (limit '
        f'{self._timeout_seconds} s, hang_timeout_seconds)'
      )
      _say(message)
      _dump_stacks()
      if self._peers is not None:
        hosts.within(_BEAT_SECONDS, self._peers.read)
        _say(f'the hosts, as they last said: {_places(self._peers.beats)}')
        hosts.abandon(message, errors.HANG)
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
        hosts.leave(failure.exit_code)
    elif lost := self._peers.lost(now):
      message, absent = lost
      _say(f'error: {message}')
      _end(message, errors.HOST, absent)


class _Peers:
  """The thread that talks to other hosts, and what it heard.

  Attributes:
    failure: what another host announced, or None.
    beats: the newest sign of life of every host, on hosts that read them.
    listening_seconds: after which the others heard what this host announced.
  """

  def __init__(
    self,
    phase: Callable[[], tuple[str, int | None, bool]],
    timeout_seconds: float,
  ):
    self._phase = phase
    self._timeout_seconds = timeout_seconds
    self._pause_seconds = min(_BEAT_SECONDS, timeout_seconds / 10)
    self.listening_seconds = self._pause_seconds + 4 * _TICK_SECONDS
    self._suspecting = False
    self._stop = threading.Event()
    self._thread = threading.Thread(target=self._run, name='peers', daemon=True)
    self._rounds = 0  # in which the coordinator answered
    self._answered = (0, 0.0)  # rounds, and since when there are so many
    self._signs: dict[int, _Sign] = {}
    self.failure: HostError | None = None
    self.beats: dict[int, dict[str, Any]] = {}

  def start(self) -> None:
    self._thread.start()

  def stop(self) -> None:
    """Says goodbye: from now on no host expects a sign of life."""
    self._stop.set()
    self._thread.join(_GRACE_SECONDS)  # or its beat would come after this one
    hosts.within(self._pause_seconds, lambda: self._beat(_ENDED))

  def suspect(self) -> float:
    """From now on looks for lost hosts here, and sooner; returns how soon."""
    self._suspecting = True
    return min(self._timeout_seconds, _MISSED_BEATS * self._pause_seconds)

  def _run(self) -> None:
    while not self._stop.is_set():
      try:
        self._talk()
      except jax.errors.JaxRuntimeError:
        pass  # `lost` counts the time without an answer
      self._stop.wait(self._pause_seconds)

  def _talk(self) -> None:
    name, step, _ = self._phase()
    self._beat(name, step)
    self.failure = hosts.failure()
    if hosts.is_writer() or self._suspecting:
      self.read()
    self._rounds += 1

  def read(self) -> None:
    """Reads the signs of life of all hosts."""
    self.beats = beats = hosts.beats()
    for host, beat in beats.items():
      sign = self._signs.get(host)
      same = sign is not None and sign.count == beat['count']
      missed = sign.missed + 1 if same else 0
      self._signs[host] = _Sign(beat['count'], missed)

  def _beat(self, name: str, step: int | None = None) -> None:
    hosts.beat({'count': self._rounds, 'phase': name, 'step': step})

  def lost(self, now: float) -> tuple[str, list[int]] | None:
    """A message and the numbers of hosts that gave no sign of life too long.

    Args:
      now: seconds of a clock that stands still while this process does.
    """
    if self._rounds != self._answered[0]:
      self._answered = (self._rounds, now)
    silent = now - self._answered[1]
    if silent > self._timeout_seconds:
      return f'{hosts.silent_coordinator()} for {silent:.0f} s', [0]
    seconds = self.suspect() if self._suspecting else self._timeout_seconds
    absent = sorted(
      host
      for host, sign in self._signs.items()
      # In rounds of ours: time in which we could not read does not count.
      if sign.missed * self._pause_seconds >= seconds
      and host != hosts.index()
      and self.beats[host]['phase'] != _ENDED
    )
    if not absent:
      return None
    last = {host: self.beats[host] for host in absent}
    where = _places(last) if len(absent) > 1 else _place(last[absent[0]])
    have = 'has' if len(absent) == 1 else 'have'
    return (
      f'{_named(absent)} {have} not been heard of for {seconds:g} s (last: '
      f'{where})'
    ), absent


@dataclasses.dataclass
class _Sign:
  """The count of a host's newest beat, and how often it was read since."""

  count: int
  missed: int = 0


def _may_be_of_another(error: BaseException | None) -> bool:
  """Whether `error` may come from a collective whose other end is gone."""
  while error is not None and not isinstance(error, HostError):
    if isinstance(error, (RuntimeError, ValueError)):
      if str(error).startswith(_REMOTE_ERRORS):
        return True
    error = error.__cause__ or error.__context__
  return False


def _place(beat: dict[str, Any]) -> str:
  """'step 18', 'input of step 18', 'restore'."""
  name, step = beat['phase'], beat['step']
  if step is None:
    return name
  return f'step {step}' if name == 'step' else f'{name} of step {step}'


def _places(beats: dict[int, dict[str, Any]]) -> str:
  """'hosts 0, 2-3: step 18; host 1: input of step 18'."""
  places: dict[str, list[int]] = {}
  for host, beat in sorted(beats.items()):
    places.setdefault(_place(beat), []).append(host)
  return '; '.join(f'{_named(group)}: {at}' for at, group in places.items())


def _named(numbers: list[int]) -> str:
  """'host 1', 'hosts 2, 5-9'."""
  return f'host{"s" if len(numbers) > 1 else ""} {hosts.ranges(numbers)}'


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
    hosts.abandon(message, code)
  hosts.leave(code, tuple(absent))
