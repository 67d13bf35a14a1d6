"""Programs of this machine: run one by one or side by side, or only printed."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import IO

from conadv_jax.base.errors import CloudError

_AT_ONCE = 32  # each gcloud takes some 100 MB
_GLANCE_SECONDS = 0.02


@dataclasses.dataclass(frozen=True)
class Result:
  """How a program ended: its exit code, and what it wrote."""

  code: int
  out: bytes = b''
  err: bytes = b''

  @property
  def reason(self) -> str:
    """The last lines of what it wrote, for a message."""
    text = (self.err or self.out).decode('utf-8', 'replace').strip()
    return ' / '.join(text.splitlines()[-3:]) or f'exit code {self.code}'


class Shell:
  """Runs programs.

  No program sees a Ctrl-C of the terminal: it is for this command, which then
  ends those that run.

  Attributes:
    dry_run: whether commands are printed instead.
    sleep: waits for some seconds.
  """

  def __init__(
    self, *, dry_run: bool = False, sleep: Callable[[float], None] = time.sleep
  ):
    self.dry_run, self.sleep = dry_run, sleep

  def run(self, command: Sequence[str], dry: bytes = b'') -> Result:
    """Runs `command` and waits for it; `dry` is its output in a dry run."""
    return self.run_all([command], dry)[0]

  def run_all(
    self, commands: Sequence[Sequence[str]], dry: bytes = b''
  ) -> list[Result]:
    """Runs `commands` side by side; returns their results in this order.

    Raises:
      CloudError: if there is no such program.
    """
    if self.dry_run:
      print(shlex.join(commands[0]))
      if len(commands) > 1:
        print(f'# the same for {len(commands) - 1} other workers')
      return [Result(0, dry)] * len(commands)
    results: dict[int, Result] = {}
    todo, running = list(enumerate(commands)), {}
    with contextlib.ExitStack() as stack:
      try:
        while todo or running:
          while todo and len(running) < _AT_ONCE:
            index, command = todo.pop(0)
            running[index] = _start(command, stack)
          for index, (process, *files) in list(running.items()):
            if process.poll() is not None:
              results[index] = Result(process.returncode, *map(_read, files))
              del running[index]
          if running:
            time.sleep(_GLANCE_SECONDS)
      finally:
        for process, *_ in running.values():
          os.killpg(process.pid, signal.SIGKILL)  # gcloud is a shell script
          process.wait()
    return [results[index] for index in range(len(commands))]


def _start(
  command: Sequence[str], stack: contextlib.ExitStack
) -> tuple[subprocess.Popen, IO[bytes], IO[bytes]]:
  # Files and not pipes: nobody reads while it runs.
  out, err = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(2))
  try:
    process = subprocess.Popen(
      command,
      stdin=subprocess.DEVNULL,
      stdout=out,
      stderr=err,
      start_new_session=True,
    )
  except FileNotFoundError as error:
    raise CloudError(
      f'{command[0]}: not found; install it (gcloud: the Google Cloud CLI) or '
      'put it on the PATH'
    ) from error
  return process, out, err


def _read(file: IO[bytes]) -> bytes:
  file.seek(0)
  return file.read()
