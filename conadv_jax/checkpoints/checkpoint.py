"""Saves and restores the state of a run; damage is found, not restored.

A checkpoint is a directory named by its step, with the state and a manifest of
its leaves. A file written last commits both: a directory without it is not a
checkpoint. The manifest has a checksum of every leaf (`checksum`), because
storage libraries restore flipped bits without an error.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.path import atomicity

from conadv_jax import hosts
from conadv_jax.base import faults, storage
from conadv_jax.base.errors import CheckpointError, StorageError
from conadv_jax.checkpoints import checksum, files, manifest
from conadv_jax.method.state import TrainState

_MAX_FAILURES = 3
_BACK_OFF_SECONDS = (1, 4)  # after the first failure in a row, and the next
_FULL_BYTES = 2**20  # no checkpoint fits into this
_sleep = time.sleep


class Checkpoints:
  """The checkpoints of a run, in `workdir/checkpoints`.

  The pending perturbation is left out: it is as large as a batch of float
  images, and `pending_perturbation` computes it again bit for bit.

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
    """Opens the directory and removes what a killed save left there.

    Args:
      workdir: of the run.
      keep: how many of the newest checkpoints stay.
      strict: whether a damaged checkpoint is an error; else it is skipped.
      read_only: changes nothing; a training run may be writing there.
    """
    self._directory = files.directory_of(epath.Path(workdir))
    self._keep = keep
    self._strict = strict
    self._started: int | None = None  # the last save, unless it failed
    self._pending: int | None = None  # the save that has not been confirmed
    self._pending_like: TrainState | None = None  # shapes and types of that
    self._start_error: BaseException | None = None  # of the pending save
    self._failures = 0  # in a row
    hosts.on_writer('strays', lambda: files.tidy(self._directory, read_only))
    self._manager = None
    if not read_only:
      # orbax measures its timeout with the clock of the machine, which may
      # jump; the watchdog ends a save that hangs.
      options = ocp.CheckpointManagerOptions(
        temporary_path_class=_TemporaryPath,
        async_options=ocp.options.AsyncOptions(timeout_secs=24 * 60 * 60),
      )
      self._manager = ocp.CheckpointManager(
        self._directory, options=options, item_names=('state', 'manifest')
      )

  def steps(self) -> list[int]:
    """Steps of the complete checkpoints, ascending."""
    return hosts.on_writer(
      'the list of checkpoints',
      lambda: storage.read(
        lambda: files.committed(self._directory), self._directory
      ),
    )

  def latest_step(self) -> int | None:
    """Newest complete step, or None."""
    return max(self.steps(), default=None)

  def save(
    self, step: int, state: TrainState, facts: Mapping[str, Any] | None = None
  ) -> None:
    """Starts saving `state`; does nothing if `step` is already saved.

    It first waits for the previous save, if that has not ended.

    Args:
      step: of the run.
      state: as it is now; it may be donated when this returns.
      facts: further content of the manifest. A checkpoint with a
        `nonfinite_streak` of 0 is known to be good.

    Raises:
      CheckpointError: for numbers that are not finite, or a step before one
        that is saved; nothing is written.
      StorageError: as `poll`, if the previous save failed.
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
    content = manifest.make(step, state, sums, facts or {})
    saved = ocp.args.Composite(
      state=ocp.args.StandardSave(state), manifest=ocp.args.JsonSave(content)
    )
    try:
      started = self._manager.save(step, args=saved)
    except files.UNWRITABLE as error:
      started, self._start_error = True, error
    if not started:
      raise CheckpointError(
        f'step {step} was not saved: {self._directory} has a later step, '
        f'{self._manager.latest_step()}; use another --workdir'
      )
    self._started = self._pending = step
    self._pending_like = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state
    )

  def poll(self) -> bool:
    """Notes the end of a save without waiting; call it after every step.

    Returns:
      Whether the current state should be saved because the last save failed.
      In that case the call waits for a few seconds.

    Raises:
      StorageError: if another attempt cannot help: the disk is full, saves
        have failed too often, or there are several hosts.
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
    """Saves and waits, and retries where `poll` would ask for it."""
    self.save(step, state, facts)
    while self._settle():
      self.save(step, state, facts)
    self.wait(step)

  def restore(
    self, like: TrainState, step: int | None = None
  ) -> tuple[int, TrainState, dict[str, Any]] | None:
    """Restores the newest good state, placed and typed as the abstract `like`.

    Its perturbation is None. Newer checkpoints that are damaged are reported.
    They are also renamed, unless the directory is open for reading only, as
    the run will save their steps again.

    Args:
      like: shapes, types and shardings.
      step: restores this one only.

    Returns:
      Step, state and the facts it was saved with; None without a checkpoint.

    Raises:
      CheckpointError: if none is good; with `strict`, if the newest is not.
      StorageError: if files cannot be read.
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
          f'{reason}; use an older one with checkpoint.strict=False, or '
          'remove the directory'
        )
      hosts.say(f'damaged, skipped: {reason}')
    if steps:
      raise CheckpointError(
        f'no checkpoint in {self._directory} is good; the lines above say what '
        'is wrong with each. Use another --workdir, or restore a good copy'
      )
    return None

  def close(self) -> None:
    """Waits for the save in progress.

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
    """Ends the save in progress; see `poll`."""
    try:
      self._confirm_pending()
    except StorageError as failure:
      if hosts.count() > 1 or self._failures == _MAX_FAILURES:
        raise
      if storage.is_full(failure) or _free_bytes(self._directory) < _FULL_BYTES:
        raise
      seconds = _BACK_OFF_SECONDS[self._failures - 1]
      hosts.say(f'{failure}; saving again in {seconds} s')
      _sleep(seconds)
      return True
    return False

  def _confirm_pending(self) -> None:
    """Waits for the save in progress, and checks that it is on disk."""
    step, self._pending = self._pending, None
    if step is None:
      return
    try:
      if self._start_error is not None:
        raise self._start_error
      self._manager.wait_until_finished()
      if hosts.is_writer():
        self._confirm(step)
    except (*files.UNWRITABLE, StorageError) as error:
      self._started = self._start_error = None
      self._failures += 1
      self._manager.reload()
      raise self._failure(step, error) from error
    self._failures = 0

  def _confirm(self, step: int) -> None:
    if step not in files.committed(self._directory):
      raise OSError(errno.EIO, 'the save ended without a commit file')
    path, like = self._directory / str(step), self._pending_like
    if reason := files.inspect(path, step, like)['reason']:
      files.remove(path)  # else the step would count as saved
      raise OSError(errno.EIO, f'the save ended incomplete: {reason}')
    for old in files.removable(self._directory, self._keep):
      path = self._directory / str(old)
      try:
        storage.write(lambda path=path: files.remove(path), path)
      except StorageError as error:
        hosts.say(f'{error}; it stays until the next start')

  def _failure(self, step: int, error: BaseException) -> StorageError:
    if storage.is_full(error):
      error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    failure = storage.failure(error, self._directory)
    return StorageError(f'step {step} could not be saved: {failure}')

  # ---- Restoring, inside ---------------------------------------------------

  def _read(
    self, step: int, like: TrainState
  ) -> tuple[tuple[TrainState, dict[str, Any]] | None, str]:
    """Reads state and facts, or what is wrong with them; as on all hosts.

    Hosts agree after each part, because the next one needs all of them.
    """
    path = self._directory / str(step)
    checked = hosts.on_writer(
      'the check of a checkpoint', lambda: files.inspect(path, step, like)
    )
    if checked['reason']:
      return None, checked['reason']
    declared, state, reason = checked['manifest'], None, ''
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
      reason = hosts.first('its checksums', _damage(declared, state))
    return (None if reason else (state, declared['facts'])), reason

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
    faults.point('checkpoint/mid_write', files.step_of(self.get_final()))
    return path

  async def finalize(self) -> None:
    faults.point('checkpoint/before_commit', files.step_of(self.get_final()))
    await super().finalize()
    faults.point('checkpoint/after_commit', files.step_of(self.get_final()))


def _damage(declared: Mapping[str, Any], state: TrainState) -> str:
  sums, _ = checksum.checksums(state)
  damaged = [
    name for name, x in declared['leaves'].items() if x['sum'] != sums[name]
  ]
  if not damaged:
    return ''
  return (
    f'{len(damaged)} of {len(sums)} leaves are not as they were saved: '
    f'{", ".join(damaged[:4])}'
  )


def _free_bytes(directory: epath.Path) -> float:
  if storage.is_remote(directory):
    return float('inf')
  return shutil.disk_usage(directory).free
