"""Retries reads and writes that fail; errors name the path and the fix."""

from __future__ import annotations

import errno
import os
import pathlib
import random
import shutil
import sys
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from etils import epath

from conadv_jax.base import faults
from conadv_jax.base.errors import StorageError, redact

_ATTEMPTS = 5
# Doubled after each attempt, and changed by up to a quarter, so that hosts do
# not come back together: 5.6 to 9.4 s in all.
_FIRST_DELAY_SECONDS = 0.5
_JITTER = 0.25
_sleep = time.sleep
_random = random.Random()  # hosts must differ, whatever the run's seed is

# Errors that another attempt would not cure. All others are retried: that costs
# some seconds, and network file systems have errors of their own.
_LASTING = {
  errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR,
  errno.EEXIST, errno.ENOTEMPTY, errno.ENOSPC, errno.EDQUOT, errno.EROFS,
  errno.EFBIG, errno.ENAMETOOLONG, errno.ELOOP, errno.EXDEV,
}  # fmt: skip
_LASTING_CLASSES = (
  FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError,
  FileExistsError,
)  # fmt: skip
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FULL_TEXTS = tuple(map(os.strerror, _FULL))  # as tensorstore passes them on

# Codes of tensorflow's errors, which file systems of buckets raise, as those of
# the operating system; a code that is not here is no failure of storage.
_OF_TENSORFLOW = {
  2: errno.EIO,  # UNKNOWN
  4: errno.ETIMEDOUT,  # DEADLINE_EXCEEDED
  5: errno.ENOENT,  # NOT_FOUND
  6: errno.EEXIST,  # ALREADY_EXISTS
  7: errno.EACCES,  # PERMISSION_DENIED
  8: errno.EAGAIN,  # RESOURCE_EXHAUSTED: too many requests
  10: errno.EAGAIN,  # ABORTED
  13: errno.EIO,  # INTERNAL
  14: errno.EAGAIN,  # UNAVAILABLE
  16: errno.EACCES,  # UNAUTHENTICATED
}

T = TypeVar('T')


class _Retries:
  """Counts retries; readers are in many threads."""

  def __init__(self):
    self.count = 0
    self._lock = threading.Lock()

  def add(self) -> None:
    with self._lock:
      self.count += 1


_retries = _Retries()


def read(function: Callable[[], T], path: os.PathLike | str) -> T:
  """Returns `function()`, which reads `path`; retries it while storage fails.

  It makes up to 5 attempts, waits at most 9.4 s in all, and reports each retry
  on stderr.

  Raises:
    StorageError: if the last attempt failed.
    OSError: at once, where a retry would not help; also in place of such an
      error of tensorflow's file systems.
  """
  return _attempts(function, path, 'read')


def write(function: Callable[[], T], path: os.PathLike | str) -> T:
  """Returns `function()`, which writes `path`; retries it as `read` does.

  Args:
    function: may be called again after it has failed half-way.
    path: what it writes; may not be there yet.

  Raises:
    StorageError: if the last attempt failed, or at once where a retry would
      not help, as on a full disk.
  """
  try:
    return _attempts(function, path, 'write')
  except OSError as error:
    raise failure(error, path, 'written') from error


def write_text(path: epath.Path, text: str) -> None:
  """Writes `text` as `write_bytes` does."""
  write_bytes(path, text.encode())


def write_bytes(path: epath.Path, content: bytes) -> None:
  """Writes through a temporary file, so that no reader sees half of it.

  Raises:
    StorageError: as `write`.
  """
  path = epath.Path(path)
  temporary = path.parent / f'{path.name}.tmp'

  def attempt() -> None:
    temporary.write_bytes(content)
    temporary.replace(path)

  write(attempt, path)


def failure(
  error: BaseException, path: os.PathLike | str, what: str = 'written'
) -> StorageError:
  """Makes the error for `path`, with the free space there and a fix.

  Args:
    error: why; an OSError or any other.
    path: a file or directory.
    what: 'written' or 'read'.
  """
  details, fix = '', 'check that the storage is there and works'
  if what == 'written':
    details = space(path)
    fix = 'check that the storage is there and can be written'
    if is_full(error):
      fix = 'free some space, or raise the quota'
  reason = getattr(error, 'strerror', None) or error
  return StorageError(
    redact(
      f'{os.fspath(path)}: cannot be {what}: {reason}{details and "; "}'
      f'{details}; {fix}, then run the same command again'
    )
  )


def is_full(error: BaseException | None) -> bool:
  """Whether `error`, or a cause of it, says that a disk or quota is full."""
  while error is not None:
    if isinstance(error, OSError) and error.errno in _FULL:
      return True
    if any(text in str(error) for text in _FULL_TEXTS):
      return True
    error = error.__cause__ or error.__context__
  return False


def space(path: os.PathLike | str) -> str:
  """'12,345 bytes free there'; '' for a bucket, or where it is not known."""
  free = free_bytes(path)
  return '' if free is None else f'{free:,} bytes free there'


def free_bytes(path: os.PathLike | str) -> int | None:
  """Free space where `path` is or will be; None as `space` has it."""
  if is_remote(path):
    return None
  place = pathlib.Path(path).absolute()
  for directory in (place, *place.parents):
    try:
      return shutil.disk_usage(directory).free
    except FileNotFoundError:
      continue  # it is not made yet
    except OSError:
      break
  return None


def expand(path: os.PathLike | str) -> epath.Path:
  """The path that a flag, a field or a caller names: `~` is the home."""
  return epath.Path(path).expanduser()


def is_remote(path: os.PathLike | str) -> bool:
  """Whether `path` is in a bucket, where nothing is appended or locked."""
  return '://' in os.fspath(path)


def num_retries() -> int:
  """Returns how many attempts of this process followed a failed one."""
  return _retries.count


def _attempts(
  function: Callable[[], T], path: os.PathLike | str, verb: str
) -> T:
  for attempt in range(1, _ATTEMPTS + 1):
    try:
      faults.point(f'storage/{verb}')
      return function()
    except Exception as error:
      failed = _as_os_error(error)
      if failed is None or (failed is error and _is_lasting(error)):
        raise
      if _is_lasting(failed):
        raise failed from error
    if attempt < _ATTEMPTS:
      _wait(attempt, failed, path, verb)
  raise failure(failed, path, {'read': 'read', 'write': 'written'}[verb])


def _wait(
  attempt: int, failed: OSError, path: os.PathLike | str, verb: str
) -> None:
  seconds = _FIRST_DELAY_SECONDS * 2 ** (attempt - 1)
  seconds *= 1 + _random.uniform(-_JITTER, _JITTER)
  text = redact(f'{os.fspath(path)}: {failed.strerror or failed}')
  print(
    f'{text}; {verb} again in {seconds:.1f} s (attempt {attempt + 1} of '
    f'{_ATTEMPTS})',
    file=sys.stderr,
    flush=True,
  )
  _retries.add()
  _sleep(seconds)


def _is_lasting(error: OSError) -> bool:
  # Some libraries raise the class without a number.
  return error.errno in _LASTING or isinstance(error, _LASTING_CLASSES)


def _as_os_error(error: Exception) -> OSError | None:
  """`error` as one of the operating system; None if it is not storage's."""
  if isinstance(error, OSError):
    return error
  # Told without tensorflow, which the training step must not need.
  if not type(error).__module__.startswith('tensorflow.'):
    return None
  message = str(error).splitlines()[0]
  for number in _FULL:  # of a local disk, under several codes
    if os.strerror(number) in message:
      return OSError(number, os.strerror(number))
  number = _OF_TENSORFLOW.get(getattr(error, 'error_code', None))
  return None if number is None else OSError(number, message)
