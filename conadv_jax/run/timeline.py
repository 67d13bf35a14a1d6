"""When the parts of a command began, and when it is time for a word."""

from __future__ import annotations

import time


class Timeline:
  """The parts of a command until its first step is done.

  Attributes:
    began: when the command did, in seconds since the epoch.
    wanted: whether the user wants to see the table.
  """

  def __init__(self, *, wanted: bool = False):
    """Starts now, with the part `imports`."""
    self.began, self.wanted = time.time(), wanted
    self._parts = [('imports', self.began, 0.0)]

  def enter(self, part: str) -> None:
    """Ends the last part and begins this one."""
    self._parts.append((part, time.time(), time.process_time()))

  def table(self) -> str:
    """Seconds of each part, the last of which ends now.

    Processor time is that of all threads, so one part may have been at work
    for another: TensorFlow is imported while the step compiles.
    """
    end = ('first step done', time.time(), time.process_time())
    lines = [f'{"from command to first step":<28}{"seconds":>9}{"of CPU":>9}']
    parts = [*self._parts, end]
    for (name, *began), (_, *ended) in zip(parts, parts[1:], strict=False):
      wall, cpu = (b - a for a, b in zip(began, ended, strict=True))
      lines.append(f'  {name:<26}{wall:>9.2f}{cpu:>9.2f}')
    lines.append(f'  {"in all":<26}{end[1] - self.began:>9.2f}{end[2]:>9.2f}')
    return '\n'.join(lines)


class Ticker:
  """Says when a user should hear something: after 10 s, then less often."""

  _FIRST_SECONDS, _MOST_SECONDS = 10, 300

  def __init__(self):
    self._pause = self._FIRST_SECONDS
    self.heard()

  def heard(self) -> None:
    """The user has just heard something else."""
    self._since = time.monotonic()

  def due(self) -> bool:
    """Whether it is time again; the pause then doubles, up to 5 minutes."""
    if time.monotonic() - self._since < self._pause:
      return False
    self._pause = min(2 * self._pause, self._MOST_SECONDS)
    self.heard()
    return True
