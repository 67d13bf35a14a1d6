"""Audits several programs: what an option costs, and what fits where."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from conadv_jax.base.errors import ConfigError
from conadv_jax.config import Config, from_config_dict, to_dict
from conadv_jax.devices.topology import Topology

Audit = Callable[[Config, Topology], dict[str, Any]]

# Programs of one batch and slice that a sweep compiles before it gives up.
_MAX_TRIALS = 5

_COLUMNS = (
  'topology', 'alias', 'devices', 'hosts', 'method', 'batch_size',
  'examples_per_device', 'bn_group_size', 'mesh', 'microbatches', 'remat',
  'fits', 'peak_hbm_bytes', 'hbm_limit_bytes', 'flops_per_device',
  'flops_ratio', 'bytes_accessed_per_device', 'hbm_bytes_per_device',
  'roofline_seconds',
  'images_per_sec_bound', 'images_per_sec_per_host', 'compile_seconds',
)  # fmt: skip


def with_fields(config: Config, **fields: Any) -> Config:
  """Returns `config` with fields replaced; None takes the preset's value."""
  return from_config_dict(to_dict(config) | fields)


def variants(config: Config) -> Iterator[tuple[str, Config]]:
  """Yields names and configurations to compare, the baseline first."""
  adversarial = (
    config if config.is_adversarial else with_method(config, 'conadv')
  )
  yield 'baseline', with_method(config, 'baseline')
  yield 'disadv: clean + adv, tau 0', with_method(config, 'disadv')
  conadv = with_method(config, 'conadv')
  yield 'conadv: clean + adv, tau 1', conadv
  yield 'conadv, tau 2', with_fields(conadv, staleness_steps=2)
  yield 'conadv_aa: clean + aa + adv, tau 1', with_method(config, 'conadv_aa')
  if config.ascends:
    yield f'{config.method}, tau {config.staleness_steps}', config
  name = adversarial.method
  groups = config.batch_size // config.bn_group_size
  if config.microbatches == 1 and groups % 2 == 0:
    yield f'{name}, microbatches 2', with_fields(adversarial, microbatches=2)
  if config.remat == 'none':
    yield f'{name}, remat blocks', with_fields(adversarial, remat='blocks')
  if not config.shard_optimizer:
    yield (
      f'{name}, sharded optimizer',
      with_fields(adversarial, shard_optimizer=True),
    )


def with_method(config: Config, method: str) -> Config:
  """Returns `config` with another method and its staleness."""
  return with_fields(
    config,
    method=method,
    staleness_steps=None,
    eval=dataclasses.asdict(config.eval) | {'route': 'clean'},
  )


def compare(
  config: Config, topology: Topology, audit: Audit
) -> list[dict[str, Any]]:
  """Compares the cost of staleness, views, accumulation and remat.

  Ratios to the baseline are of FLOPs, bytes, roofline and compile time. A
  variant that the model or the slice does not allow has only a `name` and an
  `error`.
  """
  rows = []
  for name, variant in variants(config):
    try:
      row = row_of(audit(variant, topology))
    except ConfigError as error:
      row = {'error': str(error)}
    first = rows[0] if rows else row
    for key in (
      'flops_per_device',
      'bytes_accessed_per_device',
      'hbm_bytes_per_device',
      'roofline_seconds',
      'compile_seconds',
    ):
      if row.get(key) and first.get(key):
        row[key + '_ratio'] = row[key] / first[key]
    rows.append({'name': name} | row)
  return rows


def sweep(
  config: Config,
  topologies: Sequence[Topology],
  batch_sizes: Sequence[int],
  audit: Audit,
) -> list[dict[str, Any]]:
  """Finds the accumulation with which each batch fits each slice.

  Returns a row for every program that was compiled, also for those that do not
  fit. After one of these, the next has as many microbatches as it is estimated
  to need. Everything else stays as configured.
  """
  return [
    row
    for batch_size in batch_sizes
    for topology in topologies
    for row in _trials(
      with_fields(config, batch_size=batch_size, microbatches=1),
      topology,
      audit,
    )
  ]


def _trials(
  config: Config, topology: Topology, audit: Audit
) -> Iterator[dict[str, Any]]:
  """Rows of one batch and slice; each trial goes where the last one points."""
  for _ in range(_MAX_TRIALS):
    try:
      found = audit(config, topology)
    except ConfigError as error:
      yield {
        'topology': topology.label,
        'alias': topology.alias_label,
        'batch_size': config.batch_size,
        'microbatches': config.microbatches,
        'error': str(error),
      }
      return
    yield row_of(found)
    if found['fits']:
      return
    more = [
      int(r['option'].removeprefix('microbatches='))
      for r in found['remedies']
      if r['option'].startswith('microbatches=')
    ]
    if not more:
      return
    # The last is the one that is estimated to fit, or the most there can be.
    config = with_fields(config, microbatches=max(more))


def row_of(report: dict[str, Any]) -> dict[str, Any]:
  """Picks the columns of a report for a table of several."""
  return {name: report[name] for name in _COLUMNS if name in report}
