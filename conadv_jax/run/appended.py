"""A file that grows, piece by piece, for a reader who may look at any time."""

from __future__ import annotations

import os
import time

from etils import epath

from conadv_jax.base import storage

# In a bucket nothing is appended: every change writes the whole file.
_BUCKET_SECONDS = 60


class AppendedFile:
  """Holds whole pieces only, also after a write that failed.

  On a file system, a piece is in the file when `append` returns. In a bucket,
  it is there a minute later, or after `flush`. All methods raise StorageError
  if storage fails for good, as a full disk does.
  """

  def __init__(self, path: epath.Path, content: bytes = b''):
    """Writes a new file with `content`."""
    self._path = epath.Path(path)
    self._content = [content]
    self._file = None
    self._rewrite()
    if not storage.is_remote(path):
      # Not buffered: what could not be written would be tried again at its end.
      self._file = storage.write(lambda: open(path, 'ab', buffering=0), path)

  def append(self, piece: bytes) -> None:
    """Adds `piece` at the end."""
    if self._file is not None:
      self._append(piece)
      return
    self._content.append(piece)
    self._pending = True
    if time.monotonic() - self._written > _BUCKET_SECONDS:
      self._rewrite()

  def flush(self) -> None:
    """Puts all pieces into the file."""
    if self._file is None and self._pending:
      self._rewrite()

  def close(self) -> None:
    """Flushes; nothing can be added any more."""
    self.flush()
    if self._file is not None:
      self._file.close()

  def _append(self, piece: bytes) -> None:
    def size() -> int:
      return os.fstat(self._file.fileno()).st_size

    before = storage.read(size, self._path)

    def attempt() -> None:
      if size() != before:
        self._file.truncate(before)  # what a failed attempt has left
      rest = piece
      while rest:
        rest = rest[self._file.write(rest) :]

    storage.write(attempt, self._path)

  def _rewrite(self) -> None:
    storage.write_bytes(self._path, b''.join(self._content))
    self._pending, self._written = False, time.monotonic()
