"""Weights that are not those of a run: a file of `export`, or timm's."""

from __future__ import annotations

import hashlib

from flax import traverse_util

from conadv_jax.base import storage
from conadv_jax.experiment import Run
from conadv_jax.method.state import Snapshot
from conadv_jax.models import weights


def read(path: str, run: Run) -> tuple[Snapshot, dict[str, str]]:
  """Reads the weights of the network of `run`; every route gets the same.

  timm's batch norm divides by sqrt(var + its own epsilon). Where `run` has
  another epsilon, the difference goes into the variance, as in `export`.

  Args:
    path: a safetensors file, local or in a bucket.
    run: what the weights are for.

  Returns:
    The weights, and what identifies them: `file` and its `sha256`.

  Raises:
    ConfigError: if the file cannot be read, or its names and shapes are not
      those of the network.
  """
  arrays = weights.load(path)
  config, state = run.config, run.abstract_state()
  variables = {'params': state.params, 'batch_stats': state.batch_stats}
  if any(name.startswith('params/') for name in arrays):
    made = weights.from_arrays(arrays, config.model, variables)
  else:
    made = weights.from_state_dict(arrays, config.model, variables)
    moved = weights.timm_epsilon(config.model) - config.bn_epsilon
    stats = traverse_util.flatten_dict(made['batch_stats'])
    stats = {k: x + moved * (k[-1] == 'var') for k, x in stats.items()}
    made['batch_stats'] = traverse_util.unflatten_dict(stats)
  digest = hashlib.sha256(storage.expand(path).read_bytes()).hexdigest()
  return (
    Snapshot(made['params'], made.get('batch_stats', {})),
    {'file': path, 'sha256': digest},
  )
