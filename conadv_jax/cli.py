"""Command lines: flags, errors and exit codes."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NoReturn

from absl import flags

from conadv_jax import hosts
from conadv_jax.base import errors, fields, jax_platform
from conadv_jax.base.errors import (
  CommandError,
  ConfigError,
  Preempted,
  unknown,
)
from conadv_jax.config import Config, recipes
from conadv_jax.config.notices import RENAMED
from conadv_jax.hosts import join, leaving


def exit_code(error: Exception) -> int:
  """Returns that of a command which `error` ends."""
  if isinstance(error, flags.Error):
    return errors.USAGE
  return getattr(error, 'exit_code', 1)


def run(main: Callable[[Sequence[str]], Any]) -> None:
  """Runs `main(argv)` and exits with its status, as `exit_code` has it."""
  # Names of files may have bytes that are no text.
  sys.stdout.reconfigure(errors='backslashreplace')
  jax_platform.choose()
  try:
    main(sys.argv)
  except Preempted as error:
    # The other hosts are not told: they have the same error.
    print(f'{hosts.label()}{error}', file=sys.stderr, flush=True)
    _end(error.exit_code)
  except (CommandError, flags.Error) as error:
    _fail(f'error: {error}', exit_code(error))
  except KeyboardInterrupt:
    if hosts.count() == 1:
      raise
    # At once: at its end, JAX would wait for hosts that wait for this one.
    os._exit(errors.INTERRUPTED)
  except Exception as error:
    if hosts.count() == 1:
      raise
    traceback.print_exc()
    leaving.abandon(f'{type(error).__name__}: {error}', 1)
    leaving.leave(1)


def start_hosts(argv: Sequence[str]) -> list[str]:
  """Starts this host as `argv` says; returns the other arguments.

  `--coordinator=HOST:PORT --num_hosts=N --host_index=I`, none of which is
  needed where JAX finds the hosts by itself, or with one host; and
  `--start_timeout_seconds=300 --peer_timeout_seconds=60`. `join.start` has
  their meaning.

  Raises:
    ConfigError: if hosts cannot be started so.
  """
  values = flags.FlagValues()
  options = dict(flag_values=values)
  coordinator = flags.DEFINE_string('coordinator', None, '', **options)
  num_hosts = flags.DEFINE_integer('num_hosts', None, '', **options)
  host_index = flags.DEFINE_integer('host_index', None, '', **options)
  timeout = flags.DEFINE_integer('start_timeout_seconds', 300, '', **options)
  peers = flags.DEFINE_integer('peer_timeout_seconds', 60, '', **options)
  rest = values(argv, known_only=True)
  join.start(
    coordinator.value,
    num_hosts.value,
    host_index.value,
    timeout.value,
    peers.value,
  )
  return rest


def parse_config_file(argv: Sequence[str]) -> tuple[dict[str, Any], str]:
  """`--config=RECIPE[:args] --workdir=DIR [--config.field=value ...]`.

  Raises:
    ConfigError: for a missing flag, a recipe that does not load, or an
      override of an unknown field.
  """
  values, workdir = _parse(argv)
  if not workdir:
    raise ConfigError('missing --workdir=DIR, where the run is written')
  return values, workdir


def parse_config(argv: Sequence[str]) -> dict[str, Any]:
  """`--config=RECIPE[:args] [--config.field=value ...]`, of no run.

  Raises:
    ConfigError: as `parse_config_file` does.
  """
  values, workdir = _parse(argv)
  if workdir:
    raise ConfigError(
      f'unexpected --workdir={workdir}: nothing is trained here'
    )
  return values


def parse_overrides(
  argv: Sequence[str], values: Mapping[str, Any]
) -> dict[str, Any]:
  """`values` with the `--config.field=value` of `argv`; skips `--workdir`.

  Raises:
    ConfigError: for an override of an unknown field.
  """
  _, overrides = _read_flags(argv, ('workdir',))
  return recipes.override(values, overrides)


def parse_workdir(argv: Sequence[str]) -> str:
  """The value of `--workdir`; every other flag is left for later."""
  values = flags.FlagValues()
  workdir = flags.DEFINE_string('workdir', None, '', flag_values=values)
  values(argv, known_only=True)
  if not workdir.value:
    raise ConfigError('missing --workdir=DIR, the directory of a run')
  return workdir.value


def _parse(argv: Sequence[str]) -> tuple[dict[str, Any], str | None]:
  given, overrides = _read_flags(argv, ('config', 'workdir'))
  if not given.get('config'):
    raise ConfigError(
      'missing --config=NAME or --config=FILE.py; recipes: '
      + ', '.join(recipes.shipped())
    )
  return recipes.load(given['config'], overrides), given.get('workdir')


_FLAG = re.compile(r'--?(no)?((\w+)(?:\.([\w.]+))?)(?:=(.*))?', re.DOTALL)


def _read_flags(
  argv: Sequence[str], names: Collection[str]
) -> tuple[dict[str, str], dict[str, str]]:
  """({flag: value}, {field: value}) of the arguments.

  `--name=value` and `--name value` with one or two dashes; for a field that is
  a bool also `--config.field` and `--noconfig.field`.
  """
  given, overrides = {}, {}
  rest = iter(argv[1:])
  for argument in rest:
    match = _FLAG.fullmatch(argument)
    if not match:
      raise ConfigError(
        f'unexpected argument {argument!r}; flags are --name=value'
      )
    no, name, group, field, value = match.groups()
    if group == 'config' and field:
      if no:
        value = 'false'
      elif value is None and field not in RENAMED:
        is_bool = fields.kind_of(Config, field) is bool
        value = 'true' if is_bool else None
      values = overrides
    elif name in names and not no:
      values = given
    else:
      raise unknown(
        'flag', argument.partition('=')[0], [f'--{n}' for n in names]
      )
    if value is None:
      value = next(rest, None)
    if value is None:
      raise ConfigError(f'{argument}: needs a value, {argument}=...')
    values[field if values is overrides else name] = value
  return given, overrides


def _fail(message: str, code: int) -> NoReturn:
  """Ends this host, and tells the others."""
  print(f'{hosts.label()}{message}', file=sys.stderr, flush=True)
  leaving.abandon(message, code)
  _end(code)


def _end(code: int) -> NoReturn:
  if hosts.count() > 1:
    # At once: at its end, JAX would wait for hosts that may not come.
    leaving.leave(code)
  sys.exit(code)
