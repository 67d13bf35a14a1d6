"""Train, and restart what was preempted or hung.

  python -m conadv_jax.supervise --config=... --workdir=DIR [flags of train]

Runs `python -m conadv_jax.train` with the same flags in a process of its own,
and restarts it, after a pause, if it ends with 42 (preempted, saved), 6 (hung),
8 (another host was lost) or by a signal, as when JAX aborts it because host 0
died. It gives up after 5 such ends in a row without a newer checkpoint. A
signal to this program goes to the run, whose exit code is then this program's.
`train --supervise` is the same.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Sequence

from etils import epath

from conadv_jax.base import errors, storage
from conadv_jax.base.usage import answered

_AGAIN = {errors.PREEMPTED, errors.HANG, errors.HOST}
_TRIALS = 5
_PAUSE_SECONDS = 60  # the longest


def supervise(
  command: Sequence[str],
  checkpoints: epath.Path,
  first_pause_seconds: float = 1,
) -> int:
  """Runs `command` until it ends for good; returns its exit code.

  Args:
    command: with all of its arguments.
    checkpoints: directory whose newest step tells whether a run got anywhere.
    first_pause_seconds: before a run is started again; it doubles each time.
  """
  trials, newest = 0, _newest_step(checkpoints)
  with _Child() as child:
    while True:
      code = child.run(command)
      # subprocess has the number of a signal as a negative code.
      again = code in _AGAIN or code < 0
      if child.signalled.is_set() or not again:
        return code if code >= 0 else 128 - code
      step = _newest_step(checkpoints)
      trials = 1 if step > newest else trials + 1
      newest = max(step, newest)
      if trials == _TRIALS:
        print(
          f'supervise: {trials} ends in a row without a newer checkpoint than '
          f'step {newest}; not restarted',
          file=sys.stderr,
          flush=True,
        )
        return code if code >= 0 else 128 - code
      pause = min(first_pause_seconds * 2 ** (trials - 1), _PAUSE_SECONDS)
      print(
        f'supervise: ended with {code} at step {newest}; restart in '
        f'{pause:g} s (trial {trials + 1} of {_TRIALS} without progress)',
        flush=True,
      )
      if child.signalled.wait(pause):
        return errors.PREEMPTED


class _Child:
  """The process that is watched, and the signals that are passed on to it."""

  def __init__(self):
    self.signalled = threading.Event()
    self._process: subprocess.Popen | None = None

  def __enter__(self) -> _Child:
    numbers = (signal.SIGINT, signal.SIGTERM)
    self._before = {n: signal.signal(n, self._handle) for n in numbers}
    return self

  def __exit__(self, *_) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def run(self, command: Sequence[str]) -> int:
    # A session of its own: a terminal would send Ctrl-C to the run as well,
    # for which a second one means to quit without saving.
    self._process = subprocess.Popen(command, start_new_session=True)
    if self.signalled.is_set():  # before there was a process to pass it on to
      self._process.send_signal(signal.SIGTERM)
    return self._process.wait()

  def _handle(self, number: int, _) -> None:
    self.signalled.set()
    if self._process is not None and self._process.poll() is None:
      self._process.send_signal(number)


def _newest_step(checkpoints: epath.Path) -> int:
  """Of the directories that are named by a step; -1 without any."""
  if not checkpoints.exists():
    return -1
  names = [path.name for path in checkpoints.iterdir()]
  return max((int(name) for name in names if name.isdecimal()), default=-1)


def command(arguments: Sequence[str]) -> list[str]:
  """Of a training run with `arguments`."""
  kept = [a for a in arguments if a.lstrip('-') != 'supervise']
  return [sys.executable, '-m', 'conadv_jax.train', *kept]


def main(argv: Sequence[str]) -> int:
  prefix = '--workdir='
  found = [a[len(prefix) :] for a in argv if a.startswith(prefix)]
  if not found:
    print('error: missing --workdir=DIR', file=sys.stderr)
    return errors.USAGE
  return supervise(command(argv[1:]), storage.expand(found[-1]) / 'checkpoints')


def console() -> None:
  """Runs the command `conadv-supervise`."""
  sys.exit(0 if answered(__doc__) else main(sys.argv))


if __name__ == '__main__':
  console()
