"""Files that fail: bounded retries, and errors that say where and why."""

from __future__ import annotations


class StorageError(Exception):
  """Storage failed for good; the message has the path and the free space."""
