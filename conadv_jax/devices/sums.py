"""Sums values over devices; every function runs under `mesh.per_device`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from conadv_jax.devices.mesh import AXES, FLAT


def mean_over_devices(tree: Any) -> Any:
  """Returns the mean of every leaf over all devices, the same on each.

  One device does without the sum, which XLA:CPU would make a copy of.
  """
  return tree if jax.lax.axis_size(AXES) == 1 else jax.lax.pmean(tree, AXES)


def means_by_spec(tree: Any, specs: Any, buckets: int = 0) -> Any:
  """Returns means over all devices; of FLAT leaves, a row's own part.

  Those are summed in one collective, the others in `buckets` vectors, which a
  compiler can put behind other work, or, with 0, as it sees fit.
  """

  def parts(vectors: list[jax.Array]) -> list[jax.Array]:
    rows = jax.lax.axis_size('data')
    tables = [x.reshape(rows, -1) for x in vectors]
    table = jax.lax.pmean(jnp.concatenate(tables, axis=1), 'bn')
    own = jax.lax.psum_scatter(table, 'data', tiled=True)[0] / rows
    return jnp.split(own, split_points([table[0] for table in tables]))

  def whole(leaves: list[jax.Array]) -> list[jax.Array]:
    if not buckets:
      return mean_over_devices(leaves)
    return _means_in_buckets(leaves, buckets)

  return by_spec(tree, specs, parts, whole)


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
  parts = jnp.split(
    mean_over_devices(jnp.concatenate(vectors)), split_points(vectors)
  )
  return {
    i: part.reshape(x.shape)
    for (i, x), part in zip(leaves.items(), parts, strict=True)
  }


def by_spec(
  tree: Any,
  specs: Any,
  of_flat: Callable[[list[jax.Array]], list[jax.Array]],
  of_others: Callable[[list[jax.Array]], list[jax.Array]],
) -> Any:
  """Replaces the FLAT leaves of `tree` by one function's, the others by one's.

  Args:
    tree: of arrays.
    specs: FLAT or REPLICATED for each leaf.
    of_flat: all leaves that are FLAT -> as many; not called without any.
    of_others: all other leaves -> as many.
  """
  leaves, structure = jax.tree.flatten(tree)
  is_flat = [spec == FLAT for spec in structure.flatten_up_to(specs)]
  flat = [x for x, yes in zip(leaves, is_flat, strict=True) if yes]
  others = [x for x, yes in zip(leaves, is_flat, strict=True) if not yes]
  new_flat = iter(of_flat(flat) if flat else ())
  new_others = iter(of_others(others))
  return structure.unflatten(
    next(new_flat if yes else new_others) for yes in is_flat
  )


def split_points(parts: Sequence[jax.Array]) -> np.ndarray:
  """Returns where to split the concatenation of vectors of these sizes."""
  return np.cumsum([x.size for x in parts])[:-1]
