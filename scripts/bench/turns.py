"""Steps that take turns: what they are, and how they are timed."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

MAX_CHUNK = 200  # steps
OUT_OF_MEMORY = re.compile(
  r'RESOURCE_EXHAUSTED|out of memory|allocate memory|ALLOC_FAILED', re.I
)


class Started(NamedTuple):
  """A step that is ready.

  Attributes:
    take: takes n steps and waits for them.
    compile_seconds: of tracing and compiling.
    peak_bytes: of one device; None if unknown.
    xla_flops: as the compiler counts them; None if unknown.
    note: of how it runs.
  """

  take: Callable[[int], None]
  compile_seconds: float
  peak_bytes: int | None
  xla_flops: float | None = None
  note: str = ''


@dataclasses.dataclass
class Contender:
  """A step to time at one batch size.

  Attributes:
    name: METHOD, METHOD@TAU, or 'torch ...'.
    floor: its arithmetic over that of a step on one view.
    flops: of a step of one device.
    start: compiles it.
    is_peer: of another library.
    release: gives back memory that nothing uses.
    started: what `start` made.
    seconds: of a step, in each round.
    note: how it runs, or why there are no times.
  """

  name: str
  floor: float
  flops: float
  start: Callable[[], Started]
  is_peer: bool = False
  release: Callable[[], Any] = gc.collect
  started: Started | None = None
  seconds: list[float] = dataclasses.field(default_factory=list)
  note: str = ''


@contextlib.contextmanager
def noting_memory(contender: Contender) -> Iterator[None]:
  """Lets the others go on where `contender` does not fit in memory."""
  try:
    yield
    return
  except RuntimeError as error:  # of JAX and of PyTorch
    if not OUT_OF_MEMORY.search(str(error)):
      raise
  contender.note, contender.started = 'out of memory', None
  contender.seconds.clear()
  contender.release()
  print(f'  {contender.name}: out of memory', flush=True)


def seconds_of(call: Callable[[], Any]) -> float:
  begin = time.perf_counter()
  call()
  return time.perf_counter() - begin


def measure(contenders: list[Contender], repeats: int, target: float) -> None:
  """Fills in `seconds`: all take turns, in chunks of about `target` seconds."""
  chunks = {}
  for i, one in enumerate(contenders, start=1):
    with noting_memory(one):
      one.started = one.start()
      one.note = one.started.note
      one.started.take(2)
      step = seconds_of(lambda one=one: one.started.take(1))
      chunks[one.name] = max(1, min(MAX_CHUNK, round(target / step)))
      print(
        f'  {i}/{len(contenders)} {one.name}: ready after '
        f'{one.started.compile_seconds:.1f} s, about {1e3 * step:.2f} ms',
        flush=True,
      )
  begin = time.perf_counter()
  for done in range(repeats):
    if done:
      left = (time.perf_counter() - begin) / done * (repeats - done)
      print(f'  round {done} of {repeats}, {left:.0f} s left', flush=True)
    for one in contenders[:: 1 if done % 2 else -1]:
      if one.started is None:
        continue
      with noting_memory(one):
        count, take = chunks[one.name], one.started.take
        take(1)
        chunk = seconds_of(lambda take=take, count=count: take(count))
        one.seconds.append(chunk / count)
