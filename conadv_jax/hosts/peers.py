"""Signs of life: what each host says it does, and which host is lost.

Hosts write to the key-value store of JAX's coordinator and read from it, in a
thread of its own, as a call may wait forever. Every 2 s (or a tenth of the peer
timeout, if that is less) a host writes one key and reads one, and host 0 reads
the signs of life of all: for 256 hosts 256 small calls a second.
"""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Callable
from typing import Any

import jax

from conadv_jax import hosts
from conadv_jax.base.errors import HostError
from conadv_jax.hosts import leaving, private

_BEAT_SECONDS = 2.0
_GOODBYE_SECONDS = 3.0
_TICKS_SECONDS = 1.0  # until another host's watchdog sees what its thread read
# After a failed collective, a host is lost if it misses this many beats.
_MISSED_BEATS = 5
_ENDED = 'ended'  # the phase of a host that said goodbye
_BEATS = 'conadv_jax/beats/'


class Peers:
  """The thread that exchanges signs of life with the other hosts.

  Attributes:
    failure: what another host announced, or None.
    beats: the newest sign of life of every host, on hosts that read them.
    listening_seconds: until the others have read what this host announced.
  """

  def __init__(
    self,
    phase: Callable[[], tuple[str, int | None, bool]],
    timeout_seconds: float,
  ):
    self._phase = phase
    self._timeout_seconds = timeout_seconds
    self._pause_seconds = min(_BEAT_SECONDS, timeout_seconds / 10)
    self.listening_seconds = self._pause_seconds + _TICKS_SECONDS
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
    self._thread.join(_GOODBYE_SECONDS)  # or its beat would come after this one
    leaving.within(self._pause_seconds, lambda: self._beat(_ENDED))

  def suspect(self) -> float:
    """Looks for lost hosts on this host, too, and sooner; returns how soon."""
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
    self.beats = beats = _read_beats()
    for host, beat in beats.items():
      sign = self._signs.get(host)
      same = sign is not None and sign.count == beat['count']
      missed = sign.missed + 1 if same else 0
      self._signs[host] = _Sign(beat['count'], missed)

  def _beat(self, name: str, step: int | None = None) -> None:
    beat = {'count': self._rounds, 'phase': name, 'step': step}
    hosts.send(f'{_BEATS}{hosts.index()}', json.dumps(beat))

  def lost(self, now: float) -> tuple[str, list[int]] | None:
    """Returns a message and the indices of lost hosts; None if there are none.

    Args:
      now: seconds of a clock that stops while this process is stopped.
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
    where = places(last) if len(absent) > 1 else place(last[absent[0]])
    return (
      f'{_named(absent)} gave no sign of life for {seconds:g} s (last: {where})'
    ), absent


@dataclasses.dataclass
class _Sign:
  """The count of a host's newest beat, and how often it was read since."""

  count: int
  missed: int = 0


def _read_beats() -> dict[int, dict[str, Any]]:
  """The newest sign of life of every host that gave one."""
  pairs = private.state.client.key_value_dir_get(_BEATS)
  return {int(key.rpartition('/')[2]): json.loads(text) for key, text in pairs}


def place(beat: dict[str, Any]) -> str:
  """'step 18', 'input of step 18', 'restore'."""
  name, step = beat['phase'], beat['step']
  if step is None:
    return name
  return f'step {step}' if name == 'step' else f'{name} of step {step}'


def places(beats: dict[int, dict[str, Any]]) -> str:
  """'hosts 0, 2-3: step 18; host 1: input of step 18'."""
  found: dict[str, list[int]] = {}
  for host, beat in sorted(beats.items()):
    found.setdefault(place(beat), []).append(host)
  return '; '.join(f'{_named(group)}: {at}' for at, group in found.items())


def _named(numbers: list[int]) -> str:
  """'host 1', 'hosts 2, 5-9'."""
  return f'host{"s" if len(numbers) > 1 else ""} {hosts.ranges(numbers)}'
