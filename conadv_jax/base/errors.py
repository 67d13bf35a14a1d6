"""Every error that ends a command, with its exit code.

0 is success and 1 an error that is not listed here. docs/design.md has the
same table for users.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable

USAGE = 2
MEMORY = 3
NONFINITE = 4
DATA = 5
HANG = 6
STORAGE = 7
HOST = 8
CLOUD = 9
PREEMPTED = 42
INTERRUPTED = 130


class CommandError(Exception):
  """An error whose message is for users: a command prints it and errors.

  Attributes:
    exit_code: of the command.
  """

  exit_code = 1


class ConfigError(CommandError, ValueError):
  """A wrong setting; the message names field, value and fix."""

  exit_code = USAGE


class OutOfMemoryError(CommandError):
  """The audited step needs more memory than its devices have."""

  exit_code = MEMORY


class NonFiniteError(CommandError):
  """Too many steps in a row had a loss or gradient that is not finite."""

  exit_code = NONFINITE


class DataError(CommandError):
  """Too many examples cannot be used, or a file lacks some of its records."""

  exit_code = DATA


class StorageError(CommandError):
  """Storage failed for good; the message has the path and the free space."""

  exit_code = STORAGE


class CheckpointError(StorageError):
  """A checkpoint is damaged, of another run, or must not be written."""


class HostError(CommandError):
  """Another host failed, or does not answer.

  Attributes:
    exit_code: of that host; `HOST` if it does not answer.
  """

  def __init__(self, message: str, exit_code: int = HOST):
    super().__init__(message)
    self.exit_code = exit_code


class CloudError(CommandError):
  """A rented machine cannot be made, reached or deleted.

  Attributes:
    retry: whether the same may work later.
  """

  exit_code = CLOUD

  def __init__(self, message: str, *, retry: bool = False):
    super().__init__(message)
    self.retry = retry


class Preempted(CommandError):
  """The run was asked to stop, and has saved its state."""

  exit_code = PREEMPTED


_URL = re.compile(
  r"""([a-z][\w+.-]*://)(?:[^\s/?'"@]*@)?([^\s?'"]*)(\?[^\s'"]*)?""",
  re.IGNORECASE,
)


def redact(text: str) -> str:
  """Cuts every URL in `text` down to what names a file.

  User, password and query, such as a signature, may be credentials.
  """
  return _URL.sub(lambda m: f'{m[1]}{m[2]}{"?..." if m[3] else ""}', text)


def printable(name: str) -> str:
  """The `name` of a file, with bytes that are not UTF-8 as \\xNN."""
  return os.fsencode(name).decode('utf-8', 'backslashreplace')


def check_no_credentials(field: str, path: str) -> None:
  """Raises ConfigError if `path` is a URL with a password or a signature."""
  if redact(path) != path:
    raise ConfigError(
      f'{field}={redact(path)!r}: holds what may be a credential, which would '
      'be written to logs and files; leave it out: buckets are opened with '
      'application-default credentials'
    )


def unknown(kind: str, name: str, known: Iterable[str]) -> ConfigError:
  """Makes the error for a `name` not among `known`; it names the nearest."""
  known = sorted(known)
  near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
  hint = f'did you mean {near[0]!r}? ' if near else ''
  return ConfigError(
    f'unknown {kind} {name!r}; {hint}known: {", ".join(known)}'
  )
