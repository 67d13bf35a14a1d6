"""Hands batches to the device ahead of their use."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Iterator
from typing import Any

DEPTH = 2


class Prefetcher:
  """Hands batches to the device ahead of their use.

  Iterates over `put(batch)`. While the caller works on one batch, the next
  `depth` have been handed to `put` already.

  Attributes:
    wait_seconds: time for which the caller was blocked on the host iterator.
    failure: what the host iterator or `put` raised; known before the batches
      that it had are used up, so that a run can save and end in order.
  """

  def __init__(
    self,
    batches: Iterator[Any],
    put: Callable[[Any], Any],
    depth: int = DEPTH,
    *,
    expected: int | None = None,
    start_step: int = 0,
  ):
    """Starts nothing; the first `next` fills the queue.

    Args:
      batches: the host's batches.
      put: starts a transfer to the device, without waiting for its end.
      depth: batches in flight beyond the caller's own, 0 or more.
      expected: batches that the caller needs, after which iteration stops;
        None is all that there are.
      start_step: step of the first batch, for the error text.
    """
    if depth < 0:
      raise ValueError(f'depth={depth}: must be 0 or more')
    self.wait_seconds = 0.0
    self.failure: Exception | None = None
    self._batches = iter(batches)
    self._put = put
    self._depth = depth
    self._expected = expected
    self._start_step = start_step
    self._fetched = 0
    self._ended = False
    self._queue = collections.deque()

  def __iter__(self) -> Prefetcher:
    return self

  def __next__(self) -> Any:
    """The next batch on the device.

    Raises:
      RuntimeError: the host's batches ended before `expected` of them.
      StopIteration: all batches were delivered.
      Exception: `failure`, in place of the batch that failed.
    """
    while len(self._queue) <= self._depth and not self._ended:
      self._fetch()
    if self._queue:
      return self._queue.popleft()
    if self.failure is not None:
      raise self.failure
    if self._expected is not None and self._fetched < self._expected:
      raise RuntimeError(
        f'input ended at step {self._start_step + self._fetched}: needed'
        f' {self._expected} batches from step {self._start_step}, got'
        f' {self._fetched}'
      )
    raise StopIteration

  def _fetch(self) -> None:
    if self._fetched == self._expected:
      self._ended = True
      return
    start = time.perf_counter()
    try:
      batch = next(self._batches)
      self.wait_seconds += time.perf_counter() - start
      self._queue.append(self._put(batch))
    except StopIteration:
      self._ended = True
      return
    except Exception as error:  # noqa: BLE001, it is raised in its place
      self._ended, self.failure = True, error
      return
    self._fetched += 1
