"""Being asked to stop: SIGINT or SIGTERM, as one decision of all hosts."""

from __future__ import annotations

import os
import signal

import jax
import jax.numpy as jnp
import numpy as np

from conadv_jax import hosts
from conadv_jax import mesh as mesh_lib

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
  """Remembers SIGINT or SIGTERM, so that the loop can save and leave.

  Ctrl-C after that interrupts at once; SIGTERM may come from several senders.
  """

  def __init__(self):
    self.signal: signal.Signals | None = None

  def __enter__(self) -> StopRequest:
    self._before = {s: signal.signal(s, self._handle) for s in _SIGNALS}
    return self

  def __exit__(self, *_) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _handle(self, number: int, _) -> None:
    if self.signal is not None:
      if number == signal.SIGINT:
        raise KeyboardInterrupt
      return
    self.signal = signal.Signals(number)
    # Not print: the signal may have come in the middle of one.
    text = f'{self.signal.name}: will save; Ctrl-C quits at once'
    os.write(1, f'\n{hosts.label()}{text}\n'.encode())


class Agreement:
  """Which signal, if any, stops all hosts before the same step.

  Each call starts the maximum of the hosts' signals over all devices, behind
  the step that runs, and reads that of the call before: no device waits for a
  host, and a signal on any host stops all at most two steps later. JAX's
  `reached_preemption_sync_point` knows SIGTERM only, takes the handler from
  Python, and never fires if the signal comes before its first call.
  """

  def __init__(self, request: StopRequest, mesh: jax.sharding.Mesh):
    self._request = request
    self._asked: jax.Array | None = None
    sharding = mesh_lib.example_sharding(mesh)

    def flags(number: int) -> jax.Array:
      return jax.make_array_from_callback(
        (mesh.size,), sharding, lambda _: np.full(1, number, np.int32)
      )

    # Made here, so that a call is nothing but a launch.
    self._flags = {number: flags(number) for number in (0, *_SIGNALS)}
    self._max = jax.jit(jnp.max, out_shardings=mesh_lib.replicated(mesh))

  def __call__(self) -> signal.Signals | None:
    """Call it before every step, on every host; the answer is the same."""
    if hosts.count() == 1:
      return self._request.signal
    now = self._max(self._flags[self._request.signal or 0])
    before, self._asked = self._asked, now
    number = int(now if before is None else before)
    return signal.Signals(number) if number else None
