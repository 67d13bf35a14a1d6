"""Locks a work directory for one run; a crash of the owner frees it.

`run.lock` names the owner. If that is a process of this machine that has ended,
the lock is reclaimed at once. An owner on another machine renews a counter in
the file: if it stays the same for the lease, the owner is taken for dead. No
clocks are compared.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import json
import os
import pathlib
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from etils import epath

from conadv_jax import hosts
from conadv_jax.base import errors, faults, storage
from conadv_jax.base.errors import ConfigError, StorageError, redact
from conadv_jax.hosts import leaving

_BOOT_ID = pathlib.Path('/proc/sys/kernel/random/boot_id')
_PID_NAMESPACE = '/proc/self/ns/pid'
_RENEWALS = 4  # in a lease
_LOOKS = 3 * _RENEWALS  # of who watches, in a lease
_BUCKET_SECONDS = 2
_RELEASE_SECONDS = 10
_NO_HARD_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP)
_UNKNOWN = {
  'host': 'an unknown machine', 'pid': '?', 'machine': '', 'process_start': '',
  'since': 'an unknown time', 'command': '?', 'token': '', 'renewed': 0,
}  # fmt: skip


class RunLock:
  """In this context, no other run writes in the work directory.

  Host 0 holds the lock for all hosts. A run that loses it to another one ends
  itself, because two that write together would damage both.
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
        machine is taken for dead; the same for all that use the directory.
      sleep: as time.sleep.
    """
    self._path = epath.Path(workdir) / 'run.lock'
    self._lease_seconds = lease_seconds
    self._sleep = sleep
    self._owner = _this_process()
    self._stop = threading.Event()
    self._writing = threading.Lock()
    self._thread: threading.Thread | None = None

  def __enter__(self) -> RunLock:
    """Takes the lock.

    Raises:
      ConfigError: on every host, if a run that is alive has it.
      StorageError: if it cannot be written or read.
    """
    hosts.on_writer('the lock of the work directory', self._take)
    faults.point('lock/taken')
    if hosts.is_writer():
      self._thread = threading.Thread(
        target=self._keep, name='run lock', daemon=True
      )
      self._thread.start()
    return self

  def __exit__(self, *_) -> None:
    self.release()

  def release(self) -> None:
    """Releases the lock if it is still ours; any thread may call it again."""
    self._stop.set()
    if self._thread is None or not self._writing.acquire(
      timeout=_RELEASE_SECONDS
    ):
      return
    try:
      if self._is_ours():
        storage.write(lambda: self._path.unlink(missing_ok=True), self._path)
    except StorageError as error:
      # The run has its result; a later one finds that this process is gone.
      _warn(f'not released: {error}')
    finally:
      self._writing.release()

  def check_free(self) -> None:
    """Checks that no run that is alive has the lock, without taking it.

    An owner on another machine is watched for up to the lease.

    Raises:
      ConfigError: if one has it.
    """
    if (text := self._read()) is not None:
      self._check_owner_ended(text)

  # ---- Taking it -----------------------------------------------------------

  def _take(self) -> None:
    try:
      while not self._create():
        text = self._read()
        if text is None:
          continue  # it was released in between
        self._check_owner_ended(text)
        self._reclaim(text)
    except OSError as error:
      raise storage.failure(error, self._path) from error

  def _create(self) -> bool:
    """Whether the lock is ours now; False if another has it."""
    text = json.dumps(self._owner)
    if not storage.is_remote(self._path):
      return storage.write(
        lambda: _create_exclusively(self._path, text), self._path
      )
    if self._read() is not None:
      return False
    storage.write(lambda: self._path.write_text(text), self._path)
    # A bucket has no exclusive creation here: who wrote last has the lock.
    self._sleep(_BUCKET_SECONDS)
    return self._is_ours()

  def _check_owner_ended(self, text: str) -> None:
    if (owner := self._living_owner(text)) is not None:
      raise ConfigError(
        f'workdir={str(self._path.parent)!r}: in use since {owner["since"]} by '
        f'process {owner["pid"]} of {owner["host"]} ({owner["command"]}); stop '
        'that run, wait for it to end, or use another --workdir'
      )

  def _living_owner(self, text: str) -> dict[str, Any] | None:
    """Returns who holds the lock with the content `text`; None if nobody."""
    owner = _parse(text)
    if owner['machine'] and owner['machine'] == self._owner['machine']:
      started = _process_start(owner['pid'])
      return owner if started and started == owner['process_start'] else None
    print(
      f'{self._path} is held by process {owner["pid"]} of {owner["host"]}; '
      f'watching it for {self._lease_seconds:g} s for a sign of life',
      flush=True,
    )
    for _ in range(_LOOKS):
      self._sleep(self._lease_seconds / _LOOKS)
      now = self._read()
      if now != text:
        return None if now is None else _parse(now)
    return None

  def _reclaim(self, text: str) -> None:
    """Takes away the file of a dead owner, if it still reads `text`."""
    owner = _parse(text)
    if storage.is_remote(self._path):
      if self._read() == text:
        storage.write(lambda: self._path.unlink(missing_ok=True), self._path)
    elif not self._move_away(text):
      return
    print(
      f'{self._path}: process {owner["pid"]} of {owner["host"]}, which held it '
      f'since {owner["since"]}, has ended; taken over',
      flush=True,
    )

  def _move_away(self, text: str) -> bool:
    """As `_reclaim`, on a file system; False if another run was faster.

    Of several that rename the file, one gets it. It may be the new file of one
    that was faster: then it is put back. Runs of one machine take turns.
    """
    aside = f'{self._path}.{self._owner["token"]}.stale'
    with _one_at_a_time(self._path.parent):
      if self._read() != text:
        return False
      try:
        os.rename(self._path, aside)
      except FileNotFoundError:
        return False
      moved = pathlib.Path(aside).read_text()
      if moved != text:
        _create_exclusively(self._path, moved)
      os.unlink(aside)
      return moved == text

  # ---- Keeping it ----------------------------------------------------------

  def _keep(self) -> None:
    """Renews the lock until it is released; ends the run if it is lost."""
    while not self._stop.wait(self._lease_seconds / _RENEWALS):
      with self._writing:
        if self._stop.is_set():
          return
        try:
          taken_by = self._renew()
        except (OSError, StorageError):
          continue  # the next round tells
      if taken_by is not None:
        text = (
          f'{self._path}: taken over by process {taken_by["pid"]} of '
          f'{taken_by["host"]}, which saw no sign of life of this run; this '
          'run ends, so that they do not write together'
        )
        _warn(f'error: {text}')
        leaving.abandon(text, errors.STORAGE)
        os._exit(errors.STORAGE)

  def _renew(self) -> dict[str, Any] | None:
    """Renews the counter in the file; returns the owner if that is another."""
    text = self._read()
    if text is None:
      # Removed by hand, or just moved away by one that believes us dead.
      if self._create() or (text := self._read()) is None:
        return None
    owner = _parse(text)
    if owner['token'] != self._owner['token']:
      return owner
    self._owner['renewed'] += 1
    storage.write_text(self._path, json.dumps(self._owner))
    return None

  def _is_ours(self) -> bool:
    text = self._read()
    return text is not None and _parse(text)['token'] == self._owner['token']

  def _read(self) -> str | None:
    try:
      return storage.read(self._path.read_text, self._path)
    except FileNotFoundError:
      return None


def _this_process() -> dict[str, Any]:
  return {
    'host': socket.gethostname(),
    'pid': os.getpid(),
    'machine': _machine(),
    'process_start': _process_start(os.getpid()),
    'since': time.strftime('%Y-%m-%dT%H:%M:%S%z'),
    'command': _command(sys.argv),
    'token': uuid.uuid4().hex,
    'renewed': 0,
  }


def _machine() -> str:
  """Identifies the set of process numbers; '' if that is not known."""
  try:
    # Containers of one machine have process numbers of their own.
    return f'{_BOOT_ID.read_text().strip()} {os.readlink(_PID_NAMESPACE)}'
  except OSError:
    return ''


def _process_start(pid: int) -> str:
  """Returns when a process began, in ticks of the kernel; '' if there is none.

  It tells a process from a later one with the same number.
  """
  try:
    stat = pathlib.Path(f'/proc/{pid}/stat').read_text()
  except OSError:
    return ''
  # The name, in brackets, may hold anything; the state is the third field.
  fields = stat.rpartition(')')[2].split()
  return '' if fields[0] == 'Z' else fields[19]


def _command(argv: Sequence[str]) -> str:
  """Returns the program, --config and --workdir; others may hold secrets."""
  kept = [os.path.basename(argv[0])] if argv else []
  for arg, following in itertools.pairwise([*argv[1:], '']):
    name, equals, _ = arg.partition('=')
    if name.lstrip('-') in ('config', 'workdir') and name.startswith('-'):
      kept.append(arg if equals else f'{arg}={following}')
  return redact(' '.join(kept))


def _parse(text: str) -> dict[str, Any]:
  """Reads the owner; of a damaged file, an unknown one that must be watched."""
  with contextlib.suppress(json.JSONDecodeError):
    owner = json.loads(text)
    if isinstance(owner, dict) and isinstance(owner.get('pid'), int):
      return _UNKNOWN | owner
  return _UNKNOWN


@contextlib.contextmanager
def _one_at_a_time(directory: os.PathLike | str) -> Iterator[None]:
  """Lets one process of this machine in, if the file system can do that."""
  descriptor = os.open(directory, os.O_RDONLY)
  try:
    with contextlib.suppress(OSError):  # NFS does not lock directories
      fcntl.flock(descriptor, fcntl.LOCK_EX)
    yield
  finally:
    os.close(descriptor)  # which unlocks


def _create_exclusively(path: os.PathLike | str, text: str) -> bool:
  """Makes a local file with all of its content; False if there is one."""
  temporary = pathlib.Path(f'{os.fspath(path)}.{uuid.uuid4().hex}')
  try:
    temporary.write_text(text)
    os.link(temporary, path)
    return True
  except FileExistsError:
    return False
  except OSError as error:
    if error.errno not in _NO_HARD_LINKS:
      raise
  finally:
    temporary.unlink(missing_ok=True)
  try:
    with open(path, 'x') as file:
      file.write(text)
  except FileExistsError:
    return False
  return True


def _warn(text: str) -> None:
  print(f'{hosts.label()}{text}', file=sys.stderr, flush=True)
