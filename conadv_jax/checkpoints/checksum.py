"""Checksums of arrays, computed on the devices that hold them.

A leaf's checksum is two sums modulo 2**32 over its 32-bit words x_i,

  sum_i mix(x_i + mix(i ^ seed)),

`mix` being the finalizer of MurmurHash3 (A. Appleby, public domain), a
bijection of 32-bit words: a change of one word always shows, any other with a
probability of 1 - 2**-64. Sums do not depend on how an array is split over
devices. Computed where the state lives, they cover its whole way to the disk
and back.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from conadv_jax.devices.mesh import replicated

_SEEDS = (0x243F6A88, 0x85A308D3)


def checksums(tree: Any) -> tuple[dict[str, str], list[str]]:
  """Computes {path: checksum of 16 hex digits} of every leaf.

  Also returns the paths of leaves that hold a number that is not finite. All
  hosts must call it, and get the same.
  """
  # Compiling while steps of several CPU devices run can deadlock.
  jax.block_until_ready(tree)
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  found = [_program(_replicated(x))(x) for _, x in leaves]
  sums, nonfinite = {}, []
  for (path, _), row in zip(leaves, jax.device_get(found), strict=True):
    name = jax.tree_util.keystr(path)
    first, second, bad = (int(x) for x in np.asarray(row))
    sums[name] = f'{first:08x}{second:08x}'
    if bad:
      nonfinite.append(name)
  return sums, nonfinite


def _replicated(x: Any) -> Any:
  sharding = getattr(x, 'sharding', None)
  found = getattr(sharding, 'mesh', None)
  return replicated(found) if found is not None else sharding


@functools.lru_cache
def _program(sharding: Any):
  return jax.jit(_sums, out_shardings=sharding)


def _sums(x: jax.Array) -> jax.Array:
  """uint32 [3]: the two sums, and 1 if an element is not finite."""
  words = _words(x)
  place = jnp.zeros(words.shape, jnp.uint32)
  stride = 1
  for axis in reversed(range(words.ndim)):
    index = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    place += index * jnp.uint32(stride & 0xFFFFFFFF)
    stride *= words.shape[axis]
  sums = [
    jnp.sum(_mix(words + _mix(place ^ jnp.uint32(seed))), dtype=jnp.uint32)
    for seed in _SEEDS
  ]
  floating = jnp.issubdtype(x.dtype, jnp.inexact)
  bad = jnp.any(~jnp.isfinite(x)) if floating else jnp.zeros((), bool)
  return jnp.stack([*sums, bad.astype(jnp.uint32)])


def _words(x: jax.Array) -> jax.Array:
  """The bits of `x` as uint32; 64-bit types get a last axis of two."""
  if x.dtype == jnp.bool_:
    return x.astype(jnp.uint32)
  size = x.dtype.itemsize
  if size >= 4:
    return jax.lax.bitcast_convert_type(x, jnp.uint32)
  narrow = {1: jnp.uint8, 2: jnp.uint16}[size]
  return jax.lax.bitcast_convert_type(x, narrow).astype(jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)
