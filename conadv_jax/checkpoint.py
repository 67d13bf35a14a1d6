"""Saving and restoring a TrainState with orbax."""

from __future__ import annotations

import orbax.checkpoint as ocp
from etils import epath

from conadv_jax import hosts
from conadv_jax.state import TrainState


class Checkpoints:
  """The checkpoints of a run, in `workdir/checkpoints`.

  The pending perturbation is left out: it is as large as a batch of float
  images, and `train_step.pending_perturbation` makes it again bit for bit.

  All hosts make the same calls. Which steps there are is what host 0 sees.
  """

  def __init__(
    self, workdir: epath.Path, keep: int = 1, read_only: bool = False
  ):
    """`read_only` leaves alone what a training run may be writing there."""
    if read_only:
      options = ocp.CheckpointManagerOptions(
        read_only=True, create=False, save_interval_steps=0
      )
    else:
      options = ocp.CheckpointManagerOptions(
        max_to_keep=keep, cleanup_tmp_directories=True
      )
    self._manager = ocp.CheckpointManager(
      epath.Path(workdir).absolute() / 'checkpoints', options=options
    )

  def latest_step(self) -> int | None:
    """Newest saved step, or None."""
    return hosts.on_writer('the newest checkpoint', self._manager.latest_step)

  def save(self, step: int, state: TrainState) -> None:
    """Starts saving `state`; a step that is already there is kept."""
    if not self._has(step):
      content = ocp.args.StandardSave(state.replace(perturbation=None))
      self._manager.save(step, args=content)

  def restore(self, step: int, like: TrainState) -> TrainState:
    """The state saved at `step`, placed and typed as the abstract `like`.

    Its perturbation is None.
    """
    like = like.replace(perturbation=None)
    return self._manager.restore(step, args=ocp.args.StandardRestore(like))

  def wait(self, step: int) -> None:
    """Blocks until the save of `step` is complete on disk.

    Raises:
      RuntimeError: if it is not.
    """
    self._manager.wait_until_finished()
    self._manager.reload()
    if not self._has(step):
      raise RuntimeError(
        f'checkpoint of step {step} did not reach {self._manager.directory}'
      )

  def close(self) -> None:
    self._manager.close()

  def _has(self, step: int) -> bool:
    return hosts.on_writer(
      'the list of checkpoints', lambda: step in self._manager.all_steps()
    )
