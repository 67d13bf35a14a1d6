"""Checkpoints that are complete, checked and never the only copy of a guess.

A checkpoint is a directory named by its step, with the state and a manifest of
its leaves; a file written last commits both. What lacks that file is no
checkpoint. The manifest has a checksum of every leaf (`checksum`): storage
libraries restore flipped bits without an error.
"""

from __future__ import annotations

import errno
import hashlib
import json
import operator
import os
import pathlib
import re
import shutil
import stat
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.path import atomicity

from conadv_jax import checksum, faults, hosts, storage
from conadv_jax.state import TrainState
from conadv_jax.storage import StorageError

_FORMAT = 1
_STEP = re.compile('0|[1-9][0-9]*')
_COMMITTED = 'commit_success.txt'
_TEMPORARY = '.orbax-checkpoint-tmp'
_MAX_FAILURES = 3
_BACK_OFF_SECONDS = (1, 4)  # after the first failure in a row, and the next
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_TEXTS = tuple(map(os.strerror, _FULL))  # as tensorstore passes them on
_FULL_BYTES = 2**20  # no checkpoint fits into this
# More than a checkpoint of our own can need: a page for each file beside data.
_SLACK_BYTES = 2**26
_sleep = time.sleep


class CheckpointError(StorageError):
  """A checkpoint that is damaged, foreign, or not to be written."""


# What orbax and tensorstore raise for writes that fail.
_UNWRITABLE = (
  OSError, ValueError, KeyError, TypeError, RuntimeError, CheckpointError,
)  # fmt: skip
# What files raise that are not as we write them.
_UNREADABLE = (*_UNWRITABLE, AttributeError, IndexError)


class Checkpoints:
  """The checkpoints of a run, in `workdir/checkpoints`.

  The pending perturbation is left out: it is as large as a batch of float
  images, and `train_step.pending_perturbation` makes it again bit for bit.

  All hosts make the same calls. Which steps there are is what host 0 sees.
  """

  def __init__(
    self,
    workdir: epath.Path,
    keep: int = 1,
    *,
    strict: bool = False,
    read_only: bool = False,
  ):
    """Opens the directory; what a killed save left there is removed.

    Args:
      workdir: of the run.
      keep: newest checkpoints that stay.
      strict: whether a damaged checkpoint is an error, not passed over.
      read_only: leaves alone what a training run may be writing there.
    """
    self._directory = _directory_of(epath.Path(workdir))
    self._keep = keep
    self._strict = strict
    self._started: int | None = None  # the last save, unless it failed
    self._pending: int | None = None  # the save that has not been confirmed
    self._start_error: BaseException | None = None  # of the pending save
    self._failures = 0  # in a row
    hosts.on_writer('strays', lambda: _tidy(self._directory, read_only))
    self._manager = None
    if not read_only:
      options = ocp.CheckpointManagerOptions(
        temporary_path_class=_TemporaryPath
      )
      self._manager = ocp.CheckpointManager(
        self._directory, options=options, item_names=('state', 'manifest')
      )

  def steps(self) -> list[int]:
    """Steps of the complete checkpoints, ascending."""
    return hosts.on_writer(
      'the list of checkpoints',
      lambda: storage.read(
        lambda: _committed(self._directory), self._directory
      ),
    )

  def latest_step(self) -> int | None:
    """Newest complete step, or None."""
    return max(self.steps(), default=None)

  def save(
    self, step: int, state: TrainState, facts: Mapping[str, Any] | None = None
  ) -> None:
    """Starts saving `state`; a step that is already there is kept.

    It first waits for the save before, if that has not ended.

    Args:
      step: of the run.
      state: as it is now; it may be donated when this returns.
      facts: what the manifest is to say besides. A checkpoint with a
        `nonfinite_streak` of 0 is known to be good.

    Raises:
      CheckpointError: for numbers that are not finite, and for a step before
        one that is there; nothing is written.
      StorageError: as `poll`, if the save before failed.
    """
    # Hosts note the end of a save at different times, its start at the same.
    if step == self._started or step in self.steps():
      return
    self._settle()
    state = state.replace(perturbation=None)
    sums, nonfinite = checksum.checksums(state)
    if nonfinite:
      raise CheckpointError(
        f'step {step} is not saved: not finite are {", ".join(nonfinite[:8])}'
        f'{" and others" if len(nonfinite) > 8 else ""}; checkpoints of '
        f'earlier steps are in {self._directory}'
      )
    manifest = _manifest(step, state, sums, facts or {})
    content = ocp.args.Composite(
      state=ocp.args.StandardSave(state), manifest=ocp.args.JsonSave(manifest)
    )
    try:
      started = self._manager.save(step, args=content)
    except _UNWRITABLE as error:
      started, self._start_error = True, error
    if not started:
      raise CheckpointError(
        f'step {step} was not saved: {self._directory} has a later step, '
        f'{self._manager.latest_step()}; use another --workdir'
      )
    self._started = self._pending = step

  def poll(self) -> bool:
    """Call it after every step: notes the end of a save, at once.

    Returns:
      Whether the state of now is to be saved, as the last save failed. It
      waits for a few seconds then.

    Raises:
      StorageError: if that cannot help: the disk is full, it has failed too
        often, or there are several hosts.
    """
    if self._manager.is_saving_in_progress():
      return False
    return self._settle()

  def wait(self, step: int) -> None:
    """Blocks until the save of `step` is complete on disk.

    Raises:
      StorageError: if it is not.
    """
    self._confirm_pending()
    if step not in self.steps():
      raise StorageError(
        f'{self._directory}: the checkpoint of step {step} is not there; see '
        'that nothing else writes there'
      )

  def save_now(
    self, step: int, state: TrainState, facts: Mapping[str, Any] | None = None
  ) -> None:
    """`save` and `wait`, tried again where `poll` would ask for it."""
    self.save(step, state, facts)
    while self._settle():
      self.save(step, state, facts)
    self.wait(step)

  def restore(
    self, like: TrainState, step: int | None = None
  ) -> tuple[int, TrainState, dict[str, Any]] | None:
    """The newest good state, placed and typed as the abstract `like`.

    Its perturbation is None. Damaged ones that are newer are said and, unless
    the directory is open for reading only, renamed: they would be in the way
    of the steps to come.

    Args:
      like: shapes, types and shardings.
      step: takes this one only.

    Returns:
      Step, state and the facts it was saved with; None if there is none.

    Raises:
      CheckpointError: if none is good; with `strict`, if the newest is not.
      StorageError: if files cannot be read, whatever is in them.
    """
    like = like.replace(perturbation=None)
    steps = [step] if step is not None else self.steps()[::-1]
    for place, candidate in enumerate(steps):
      found, reason = self._read(candidate, like)
      if not reason:
        self._set_aside(steps[:place])
        return candidate, *found
      reason = f'{self._directory / str(candidate)}: {reason}'
      if self._strict or step is not None:
        raise CheckpointError(
          f'{reason}; take an older one with checkpoint.strict=False, or '
          'remove the directory'
        )
      hosts.say(f'damaged, passed over: {reason}')
    if steps:
      raise CheckpointError(
        f'no checkpoint in {self._directory} is good; the lines above say what '
        'is wrong with each. Use another --workdir, or put back a good copy'
      )
    return None

  def close(self) -> None:
    """Waits for the save under way.

    Raises:
      StorageError: if it failed.
    """
    if self._manager is not None:
      try:
        self._confirm_pending()
      finally:
        self._manager.close()

  # ---- Saving, inside ------------------------------------------------------

  def _settle(self) -> bool:
    """Ends the save under way; see `poll`."""
    try:
      self._confirm_pending()
    except StorageError as failure:
      if hosts.count() > 1 or self._failures == _MAX_FAILURES:
        raise
      if _is_full(failure) or _free_bytes(self._directory) < _FULL_BYTES:
        raise
      seconds = _BACK_OFF_SECONDS[self._failures - 1]
      hosts.say(f'{failure}; saving again in {seconds} s')
      _sleep(seconds)
      return True
    return False

  def _confirm_pending(self) -> None:
    """Waits for the save under way, and sees that it is on disk."""
    step, self._pending = self._pending, None
    if step is None:
      return
    try:
      if self._start_error is not None:
        raise self._start_error
      self._manager.wait_until_finished()
      if hosts.is_writer():
        self._confirm(step)
    except _UNWRITABLE as error:
      self._started = self._start_error = None
      self._failures += 1
      self._manager.reload()
      raise self._failure(step, error) from error
    self._failures = 0

  def _confirm(self, step: int) -> None:
    if step not in _committed(self._directory):
      raise OSError(errno.EIO, 'the save ended without a commit file')
    _read_manifest(self._directory / str(step))
    for old in _removable(self._directory, self._keep):
      path = self._directory / str(old)
      try:
        storage.write(lambda path=path: _remove(path), path)
      except StorageError as error:
        hosts.say(f'{error}; it stays until the next start')

  def _failure(self, step: int, error: BaseException) -> StorageError:
    if _is_full(error):
      error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    failure = storage.failure(error, self._directory)
    return StorageError(f'step {step} could not be saved: {failure}')

  # ---- Restoring, inside ---------------------------------------------------

  def _read(
    self, step: int, like: TrainState
  ) -> tuple[tuple[TrainState, dict[str, Any]] | None, str]:
    """State and facts, or what is wrong with them: the same on all hosts.

    Hosts agree after each part, as the next one needs all of them.
    """
    path = self._directory / str(step)
    checked = hosts.on_writer(
      'the check of a checkpoint', lambda: _inspect(path, step, like)
    )
    if checked['reason']:
      return None, checked['reason']
    manifest, state, reason = checked['manifest'], None, ''
    try:
      faults.point('checkpoint/read', step)
      # Without orbax's barriers, where hosts that read would wait for one
      # that failed.
      state = ocp.StandardCheckpointHandler().restore(
        path / 'state', args=ocp.args.StandardRestore(like)
      )
    except Exception as error:  # noqa: BLE001, orbax raises it so
      text = str(error).partition(' See full TensorStore')[0]
      reason = f'{type(error).__name__}: {text}'
    if not (reason := hosts.first('the restored state', reason)):
      reason = hosts.first('its checksums', _damage(manifest, state))
    return (None if reason else (state, manifest['facts'])), reason

  def _set_aside(self, steps: list[int]) -> None:
    """Renames damaged checkpoints, whose steps the run will save again."""
    if steps and self._manager is not None:
      hosts.on_writer('damaged checkpoints', lambda: self._rename(steps))
      self._manager.reload()

  def _rename(self, steps: list[int]) -> None:
    for step in steps:
      path = self._directory / str(step)
      names = (f'{step}.damaged{n or ""}' for n in range(10_000))
      free = (self._directory / name for name in names)
      new = next(target for target in free if not target.exists())
      storage.write(lambda path=path, new=new: path.rename(new), path)
      hosts.say(f'{path}: now {new.name}; remove it if you do not need it')


class _TemporaryPath(atomicity.CommitFileTemporaryPath):
  """Where a save is until its commit file is written."""

  async def create(self) -> epath.Path:
    path = await super().create()
    faults.point('checkpoint/mid_write', _step_of(self.get_final()))
    return path

  async def finalize(self) -> None:
    faults.point('checkpoint/before_commit', _step_of(self.get_final()))
    await super().finalize()
    faults.point('checkpoint/after_commit', _step_of(self.get_final()))


def _step_of(path: epath.Path) -> int | None:
  return int(path.name) if _STEP.fullmatch(path.name) else None


def _damage(manifest: Mapping[str, Any], state: TrainState) -> str:
  sums, _ = checksum.checksums(state)
  damaged = [
    name for name, x in manifest['leaves'].items() if x['sum'] != sums[name]
  ]
  if not damaged:
    return ''
  return (
    f'{len(damaged)} of {len(sums)} leaves are not as they were saved: '
    f'{", ".join(damaged[:4])}'
  )


def _is_full(error: BaseException | None) -> bool:
  while error is not None:
    if isinstance(error, OSError) and error.errno in _FULL:
      return True
    if any(text in str(error) for text in _FULL_TEXTS):
      return True
    error = error.__cause__ or error.__context__
  return False


def _free_bytes(directory: epath.Path) -> float:
  if storage.is_remote(directory):
    return float('inf')
  return shutil.disk_usage(directory).free


# ---- Files -----------------------------------------------------------------


def _directory_of(workdir: epath.Path) -> epath.Path:
  # `absolute` takes the name of a bucket for one of a directory.
  if not storage.is_remote(workdir):
    workdir = workdir.absolute()
  return workdir / 'checkpoints'


def _committed(directory: epath.Path) -> list[int]:
  if not directory.exists():
    return []
  return sorted(
    int(path.name)
    for path in directory.iterdir()
    if _STEP.fullmatch(path.name) and (path / _COMMITTED).exists()
  )


def _tidy(directory: epath.Path, read_only: bool) -> None:
  """Removes what killed saves and removals left, and says what is no step.

  Orbax would do so in a thread, while the run saves again.
  """
  if not directory.exists():
    return
  complete = {str(step) for step in _committed(directory)}
  removed, ignored = [], []
  for path in sorted(directory.iterdir()):
    if path.name in complete:
      continue
    if read_only or not _is_leftover(path):
      ignored.append(path.name)
    else:
      storage.write(lambda path=path: _remove(path), path)
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


def _removable(directory: epath.Path, keep: int) -> list[int]:
  """Steps that are neither among the newest nor the newest known good one."""
  steps = _committed(directory)
  kept, older = steps[-keep:], steps[:-keep]

  def is_good(step: int) -> bool:
    try:
      facts = _read_manifest(directory / str(step))['facts']
    except CheckpointError:
      return False
    return not facts.get('nonfinite_streak', 0)

  if older and not any(map(is_good, kept)):
    good = next((step for step in reversed(older) if is_good(step)), None)
    older = [step for step in older if step != good]
  return older


def _remove(path: epath.Path) -> None:
  """Works again after it has failed half-way."""
  # First what makes it a checkpoint: half of one is then not taken for it.
  (path / _COMMITTED).unlink(missing_ok=True)
  faults.point('checkpoint/mid_removal', _step_of(path))
  if path.exists():
    path.rmtree()


# ---- Checks before any array is read ----------------------------------------


def _inspect(path: epath.Path, step: int, like: TrainState) -> dict[str, Any]:
  """The manifest, or what is wrong, of a checkpoint that may be a stranger's.

  Raises:
    StorageError: if files cannot be read, whatever is in them.
  """

  def check() -> dict[str, Any]:
    _check_files(path, like)
    manifest = _read_manifest(path)
    _check_declared(manifest, step, like)
    _check_stored(path / 'state', like)
    return manifest

  try:
    return {'manifest': storage.read(check, path), 'reason': ''}
  except CheckpointError as error:
    return {'reason': str(error)}
  except PermissionError as error:
    raise storage.failure(error, path, 'read') from error
  except _UNREADABLE as error:
    return {'reason': f'{type(error).__name__}: {error}'}


def _check_files(path: epath.Path, like: TrainState) -> None:
  """Refuses links, which could lead anywhere, and more than can be ours."""
  total = sum(x.stat().length for x in _walk(path) if not x.is_dir())
  expected = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(like))
  if total > 2 * expected + _SLACK_BYTES:
    raise CheckpointError(
      f'{total:,} bytes of files for a state of {expected:,} bytes'
    )


def _walk(path: epath.Path) -> Iterator[epath.Path]:
  """`path` and all below; what it refuses, it does not open."""
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
  """Refuses declared sizes that the reader would allocate, or abort over.

  Keys of our format (OCDBT) are no paths, and tensorstore refuses '..' and
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


# ---- The manifest ----------------------------------------------------------


def _manifest(
  step: int, state: TrainState, sums: dict[str, str], facts: Mapping[str, Any]
) -> dict[str, Any]:
  leaves = jax.tree_util.tree_leaves_with_path(state)
  content = {
    'format': _FORMAT,
    'step': step,
    'facts': dict(facts),
    'leaves': {
      (name := jax.tree_util.keystr(path)): {
        'shape': list(x.shape),
        'dtype': str(x.dtype),
        'sum': sums[name],
      }
      for path, x in leaves
    },
  }
  return content | {'digest': _digest(content)}


def _digest(content: Mapping[str, Any]) -> str:
  text = json.dumps(content, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def _read_manifest(path: epath.Path) -> dict[str, Any]:
  """Raises CheckpointError for one that is missing or edited."""
  file = path / 'manifest' / 'metadata'
  try:
    content = json.loads(file.read_text())
    digest = content.pop('digest')
  except (OSError, ValueError, KeyError, AttributeError) as error:
    raise CheckpointError(f'{file}: no manifest: {error!r}') from error
  if digest != _digest(content):
    raise CheckpointError(f'{file}: not as it was written')
  return content


def _check_declared(
  manifest: Mapping[str, Any], step: int, like: TrainState
) -> None:
  """Before arrays are read: step, paths, shapes and types are ours."""
  if (manifest['format'], manifest['step']) != (_FORMAT, step):
    raise CheckpointError(
      f'the manifest is of format {manifest["format"]}, step '
      f'{manifest["step"]}; expected {_FORMAT} and {step}'
    )
  leaves = jax.tree_util.tree_leaves_with_path(like)
  ours = {
    jax.tree_util.keystr(path): [list(x.shape), str(x.dtype)]
    for path, x in leaves
  }
  theirs = {
    name: [x['shape'], x['dtype']] for name, x in manifest['leaves'].items()
  }
  for name in sorted(ours.keys() | theirs.keys()):
    if ours.get(name) != theirs.get(name):
      raise CheckpointError(
        f'leaf {name} is {theirs.get(name, "missing")}, this run needs '
        f'{ours.get(name, "none")}'
      )
