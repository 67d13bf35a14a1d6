"""SIGINT, SIGTERM or an input that fails, as one decision of all hosts."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from conadv_jax import hosts
from conadv_jax.base import errors
from conadv_jax.devices.mesh import example_sharding, replicated
from conadv_jax.hosts import leaving

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Above all signals: it wins where both come at once.
_INPUT_FAILED = 127
# Why a signal may end a command at once, for its user.
NOTHING_TO_SAVE = 'no step was taken since the last checkpoint'


class Stopped(Exception):
  """All hosts stop here, because of something on one of them.

  Attributes:
    signal: that it got; None if its input failed.
  """

  def __init__(self, number: signal.Signals | None):
    super().__init__(number.name if number else 'the input failed')
    self.signal = number


class StopRequest:
  """Remembers SIGINT or SIGTERM, so that the loop can save and leave.

  A second Ctrl-C interrupts at once; SIGTERM may come from several senders.
  """

  def __init__(self):
    self.signal: signal.Signals | None = None
    self._leave: Callable[[int], None] | None = None
    self._last: Callable[[], None] = lambda: None

  def __enter__(self) -> StopRequest:
    # Python's handlers wait for the main thread to come back from a compiler
    # or a file system; what C writes to this pipe does not.
    self._read, write = os.pipe()
    os.set_blocking(write, False)
    self._write = write
    self._wakeup_before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    self._before = {s: signal.signal(s, self._handle) for s in _SIGNALS}
    self._thread = threading.Thread(target=self._listen, daemon=True)
    self._thread.start()
    return self

  def __exit__(self, *_) -> None:
    signal.set_wakeup_fd(self._wakeup_before)
    for number, handler in self._before.items():
      signal.signal(number, handler)
    os.close(self._write)  # which ends the thread
    self._thread.join()
    os.close(self._read)

  def leave_at_once(self, reason: str) -> None:
    """From now on a signal ends the process at once, with exit code 42.

    For times in which there is nothing to save, however long a compiler or a
    file system keeps the main thread. A signal that came before counts.

    Args:
      reason: why nothing has to be saved, for the user.
    """

    def leave(number: int) -> None:
      text = (
        f'{signal.Signals(number).name}: {reason}; run the same command again '
        'to resume'
      )
      sys.stdout.flush()
      os.write(2, f'\n{hosts.label()}{text}\n'.encode())
      self._last()
      leaving.abandon(text, errors.PREEMPTED)
      leaving.leave(errors.PREEMPTED)

    self._leave = leave
    if self.signal is not None:
      leave(self.signal)

  def before_leaving(self, last: Callable[[], None]) -> None:
    """Calls `last`, in another thread, before a signal ends the process."""
    self._last = last

  def save_first(self) -> None:
    """From now on a signal is remembered only: there is a state to save."""
    self._leave = None

  def _handle(self, number: int, _) -> None:
    if self.signal is not None:
      if number == signal.SIGINT:
        raise KeyboardInterrupt
      return
    self.signal = signal.Signals(number)
    if self._leave is None:
      # Not print: the signal may have come in the middle of one.
      text = f'{self.signal.name}: will save; Ctrl-C quits at once'
      os.write(1, f'\n{hosts.label()}{text}\n'.encode())

  def _listen(self) -> None:
    while numbers := os.read(self._read, 1):
      if numbers[0] in _SIGNALS and (leave := self._leave) is not None:
        leave(numbers[0])


class Agreement:
  """What, if anything, stops all hosts before the same step.

  Each call starts the maximum of the hosts' signals over all devices, behind
  the running step, and reads that of the call before. So no device waits for a
  host, and a signal on any host stops all at most two steps later. A failed
  input counts as a signal; two batches of it must be left. JAX's
  `reached_preemption_sync_point` knows SIGTERM only, takes the handler from
  Python, and never fires if the signal comes before its first call.
  """

  def __init__(self, request: StopRequest, mesh: jax.sharding.Mesh):
    self._request = request
    self._asked: jax.Array | None = None
    sharding = example_sharding(mesh)

    def flags(number: int) -> jax.Array:
      return jax.make_array_from_callback(
        (mesh.size,), sharding, lambda _: np.full(1, number, np.int32)
      )

    # Made here, so that a call is nothing but a launch.
    self._flags = {
      number: flags(number) for number in (0, *_SIGNALS, _INPUT_FAILED)
    }
    self._max = jax.jit(jnp.max, out_shardings=replicated(mesh))

  def check(self, input_failed: bool = False) -> None:
    """Call it on every host, before every step and batch of an evaluation.

    Args:
      input_failed: whether this host will soon have no batches any more.

    Raises:
      Stopped: on every host in the same call.
    """
    number = _INPUT_FAILED if input_failed else self._request.signal or 0
    if number := self._agreed(number):
      failed = number == _INPUT_FAILED
      raise Stopped(None if failed else signal.Signals(number))

  def _agreed(self, number: int) -> int:
    if hosts.count() == 1:
      return number
    now = self._max(self._flags[number])
    before, self._asked = self._asked, now
    return int(now if before is None else before)
