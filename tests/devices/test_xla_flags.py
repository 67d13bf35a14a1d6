"""Compiler options reach the compiler they are for, and it knows them."""

import jax
import jax.numpy as jnp
import pytest

from conadv_jax.audit import libtpu
from conadv_jax.devices import sums, topology, xla_flags
from conadv_jax.devices.mesh import (
  EXAMPLES,
  REPLICATED,
  example_sharding,
  make_mesh,
  per_device,
)

KINDS = ('TPU v3', 'TPU v4', 'TPU v5 lite', 'TPU v5', 'TPU v6 lite', 'TPU7x')


@pytest.mark.parametrize('name', ('none', 'overlap', 'multislice'))
@pytest.mark.parametrize('kind', ('cpu', 'NVIDIA H100 80GB HBM3'))
def test_other_devices_than_tpus_get_no_options(name, kind):
  assert xla_flags.compiler_options(name, kind) == {}


def test_overlap_is_what_the_generation_can_do():
  def found(kind):
    return ' '.join(xla_flags.compiler_options('overlap', kind))

  assert 'async_collective_fusion' in found('TPU v5 lite')
  for kind in ('TPU v5', 'TPU v5p', 'TPU v6 lite', 'TPU7x'):
    assert 'sparse_core' in found(kind)
  assert found('TPU v3') == found('TPU v4') == ''


@pytest.mark.parametrize('kind', KINDS)
def test_none_is_none_and_multislice_is_not(kind):
  assert xla_flags.compiler_options('none', kind) == {}
  assert xla_flags.compiler_options('multislice', kind)


@pytest.mark.tpu_aot
@pytest.mark.parametrize('slices', (1, 2))
@pytest.mark.parametrize(
  'name',
  ('v3:2x2', 'v4:2x2x1', 'v5e:2x2', 'v5p:2x2x1', 'v6e:2x2', 'tpu7x:2x2x1'),
)
def test_the_compilers_know_their_options(monkeypatch, name, slices):
  """And an option that they do not know fails the compile."""
  for key, value in libtpu.AOT_ENVIRONMENT.items():
    monkeypatch.setenv(key, value)
  devices = libtpu.load_devices(topology.parse(name, slices))
  assert devices[0].device_kind in KINDS
  mesh = make_mesh(len(devices), 1, devices)
  fn = per_device(mesh, sums.mean_over_devices, EXAMPLES, REPLICATED)
  x = jax.ShapeDtypeStruct(
    (len(devices), 1024),
    jnp.float32,
    sharding=example_sharding(mesh),
  )
  lowered = jax.jit(fn).lower(x)
  for options in ('overlap', 'multislice'):
    kind = devices[0].device_kind
    lowered.compile(xla_flags.compiler_options(options, kind))
  with pytest.raises(jax.errors.JaxRuntimeError, match='No such compile'):
    lowered.compile({'xla_tpu_no_such_option': True})
