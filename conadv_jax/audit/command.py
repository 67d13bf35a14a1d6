"""The command of the audit: flags, what to compile, and files to write."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import jax
from etils import epath

from conadv_jax import cli
from conadv_jax.audit import files, libtpu, report, sweep
from conadv_jax.audit.cache import Auditor
from conadv_jax.audit.scaling import forecast
from conadv_jax.audit.scaling.plot import plot
from conadv_jax.audit.scaling.study import as_json
from conadv_jax.base import storage
from conadv_jax.base.errors import ConfigError, OutOfMemoryError
from conadv_jax.config import Config, from_config_dict
from conadv_jax.devices import topology


def audit(argv: Sequence[str]) -> dict[str, Any]:
  """Runs the command; returns the report that it prints.

  Raises:
    ConfigError: for a wrong flag or configuration.
    OutOfMemoryError: if the step does not fit a slice.
  """
  options, rest = _parser().parse_known_args(argv[1:])
  config = from_config_dict(cli.parse_config([argv[0], *rest]))
  topologies = [
    topology.parse(text, options.slices) for text in options.topology.split(',')
  ]
  # An audit computes nothing, so it must not occupy a TPU of this machine.
  jax.config.update('jax_platforms', 'cpu')
  libtpu.prepare_process()
  output = storage.expand(options.output) if options.output else None
  asked = files.asked(config, topologies, options)
  if output:
    files.check_free(output / _name(config, topologies, options), asked)
  auditor = Auditor(
    output / 'programs' if output else None, _programs(options, config)
  )
  if options.sweep:
    sizes = options.batch_sizes or str(config.batch_size)
    sizes = [_batch_size(text) for text in sizes.split(',')]
    # Without this check every row would report that libtpu is missing.
    libtpu.require_libtpu()
    result = {'sweep': sweep.sweep(config, topologies, sizes, auditor)}
    fits = True
  else:
    if len(topologies) > 1:
      raise ConfigError(
        f'topology={options.topology!r}: several need --sweep; name one'
      )
    result = _audit(config, topologies[0], options, auditor, output)
    fits = result['fits']
  print('\n' + report.text(result))
  result['asked'] = asked
  if options.json:
    files.write_json(storage.expand(options.json), result)
  if output:
    files.write_pages(output / _name(config, topologies, options), result)
  if not fits:
    raise OutOfMemoryError(report.verdict(result))
  return result


def _audit(
  config: Config,
  where: topology.Topology,
  options: argparse.Namespace,
  auditor: Auditor,
  output: epath.Path | None,
) -> dict[str, Any]:
  result = auditor(config, where)
  if options.compare:
    result['comparison'] = sweep.compare(config, where, auditor)
  if options.scaling and result['fits']:
    study = forecast.study(config, where, auditor)
    result['scaling'] = as_json(study)
    if output:
      title = f'{config.model}, {config.method}, {where.generation.name}'
      output.mkdir(parents=True, exist_ok=True)
      name = _name(config, [where], options)
      plot(study, title, output / f'{name}_scaling.png')
  return result


def _programs(options: argparse.Namespace, config: Config) -> int:
  """Upper bound of the programs to compile, to estimate the time left."""
  if options.sweep:
    return len(options.topology.split(',')) * len(
      (options.batch_sizes or '1').split(',')
    )
  compared = len(list(sweep.variants(config))) if options.compare else 0
  return 1 + compared + (4 if options.scaling else 0)


def _batch_size(text: str) -> int:
  if not text.isdecimal() or not int(text):
    raise ConfigError(
      f'batch_sizes={text!r}: must be numbers, e.g. 32768,98304'
    )
  return int(text)


def _name(
  config: Config,
  topologies: Sequence[topology.Topology],
  options: argparse.Namespace,
) -> str:
  """Names the files of a report, several of which can share a directory."""
  if options.sweep:
    return 'sweep'
  where = topologies[0].alias_label
  parts = [config.model, config.method, str(config.batch_size), where]
  parts = [part.replace(':', '-').replace(' ', '') for part in parts]
  if config.staleness_steps > 1:
    parts.append(f'tau{config.staleness_steps}')
  if config.microbatches > 1:
    parts.append(f'microbatches{config.microbatches}')
  for option in (config.remat, config.xla_flags):
    if option != 'none':
      parts.append(option)
  if config.shard_optimizer:
    parts.append('sharded')
  return '_'.join(parts)


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
  parser.add_argument('--topology', required=True)
  parser.add_argument('--slices', type=int, default=1)
  parser.add_argument('--batch_sizes', default='')
  for name in ('--json', '--output'):
    parser.add_argument(name)
  for name in ('--compare', '--sweep', '--scaling'):
    parser.add_argument(name, action='store_true')
  return parser
