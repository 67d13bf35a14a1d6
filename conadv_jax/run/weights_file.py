"""Weights from elsewhere: a file of `export` or timm's, or another run."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

from etils import epath
from flax import traverse_util

from conadv_jax import experiment
from conadv_jax.base import storage
from conadv_jax.config import from_config_dict
from conadv_jax.experiment import Run
from conadv_jax.method.state import Snapshot
from conadv_jax.models import weights
from conadv_jax.run import workdir
from conadv_jax.run.evaluator import weights_of
from conadv_jax.run.reopen import restore_newest


def read(
  path: str, run: Run, new_head: Snapshot | None = None
) -> tuple[Snapshot, dict[str, Any]]:
  """Reads the weights of the network of `run`; every route gets the same.

  timm's batch norm divides by sqrt(var + its own epsilon). Where `run` has
  another epsilon, the difference goes into the variance, as in `export`.

  Args:
    path: a safetensors file, local or in a bucket, or the work directory of a
      run, whose newest weights and route `eval.route` are taken.
    run: what the weights are for.
    new_head: weights whose last layer is taken where that of `path` is for
      another number of classes; None refuses such weights.

  Returns:
    The weights, and what identifies them: `file`, `sha256` (of the file, or of
    the arrays of a run), the run's `step`, and whether they have a `new_head`.

  Raises:
    ConfigError: if they cannot be read, or their names and shapes are not
      those of the network.
  """
  folder = storage.expand(path)
  if folder.is_dir():
    arrays, identity = _of_run(folder, run)
  else:
    arrays = weights.load(path)
    identity = {'sha256': hashlib.sha256(folder.read_bytes()).hexdigest()}
  config, state = run.config, run.abstract_state()
  if new_head is not None:
    old = arrays
    arrays = weights.with_head(old, config.model, vars(new_head))
    identity['new_head'] = any(arrays[name] is not old[name] for name in old)
  variables = {'params': state.params, 'batch_stats': state.batch_stats}
  if weights.is_ours(arrays):
    made = weights.from_arrays(arrays, config.model, variables)
  else:
    made = weights.from_state_dict(arrays, config.model, variables)
    moved = weights.timm_epsilon(config.model) - config.bn_epsilon
    stats = traverse_util.flatten_dict(made['batch_stats'])
    stats = {k: x + moved * (k[-1] == 'var') for k, x in stats.items()}
    made['batch_stats'] = traverse_util.unflatten_dict(stats)
  found = Snapshot(made['params'], made.get('batch_stats', {}))
  return found, {'file': path} | identity


def _of_run(
  path: epath.Path, run: Run
) -> tuple[weights.StateDict, dict[str, Any]]:
  """The newest weights of the run in `path`, and what identifies them."""
  config = from_config_dict(workdir.read_run(path)['config'])
  # Weights do not depend on the layout of batches, which must suit the devices.
  names = ('batch_size', 'bn_group_size', 'microbatches')
  here = {name: getattr(run.config, name) for name in names}
  here['sam'] = dataclasses.replace(config.sam, group_size=0)
  other = experiment.build(
    dataclasses.replace(config, **here),
    run.mesh.devices.flatten().tolist(),
    trains=False,
  )
  step, state = restore_newest(path, other)
  now = weights_of(config, state)
  route = config.routes.index(config.eval.route)
  arrays = weights.to_arrays(now.params, now.batch_stats, route)
  digest = hashlib.sha256()
  for name in sorted(arrays):
    digest.update(name.encode() + arrays[name].tobytes())
  return arrays, {'sha256': digest.hexdigest(), 'step': step}
