"""The state that a run starts from: random weights, or those of `init_from`."""

from __future__ import annotations

from typing import Any

import jax
from etils import epath

from conadv_jax import hosts
from conadv_jax.base.errors import CheckpointError, ConfigError
from conadv_jax.checkpoints.checkpoint import Checkpoints
from conadv_jax.experiment import Run
from conadv_jax.method.state import Snapshot, TrainState
from conadv_jax.run import weights_file, workdir
from conadv_jax.run.reopen import saved_steps


def first_state(run: Run) -> tuple[TrainState, dict[str, Any]]:
  """The state before step 0, and what identifies the weights of `init_from`.

  Every route of the batch norms gets the rows of those weights. The last layer
  is new if they are for another number of classes.

  Raises:
    ConfigError: those weights cannot be read, or are of another network.
  """
  state = run.init_state()
  if not run.config.init_from:
    return state, {}
  random = jax.device_get(Snapshot(state.params, state.batch_stats))
  try:
    found, identity = weights_file.read(run.config.init_from, run, random)
  except ConfigError as error:
    raise ConfigError(f'init_from={run.config.init_from!r}: {error}') from error
  head = ', with a new last layer' if identity['new_head'] else ''
  hosts.say(f'starting from the weights of {run.config.init_from}{head}')
  return run.init_state(found), identity


def restore_before(
  path: epath.Path, run: Run, step: int
) -> tuple[int, TrainState]:
  """Step and state of the newest good checkpoint before `step`.

  Without one, those that the run began with.

  Raises:
    ConfigError: the weights that it began with are others now.
  """
  for older in reversed([s for s in saved_steps(path) if s < step]):
    checkpoints = Checkpoints(path, read_only=True)
    try:
      _, state, _ = checkpoints.restore(run.abstract_state(), older)
    except CheckpointError as error:
      hosts.say(f'damaged, skipped: {error}')
    else:
      hosts.say(f'repeating from the checkpoint of step {older}')
      return older, state
  hosts.say('repeating from step 0: no checkpoint is older')
  state, identity = first_state(run)
  before = workdir.read_run(path)['starts'][0].get('init_from', {})
  if before.get('sha256') != identity.get('sha256'):
    raise ConfigError(
      f'init_from={run.config.init_from!r}: has other weights than when the '
      f'run began (sha256 {before.get("sha256")}); bring that file back'
    )
  return 0, state
