"""Devices -> Mesh, every sharding of the project, and sums over devices.

Batches are laid out `[G, b, ...]`: G batch-norm groups of b examples. The mesh
has two axes: `data` splits the groups; `bn` splits the examples of a group, and
is longer than 1 only where one group is larger than a device's share.

Forward and backward passes run per device (`per_device`, jax.shard_map), so
that what devices exchange is written down, and not left to the partitioner: it
would sum bfloat16 gradients in bfloat16, and once per microbatch. All else, the
optimizer above all, is a program over global arrays.
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

REPLICATED = P()
BATCH = P('data', 'bn')  # arrays [G, b, ...]
EXAMPLES = P(('data', 'bn'))  # arrays [N, ...] of which nothing asks for groups
FLAT = P('data')  # vectors of a sharded optimizer
_AXES = ('data', 'bn')


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
  return Mesh(_arrange(shape, devices), _AXES, axis_types=types)


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


def state_shardings(mesh: Mesh, state: Any, is_flat: Callable[[Any], bool]):
  """Shardings of a TrainState: replicated, but for two fields.

  The perturbation lies as the batch does; leaves of the optimizer for which
  `is_flat` holds are split over `data`.
  """
  every = jax.tree.map(lambda _: replicated(mesh), state)
  return every.replace(
    perturbation=jax.tree.map(
      lambda _: batch_sharding(mesh), state.perturbation
    ),
    opt_state=jax.tree.map(
      lambda x: NamedSharding(mesh, FLAT if is_flat(x) else REPLICATED),
      state.opt_state,
    ),
  )


def split(mesh: Mesh, tree: Any, specs: Any) -> Any:
  """Replicated arrays -> of those that are FLAT by `specs`, a row's own part.

  Said per device: the partitioner would send parts of padded vectors about.
  """

  def own(vectors: list[jax.Array]) -> list[jax.Array]:
    row = jax.lax.axis_index('data')
    tables = [x.reshape(mesh.shape['data'], -1) for x in vectors]
    return [jnp.take(table, row, axis=0) for table in tables]

  def local(tree):
    return _by_spec(tree, specs, own, lambda leaves: leaves)

  return per_device(mesh, local, REPLICATED, specs)(tree)


def gather(mesh: Mesh, tree: Any, specs: Any) -> Any:
  """The inverse of `split`, in one collective."""

  def whole(parts: list[jax.Array]) -> list[jax.Array]:
    table = jax.lax.all_gather(jnp.concatenate(parts), 'data')
    return [x.reshape(-1) for x in jnp.split(table, _ends(parts), axis=1)]

  def local(tree):
    return _by_spec(tree, specs, whole, lambda leaves: leaves)

  return per_device(mesh, local, (specs,), REPLICATED)(tree)


def _by_spec(
  tree: Any,
  specs: Any,
  of_flat: Callable[[list[jax.Array]], list[jax.Array]],
  of_others: Callable[[list[jax.Array]], list[jax.Array]],
) -> Any:
  """`tree` with either kind of leaves replaced by what a function makes."""
  leaves, structure = jax.tree.flatten(tree)
  flat = [spec == FLAT for spec in structure.flatten_up_to(specs)]
  kinds = {kind: [] for kind in (True, False)}
  for leaf, kind in zip(leaves, flat, strict=True):
    kinds[kind].append(leaf)
  new = {
    True: iter(of_flat(kinds[True]) if kinds[True] else ()),
    False: iter(of_others(kinds[False])),
  }
  return structure.unflatten(next(new[kind]) for kind in flat)


def _ends(parts: Sequence[jax.Array]) -> np.ndarray:
  """Where to split what was concatenated from vectors of these sizes."""
  return np.cumsum([x.size for x in parts])[:-1]


# ---- Per device ------------------------------------------------------------


def per_device(
  mesh: Mesh, fn: Callable[..., Any], in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
  """`fn` on every device's part of its arguments.

  `fn` must sum what `out_specs` call REPLICATED; nothing checks it, as the
  primitives of `models.layers` do not tell over which axes a value varies.
  Derivatives inside of `fn` are those of the sum over devices of what is
  derived, with respect to what this device has: gradients of weights are its
  part of the whole.
  """
  return jax.shard_map(
    fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
  )


def local_places(mesh: Mesh, groups: int, group_size: int) -> Places:
  """What this device has of a batch [G, b]."""
  rows, columns = groups // mesh.shape['data'], group_size // mesh.shape['bn']
  group = jax.lax.axis_index('data') * rows + jnp.arange(rows, dtype=jnp.int32)
  column = jax.lax.axis_index('bn') * columns
  column += jnp.arange(columns, dtype=jnp.int32)
  return Places(group, group[:, None] * group_size + column[None, :])


def mean_over_devices(tree: Any) -> Any:
  """Mean of every leaf over all devices, the same on each."""
  return jax.lax.pmean(tree, _AXES)


def means_by_spec(tree: Any, specs: Any, buckets: int = 0) -> Any:
  """Means over all devices; of FLAT leaves, a row's own part, as by `split`.

  Those are summed in one collective, the others in `buckets` vectors, which a
  compiler can put behind other work, or, with 0, as it sees fit.
  """

  def parts(vectors: list[jax.Array]) -> list[jax.Array]:
    rows = jax.lax.axis_size('data')
    tables = [x.reshape(rows, -1) for x in vectors]
    table = jax.lax.pmean(jnp.concatenate(tables, axis=1), 'bn')
    own = jax.lax.psum_scatter(table, 'data', tiled=True)[0] / rows
    return jnp.split(own, _ends([table[0] for table in tables]))

  def whole(leaves: list[jax.Array]) -> list[jax.Array]:
    if not buckets:
      return mean_over_devices(leaves)
    return _means_in_buckets(leaves, buckets)

  return _by_spec(tree, specs, parts, whole)


def _means_in_buckets(leaves: list[jax.Array], count: int) -> list[jax.Array]:
  """Means of `leaves`, summed as `count` vectors of similar size, or fewer.

  As many for each type.
  """
  means = dict.fromkeys(range(len(leaves)))
  for dtype in dict.fromkeys(x.dtype for x in leaves):
    places = [i for i, x in enumerate(leaves) if x.dtype == dtype]
    ends = np.cumsum([leaves[i].size for i in places])
    middles = ends - np.array([leaves[i].size for i in places]) / 2
    for bucket in range(count):
      here = middles * count // ends[-1] == bucket
      own = [i for i, is_here in zip(places, here, strict=True) if is_here]
      if own:
        means |= _means_in_one_vector({i: leaves[i] for i in own})
  return list(means.values())


def _means_in_one_vector(leaves: dict[int, jax.Array]) -> dict[int, jax.Array]:
  vectors = [x.reshape(-1) for x in leaves.values()]
  parts = jnp.split(mean_over_devices(jnp.concatenate(vectors)), _ends(vectors))
  return {
    i: part.reshape(x.shape)
    for (i, x), part in zip(leaves.items(), parts, strict=True)
  }
