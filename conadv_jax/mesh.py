"""Devices -> Mesh, and every sharding of the project.

Batches are laid out `[G, b, ...]`: G batch-norm groups of b examples. The mesh
has two axes: `data` splits the groups; `bn` splits the examples of a group, and
is longer than 1 only where one group is larger than a device's share.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from conadv_jax.config import ConfigError


def make_mesh(
  batch_size: int,
  bn_group_size: int,
  devices: Sequence[jax.Device] | None = None,
) -> Mesh:
  """Mesh of `devices` (default: all) on which `[G, b]` divides evenly.

  Raises:
    ConfigError: if the batch or its groups do not divide over the devices.
  """
  devices = jax.devices() if devices is None else list(devices)
  count = len(devices)
  groups = batch_size // bn_group_size
  if batch_size % count:
    multiple = math.lcm(count, bn_group_size)
    nearest = max(1, round(batch_size / multiple)) * multiple
    raise ConfigError(
      f'batch_size={batch_size}: does not divide over {count} devices; '
      f'nearest: batch_size={nearest}'
    )
  if groups % count == 0:
    shape = (count, 1)
  elif count % groups == 0 and bn_group_size % (count // groups) == 0:
    shape = (groups, count // groups)
  else:
    raise ConfigError(
      f'bn_group_size={bn_group_size}: {groups} groups (batch_size='
      f'{batch_size}) do not divide over {count} devices; use a group size '
      f'that divides {batch_size // count} examples per device'
    )
  types = (AxisType.Auto, AxisType.Auto)
  return jax.make_mesh(shape, ('data', 'bn'), types, devices=devices)


def bn_span(mesh: Mesh) -> int:
  """Devices that share one batch-norm group."""
  return mesh.shape['bn']


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Of arrays `[G, b, ...]`."""
  return NamedSharding(mesh, P('data', 'bn'))


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, P())


def local_positions(mesh: Mesh, groups: int, group_size: int) -> np.ndarray:
  """Places in the global batch that this host feeds: int [G_host, b_host].

  Raises:
    ValueError: if this host's devices do not cover a rectangle of [G, b].
  """
  shape = (groups, group_size)
  blocks = batch_sharding(mesh).addressable_devices_indices_map(shape).values()
  blocks = {
    tuple(s.indices(n) for s, n in zip(b, shape, strict=True)) for b in blocks
  }
  rows, columns = (
    np.concatenate([np.arange(*s) for s in sorted({b[axis] for b in blocks})])
    for axis in (0, 1)
  )
  if len(rows) * len(columns) != sum(
    len(range(*r)) * len(range(*c)) for r, c in blocks
  ):
    raise ValueError('the devices of one host must cover whole rows of groups')
  return rows[:, None] * group_size + columns[None, :]


def put_batch(
  mesh: Mesh, groups: int, group_size: int, local: Mapping[str, np.ndarray]
) -> dict[str, jax.Array]:
  """This host's share `[local, ...]` -> global arrays `[G, b, ...]`."""
  shape = local_positions(mesh, groups, group_size).shape
  sharding = batch_sharding(mesh)

  def put(x: np.ndarray) -> jax.Array:
    return jax.make_array_from_process_local_data(
      sharding,
      x.reshape(shape + x.shape[1:]),
      (groups, group_size) + x.shape[1:],
    )

  return {name: put(x) for name, x in local.items()}


def state_shardings(mesh: Mesh, state: Any) -> Any:
  """Shardings of a TrainState: all replicated but the perturbation."""
  every = jax.tree.map(lambda _: replicated(mesh), state)
  return every.replace(
    perturbation=jax.tree.map(
      lambda _: batch_sharding(mesh), state.perturbation
    )
  )
