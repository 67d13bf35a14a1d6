"""Makes the mesh, and names every sharding of the project.

Batches are laid out `[G, b, ...]`: G batch-norm groups of b examples. The mesh
has two axes: `data` splits the groups; `bn` splits the examples of a group, and
is longer than 1 only where one group is larger than a device's share.

Forward and backward passes run per device (`per_device`, jax.shard_map), so
that what devices exchange is written down (`sums`), and not left to the
partitioner: it would sum bfloat16 gradients in bfloat16, and once per
microbatch. All else, the optimizer above all, is a program over global arrays.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from conadv_jax.base.errors import ConfigError
from conadv_jax.devices import loops

REPLICATED = P()
BATCH = P('data', 'bn')  # arrays [G, b, ...]
EXAMPLES = P(('data', 'bn'))  # arrays [N, ...] of which nothing asks for groups
FLAT = P('data')  # vectors of a sharded optimizer
AXES = ('data', 'bn')


class Places(NamedTuple):
  """Where groups and examples are in the batch of a step.

  Attributes:
    group: batch-norm groups, int32 [G].
    example: examples, int32 [G, b], counted row by row.
  """

  group: jax.Array
  example: jax.Array

  @classmethod
  def of(cls, groups: int, group_size: int) -> Places:
    """Of a whole batch [groups, group_size]."""
    group = jnp.arange(groups, dtype=jnp.int32)
    example = jnp.arange(groups * group_size, dtype=jnp.int32)
    return cls(group, example.reshape(groups, group_size))


# ---- Mesh ------------------------------------------------------------------


def make_mesh(
  batch_size: int,
  bn_group_size: int,
  devices: Sequence[jax.Device] | None = None,
  microbatches: int = 1,
) -> Mesh:
  """Mesh of `devices` (default: all) on which `[G, b]` divides evenly.

  So does every one of `microbatches` equal parts of G. Devices of one slice are
  neighbours along `data`, so that what crosses slices is little.

  Raises:
    ConfigError: if the batch or its groups do not divide over the devices.
  """
  devices = jax.devices() if devices is None else list(devices)
  count = len(devices)
  if batch_size % count:
    multiple = math.lcm(count, bn_group_size)
    nearest = max(1, round(batch_size / multiple)) * multiple
    raise ConfigError(
      f'batch_size={batch_size}: does not divide over {count} devices; '
      f'nearest: batch_size={nearest}'
    )
  groups = batch_size // bn_group_size // microbatches
  if groups % count == 0:
    shape = (count, 1)
  elif count % groups == 0 and bn_group_size % (count // groups) == 0:
    shape = (groups, count // groups)
  else:
    parts = (
      f' in each of {microbatches} microbatches' if microbatches > 1 else ''
    )
    raise ConfigError(
      f'bn_group_size={bn_group_size}: {groups} groups{parts} (batch_size='
      f'{batch_size}) do not divide over {count} devices; use a group size '
      f'that divides {batch_size // microbatches // count} examples per device'
    )
  types = (AxisType.Auto, AxisType.Auto)
  return Mesh(_arrange(shape, devices), AXES, axis_types=types)


def _arrange(shape: tuple[int, int], devices: list[jax.Device]) -> np.ndarray:
  """`devices` in the order in which neighbours are near: [data, bn].

  In that order the devices of one host must cover whole rows of groups, as it
  feeds them; where they do not, hosts go one after the other.
  """
  in_order = np.array(
    sorted(devices, key=lambda d: (slice_of(d), d.process_index, d.id))
  ).reshape(shape)
  slices = len({slice_of(device) for device in devices})
  if devices[0].platform != 'tpu':
    return in_order
  if shape[0] % slices:
    raise ConfigError(
      f'bn_group_size: {shape[0]} batch-norm groups over {shape[1]} devices '
      f'each would span {slices} slices; use smaller groups'
    )
  if slices > 1:
    inner = (shape[0] // slices, shape[1])
    near = mesh_utils.create_hybrid_device_mesh(
      inner, (slices, 1), devices, allow_split_physical_axes=True
    )
  else:
    near = mesh_utils.create_device_mesh(
      shape, devices, allow_split_physical_axes=True
    )
  return near if _is_fed_by_rows(near) else in_order


def slice_of(device: jax.Device) -> int:
  """Index of the slice that `device` is in; 0 where there is only one."""
  return getattr(device, 'slice_index', None) or 0


def _is_fed_by_rows(devices: np.ndarray) -> bool:
  """Whether the devices [data, bn] of each host are rows x columns."""
  places = collections.defaultdict(list)
  for index, device in np.ndenumerate(devices):
    places[device.process_index].append(index)
  return all(
    len({i for i, _ in own}) * len({j for _, j in own}) == len(own)
    for own in places.values()
  )


def bn_axis(mesh: Mesh) -> str | None:
  """The axis over which a batch-norm group lies; None where it is local."""
  return 'bn' if mesh.shape['bn'] > 1 else None


# ---- Global arrays ---------------------------------------------------------


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Of arrays `[G, b, ...]`."""
  return NamedSharding(mesh, BATCH)


def example_sharding(mesh: Mesh) -> NamedSharding:
  """Of arrays `[N, 1, ...]`, whatever the batch-norm groups."""
  return NamedSharding(mesh, EXAMPLES)


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, REPLICATED)


def local_positions(
  sharding: NamedSharding, groups: int, group_size: int
) -> np.ndarray:
  """Places in a batch [G, b] that this host feeds: int [G_host, b_host].

  Raises:
    ValueError: if this host's devices do not cover a rectangle of [G, b].
  """
  shape = (groups, group_size)
  blocks = sharding.addressable_devices_indices_map(shape).values()
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
  sharding: NamedSharding,
  groups: int,
  group_size: int,
  local: Mapping[str, np.ndarray],
) -> dict[str, jax.Array]:
  """This host's share `[local, ...]` -> global arrays `[G, b, ...]`."""
  shape = local_positions(sharding, groups, group_size).shape

  def put(x: np.ndarray) -> jax.Array:
    return jax.make_array_from_process_local_data(
      sharding,
      x.reshape(shape + x.shape[1:]),
      (groups, group_size) + x.shape[1:],
    )

  return {name: put(x) for name, x in local.items()}


def state_shardings(
  mesh: Mesh, state: Any, is_flat: Callable[[Any], bool], *, in_groups: bool
):
  """Shardings of a TrainState: replicated, but for two fields.

  Images of the perturbation lie as the batch does; so do its weights if they
  are `in_groups`. Leaves of the optimizer for which `is_flat` holds are split
  over `data`.
  """
  every = jax.tree.map(lambda _: replicated(mesh), state)
  return every.replace(
    perturbation=_of_perturbation(mesh, state.perturbation, in_groups),
    opt_state=jax.tree.map(
      lambda x: NamedSharding(mesh, FLAT if is_flat(x) else REPLICATED),
      state.opt_state,
    ),
  )


def _of_perturbation(mesh: Mesh, perturbation: Any, in_groups: bool):
  every = jax.tree.map(lambda _: batch_sharding(mesh), perturbation)
  if perturbation is None or in_groups:
    return every
  whole = jax.tree.map(lambda _: replicated(mesh), perturbation.weights)
  return every.replace(weights=whole)


# ---- Per device ------------------------------------------------------------


def per_device(
  mesh: Mesh, fn: Callable[..., Any], in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
  """Runs `fn` on every device's part of its arguments.

  JAX checks that `fn` sums whatever `out_specs` call REPLICATED, unless there
  is one device, and so nothing to sum (`sums.mean_over_devices`). Weights that
  are derived with respect to must be marked by `own_copy` first: the gradient
  of a replicated value is summed over devices by JAX itself, once for each
  call of `jax.grad`, before `sums` could do it once for all.
  """

  def traced(*args):
    with loops.of_mesh(mesh):
      return fn(*args)

  return jax.shard_map(
    traced,
    mesh=mesh,
    in_specs=in_specs,
    out_specs=out_specs,
    check_vma=mesh.size > 1,
  )


def own_copy(tree: Any) -> Any:
  """Marks replicated values as this device's own, under `per_device`.

  Derivatives with respect to them are then this device's part of the whole.
  """
  return jax.tree.map(lambda x: jax.lax.pcast(x, AXES, to='varying'), tree)


def local_places(mesh: Mesh, groups: int, group_size: int) -> Places:
  """What this device has of a batch [G, b]."""
  rows, columns = groups // mesh.shape['data'], group_size // mesh.shape['bn']
  group = jax.lax.axis_index('data') * rows + jnp.arange(rows, dtype=jnp.int32)
  column = jax.lax.axis_index('bn') * columns
  column += jnp.arange(columns, dtype=jnp.int32)
  return Places(group, group[:, None] * group_size + column[None, :])
