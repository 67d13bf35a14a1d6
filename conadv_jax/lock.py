"""One run per work directory: a lock that survives crashes of its owner.

`run.lock` names the owner. A local one whose process is gone is reclaimed at
once. One of another machine is watched: its owner renews a counter, and if the
counter stands still for the lease, it is gone. No clocks are compared.
"""

from __future__ import annotations

import json
import os
import pathlib
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

from etils import epath

from conadv_jax import exits, faults, hosts
from conadv_jax.config import ConfigError

_BOOT_ID = pathlib.Path('/proc/sys/kernel/random/boot_id')


class RunLock:
  """In this context, no other run writes in the work directory.

  Host 0 holds it for all. The one that loses it to another run ends itself, as
  two that write together would spoil both.
  """

  def __init__(
    self,
    workdir: epath.Path,
    lease_seconds: float = 45,
    sleep: Callable[[float], None] = time.sleep,
  ):
    """Makes the lock; entering its context takes it.

    Args:
      workdir: a directory that exists.
      lease_seconds: after so long without a sign of life, an owner on another
        machine is taken for dead.
      sleep: as time.sleep.
    """
    self._path = epath.Path(workdir) / 'run.lock'
    self._lease_seconds = lease_seconds
    self._sleep = sleep
    self._owner = _this_process()
    self._stop = threading.Event()
    self._thread: threading.Thread | None = None

  def __enter__(self) -> RunLock:
    hosts.on_writer('the lock of the work directory', self._take)
    faults.point('lock/taken')
    if hosts.is_writer():
      self._thread = threading.Thread(
        target=self._renew, name='run lock', daemon=True
      )
      self._thread.start()
    return self

  def __exit__(self, *_) -> None:
    self.release()

  def release(self) -> None:
    """Gives the lock back, if it is still ours."""
    self._stop.set()
    if self._thread is not None and self._is_ours():
      self._path.unlink(missing_ok=True)

  def _take(self) -> None:
    while not self._create():
      owner = _read(self._path)
      if owner is None:
        continue  # it was given back, or is being written
      if self._is_alive(owner):
        raise ConfigError(
          f'workdir={str(self._path.parent)!r}: in use since {owner["since"]} '
          f'by process {owner["pid"]} of {owner["host"]}; stop that run, or '
          'use another --workdir'
        )
      print(
        f'{self._path}: process {owner["pid"]} of {owner["host"]} is gone; '
        'taken over',
        flush=True,
      )
      self._path.unlink(missing_ok=True)

  def _create(self) -> bool:
    """Whether the lock is ours now; False if another has it."""
    text = json.dumps(self._owner)
    if '://' in str(self._path):
      if self._path.exists():
        return False
      self._path.write_text(text)
      self._sleep(2)  # who wrote last has it
      return self._is_ours()
    temporary = f'{self._path}.{self._owner["token"]}'
    pathlib.Path(temporary).write_text(text)
    try:
      os.link(temporary, self._path)
    except FileExistsError:
      return False
    finally:
      os.unlink(temporary)
    return True

  def _is_alive(self, owner: dict[str, Any]) -> bool:
    if owner['boot'] and owner['boot'] == self._owner['boot']:
      return _started(owner['pid']) == owner['started']
    print(
      f'{self._path} is held by process {owner["pid"]} of {owner["host"]}; '
      f'waiting {self._lease_seconds:g} s for a sign of life',
      flush=True,
    )
    self._sleep(self._lease_seconds)
    return _read(self._path) != owner

  def _renew(self) -> None:
    while not self._stop.wait(self._lease_seconds / 4):
      try:
        owner = _read(self._path)
        if owner is None or owner['token'] != self._owner['token']:
          break
        self._owner['renewed'] += 1
        _write(self._path, self._owner)
      except OSError:
        continue  # a file system that blinks; the next round tells
    else:
      return
    who = 'nobody' if owner is None else f'{owner["pid"]} of {owner["host"]}'
    text = f'{self._path} is not ours any more, but of {who}: this run ends'
    print(f'{hosts.label()}error: {text}', file=sys.stderr, flush=True)
    hosts.abandon(text, exits.STORAGE)
    os._exit(exits.STORAGE)

  def _is_ours(self) -> bool:
    owner = _read(self._path)
    return owner is not None and owner['token'] == self._owner['token']


def _this_process() -> dict[str, Any]:
  return {
    'host': socket.gethostname(),
    'pid': os.getpid(),
    'started': _started(os.getpid()),
    'boot': _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else '',
    'since': time.strftime('%Y-%m-%d %H:%M:%S %z'),
    'token': uuid.uuid4().hex,
    'renewed': 0,
  }


def _started(pid: int) -> str | None:
  """When a process began, in ticks of the kernel; None if there is none.

  A number can be given to another process; this tells them apart.
  """
  try:
    stat = pathlib.Path(f'/proc/{pid}/stat').read_text()
  except OSError:
    return None
  # The name, in brackets, may hold anything; the state is the third field.
  fields = stat.rpartition(')')[2].split()
  return None if fields[0] == 'Z' else fields[19]


def _read(path: epath.Path) -> dict[str, Any] | None:
  try:
    return json.loads(path.read_text())
  except (FileNotFoundError, json.JSONDecodeError):
    return None


def _write(path: epath.Path, owner: dict[str, Any]) -> None:
  """In one piece: a reader sees this or what was there before."""
  temporary = path.parent / f'{path.name}.{owner["token"]}'
  temporary.write_text(json.dumps(owner))
  temporary.replace(path)
