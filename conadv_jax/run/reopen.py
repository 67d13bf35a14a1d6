"""Opens a run that was trained: its configuration, weights and examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from etils import epath

from conadv_jax import cli, hosts
from conadv_jax.base.errors import ConfigError
from conadv_jax.checkpoints.checkpoint import Checkpoints
from conadv_jax.config import Config, changes, from_config_dict
from conadv_jax.data.sources.source import Source
from conadv_jax.experiment import Run
from conadv_jax.method.state import TrainState
from conadv_jax.run import compile_cache, provenance, workdir


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
  if not saved_steps(path):
    raise ConfigError(f'workdir={str(path)!r}: holds no checkpoint yet')
  checkpoints = Checkpoints(path, read_only=True)
  step, state, _ = checkpoints.restore(run.abstract_state())
  return step, state


def saved_steps(path: epath.Path) -> list[int]:
  """Steps of the checkpoints of the run in `path`, ascending."""
  if not (path / 'checkpoints').exists():
    return []
  return Checkpoints(path, read_only=True).steps()


def open_trained(origin: Mapping[str, Any], run: Run) -> Source:
  """Opens the examples that the run was trained on.

  Tells of what may change last bits when its steps are repeated.

  Args:
    origin: content of its config.json.
    run: as built here.

  Raises:
    ConfigError: for other examples.
  """
  dataset = run.config.dataset
  source = run.spec.open('train', dataset)
  now = provenance.of_examples(run.spec, dataset.data_dir, train=source)
  if lines := provenance.changes(origin.get('data', {}), now):
    raise ConfigError(
      'the run was trained on other examples:\n  '
      + '\n  '.join(lines)
      + '\ngive its data with --config.dataset.data_dir=DIR'
    )
  devices = origin.get('devices', {}).get('count')
  if devices != jax.device_count():
    hosts.say(
      f'the run has {devices} devices, this is on {jax.device_count()}: '
      'last bits may differ'
    )
  if origin.get('versions') != workdir.versions():
    hosts.say('versions are not those of the run: last bits may differ')
  return source


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
