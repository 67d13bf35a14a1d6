"""The work directory of a run: its `config.json` and what guards it."""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import json
import subprocess
import time
import uuid
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from conadv_jax import hosts
from conadv_jax.base import fields, storage
from conadv_jax.base.errors import ConfigError, check_no_credentials
from conadv_jax.config import Config, changes, from_config_dict, to_dict
from conadv_jax.data.quarantine import Quarantine
from conadv_jax.experiment import Run
from conadv_jax.run import provenance

_PACKAGES = (
  'conadv_jax', 'jax', 'jaxlib', 'libtpu', 'flax', 'optax', 'orbax-checkpoint',
  'tensorflow', 'tensorflow-cpu', 'tensorflow-datasets', 'numpy',
)  # fmt: skip

# What `starts` in config.json keeps the changes of.
_TRACED = ('config', 'git_commit', 'versions', 'devices')

# Fields that a rerun may change: they do not alter the weights of any step, but
# for rounding, as the number of devices does.
_FREE = (
  'max_steps', 'log_every_steps', 'attack_stats_every_steps', 'noise_scale',
  'plots', 'wandb_project', 'max_nonfinite_steps', 'microbatches', 'remat',
  'xla_flags', 'grad_buckets', 'dataset.data_dir', 'dataset.cache',
  'dataset.max_bad_share', 'checkpoint.', 'eval.', 'hang_timeout_seconds',
  'profile.', 'compile_cache',
)  # fmt: skip


def path_of(workdir: str) -> epath.Path:
  """The work directory that a user names; `~` is the home.

  Raises:
    ConfigError: for a URL with what may be a credential, a name that orbax
      cannot read, or a file.
  """
  check_no_credentials('workdir', workdir)
  path = storage.expand(workdir)
  _check_name(path)
  if not storage.is_remote(path) and path.is_file():
    raise ConfigError(f'workdir={workdir!r}: is a file; name a directory')
  return path


def prepare(workdir: str, run: Run, data: Mapping[str, Any]) -> epath.Path:
  """Makes `workdir`, or checks the run that is there.

  Host 0 does it; the others wait for its result.

  Args:
    workdir: the directory, or a bucket's.
    run: the run that starts or resumes there.
    data: what identifies the examples, as `write_config` gets it.

  Raises:
    ConfigError: if the directory holds a run of another configuration (the
      message has the fields that differ), cannot be made, or is not the same
      on all hosts.
    StorageError: if the storage fails, in spite of retries.
  """
  path = path_of(workdir)

  def make() -> None:
    try:
      path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise ConfigError(
        f'workdir={workdir!r}: cannot be made: {error}'
      ) from error
    if (path / 'config.json').exists():
      check_same(path, run.config, data)

  hosts.on_writer('the work directory', make)
  _check_shared(path)
  return path


def check_not_past(run: Run, step: int) -> None:
  """Raises ConfigError if a checkpoint at `step` is after the last step."""
  if step > run.steps.stop:
    raise ConfigError(
      f'max_steps={run.config.max_steps}: the run is already at step {step}; '
      'use another --workdir, or more steps'
    )


def write_config(
  path: epath.Path,
  run: Run,
  data: Mapping[str, Any],
  step: int = 0,
  began: float | None = None,
  weights: Mapping[str, Any] | None = None,
) -> float:
  """Writes `config.json`: the resolved configuration and what it ran on.

  Its `starts` keeps what earlier starts ran on, as changes.

  Args:
    path: the work directory.
    run: the run.
    data: what identifies the examples; JSON can hold it.
    step: that this start begins after.
    began: when this start did, in seconds since the epoch; None is now.
    weights: what identifies those of `init_from`, if this start reads them.

  Returns:
    When the first start began, likewise.

  Raises:
    StorageError: if that fails.
  """
  at = dt.datetime.fromtimestamp(began or time.time(), dt.UTC)
  start = {'step': step, 'time': at.isoformat(timespec='seconds')}
  if weights:
    start['init_from'] = dict(weights)
  first = hosts.on_writer(
    'config.json', lambda: _write_config(path, run, data, start)
  )
  return dt.datetime.fromisoformat(first).timestamp()


def not_applied(path: epath.Path, config: Config) -> list[str]:
  """A line for each setting that is not as the run in `path` was trained."""

  def compare() -> list[str]:
    return _diff(
      changes(from_config_dict(read_run(path)['config']), config, ())
    )

  return hosts.on_writer('the comparison of settings', compare)


def read_config(workdir: str) -> dict[str, Any]:
  """The resolved configuration of the run in `workdir`, as nested dicts.

  Raises:
    ConfigError: if there is no run.
    StorageError: if the storage fails, in spite of retries.
  """
  return read_run(path_of(workdir))['config']


def read_run(workdir: epath.Path) -> dict[str, Any]:
  """Content of `config.json`; see `write_config`.

  A field that it lacks, as it was written before there was that field, takes
  its default.

  Raises:
    ConfigError: if there is none, or it has fields that are gone or renamed.
    StorageError: if the storage fails, in spite of retries.
  """
  path = workdir / 'config.json'
  if not path.exists():
    raise ConfigError(
      f'workdir={str(workdir)!r}: holds no run (no config.json); train one '
      f'with python -m conadv_jax.train --config=... --workdir={workdir}'
    )
  try:
    content = json.loads(storage.read(path.read_text, path))
    from_config_dict(content['config'])
  except (json.JSONDecodeError, TypeError, KeyError) as error:
    raise ConfigError(f'{path}: not readable: {error!r}') from error
  except ConfigError as error:
    raise ConfigError(
      f'{path}: {error}\nthe run is of another version of this code: edit that '
      'file, or use the code of its git_commit'
    ) from error
  return content


def quarantine(path: epath.Path, config: Config) -> Quarantine:
  """The run's list of bad examples, of this host."""
  host = f'_host{hosts.index()}' if hosts.count() > 1 else ''
  return Quarantine(
    path / f'quarantine{host}.jsonl', max_share=config.dataset.max_bad_share
  )


def write_json(path: epath.Path, content: Any) -> None:
  """Writes through a temporary file, so that no reader sees half of it.

  Raises:
    StorageError: as `storage.write`.
  """
  storage.write_text(path, json.dumps(content, indent=2) + '\n')


def git_commit() -> str:
  """Commit of the code, '+changes' if it is edited, '' outside git."""
  folder = epath.Path(__file__).parent

  def git(*args: str) -> str:
    command = ['git', '-C', str(folder), *args]
    return subprocess.run(
      command, capture_output=True, text=True, check=True
    ).stdout.strip()

  try:
    commit = git('rev-parse', 'HEAD')
    return commit + ('+changes' if git('status', '--porcelain') else '')
  except (OSError, subprocess.CalledProcessError):
    return ''


def versions() -> dict[str, str]:
  """{package: version} of what the results of a run may depend on."""
  found = {}
  for name in _PACKAGES:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue  # tensorflow and tensorflow-cpu: one of the two is installed
  return found


def built_with() -> dict[str, dict[str, Any]]:
  """Returns what the last bits of a run depend on, besides its config."""
  return {
    'versions': versions(),
    'devices': {
      'kind': jax.devices()[0].device_kind,
      'count': jax.device_count(),
      'hosts': hosts.count(),
    },
  }


def _write_config(
  path: epath.Path, run: Run, data: Mapping[str, Any], start: dict[str, Any]
) -> str:
  """Returns the time of the first of `starts`."""
  now = {
    'config': to_dict(run.config),
    'data': dict(data),
    'steps': vars(run.steps),
    'git_commit': git_commit(),
  } | built_with()
  file = path / 'config.json'
  before = read_run(path) if file.exists() else now
  starts = before.get('starts', [])
  old, new = ({k: x.get(k) for k in _TRACED} for x in (before, now))
  changed = fields.differences(old, new)
  now['starts'] = [*starts, start | {'changed': changed}]
  write_json(file, now)
  # Starts of earlier versions have no time.
  return now['starts'][0].get('time', start['time'])


def _check_name(path: epath.Path) -> None:
  """Refuses what orbax would take for a pattern, and then not find."""
  name = str(path if storage.is_remote(path) else path.absolute())
  found = sorted(set('[]*?') & set(name))
  if found:
    raise ConfigError(
      f'workdir={name!r}: has {" ".join(found)} in its name, which orbax takes '
      'for a pattern when it reads a checkpoint; use a name without them'
    )


def _check_shared(path: epath.Path) -> None:
  """Checks that all hosts see a file that host 0 writes."""
  if hosts.count() == 1:
    return
  token = path / '.seen_by_all_hosts'

  def write() -> str:
    text = uuid.uuid4().hex
    storage.write(lambda: token.write_text(text), token)
    return text

  text = hosts.on_writer('a file in the work directory', write)
  seen = hosts.gather('its readers', comes_to_hold(token, text))

  def judge() -> None:
    token.unlink()
    blind = [host for host, sees in enumerate(seen) if not sees]
    if blind:
      raise ConfigError(
        f'workdir={str(path)!r}: what host 0 writes there is not seen by host'
        f'{"s" * (len(blind) > 1)} {hosts.ranges(blind)}; use a directory that '
        'all hosts share: a bucket (gs://...) or a network file system'
      )

  hosts.on_writer('the check of the work directory', judge)


def comes_to_hold(path: epath.Path, text: str) -> bool:
  """Whether `path` does; network file systems show new files late."""
  for wait_seconds in (0, 0.1, 0.5, 1, 2, 4):
    time.sleep(wait_seconds)
    try:
      if path.read_text() == text:
        return True
    except OSError:
      continue
  return False


def check_same(
  path: epath.Path, config: Config, data: Mapping[str, Any]
) -> None:
  """Checks that the run in `path` may go on with `config` and `data`.

  Raises:
    ConfigError: with the fields and facts that differ.
  """
  content = read_run(path)
  differences = changes(from_config_dict(content['config']), config, _FREE)
  old, new = differences.get('epochs', (0, 0))
  if new > old:
    del differences['epochs']
    print(
      f'epochs: {old:g} -> {new:g}: from this step on, the learning rate '
      'follows the longer schedule'
    )
  lines = _diff(differences)
  lines += provenance.changes(content.get('data', {}), data)
  if lines:
    raise ConfigError(
      f'workdir={str(path)!r}: holds a run of another configuration, or of '
      'other examples:\n  '
      + '\n  '.join(lines)
      + '\nuse another --workdir, or the configuration and data of that run'
    )
  built = built_with()
  rebuilt = {
    f'{group}.{name}': (content.get(group, {}).get(name), value)
    for group, values in built.items()
    for name, value in values.items()
    if content.get(group, {}).get(name) != value
  }
  if rebuilt:
    print(
      'changed since this run was last started, so that numbers may differ in '
      'their last bits:\n  ' + '\n  '.join(_diff(rebuilt))
    )


def _diff(differences: Mapping[str, tuple[Any, Any]]) -> list[str]:
  return [
    f'{name}: {old!r} -> {new!r}' for name, (old, new) in differences.items()
  ]
