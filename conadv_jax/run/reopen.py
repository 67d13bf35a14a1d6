"""Opens a run that was trained: its configuration and newest weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from etils import epath

from conadv_jax import cli
from conadv_jax.base.errors import ConfigError
from conadv_jax.checkpoints.checkpoint import Checkpoints
from conadv_jax.config import Config, changes, from_config_dict
from conadv_jax.experiment import Run
from conadv_jax.method.state import TrainState
from conadv_jax.run import compile_cache, workdir


def parse_args(
  argv: Sequence[str], free: Sequence[str] = (), **eval_defaults: Any
) -> tuple[epath.Path, Config]:
  """The run's directory, and its configuration with the overrides of `argv`.

  Args:
    argv: `--workdir=DIR [--config.field=value ...]`.
    free: fields that may be set besides those that every command reads.
    **eval_defaults: fields of `eval` that are not as in training by default.

  Raises:
    ConfigError: if there is no run, or a field was fixed by its training.
  """
  directory = cli.parse_workdir(argv)
  values = workdir.read_config(directory)
  values['eval'] = values.get('eval', {}) | eval_defaults
  trained = from_config_dict(values)
  config = from_config_dict(cli.parse_overrides(argv, values))
  _check_overrides(trained, config, free)
  compile_cache.use(config)
  return workdir.path_of(directory), config


def restore_newest(path: epath.Path, run: Run) -> tuple[int, TrainState]:
  """Step and state of the newest checkpoint of the run in `path`.

  Raises:
    ConfigError: if there is none.
  """
  step = None
  if (path / 'checkpoints').exists():
    checkpoints = Checkpoints(path, read_only=True)
    step = checkpoints.latest_step()
  if step is None:
    raise ConfigError(f'workdir={str(path)!r}: holds no checkpoint yet')
  step, state, _ = checkpoints.restore(run.abstract_state())
  return step, state


def _check_overrides(
  trained: Config, config: Config, free: Sequence[str]
) -> None:
  free = (
    'dataset.data_dir', 'dataset.cache', 'dataset.max_bad_share',
    'compile_cache', *free,
  )  # fmt: skip
  for name, (old, new) in changes(trained, config, ('eval.', *free)).items():
    raise ConfigError(
      f'{name}={new!r}: the run was trained with {old!r}; only eval.*, '
      f'{", ".join(free)} can be set here'
    )
