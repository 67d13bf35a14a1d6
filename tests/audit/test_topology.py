"""Slices of TPUs: names, sizes, and that libtpu agrees."""

import importlib.util
import math
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from conadv_jax.audit.libtpu import AOT_ENVIRONMENT, load_devices
from conadv_jax.base.errors import ConfigError
from conadv_jax.devices.generations import GENERATIONS
from conadv_jax.devices.mesh import batch_sharding, make_mesh, replicated
from conadv_jax.devices.topology import Topology, parse

# text, slices, name of a slice, alias, chips, devices, hosts. Chips, devices
# and hosts of the types are those of Cloud TPU's tables.
SLICES = [
  ('v3:16x32', 1, 'v3:16x32', 'v3-1024', 512, 1024, 128),
  ('v3-1024', 1, 'v3:16x32', 'v3-1024', 512, 1024, 128),
  ('v3-32', 1, 'v3:4x4', 'v3-32', 16, 32, 4),
  ('v3-8', 1, 'v3:2x2', 'v3-8', 4, 8, 1),
  ('v3-2048', 2, 'v3:32x32', 'v3-2048', 2048, 4096, 512),
  ('v4:2x2x1', 1, 'v4:2x2x1', 'v4-8', 4, 4, 1),
  ('v4-128', 1, 'v4:4x4x4', 'v4-128', 64, 64, 16),
  ('v4-8192', 2, 'v4:16x16x16', 'v4-8192', 8192, 8192, 2048),
  ('v5e-1', 1, 'v5e:1x1', 'v5e-1', 1, 1, 1),
  ('v5e-4', 1, 'v5e:2x2', 'v5e-4', 4, 4, 1),
  ('v5e:2x4', 2, 'v5e:2x4', 'v5e-8', 16, 16, 2),
  ('V5LitePod-256', 1, 'v5e:16x16', 'v5e-256', 256, 256, 64),
  ('v5e-256', 4, 'v5e:16x16', 'v5e-256', 1024, 1024, 256),
  ('v5p-128', 1, 'v5p:4x4x4', 'v5p-128', 64, 64, 16),
  ('v5p-12288', 1, 'v5p:16x16x24', 'v5p-12288', 6144, 6144, 1536),
  ('v5p:4x4x64', 1, 'v5p:4x4x64', 'v5p:4x4x64', 1024, 1024, 256),
  ('v6e-8', 1, 'v6e:2x4', 'v6e-8', 8, 8, 1),
  (' v6e:16x16 ', 2, 'v6e:16x16', 'v6e-256', 512, 512, 128),
  ('tpu7x-128', 1, 'tpu7x:4x4x4', 'tpu7x-128', 64, 128, 16),
  ('tpu7x:2x2x1', 2, 'tpu7x:2x2x1', 'tpu7x-8', 8, 16, 2),
]
KINDS = {
  'v3': 'TPU v3',
  'v4': 'TPU v4',
  'v5e': 'TPU v5 lite',
  'v5p': 'TPU v5',
  'v6e': 'TPU v6 lite',
  'tpu7x': 'TPU7x',
}


@pytest.mark.parametrize(
  'text, slices, name, alias, chips, devices, hosts', SLICES
)
def test_names_and_sizes(text, slices, name, alias, chips, devices, hosts):
  topology = parse(text, slices)
  assert (topology.name, topology.alias) == (name, alias)
  assert topology.chips == chips
  assert topology.devices == devices
  assert topology.hosts == hosts
  assert topology.slices == slices
  assert parse(topology.alias, slices) == topology
  times = f'{slices} x ' if slices > 1 else ''
  assert topology.label == times + name
  assert topology.alias_label == times + alias


def test_a_slice_is_labelled_with_its_number():
  assert parse('v3-32').label == 'v3:4x4'
  assert parse('v3-32', 3).label == '3 x v3:4x4'


@pytest.mark.parametrize(
  'generation', GENERATIONS.values(), ids=lambda g: g.name
)
def test_every_shape_is_parsed_back_and_every_type_is_the_squarest(generation):
  seen = {}
  for shape in generation.shapes:
    topology = Topology(generation, shape)
    assert parse(topology.name) == topology
    assert topology.chips <= generation.max_chips
    assert len(shape) == generation.rank and shape[0] > 0
    spread = max(shape) / min(shape)
    seen[topology.chips] = min(spread, seen.get(topology.chips, spread))
  for chips, spread in seen.items():
    shape = parse(
      f'{generation.name}-{chips * generation.counts_per_chip}'
    ).shape
    assert math.prod(shape) == chips
    assert max(shape) / min(shape) == spread, 'no squarer shape'
  assert max(seen) == generation.max_chips


@pytest.mark.parametrize(
  'text, words',
  [
    ('', ['name a slice', 'v3:16x32', 'v3-1024', 'tpu7x']),
    ('v3', ['name a slice']),
    ('v3:', ['name a slice']),
    ('v3:4', ['v3 has 2 dimensions']),
    ('v3-1024x2', ['name a slice']),
    ('v5p2:2x2', ['unknown TPU generation', "did you mean 'v5p'"]),
    ('v9-8', ['unknown TPU generation', 'v6e']),
    ('v3:16x31', ['not a slice', 'nearest: v3:16x32 = v3-1024']),
    ('v3:32x16', ['smallest side first', 'nearest: v3:16x32']),
    ('v3:0x0', ['not a slice', 'nearest: v3:2x2']),
    ('v3:32x64', ['at most 1024 chips', '--slices']),
    ('v3:4x4x4', ['v3 has 2 dimensions']),
    ('v4:4x4', ['v4 has 3 dimensions', 'nearest: v4:2x2x4']),
    ('v4:4x4x6', ['not a slice', 'nearest: v4:4x4x8 = v4-256']),
    ('v4:8x8x4', ['smallest side first']),
    ('v3-1000', ['no slice has 1000 TensorCores', 'v3-1024']),
    ('v3-1', ['no slice has 1 TensorCores', 'v3-8']),
    ('v3-0', ['no slice has 0', 'v3-8']),
    ('v3-9', ['no slice has 9', 'v3-8']),
    ('v5e-512', ['at most 256 chips', '--slices', 'v5e-256']),
    ('v4-16384', ['at most 8192 TensorCores', 'v4-8192']),
  ],
)
def test_a_wrong_name_says_which_is_right(text, words):
  with pytest.raises(ConfigError) as error:
    parse(text)
  for word in words:
    assert word in str(error.value)


def test_there_is_at_least_one_slice():
  with pytest.raises(ConfigError, match='slices=0: must be >= 1'):
    parse('v3-8', 0)


@pytest.mark.parametrize(
  'text, wrap',
  [
    ('v3:32x32', (True, True)),
    ('v3:16x32', (False, True)),
    ('v3:16x16', (False, False)),
    ('v5e:16x16', (True, True)),
    ('v5e:8x16', (False, True)),
    ('v6e:8x8', (False, False)),
    ('v4:4x4x4', (True, True, True)),
    ('v5p:4x4x8', (True, True, True)),
    ('v5p:2x4x4', (False, False, False)),
    ('tpu7x:2x2x1', (False, False, False)),
  ],
)
def test_which_dimensions_are_rings(text, wrap):
  assert parse(text).wrap == wrap


@pytest.mark.parametrize(
  'name, chip_flops, chip_hbm_bytes_per_sec, link_bytes_per_sec',
  [
    ('v3', 123e12, 900e9, 83.0e9),
    ('v4', 275e12, 1200e9, 44.8e9),
    ('v5e', 197e12, 819e9, 50e9),
    ('v5p', 459e12, 2765e9, 100e9),
    ('v6e', 918e12, 1640e9, 100e9),
    ('tpu7x', 2307e12, 7380e9, 100e9),
  ],
)
def test_the_rates_of_a_chip_are_shared_by_its_devices(
  name, chip_flops, chip_hbm_bytes_per_sec, link_bytes_per_sec
):
  g = GENERATIONS[name]
  assert g.peak_flops_per_sec * g.devices_per_chip == chip_flops
  assert g.hbm_bytes_per_sec * g.devices_per_chip == chip_hbm_bytes_per_sec
  assert g.ici_link_bytes_per_sec == pytest.approx(link_bytes_per_sec, 1e-3)


@pytest.mark.parametrize(
  'generation', GENERATIONS.values(), ids=lambda g: g.name
)
def test_every_figure_has_a_source(generation):
  page = generation.source('peak_flops_per_sec')
  assert page == f'docs.cloud.google.com/tpu/docs/{generation.page}'
  assert 'assumption' in generation.source('dcn_latency_seconds')
  assert 'XLA' in generation.source('hbm_limit_bytes')


# ---- With libtpu -------------------------------------------------------------


@pytest.fixture
def aot(monkeypatch):
  for name, value in AOT_ENVIRONMENT.items():
    monkeypatch.setenv(name, value)


@pytest.mark.tpu_aot
@pytest.mark.usefixtures('aot')
@pytest.mark.parametrize(
  'text, slices', [(text, slices) for text, slices, *_ in SLICES]
)
def test_libtpu_has_the_same_devices_and_hosts(text, slices):
  topology = parse(text, slices)
  devices = load_devices(topology)
  assert len(devices) == topology.devices
  assert len({d.process_index for d in devices}) == topology.hosts
  assert {d.device_kind for d in devices} == {KINDS[topology.generation.name]}
  coords = zip(*(d.coords for d in devices), strict=True)
  sides = tuple(1 + max(axis) for axis in coords)
  assert sides == (*topology.shape, 1)[:3]
  if slices > 1:
    assert {d.slice_index for d in devices} == set(range(slices))


@pytest.mark.tpu_aot
@pytest.mark.usefixtures('aot')
@pytest.mark.parametrize(
  'generation', GENERATIONS.values(), ids=lambda g: g.name
)
def test_libtpu_knows_the_usual_slices(generation):
  usual = [s for s in generation.shapes if math.prod(s).bit_count() == 1]
  for shape in usual:
    topology = Topology(generation, shape)
    assert len(load_devices(topology)) == topology.devices


@pytest.mark.tpu_aot
@pytest.mark.usefixtures('aot')
@pytest.mark.parametrize('text, kind', [('4x4x4', 'TORUS'), ('2x2x2', 'MESH')])
def test_the_compiler_knows_which_dimensions_are_rings(text, kind):
  devices = load_devices(parse(f'tpu7x:{text}'))
  count = len(devices)
  mesh = make_mesh(count, 1, devices)
  x = jax.ShapeDtypeStruct(
    (count, 1, 2**20), jnp.float32, sharding=batch_sharding(mesh)
  )
  total = jax.jit(lambda x: x.sum(axis=(0, 1)), out_shardings=replicated(mesh))
  hlo = total.lower(x).compile().as_text()
  assert set(re.findall(r'ICI_RING_DIM_[XYZ]_(\w+)', hlo)) == {kind}


def test_without_libtpu_the_error_says_what_to_install(monkeypatch):
  def find_spec(name):
    assert name == 'libtpu'

  monkeypatch.setattr(importlib.util, 'find_spec', find_spec)
  monkeypatch.delenv('TPU_LIBRARY_PATH', raising=False)
  with pytest.raises(ConfigError, match=r"pip install -e '\.\[tpu\]'"):
    load_devices(parse('v3-8'))


def test_only_who_asks_for_it_gets_the_environment_of_an_audit():
  """It would break the start of a real run on several hosts."""
  # JAX itself sets TPU_SKIP_MDS_QUERY where it sees no chip.
  code = (
    'import os, jax\n'
    'before = dict(os.environ)\n'
    'from conadv_jax.audit import libtpu\n'
    'from conadv_jax.devices import topology\n'
    'topology.parse("v3-8")\n'
    'print(dict(os.environ) == before)\n'
    'libtpu.prepare_process()\n'
    'print([os.environ[name] for name in libtpu.AOT_ENVIRONMENT])\n'
  )
  env = {k: v for k, v in os.environ.items() if k not in AOT_ENVIRONMENT}
  process = subprocess.run(
    [sys.executable, '-c', code],
    env=env | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': os.pathsep.join(sys.path)},
    capture_output=True,
    text=True,
    timeout=120,
    check=True,
  )
  values = list(AOT_ENVIRONMENT.values())
  assert process.stdout.split('\n')[:2] == ['True', str(values)]
