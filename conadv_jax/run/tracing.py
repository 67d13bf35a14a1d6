"""Traces of some steps by JAX's profiler, as `profile.steps` asks for."""

from __future__ import annotations

import jax
from etils import epath

from conadv_jax import hosts
from conadv_jax.config import Config


class Tracer:
  """Writes a trace of the steps in `profile.steps` to `profile/`.

  TensorBoard with xprof shows it: on which operations the devices spend their
  time, and what the host does. Each host writes its own.
  """

  def __init__(self, config: Config, path: epath.Path, start: int):
    """Prepares to trace a run whose first `start` steps are done."""
    self._first, self._end = config.profile.span
    self._path = path / 'profile'
    self._running = False
    if self._first and start >= self._first:
      steps = config.profile.steps
      hosts.say(f'profile.steps={steps!r}: no trace, step {start} is done')
      self._first = 0

  def before(self, step: int, state: jax.Array) -> None:
    """Starts or ends the trace, if `step` is the one to do so before.

    Args:
      step: that is about to begin.
      state: what the devices work on; a trace waits for it.
    """
    if self._first and step in (self._first, self._end):
      jax.block_until_ready(state)
      if step == self._first:
        jax.profiler.start_trace(str(self._path))
        self._running = True
      else:
        self.close()

  def close(self) -> None:
    """Ends a trace that runs, as at the end of a run that was stopped."""
    if self._running:
      jax.profiler.stop_trace()
      self._running = False
      hosts.say(f'profile: tensorboard --logdir={self._path}')
