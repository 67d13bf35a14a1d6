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
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import options as ocp_options
from orbax.checkpoint.path import atomicity

from conadv_jax import checksum, faults, hosts
from conadv_jax.state import TrainState
from conadv_jax.storage import StorageError

_FORMAT = 1
_COMMITTED = 'commit_success.txt'
_MAX_FAILURES = 3
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_TEXTS = tuple(map(os.strerror, _FULL))  # as tensorstore passes them on
# What orbax and tensorstore raise for writes that fail.
_UNWRITABLE = (OSError, ValueError, KeyError, TypeError, RuntimeError)
# More than a checkpoint of our own can need: a page for each file beside data.
_SLACK_BYTES = 2**26


class CheckpointError(StorageError):
  """A checkpoint that is damaged, foreign, or not to be written."""


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
    self._directory = epath.Path(workdir).absolute() / 'checkpoints'
    self._keep = keep
    self._strict = strict
    self._pending: int | None = None  # the step that is being saved
    self._failures = 0  # in a row
    hosts.on_writer('strays', lambda: _say_strays(self._directory))
    common = dict(
      atomicity_options=ocp_options.AtomicityOptions(
        mode=ocp_options.AtomicityMode.COMMIT_FILE
      )
    )
    if read_only:
      options = ocp.CheckpointManagerOptions(
        read_only=True, create=False, save_interval_steps=0, **common
      )
    else:
      options = ocp.CheckpointManagerOptions(
        cleanup_tmp_directories=True,
        temporary_path_class=_TemporaryPath,
      )
    self._manager = ocp.CheckpointManager(
      self._directory, options=options, item_names=('state', 'manifest')
    )

  def steps(self) -> list[int]:
    """Steps of the complete checkpoints, ascending."""
    return hosts.on_writer(
      'the list of checkpoints', lambda: _committed(self._directory)
    )

  def latest_step(self) -> int | None:
    """Newest complete step, or None."""
    return max(self.steps(), default=None)

  def save(
    self, step: int, state: TrainState, facts: Mapping[str, Any] | None = None
  ) -> None:
    """Starts saving `state`; a step that is already there is kept.

    Args:
      step: of the run.
      state: as it is now; it may be donated when this returns.
      facts: what the manifest is to say besides. A checkpoint with a
        `nonfinite_streak` of 0 is known to be good.

    Raises:
      CheckpointError: for numbers that are not finite; nothing is written.
      StorageError: if saving cannot begin, or the save before failed.
    """
    if step == self._pending or step in self.steps():
      return
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
    self._pending = step
    try:
      started = self._manager.save(step, args=content)
    except _UNWRITABLE as error:
      raise self._failed(error) from error
    if not started:
      raise CheckpointError(
        f'step {step} was not saved: {self._directory} has a later step, '
        f'{self._manager.latest_step()}; use another --workdir'
      )

  def poll(self) -> bool:
    """Call it after every step: notes the end of a save, at once.

    Returns:
      Whether the state of now is to be saved, as the last save failed.

    Raises:
      StorageError: if that cannot help: the disk is full, it has failed too
        often, or there are several hosts.
    """
    if self._pending is None or self._manager.is_saving_in_progress():
      return False
    try:
      self._manager.wait_until_finished()
      if hosts.is_writer():
        self._confirm()
    except _UNWRITABLE as error:
      self._failures += 1
      failure = self._failed(error)
      if (
        hosts.count() > 1 or self._failures == _MAX_FAILURES or _is_full(error)
      ):
        raise failure from error
      hosts.say(f'{failure}; saving again')
      self._manager.reload()
      return True
    self._pending, self._failures = None, 0
    return False

  def wait(self, step: int) -> None:
    """Blocks until the save of `step` is complete on disk.

    Raises:
      StorageError: if it is not.
    """
    try:
      self._manager.wait_until_finished()
      hosts.on_writer('the end of the save', self._confirm)
    except _UNWRITABLE as error:
      raise self._failed(error) from error
    if step not in self.steps():
      raise StorageError(
        f'checkpoint of step {step} did not reach {self._directory}'
      )

  def restore(
    self, like: TrainState, step: int | None = None
  ) -> tuple[int, TrainState, dict[str, Any]] | None:
    """The newest good state, placed and typed as the abstract `like`.

    Its perturbation is None.

    Args:
      like: shapes, types and shardings.
      step: takes this one only.

    Returns:
      Step, state and the facts it was saved with; None if there is none.

    Raises:
      CheckpointError: if none is good; with `strict`, if the newest is not.
    """
    like = like.replace(perturbation=None)
    steps = [step] if step is not None else self.steps()[::-1]
    for candidate in steps:
      try:
        found, reason = self._read(candidate, like), ''
      except (CheckpointError, OSError) as error:
        found, reason = None, str(error)
      reason = _first(hosts.gather('the restored state', reason))
      if not reason:
        return candidate, *found
      reason = f'{self._directory / str(candidate)}: {reason}'
      if self._strict or step is not None:
        raise CheckpointError(
          f'{reason}; take an older one with checkpoint.strict=False, or '
          'remove the directory'
        )
      hosts.say(f'damaged, passed over: {reason}')
    if steps:
      raise CheckpointError(f'no checkpoint in {self._directory} is good')
    return None

  def close(self) -> None:
    self._manager.close()

  def _read(
    self, step: int, like: TrainState
  ) -> tuple[TrainState, dict[str, Any]]:
    path = self._directory / str(step)
    _check_files(path, like)
    manifest = _read_manifest(path)
    _check_declared(manifest, step, like)
    arguments = ocp.args.Composite(state=ocp.args.StandardRestore(like))
    try:
      state = self._manager.restore(step, args=arguments).state
    except Exception as error:  # orbax raises it as it is, for damaged arrays
      reason = str(error).partition(' See full TensorStore')[0]
      raise CheckpointError(f'{type(error).__name__}: {reason}') from error
    sums, _ = checksum.checksums(state)
    damaged = [
      name for name, x in manifest['leaves'].items() if x['sum'] != sums[name]
    ]
    if damaged:
      raise CheckpointError(
        f'{len(damaged)} of {len(sums)} leaves are not as they were saved: '
        f'{", ".join(damaged[:4])}'
      )
    return state, manifest['facts']

  def _confirm(self) -> None:
    """On host 0: the pending step is on disk; then removes older ones."""
    step, self._pending = self._pending, None
    if step is None:
      return
    if step not in _committed(self._directory):
      raise OSError(errno.EIO, 'the save ended without a commit file')
    _read_manifest(self._directory / str(step))
    for old in _removable(self._directory, self._keep):
      _remove(self._directory / str(old), old)

  def _failed(self, error: BaseException) -> StorageError:
    step, self._pending = self._pending, None
    free = ''
    if '://' not in str(self._directory):
      free = f', {shutil.disk_usage(self._directory).free:,} bytes free'
    return StorageError(
      f'step {step} could not be saved in {self._directory}{free}: '
      f'{type(error).__name__}: {str(error)[:400]}'
    )


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
  return int(path.name) if path.name.isdecimal() else None


# ---- Files -----------------------------------------------------------------


def _committed(directory: epath.Path) -> list[int]:
  if not directory.exists():
    return []
  return sorted(
    int(path.name)
    for path in directory.iterdir()
    if path.name.isdecimal() and (path / _COMMITTED).exists()
  )


def _say_strays(directory: epath.Path) -> None:
  if not directory.exists():
    return
  complete = {str(step) for step in _committed(directory)}
  strays = sorted({path.name for path in directory.iterdir()} - complete)
  if strays:
    print(f'{directory}: not complete, ignored: {", ".join(strays)}')


def _removable(directory: epath.Path, keep: int) -> list[int]:
  """Steps that are neither among the newest nor the newest known good one."""
  steps = _committed(directory)
  kept, older = steps[-keep:], steps[:-keep]

  def is_good(step: int) -> bool:
    facts = _read_manifest(directory / str(step))['facts']
    return not facts.get('nonfinite_streak', 0)

  if not any(map(is_good, kept)):
    good = next((step for step in reversed(older) if is_good(step)), None)
    older = [step for step in older if step != good]
  return older


def _remove(path: epath.Path, step: int) -> None:
  # First what makes it a checkpoint: half of one is then not taken for it.
  (path / _COMMITTED).unlink()
  faults.point('checkpoint/mid_removal', step)
  path.rmtree()


def _check_files(path: epath.Path, like: TrainState) -> None:
  """Refuses links, which could lead anywhere, and more than can be ours."""
  total = 0
  for file in (path, *_walk(path)):
    if '://' not in str(file) and _is_link(file):
      raise CheckpointError(f'{file} is a symbolic link')
    if not file.is_dir():
      total += file.stat().length
  expected = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(like))
  if total > 2 * expected + _SLACK_BYTES:
    raise CheckpointError(
      f'{total:,} bytes of files for a state of {expected:,} bytes'
    )


def _walk(path: epath.Path) -> Iterator[epath.Path]:
  for child in path.iterdir():
    yield child
    if child.is_dir() and not ('://' not in str(child) and _is_link(child)):
      yield from _walk(child)


def _is_link(path: epath.Path) -> bool:
  return pathlib.Path(path).is_symlink()


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


def _first(reasons: list[str] | None) -> str:
  return hosts.on_writer(
    'the verdict on the state', lambda: next(filter(None, reasons), '')
  )


def _is_full(error: BaseException | None) -> bool:
  while error is not None:
    if isinstance(error, OSError) and error.errno in _FULL:
      return True
    if any(text in str(error) for text in _FULL_TEXTS):
      return True
    error = error.__cause__ or error.__context__
  return False
