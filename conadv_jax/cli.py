"""Command lines: flags, errors and exit codes."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import ml_collections
from absl import flags
from ml_collections import config_flags

from conadv_jax import hosts
from conadv_jax.base import errors
from conadv_jax.base.errors import (
  CommandError,
  ConfigError,
  Preempted,
  unknown,
)
from conadv_jax.config import flatten
from conadv_jax.hosts import join, leaving


def exit_code(error: Exception) -> int:
  """Returns that of a command which `error` ends."""
  if isinstance(error, flags.Error):
    return errors.USAGE
  return getattr(error, 'exit_code', 1)


def run(main: Callable[[Sequence[str]], Any], usage: str) -> None:
  """Runs `main(argv)` and exits with its status, as `exit_code` has it."""
  if {'-h', '--help'} & set(sys.argv[1:]):
    print(usage)
    sys.exit(0)
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


def parse_config_file(
  argv: Sequence[str],
) -> tuple[ml_collections.ConfigDict, str]:
  """`--config=FILE[:args] --workdir=DIR [--config.field=value ...]`.

  Raises:
    ConfigError: for a missing flag, a file that does not load, or an override
      of an unknown field.
  """
  config, workdir = _parse(argv)
  if not workdir:
    raise ConfigError('missing --workdir=DIR, where the run is written')
  return config, workdir


def parse_config(argv: Sequence[str]) -> ml_collections.ConfigDict:
  """`--config=FILE[:args] [--config.field=value ...]`, of no run.

  Raises:
    ConfigError: as `parse_config_file` does.
  """
  config, workdir = _parse(argv)
  if workdir:
    raise ConfigError(
      f'unexpected --workdir={workdir}: nothing is trained here'
    )
  return config


def _parse(
  argv: Sequence[str],
) -> tuple[ml_collections.ConfigDict, str | None]:
  values = flags.FlagValues()
  try:
    with _command_line(argv):
      config = config_flags.DEFINE_config_file('config', flag_values=values)
      workdir = flags.DEFINE_string('workdir', None, '', flag_values=values)
      _reject_positional(values(argv))
    if config.value is not None:
      config.value.to_dict()  # a file that did not load says so when it is read
  except (AttributeError, KeyError) as error:
    raise _unknown_override(argv) or _load_error(error) from error
  except (ImportError, OSError, SyntaxError) as error:
    raise _load_error(error) from error
  except flags.IllegalFlagValueError as error:
    # An error of the file's arguments comes wrapped, with its traceback.
    _, wrapped, message = str(error).rpartition('ConfigError: ')
    raise (ConfigError(message.strip()) if wrapped else error) from error
  if config.value is None:
    raise ConfigError('missing --config=configs/NAME.py')
  return config.value, workdir.value


def parse_overrides(
  argv: Sequence[str], config: ml_collections.ConfigDict
) -> ml_collections.ConfigDict:
  """`config` with the `--config.field=value` of `argv`; skips `--workdir`.

  Raises:
    ConfigError: for an override of an unknown field.
  """
  values = flags.FlagValues()
  try:
    with _command_line(argv):
      holder = config_flags.DEFINE_config_dict(
        'config', config, flag_values=values
      )
      flags.DEFINE_string('workdir', None, '', flag_values=values)
      _reject_positional(values(argv))
  except (AttributeError, KeyError) as error:
    raise _unknown_field(argv, config) or error from error
  return holder.value


def parse_workdir(argv: Sequence[str]) -> str:
  """The value of `--workdir`; every other flag is left for later."""
  values = flags.FlagValues()
  workdir = flags.DEFINE_string('workdir', None, '', flag_values=values)
  values(argv, known_only=True)
  if not workdir.value:
    raise ConfigError('missing --workdir=DIR, the directory of a run')
  return workdir.value


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


@contextlib.contextmanager
def _command_line(argv: Sequence[str]):
  """ml_collections looks for overrides in sys.argv, whatever it is given."""
  before, sys.argv = sys.argv, list(argv)
  try:
    yield
  finally:
    sys.argv = before


def _reject_positional(rest: Sequence[str]) -> None:
  if rest[1:]:
    raise ConfigError(
      f'unexpected argument {rest[1]!r}; flags are --name=value'
    )


def _unknown_override(argv: Sequence[str]) -> ConfigError | None:
  """The error of an override that the config file has no field for."""
  values = flags.FlagValues()
  plain = [arg for arg in argv if not re.match(r'--?(no)?config\.', arg)]
  try:
    with _command_line(plain):
      config = config_flags.DEFINE_config_file('config', flag_values=values)
      values(plain, known_only=True)
  except (AttributeError, KeyError):
    return None  # the file itself is wrong, not an override
  return _unknown_field(argv, config.value)


def _load_error(error: Exception) -> ConfigError:
  hint = ''
  if isinstance(error, ModuleNotFoundError):
    hint = '; run from the root of the repository'
  return ConfigError(f'--config: {type(error).__name__}: {error}{hint}')


def _unknown_field(argv: Sequence[str], config: Any) -> ConfigError | None:
  known = flatten(config.to_dict()) if config is not None else {}
  for arg in argv:
    match = re.match(r'--?(?:no)?config\.([^=\s]+)', arg)
    if match and match[1] not in known:
      return unknown('config field', match[1], known)
  return None
