"""Runs the cells of a study in processes, each on cores of its own."""

from __future__ import annotations

import collections
import itertools
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from typing import Any

from etils import epath

from conadv_jax.base import errors
from conadv_jax.base.errors import ConfigError, Preempted
from conadv_jax.run.lock import RunLock
from conadv_jax.run.metrics import clock
from conadv_jax.study import results
from conadv_jax.study.design import Cell
from conadv_jax.study.record import DONE, FAILED, NON_FINITE, Record, Row

# Which starts a run again that hung, or that a signal has ended.
_TRAIN = (sys.executable, '-m', 'conadv_jax.supervise')
_ANALYSE = (sys.executable, '-m', 'conadv_jax.analysis')
# Yields cells that it wants run, is sent their rows, and returns a value.
Steps = Generator[list[Cell], list[Row], Any]

_SAY_SECONDS = 60
_LOCK_SECONDS = 5


class Runner:
  """Runs cells, so many at a time, and keeps a row of each.

  In this context SIGINT and SIGTERM stop the cells, which save their states.
  """

  def __init__(self, record: Record, processes: int):
    """Makes the runner.

    Args:
      record: of the study.
      processes: at a time. The cores are divided evenly between them.

    Raises:
      ConfigError: there are more processes than cores.
    """
    cores = sorted(os.sched_getaffinity(0))
    if not 1 <= processes <= len(cores):
      raise ConfigError(
        f'--processes={processes}: must be in [1, {len(cores)}], the cores '
        'that there are'
      )
    self._record = record
    self._cores = [cores[i::processes] for i in range(processes)]
    self._stopped = threading.Event()
    self._running: dict[str, subprocess.Popen] = {}
    self._seconds: dict[str, list[float]] = collections.defaultdict(list)
    self._waiting: queue.SimpleQueue[Cell | None] = queue.SimpleQueue()
    self._asked: dict[str, Cell] = {}  # of this call, by digest
    self._over: set[str] = set()  # of those, which have ended

  def __enter__(self) -> Runner:
    numbers = (signal.SIGINT, signal.SIGTERM)
    self._before = {n: signal.signal(n, self._stop) for n in numbers}
    return self

  def __exit__(self, *_) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def run(self, cells: Sequence[Cell]) -> list[Row]:
    """Runs those of `cells` that have no row yet; returns the rows of all.

    As `drive` does.
    """

    def once() -> Steps:
      return (yield list(cells))

    return self.drive({'': once()})['']

  def drive(self, steps: Mapping[str, Steps]) -> dict[str, Any]:
    """Runs the cells that each of `steps` asks for, all of them side by side.

    A cell whose loss stops being finite has a row that says so, and so has one
    that fails, which the next call tries again.

    Args:
      steps: by name. They yield cells, are sent their rows once all have ended,
        and return a value.

    Returns:
      Their values, by name.

    Raises:
      ConfigError: for a cell of a wrong setting, or a row of other settings.
      Preempted: after a signal; run the same command again to resume.
    """
    self._asked, self._over = {}, set()
    self._waiting = queue.SimpleQueue()
    ended: queue.SimpleQueue[Any] = queue.SimpleQueue()
    values: dict[str, Any] = {}
    wanted = {name: next(each) for name, each in steps.items()}
    for cell in itertools.chain(*wanted.values()):
      _ = cell.config  # Wrong settings are errors before anything runs.
    threads = [
      threading.Thread(target=self._work, args=(cores, ended))
      for cores in self._cores
    ]
    try:
      for thread in threads:
        thread.start()
      self._ask(steps, wanted, values)
      while wanted:
        self._record_one(threads, ended)
        self._ask(steps, wanted, values)
    finally:
      self._stopped.set()
      self._signal_all()
      self._end(threads)
      for thread in threads:
        thread.join()
    self._stopped.clear()
    return values

  def _ask(self, steps, wanted, values) -> None:
    """Sends rows to those of `steps` that have all of them; asks for more."""
    for name, each in steps.items():
      while name in wanted and not self._under_way(wanted[name]):
        rows = [self._record.row(cell) for cell in wanted[name]]
        try:
          wanted[name] = each.send(rows)
        except StopIteration as end:
          values[name] = end.value
          del wanted[name]

  def _under_way(self, cells: Sequence[Cell]) -> bool:
    """Whether any of `cells` has not ended; those not asked for yet are now."""
    self._copy_same(cells)
    for cell in filter(self._is_left, cells):
      if cell.digest not in self._asked:
        self._asked[cell.digest] = cell
        self._waiting.put(cell)
    digests = {cell.digest for cell in cells}
    return bool(digests & (self._asked.keys() - self._over))

  def _is_left(self, cell: Cell) -> bool:
    row = self._record.row(cell)
    return row is None or row['status'] == FAILED

  def _copy_same(self, cells: Sequence[Cell]) -> None:
    """Gives cells without a result the row of another with their settings."""
    rows = sorted(self._record.rows(), key=lambda row: row['status'] != FAILED)
    same = {row['digest']: row for row in rows}  # one that failed, if no other
    for cell in filter(self._is_left, cells):
      row = same.get(cell.digest)
      if row is not None and row['cell'] != cell.name:
        names = {'cell': cell.name, 'phase': cell.phase, 'arm': cell.arm}
        self._record.add(row | names)

  def _record_one(self, threads, ended) -> None:
    """Waits for a cell to end, and records it; reports progress meanwhile."""
    last = time.monotonic()
    while True:
      try:
        cell, row, seconds = ended.get(timeout=1)
        break
      except queue.Empty:
        self._check_stopped(threads)
        if time.monotonic() - last > _SAY_SECONDS:
          last = time.monotonic()
          self._say_running()
    if isinstance(row, Exception):
      raise row
    self._over.add(cell.digest)
    self._seconds[cell.arm].append(seconds)
    self._record.add(row)
    left = [c for c in self._asked.values() if c.digest not in self._over]
    self._record.log(
      f'{len(self._over)}/{len(self._asked)} {results.describe(row)}'
      f'{self._eta(left)}'
    )

  def _check_stopped(self, threads) -> None:
    if not self._stopped.is_set():
      return
    self._end(threads)
    if not any(thread.is_alive() for thread in threads):
      raise Preempted(
        f'stopped with {len(self._asked) - len(self._over)} runs left; run the '
        'same command again to go on'
      )

  def _end(self, threads) -> None:
    """Wakes the threads that wait for a cell, to end."""
    for _ in threads:
      self._waiting.put(None)

  def _work(self, cores, ended) -> None:
    """Runs one cell after the other, in a thread that is bound to `cores`."""
    os.sched_setaffinity(0, cores)  # of this thread, and of what it starts
    while (cell := self._waiting.get()) and not self._stopped.is_set():
      start = time.monotonic()
      try:
        row = self._run_cell(cell)
      except Exception as error:  # noqa: BLE001
        row = error  # which the main thread raises
      if row is not None:
        ended.put((cell, row, time.monotonic() - start))

  def _run_cell(self, cell: Cell) -> Row | None:
    """Trains and analyses; the row, or None if the study was stopped."""
    directory = self._record.path / 'cells' / cell.name
    command = [*_TRAIN, *cell.flags, '--config.plots=False']
    code = self._call(cell, command, directory)
    if code == 0 and cell.analyse:
      code = self._call(cell, [*_ANALYSE, *cell.analyse], directory)
    if self._stopped.is_set() and code != 0:
      return None
    if code == errors.USAGE:
      raise ConfigError(f'{cell.name}: {results.last_error(directory)}')
    status = {0: DONE, errors.NONFINITE: NON_FINITE}.get(code, FAILED)
    return results.row_of(cell, directory, status)

  def _call(self, cell: Cell, command, directory: epath.Path) -> int:
    """Runs `command` until it ends; returns its exit code."""
    directory.mkdir(parents=True, exist_ok=True)
    self._wait_for_lock(directory)
    if self._stopped.is_set():
      return errors.PREEMPTED
    with open(directory / 'log.txt', 'ab') as log:
      # A session of its own: a terminal would send Ctrl-C to it as well.
      process = subprocess.Popen(
        [*command, f'--workdir={directory}'],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
      )
    self._running[cell.name] = process
    if self._stopped.is_set():  # before there was a process to stop
      process.send_signal(signal.SIGTERM)
    code = process.wait()
    del self._running[cell.name]
    return code

  def _wait_for_lock(self, directory: epath.Path) -> None:
    """Waits for a run that a study which was killed has left behind."""
    said = False
    while not self._stopped.is_set():
      try:
        with RunLock(directory):
          return
      except ConfigError as error:
        if not said:
          print(f'waiting: {error}', flush=True)
        said = True
        self._stopped.wait(_LOCK_SECONDS)

  def _stop(self, *_) -> None:
    self._stopped.set()
    os.write(1, b'\nstopping: the runs save their states\n')
    self._signal_all()

  def _signal_all(self) -> None:
    for process in list(self._running.values()):
      if process.poll() is None:
        process.send_signal(signal.SIGTERM)

  def _say_running(self) -> None:
    for name in list(self._running):
      last = results.last_line(self._record.path / 'cells' / name)
      print(f'  {name}: {last}', flush=True)

  def _eta(self, left: Sequence[Cell]) -> str:
    """What is left, at the mean of its arm so far, or else of all."""
    every = [s for seconds in self._seconds.values() for s in seconds]
    mean = sum(every) / len(every)
    total = 0.0
    for cell in left:
      known = self._seconds.get(cell.arm)
      total += sum(known) / len(known) if known else mean
    return f', {clock(total / len(self._cores))} left' if left else ''
