"""The directories of checkpoints, and checks of one before it is read."""

from __future__ import annotations

import operator
import pathlib
import re
import stat
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from conadv_jax import hosts
from conadv_jax.base import faults, storage
from conadv_jax.base.errors import CheckpointError
from conadv_jax.checkpoints import manifest
from conadv_jax.method.state import TrainState

_STEP = re.compile('0|[1-9][0-9]*')
_COMMITTED = 'commit_success.txt'
_TEMPORARY = '.orbax-checkpoint-tmp'
# More than a checkpoint of our own can need: a page for each file beside data.
_SLACK_BYTES = 2**26
# What orbax and tensorstore raise for writes that fail.
UNWRITABLE = (
  OSError, ValueError, KeyError, TypeError, RuntimeError, CheckpointError,
)  # fmt: skip
# What reading raises for files that are not as we write them.
_UNREADABLE = (*UNWRITABLE, AttributeError, IndexError)


def step_of(path: epath.Path) -> int | None:
  """Step that the directory `path` is named by, or None."""
  return int(path.name) if _STEP.fullmatch(path.name) else None


def directory_of(workdir: epath.Path) -> epath.Path:
  """The directory of a run's checkpoints, as orbax wants it: absolute."""
  # `absolute` takes the name of a bucket for one of a directory.
  if not storage.is_remote(workdir):
    workdir = workdir.absolute()
  return workdir / 'checkpoints'


def committed(directory: epath.Path) -> list[int]:
  """Steps of the checkpoints with a commit file, ascending."""
  if not directory.exists():
    return []
  return sorted(
    int(path.name)
    for path in directory.iterdir()
    if _STEP.fullmatch(path.name) and (path / _COMMITTED).exists()
  )


def tidy(directory: epath.Path, read_only: bool) -> None:
  """Removes what killed saves and removals left; reports what it ignores.

  Orbax would do so in a thread, while the run is saving again.
  """
  if not directory.exists():
    return
  complete = {str(step) for step in committed(directory)}
  removed, ignored = [], []
  for path in sorted(directory.iterdir()):
    if path.name in complete:
      continue
    if read_only or not _is_leftover(path):
      ignored.append(path.name)
    else:
      storage.write(lambda path=path: remove(path), path)
      removed.append(path.name)
  if removed or ignored:
    hosts.say(
      f'{directory}: not complete, removed: {", ".join(removed) or "none"}; '
      f'ignored: {", ".join(ignored) or "none"}'
    )


def _is_leftover(path: epath.Path) -> bool:
  name = path.name.partition(_TEMPORARY)[0]
  is_link = not storage.is_remote(path) and pathlib.Path(path).is_symlink()
  return bool(_STEP.fullmatch(name)) and path.is_dir() and not is_link


def removable(directory: epath.Path, keep: int) -> list[int]:
  """Lists all steps but the newest ones and the newest known good one."""
  steps = committed(directory)
  kept, older = steps[-keep:], steps[:-keep]

  def is_good(step: int) -> bool:
    try:
      facts = manifest.read(directory / str(step))['facts']
    except CheckpointError:
      return False
    return not facts.get('nonfinite_streak', 0)

  if older and not any(map(is_good, kept)):
    good = next((step for step in reversed(older) if is_good(step)), None)
    older = [step for step in older if step != good]
  return older


def remove(path: epath.Path) -> None:
  """Removes a checkpoint; can be called again after it failed half-way."""
  # The commit file first, so that what is left is not taken for a checkpoint.
  (path / _COMMITTED).unlink(missing_ok=True)
  faults.point('checkpoint/mid_removal', step_of(path))
  if path.exists():
    path.rmtree()


# ---- Checks before any array is read ----------------------------------------


def inspect(path: epath.Path, step: int, like: TrainState) -> dict[str, Any]:
  """Returns the manifest of an untrusted checkpoint, or what is wrong with it.

  Raises:
    StorageError: if files cannot be read.
  """

  def check() -> dict[str, Any]:
    _check_files(path, like)
    found = manifest.read(path)
    manifest.check_declared(found, step, like)
    _check_stored(path / 'state', like)
    return found

  try:
    return {'manifest': storage.read(check, path), 'reason': ''}
  except CheckpointError as error:
    return {'reason': str(error)}
  except PermissionError as error:
    raise storage.failure(error, path, 'read') from error
  except _UNREADABLE as error:
    return {'reason': f'{type(error).__name__}: {error}'}


def _check_files(path: epath.Path, like: TrainState) -> None:
  """Refuses links, which could lead anywhere, and files that are too large."""
  total = sum(x.stat().length for x in _walk(path) if not x.is_dir())
  expected = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(like))
  if total > 2 * expected + _SLACK_BYTES:
    raise CheckpointError(
      f'{total:,} bytes of files for a state of {expected:,} bytes'
    )


def _walk(path: epath.Path) -> Iterator[epath.Path]:
  """Yields `path` and all below; what it refuses, it does not open."""
  if not storage.is_remote(path):
    _check_kind(path)
  yield path
  if path.is_dir():
    for child in path.iterdir():
      yield from _walk(child)


def _check_kind(path: epath.Path) -> None:
  mode = pathlib.Path(path).lstat().st_mode
  if stat.S_ISLNK(mode):
    raise CheckpointError(f'{path} is a symbolic link')
  if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
    raise CheckpointError(f'{path} is neither a file nor a directory')


def _check_stored(path: epath.Path, like: TrainState) -> None:
  """Refuses shapes for which the reader would allocate too much, or abort.

  In our format (OCDBT) keys are not paths, and tensorstore refuses '..' and
  absolute paths in the names of the files that hold their values. In another
  format, where arrays are directories, keys would be paths.
  """
  if not (path / 'manifest.ocdbt').exists():
    raise CheckpointError(f'{path / "manifest.ocdbt"} is missing')
  tree = ocp.StandardCheckpointHandler().metadata(path).tree
  arrays = jax.tree.leaves(tree, is_leaf=lambda x: hasattr(x, 'name'))
  stored = {array.name: array for array in arrays}
  for keys, leaf in jax.tree_util.tree_leaves_with_path(like):
    array = stored.get(jax.tree_util.keystr(keys, simple=True, separator='.'))
    name = jax.tree_util.keystr(keys)
    if array is None:
      raise CheckpointError(f'leaf {name} is not in the files of {path}')
    declared = tuple(array.shape), str(array.dtype)
    if declared != (leaf.shape, str(leaf.dtype)):
      raise CheckpointError(
        f'leaf {name} is {declared} in the files of {path}, this run needs '
        f'{(leaf.shape, str(leaf.dtype))}'
      )
    chunk = array.storage.chunk_shape
    bounds = [max(1, size) for size in leaf.shape]
    if len(chunk) != len(bounds) or any(map(operator.gt, chunk, bounds)):
      raise CheckpointError(
        f'leaf {name} has chunks of {chunk} in the files of {path}, more than '
        f'its shape {leaf.shape}'
      )
