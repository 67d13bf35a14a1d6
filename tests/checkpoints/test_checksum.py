"""Checksums on devices, against NumPy, and what they see."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conadv_jax.checkpoints import checksum
from conadv_jax.devices import mesh

SEEDS = (0x243F6A88, 0x85A308D3)


def mix(x):
  x = x.astype(np.uint64)
  x = ((x ^ (x >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
  x = ((x ^ (x >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
  return x ^ (x >> 16)


def oracle(x):
  """From the definition, on the bytes of the array."""
  x = np.ascontiguousarray(x)
  size = min(x.dtype.itemsize, 4)
  words = np.frombuffer(x.tobytes(), f'<u{size}').astype(np.uint64)
  places = np.arange(len(words), dtype=np.uint64)
  sums = [
    int(mix((words + mix(places ^ seed)) & 0xFFFFFFFF).sum() & 0xFFFFFFFF)
    for seed in SEEDS
  ]
  return f'{sums[0]:08x}{sums[1]:08x}'


def of(x):
  sums, _ = checksum.checksums({'x': x})
  return sums["['x']"]


@pytest.mark.parametrize(
  'dtype', ['float32', 'bfloat16', 'float16', 'int32', 'uint8', 'bool', 'int8']
)
@pytest.mark.parametrize('shape', [(), (0,), (1,), (7,), (3, 5), (2, 3, 4, 5)])
def test_it_equals_numpy(dtype, shape):
  rng = np.random.default_rng(1)
  x = jnp.asarray(rng.standard_normal(shape) * 50).astype(dtype)
  assert of(x) == oracle(np.asarray(x))


def test_it_equals_numpy_in_64_bit(x64):
  x = np.random.default_rng(1).standard_normal((3, 5))
  assert of(jnp.asarray(x)) == oracle(x)


def test_every_single_bit_shows():
  x = np.random.default_rng(1).standard_normal(6).astype(np.float32)
  seen = {of(jnp.asarray(x))}
  for bit in range(32 * 6):
    words = x.view(np.uint32).copy()
    words[bit // 32] ^= np.uint32(1) << np.uint32(bit % 32)
    seen.add(of(jnp.asarray(words.view(np.float32))))
  assert len(seen) == 1 + 32 * 6


def test_two_signs_and_an_exchange_show():
  x = jnp.arange(1.0, 7.0)
  changed = [
    x.at[:2].multiply(-1),
    x[jnp.array([1, 0, 2, 3, 4, 5])],
    x.at[0].set(-0.0),
    x.reshape(2, 3).T.reshape(6),
  ]
  assert len({of(y) for y in [x, *changed]}) == 5


def test_it_does_not_depend_on_how_an_array_is_split():
  x = np.random.default_rng(1).standard_normal(64).astype(np.float32)
  devices = mesh.make_mesh(64, 8)
  split = jax.device_put(x, mesh.example_sharding(devices))
  whole = jax.device_put(x, mesh.replicated(devices))
  assert len(split.sharding.device_set) == 8
  assert of(split) == of(whole) == of(jnp.asarray(x)) == oracle(x)


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_leaves_that_are_not_finite_are_named(value):
  tree = {'a': jnp.ones(3), 'b': [jnp.ones(3).at[1].set(value), jnp.arange(3)]}
  assert checksum.checksums(tree)[1] == ["['b'][0]"]
