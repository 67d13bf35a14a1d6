"""Splits the optimizer over devices, for `shard_optimizer`.

Large leaves become padded vectors (`pack`), whose parts lie on the devices of
the mesh axis `data`; each device updates its part, and the new weights are
gathered. Norms and elementwise arithmetic, all that an optimizer does, are
those of the leaf. Without `shard_optimizer` every leaf stays as it is.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from conadv_jax.base.errors import ConfigError
from conadv_jax.config import Config
from conadv_jax.devices.mesh import FLAT, REPLICATED, Mesh, per_device
from conadv_jax.devices.sums import by_spec, split_points

Params = Any

# Leaves of so many elements or more are sharded by `shard_optimizer`. Vectors
# are padded to a multiple of it, so that checkpoints do not depend on the
# number of devices, as long as that divides it.
SHARD_MULTIPLE = 8192


def is_large(leaf: Any) -> bool:
  """Tells whether a sharded optimizer splits `leaf`, packed or not."""
  return leaf.size >= SHARD_MULTIPLE


def pack(config: Config, tree: Params) -> Params:
  """Returns `tree` as the optimizer sees it: large leaves as padded vectors."""
  if not config.shard_optimizer:
    return tree

  def vector(x):
    if not is_large(x):
      return x
    return jnp.pad(x.reshape(-1), (0, -x.size % SHARD_MULTIPLE))

  return jax.tree.map(vector, tree)


def packed_specs(config: Config, tree: Params) -> Any:
  """Returns how packed leaves lie on the mesh: large ones split over `data`."""
  return jax.tree.map(
    lambda x: FLAT if config.shard_optimizer and is_large(x) else REPLICATED,
    tree,
  )


def check_shards(config: Config, mesh: Mesh) -> None:
  """Raises ConfigError if the optimizer cannot be sharded over `mesh`."""
  shards = mesh.shape['data']
  if config.shard_optimizer and SHARD_MULTIPLE % shards:
    raise ConfigError(
      f'shard_optimizer=True: {shards} shards do not divide {SHARD_MULTIPLE}; '
      'use a power of two of devices, or set it to False'
    )


def apply_updates(
  config: Config,
  mesh: Mesh,
  optimizer: optax.GradientTransformation,
  grads: Params,
  opt_state: optax.OptState,
  params: Params,
) -> tuple[Params, optax.OptState, Params]:
  """Makes one step of `optimizer`, each device on its part of large leaves.

  Args:
    config: of the run; `shard_optimizer` decides.
    mesh: of the run.
    optimizer: sees packed leaves only.
    grads: packed and split already, as `sums.means_by_spec` returns them.
    opt_state: of packed leaves.
    params: as the network has them.

  Returns:
    The new params, the new state, and the old params as `optimizer` saw them.
  """
  packed = split(config, mesh, params)
  updates, opt_state = optimizer.update(grads, opt_state, packed)
  new = optax.apply_updates(packed, updates)
  return joined(config, mesh, new, params), opt_state, packed


def split(config: Config, mesh: Mesh, tree: Params) -> Params:
  """Packs a `tree` of all devices; each keeps its part of large leaves."""
  packed = pack(config, tree)
  if not config.shard_optimizer:
    return packed
  return _split(mesh, packed, packed_specs(config, packed))


def joined(config: Config, mesh: Mesh, packed: Params, like: Params) -> Params:
  """Returns what `split` took, in the shapes of `like`, on all devices."""
  if not config.shard_optimizer:
    return packed
  whole = _gather(mesh, packed, packed_specs(config, packed))
  return jax.tree.map(
    lambda x, leaf: x.reshape(-1)[: leaf.size].reshape(leaf.shape), whole, like
  )


def _split(mesh: Mesh, tree: Any, specs: Any) -> Any:
  """Replicated arrays -> of those that are FLAT by `specs`, a row's own part.

  Written per device, because the partitioner would move parts of padded
  vectors between devices.
  """

  def own(vectors: list[jax.Array]) -> list[jax.Array]:
    row = jax.lax.axis_index('data')
    tables = [x.reshape(mesh.shape['data'], -1) for x in vectors]
    return [jnp.take(table, row, axis=0) for table in tables]

  def local(tree):
    return by_spec(tree, specs, own, lambda leaves: leaves)

  return per_device(mesh, local, REPLICATED, specs)(tree)


def _gather(mesh: Mesh, tree: Any, specs: Any) -> Any:
  """The inverse of `_split`, in one collective."""

  def whole(parts: list[jax.Array]) -> list[jax.Array]:
    vector = jnp.concatenate(parts)
    table = jax.lax.all_gather(vector, 'data', to='invarying')
    return [x.reshape(-1) for x in jnp.split(table, split_points(parts), 1)]

  def local(tree):
    return by_spec(tree, specs, whole, lambda leaves: leaves)

  return per_device(mesh, local, (specs,), REPLICATED)(tree)
