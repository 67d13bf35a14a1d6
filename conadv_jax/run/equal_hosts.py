"""Compares what must be equal on all hosts, before anything is compiled."""

from __future__ import annotations

import collections
import hashlib
import json
import os
import pathlib
import platform
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from conadv_jax import hosts
from conadv_jax.base.errors import ConfigError
from conadv_jax.config import Config, flatten, to_dict
from conadv_jax.experiment import Run
from conadv_jax.run import wandb_log, workdir

Facts = dict[str, Any]

# Of the environment only what changes programs: the rest may hold secrets.
_ENVIRONMENT = ('XLA_FLAGS', 'LIBTPU_INIT_ARGS')
_JAX_OPTIONS = (
  'jax_enable_x64', 'jax_default_matmul_precision', 'jax_default_prng_impl',
  'jax_threefry_partitionable', 'jax_numpy_dtype_promotion',
)  # fmt: skip


def check_program(config: Config) -> None:
  """Compares config, code, versions and devices of all hosts.

  Raises:
    ConfigError: on every host, with all that differs; if a package that the
      config asks for is not installed.
  """
  wandb_log.check_installed(config.wandb_project)
  _compare('the comparison of programs', program(config))


def check_input(run: Run, data: Facts) -> None:
  """Compares what hosts feed: shapes, the examples, places in the batch.

  Args:
    run: as built on this host.
    data: what identifies the examples that this host found.

  Raises:
    ConfigError: on every host, with all that differs, or if a place of the
      global batch has not exactly one host.
  """
  positions = run.local_positions()
  facts = {f'data.{name}': value for name, value in data.items()}
  facts['batch.examples_per_host'] = len(positions)
  for name, x in run.abstract_batch().items():
    facts[f'batch.{name}'] = f'{x.dtype}{list(x.shape)}'
  _compare('the comparison of inputs', facts)
  rows = hosts.gather('places in the batch', _spans(positions))
  hosts.on_writer(
    'the check of places in the batch',
    lambda: check_cover(rows, run.config.batch_size),
  )


def differences(rows: Sequence[Mapping[str, Any]]) -> list[str]:
  """Makes a line for each fact that differs from host 0's.

  Args:
    rows: facts of each host, in order.
  """
  lines = []
  for name in sorted(set().union(*rows)):
    by_value = collections.defaultdict(list)
    for host, row in enumerate(rows):
      by_value[_text(row, name)].append(host)
    expected = _text(rows[0], name)
    others = [
      f'{value} on host{"s" * (len(found) > 1)} {hosts.ranges(found)}'
      for value, found in by_value.items()
      if value != expected
    ]
    if others:
      lines.append(f'{name}: {expected} on host 0, {", ".join(others)}')
  return lines


def check_cover(rows: Sequence[Sequence[Sequence[int]]], size: int) -> None:
  """Checks that each place in [0, size) gets its example from one host.

  Args:
    rows: the places of each host, as [start, stop) spans.
    size: examples in the global batch.

  Raises:
    ConfigError: naming the first place that is fed by none or by several.
  """
  count = np.zeros(size, np.int32)
  for spans in rows:
    for start, stop in spans:
      count[start:stop] += 1
  wrong = np.flatnonzero(count != 1)
  if len(wrong):
    place = int(wrong[0])
    feeding = [
      host
      for host, spans in enumerate(rows)
      if any(start <= place < stop for start, stop in spans)
    ]
    who = f'hosts {hosts.ranges(feeding)}' if feeding else 'no host'
    raise ConfigError(
      f'batch_size={size}: place {place} of the batch is fed by {who}, and '
      f'{len(wrong)} places in all not by exactly one; use a batch_size and a '
      'bn_group_size that give each host whole groups'
    )


def program(config: Config) -> Facts:
  """What must be equal on all hosts before anything is compiled."""
  local = jax.local_devices()
  facts = {
    'python': platform.python_version(),
    'devices.kind': local[0].device_kind,
    'devices.per_host': len(local),
  }
  groups = {
    'config': flatten(to_dict(config)),
    'code': code_digests(),
    'version': workdir.versions(),
    'environment': {name: os.environ.get(name, '') for name in _ENVIRONMENT},
    'jax': {name: getattr(jax.config, name) for name in _JAX_OPTIONS},
  }
  for group, values in groups.items():
    facts |= {f'{group} {name}': value for name, value in values.items()}
  return facts


def code_digests() -> dict[str, str]:
  """{file: the first 12 digits of its SHA-256} of the package's Python."""
  package = pathlib.Path(__file__).parents[1]
  return {
    path.relative_to(package.parent).as_posix(): hashlib.sha256(
      path.read_bytes()
    ).hexdigest()[:12]
    for path in sorted(package.rglob('*.py'))
  }


def check_same(rows: Sequence[Mapping[str, Any]]) -> None:
  """Checks that the facts of all hosts are equal.

  Raises:
    ConfigError: with all that differs.
  """
  if lines := differences(rows):
    raise ConfigError(
      'the hosts differ:\n  '
      + '\n  '.join(lines)
      + '\nstart the same code with the same flags, versions and environment '
      'on every host'
    )


def _compare(name: str, facts: Facts) -> None:
  rows = hosts.gather(name, facts)
  hosts.on_writer(f'the result of {name}', lambda: check_same(rows))


def _text(row: Mapping[str, Any], name: str) -> str:
  return json.dumps(row[name]) if name in row else 'missing'


def _spans(positions: np.ndarray) -> list[list[int]]:
  """Places -> [start, stop) spans of neighbours."""
  return list(_runs(np.sort(positions)))


def _runs(places: np.ndarray) -> Iterator[list[int]]:
  for run in np.split(places, np.flatnonzero(np.diff(places) != 1) + 1):
    yield [int(run[0]), int(run[-1]) + 1]
