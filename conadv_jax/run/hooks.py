"""What a run does every n steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# (step, its new state, the next batch, the metrics of the step) -> None
Hook = Callable[[int, Any, Any, Any], None]


def every(
  steps: int,
  hook: Hook,
  *,
  also_at: int | None = None,
  before: int | None = None,
) -> Hook:
  """Returns `hook` for every `steps` steps; 0 is never.

  Args:
    steps: the interval.
    hook: what to do.
    also_at: a step at which it is done whatever the interval.
    before: the first step from which on it is not done any more.
  """

  def when_due(step: int, *args) -> None:
    due = is_due(step, steps) and (before is None or step < before)
    if due or step == also_at:
      hook(step, *args)

  return when_due


def is_due(step: int, every_steps: int) -> bool:
  """Whether `step` is one of every `every_steps`; 0 is never."""
  return every_steps > 0 and step % every_steps == 0
