"""A run that outlives its machines, which do not outlive the run."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence

from conadv_jax.base import errors
from conadv_jax.base.errors import CloudError, ConfigError
from conadv_jax.cloud import jobs
from conadv_jax.cloud.machines import NOT_FOUND, READY, Machines

_AGAIN = {errors.PREEMPTED, errors.HANG, errors.HOST}
_PROGRESS_SECONDS = 600  # a run that lasted this long was worth its machines
_FIRST_PAUSE_SECONDS, _MOST_PAUSE_SECONDS = 30, 600
_SAVE_SECONDS, _STOP_POLL_SECONDS = 120, 10  # of a run that was stopped


@dataclasses.dataclass(frozen=True)
class Job:
  """What is run.

  Attributes:
    name: of its directory on the workers.
    command: on every worker.
    commit: of the code.
    device: tpu, cuda or cpu.
    logs: directory here.
  """

  name: str
  command: Sequence[str]
  commit: str
  device: str
  logs: pathlib.Path


@dataclasses.dataclass(frozen=True)
class Policy:
  """When to give up, and what stays.

  Attributes:
    tries: ends in a row, each soon after its start.
    keep: whether the machines stay at the end.
    adopt: whether machines that exist already are taken over.
  """

  tries: int = 5
  keep: bool = False
  adopt: bool = False


def supervise(
  machines: Machines,
  job: Job,
  policy: Policy,
  clock: Callable[[], float] = time.monotonic,
) -> int:
  """Runs `job` until it ends for good; returns its exit code.

  Machines that are rented are deleted at the end, whatever ends it.

  Raises:
    ConfigError: if a slice of that name exists and may not be taken over.
    CloudError: if it gives up, or cannot delete what it made.
  """
  if machines.rented and not policy.adopt and machines.state() != NOT_FOUND:
    raise ConfigError(
      f'name={machines.label!r}: exists already; take another name, delete it, '
      'or take it over with --adopt'
    )
  with _signals(), _left_behind(machines, policy.keep):
    tries, is_set_up = 0, False
    while True:
      began = clock()
      try:
        is_set_up = _prepare(machines, job, is_set_up)
        began = clock()
        code = _run(machines, job)
        if code not in _AGAIN and code <= 128 or code == errors.INTERRUPTED:
          return code
        reason, last = f'job {job.name} ended with {code}', code
      except CloudError as error:
        if not error.retry:
          raise
        reason, last = str(error), error.exit_code
      tries = 1 if clock() - began > _PROGRESS_SECONDS else tries + 1
      print(f'supervise: {reason}', flush=True)
      if tries >= policy.tries:
        print(f'supervise: gives up after {tries} tries', flush=True)
        return last
      pause = min(_FIRST_PAUSE_SECONDS * 2 ** (tries - 1), _MOST_PAUSE_SECONDS)
      print(
        f'supervise: resumes in {pause:g} s (try {tries + 1} of '
        f'{policy.tries})',
        flush=True,
      )
      machines.shell.sleep(pause)


def _prepare(machines: Machines, job: Job, is_set_up: bool) -> bool:
  """Sees to machines that are ready and have the code; returns True."""
  state = machines.state()
  if state != READY:
    is_set_up = False
    if state != NOT_FOUND:
      print(f'{machines.label}: is {state}; deleting it', flush=True)
      machines.delete()
    machines.create()
    machines.wait()
  if not is_set_up:
    jobs.setup(machines, job.commit, job.device)
  return True


def _run(machines: Machines, job: Job) -> int:
  """Runs the job once; returns the exit code that tells most."""
  try:
    states = jobs.states(machines, job.name)
    if set(states.values()) == {'running'}:  # its supervisor was killed
      begins = dict.fromkeys(machines.workers(), 1)
    else:
      _stop(machines, job)
      begins = jobs.start(machines, job.name, job.command)
    codes = jobs.follow(machines, job.name, begins, job.logs)
  except KeyboardInterrupt:
    print(
      f'supervise: {_SAVE_SECONDS} s to save (Ctrl-C again: at once)',
      flush=True,
    )
    with contextlib.suppress(CloudError):  # they are gone, and it with them
      _stop(machines, job)
    raise
  return worst(list(codes.values()))


def _stop(machines: Machines, job: Job) -> None:
  """Stops the job where it runs, and gives it time to save."""
  for trial in range(_SAVE_SECONDS // _STOP_POLL_SECONDS):
    if 'running' not in jobs.states(machines, job.name).values():
      break
    if not trial:
      jobs.stop(machines, job.name)
    machines.shell.sleep(_STOP_POLL_SECONDS)


def worst(codes: Sequence[int]) -> int:
  """The exit code that tells most: a cause before what follows from it."""
  return max(codes, key=lambda code: (code != 0, code not in _AGAIN, -code))


@contextlib.contextmanager
def _signals() -> Iterator[None]:
  """Makes signals to end, also the loss of the terminal, like a Ctrl-C."""

  def interrupt(*_) -> None:
    raise KeyboardInterrupt

  before = {}
  for number in (signal.SIGTERM, signal.SIGHUP):
    if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
      before[number] = signal.signal(number, interrupt)
  try:
    yield
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


@contextlib.contextmanager
def _left_behind(machines: Machines, keep: bool) -> Iterator[None]:
  """Deletes the machines in the end, or says what is left and how to delete it.

  From before they are asked for: what was asked for may come into being.
  """
  try:
    yield
  finally:
    if machines.rented and keep:
      print(
        f'supervise: {machines.label} is kept, and costs money; '
        f'{machines.how_to_delete()}',
        flush=True,
      )
    elif machines.rented:
      print(f'supervise: deleting {machines.label} ...', flush=True)
      try:
        machines.delete()
      except KeyboardInterrupt:
        print(
          f'supervise: {machines.label} may be left, and costs money; '
          f'{machines.how_to_delete()}',
          flush=True,
        )
        raise
      print(f'supervise: {machines.label} is gone', flush=True)
