"""TPU slices: what they are made of, and their devices without the hardware.

A chip sits in a mesh or torus of chips (`shape`), linked by the inter-chip
interconnect (ICI); the data centre network (DCN) joins several slices. A
*device* is what JAX calls one: a TensorCore on v3 and TPU7x, else a chip.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import itertools
import math
import os
import re
from collections.abc import Mapping

import jax
from jax.experimental import topologies

from conadv_jax.base.errors import ConfigError, unknown

_GIB = 2**30
_DOCS = 'docs.cloud.google.com/tpu/docs/'
_BOOK = 'jax-ml.github.io/scaling-book'

# Small slices of the 3D generations; larger ones are made of cubes of 4x4x4.
_SMALL_3D = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
_SHAPES_V5E = (
  (1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16),
)  # fmt: skip

# What libtpu needs in a process that compiles but runs nothing. With
# TPU_SKIP_MDS_QUERY, `jax.distributed.initialize` no longer finds its cluster,
# and ALLOW_MULTIPLE_LIBTPU_LOAD lets two processes take the same chips: neither
# may reach a process that trains.
AOT_ENVIRONMENT: Mapping[str, str] = {
  'TPU_SKIP_MDS_QUERY': '1',
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
}


@dataclasses.dataclass(frozen=True)
class Generation:
  """Peak rates and sizes of one TPU generation, per JAX device or as named.

  Attributes:
    name: as libtpu and we write it; the part of a topology before the colon.
    accelerator_type: prefix of Cloud TPU's types, 'v5litepod' of v5e.
    counts_per_chip: of what a type's number counts: 2 TensorCores, or 1 chip.
    devices_per_chip: JAX devices on one chip.
    chips_per_host: of slices with more than one host.
    shapes_2d: chips along each dimension of every slice of a 2D generation;
      empty for a 3D one, whose slices `shapes` counts up.
    single_host_shapes: slices whose only host has not `chips_per_host` chips.
    max_chips: of one slice.
    peak_flops_per_sec: multiply and add counted as two, bfloat16.
    hbm_bytes_per_sec: peak.
    hbm_limit_bytes: what XLA:TPU lets one device use.
    ici_bytes_per_sec: out of a device in one direction, over all links of its
      chip (2 per dimension), shared by the devices of the chip.
    dcn_bytes_per_sec_per_host: out of a host in one direction.
    host_vcpus: virtual CPUs of a host with `chips_per_host` chips.
    page: the documentation of Cloud TPU that figures are from.
    sources: field -> source, of the figures that are not from `page`.
    ici_hop_seconds: from one chip to the next, however few the bytes.
    dcn_latency_seconds: from one host to another, likewise.
  """

  name: str
  accelerator_type: str
  counts_per_chip: int
  devices_per_chip: int
  chips_per_host: int
  shapes_2d: tuple[tuple[int, ...], ...]
  single_host_shapes: tuple[tuple[int, ...], ...]
  max_chips: int
  peak_flops_per_sec: float
  hbm_bytes_per_sec: float
  hbm_limit_bytes: int
  ici_bytes_per_sec: float
  dcn_bytes_per_sec_per_host: float
  host_vcpus: int
  page: str
  sources: Mapping[str, str] = dataclasses.field(compare=False)
  ici_hop_seconds: float = 1e-6
  dcn_latency_seconds: float = 1e-4

  @property
  def rank(self) -> int:
    """Dimensions of the torus: 2 or 3."""
    return 2 if self.shapes_2d else 3

  @property
  def ici_link_bytes_per_sec(self) -> float:
    """One link between neighbouring chips, one direction."""
    chip = self.ici_bytes_per_sec * self.devices_per_chip
    return chip / (2 * self.rank)

  @property
  def shapes(self) -> tuple[tuple[int, ...], ...]:
    """Every slice, as chips along each dimension, by number of chips."""
    return self.shapes_2d or _shapes_3d(self.max_chips)

  def source(self, field: str) -> str:
    """Where the figure in `field` is from."""
    return self.sources.get(field, _DOCS + self.page)


@functools.cache
def _shapes_3d(max_chips: int) -> tuple[tuple[int, ...], ...]:
  """The small slices, and a <= b <= c in multiples of 4 up to `max_chips`."""
  cubes = max_chips // 4**3
  shapes = [
    (4 * a, 4 * b, 4 * c)
    for a in range(1, math.isqrt(cubes) + 1)
    for b in range(a, cubes // a + 1)
    for c in range(b, cubes // (a * b) + 1)
  ]
  return _SMALL_3D + tuple(sorted(shapes, key=lambda s: (math.prod(s), s)))


def _sources(**others: str) -> dict[str, str]:
  """What is from no page of Cloud TPU, for every generation, and `others`."""
  return {
    'hbm_limit_bytes': 'XLA:TPU of libtpu 0.0.42: "available HBM"',
    'ici_hop_seconds': f'{_BOOK}/sharding: "typically around 1us"',
    'dcn_latency_seconds': 'our assumption',
    'host_vcpus': 'machine types of GKE and Compute Engine, recalled',
  } | others


_NO_DCN = 'our assumption: one 100 Gbit/s interface per host'

GENERATIONS: Mapping[str, Generation] = {
  generation.name: generation
  for generation in (
    Generation(
      name='v3', accelerator_type='v3', counts_per_chip=2, devices_per_chip=2,
      chips_per_host=4, single_host_shapes=(), max_chips=1024,
      shapes_2d=(
        (2, 2), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16), (16, 32), (32, 32),
      ),
      peak_flops_per_sec=123e12 / 2,
      hbm_bytes_per_sec=900e9 / 2,
      hbm_limit_bytes=round(15.48 * _GIB),
      ici_bytes_per_sec=340e12 / 1024 / 2,
      dcn_bytes_per_sec_per_host=12.5e9,
      host_vcpus=96,
      page='v3',
      sources=_sources(
        ici_bytes_per_sec=f'{_DOCS}v3: all-reduce of a pod, 340 TB/s, / chips',
        dcn_bytes_per_sec_per_host=_NO_DCN,
      ),
    ),
    Generation(
      name='v4', accelerator_type='v4', counts_per_chip=2, devices_per_chip=1,
      chips_per_host=4, single_host_shapes=(), max_chips=4096, shapes_2d=(),
      peak_flops_per_sec=275e12,
      hbm_bytes_per_sec=1200e9,
      hbm_limit_bytes=round(30.75 * _GIB),
      ici_bytes_per_sec=1.1e15 / 4096,
      dcn_bytes_per_sec_per_host=12.5e9,
      host_vcpus=240,
      page='v4',
      sources=_sources(
        ici_bytes_per_sec=f'{_DOCS}v4: all-reduce of a pod, 1.1 PB/s, / chips',
        dcn_bytes_per_sec_per_host=_NO_DCN,
      ),
    ),
    Generation(
      name='v5e', accelerator_type='v5litepod', counts_per_chip=1,
      devices_per_chip=1, chips_per_host=4, single_host_shapes=((1, 1), (2, 4)),
      max_chips=256, shapes_2d=_SHAPES_V5E,
      peak_flops_per_sec=197e12,
      hbm_bytes_per_sec=819e9,
      hbm_limit_bytes=round(15.75 * _GIB),
      ici_bytes_per_sec=400e9 / 2,
      dcn_bytes_per_sec_per_host=6.4e12 / 8 / 256 * 4,
      host_vcpus=112,
      page='v5e',
      sources=_sources(host_vcpus='machine type ct5lp-hightpu-4t'),
    ),
    Generation(
      name='v5p', accelerator_type='v5p', counts_per_chip=2, devices_per_chip=1,
      chips_per_host=4, single_host_shapes=(), max_chips=6144, shapes_2d=(),
      peak_flops_per_sec=459e12,
      hbm_bytes_per_sec=2765e9,
      hbm_limit_bytes=round(95.74 * _GIB),
      ici_bytes_per_sec=1200e9 / 2,
      dcn_bytes_per_sec_per_host=50e9 / 8 * 4,
      host_vcpus=208,
      page='v5p',
      sources=_sources(),
    ),
    Generation(
      name='v6e', accelerator_type='v6e', counts_per_chip=1, devices_per_chip=1,
      chips_per_host=4, single_host_shapes=((1, 1), (2, 4)), max_chips=256,
      shapes_2d=_SHAPES_V5E,
      peak_flops_per_sec=918e12,
      hbm_bytes_per_sec=1640e9,
      hbm_limit_bytes=round(31.25 * _GIB),
      ici_bytes_per_sec=800e9 / 2,
      dcn_bytes_per_sec_per_host=100e9 / 8 * 4,
      host_vcpus=180,
      page='v6e',
      sources=_sources(),
    ),
    Generation(
      name='tpu7x', accelerator_type='tpu7x', counts_per_chip=2,
      devices_per_chip=2, chips_per_host=4, single_host_shapes=(),
      max_chips=9216, shapes_2d=(),
      peak_flops_per_sec=2307e12 / 2,
      hbm_bytes_per_sec=7380e9 / 2,
      hbm_limit_bytes=round(94.75 * _GIB),
      ici_bytes_per_sec=1200e9 / 2 / 2,
      dcn_bytes_per_sec_per_host=100e9 / 8 * 4,
      host_vcpus=224,
      page='tpu7x',
      sources=_sources(),
    ),
  )
}  # fmt: skip
_GENERATION_OF = {g.name: g for g in GENERATIONS.values()} | {
  g.accelerator_type: g for g in GENERATIONS.values()
}


@dataclasses.dataclass(frozen=True)
class Topology:
  """Equal slices of one generation.

  Attributes:
    generation: of the chips.
    shape: chips along each dimension of one slice.
    slices: number of them, joined by the data centre network.
  """

  generation: Generation
  shape: tuple[int, ...]
  slices: int = 1

  @property
  def chips(self) -> int:
    """Of all slices."""
    return math.prod(self.shape) * self.slices

  @property
  def devices(self) -> int:
    """JAX devices of all slices."""
    return self.chips * self.generation.devices_per_chip

  @property
  def hosts(self) -> int:
    """Of all slices; as many processes run."""
    return self.chips // math.prod(self.host_bounds)

  @property
  def host_bounds(self) -> tuple[int, int, int]:
    """Chips of one host along x, y and z."""
    if self.shape in self.generation.single_host_shapes:
      return (*self.shape, 1)
    return (2, 2, self.generation.chips_per_host // 4)

  @property
  def name(self) -> str:
    """Of one slice, as libtpu knows it: 'v3:16x32'."""
    return f'{self.generation.name}:{_times(self.shape)}'

  @property
  def alias(self) -> str:
    """Type of one slice: 'v3-1024'; Cloud TPU writes v5e's 'v5litepod-256'.

    It is `name` where that type means another shape.
    """
    chips = math.prod(self.shape)
    if self.shape != squarest_shape(self.generation, chips):
      return self.name
    return f'{self.generation.name}-{chips * self.generation.counts_per_chip}'

  @property
  def label(self) -> str:
    """For people: 'v3:16x32', '2 x v3:32x32'."""
    return self._times_slices(self.name)

  @property
  def alias_label(self) -> str:
    """As `label`, of the types: 'v3-1024', '2 x v3-2048'."""
    return self._times_slices(self.alias)

  def _times_slices(self, name: str) -> str:
    return name if self.slices == 1 else f'{self.slices} x {name}'

  @property
  def wrap(self) -> tuple[bool, ...]:
    """Whether the two ends of each dimension are linked, making it a ring.

    3D: all are if the slice is made of whole cubes of 4x4x4, else none
    (docs.cloud.google.com/tpu/docs/v4). 2D: those as long as the pod
    (jax-ml.github.io/scaling-book/tpus, of v5e and v6e; that v3 is alike is our
    assumption).
    """
    if self.generation.rank == 3:
      return (all(side % 4 == 0 for side in self.shape),) * 3
    pod_side = max(map(max, self.generation.shapes))
    return tuple(side == pod_side for side in self.shape)


def _times(shape: tuple[int, ...]) -> str:
  return 'x'.join(map(str, shape))


def squarest_shape(
  generation: Generation, chips: int
) -> tuple[int, ...] | None:
  """Of the slices of `chips`, the one nearest to a cube; None without one.

  docs.cloud.google.com/tpu/docs/types-topologies, "default topology".
  """
  fits = [s for s in generation.shapes if math.prod(s) == chips]

  def faces(shape: tuple[int, ...]) -> int:
    return sum(a * b for a, b in itertools.combinations(shape, 2))

  return min(fits, key=faces, default=None)


def parse(text: str, slices: int = 1) -> Topology:
  """'v3:16x32' (chips per dimension) or 'v3-1024' (Cloud TPU's type).

  Args:
    text: in upper or lower case; v5litepod-256 may be called v5e-256.
    slices: of this shape.

  Raises:
    ConfigError: for an unknown generation, a shape or size that it does not
      have, or fewer than one slice; the message names the nearest.
  """
  match = re.fullmatch(
    r'([a-z0-9]+)(?::(\d+(?:x\d+)*)|-(\d+))', text.strip().lower()
  )
  if match is None:
    raise ConfigError(
      f'topology={text!r}: name a slice by its chips per dimension (v3:16x32) '
      f'or its type (v3-1024); generations: {", ".join(GENERATIONS)}'
    )
  name, sides, count = match.groups()
  if name not in _GENERATION_OF:
    raise unknown('TPU generation', name, _GENERATION_OF)
  if slices < 1:
    raise ConfigError(f'slices={slices}: must be >= 1')
  generation = _GENERATION_OF[name]
  if sides:
    shape = _checked_shape(text, generation, sides)
  else:
    shape = _checked_type(text, generation, int(count))
  return Topology(generation, shape, slices)


def _checked_shape(
  text: str, generation: Generation, sides: str
) -> tuple[int, ...]:
  shape = tuple(int(side) for side in sides.split('x'))
  if shape in generation.shapes:
    return shape
  if len(shape) != generation.rank:
    fix = f'{generation.name} has {generation.rank} dimensions'
  elif math.prod(shape) > generation.max_chips:
    fix = f'at most {generation.max_chips} chips in a slice; more: --slices'
  elif tuple(sorted(shape)) in generation.shapes:
    fix = 'smallest side first'
  else:
    fix = 'not a slice'
  raise ConfigError(
    f'topology={text!r}: {fix}; {_nearest(generation, math.prod(shape))}'
  )


def _checked_type(
  text: str, generation: Generation, count: int
) -> tuple[int, ...]:
  chips, rest = divmod(count, generation.counts_per_chip)
  shape = squarest_shape(generation, chips)
  if shape is not None and not rest:
    return shape
  counted = 'chips' if generation.counts_per_chip == 1 else 'TensorCores'
  if count > generation.max_chips * generation.counts_per_chip:
    most = generation.max_chips * generation.counts_per_chip
    fix = f'at most {most} {counted} in a slice; more: --slices'
  else:
    fix = f'no slice has {count} {counted}'
  raise ConfigError(f'topology={text!r}: {fix}; {_nearest(generation, chips)}')


def _nearest(generation: Generation, chips: int) -> str:
  """Names the slice nearest to `chips` by factor, and the usual ones."""
  usual = [
    Topology(generation, shape)
    for shape in generation.shapes
    if shape == squarest_shape(generation, math.prod(shape))
  ]
  best = min(usual, key=lambda t: abs(math.log(t.chips / max(chips, 1))))
  powers = [t for t in usual if t.chips.bit_count() == 1]
  return (
    f'nearest: {best.name} = {best.alias}; '
    f'known: {", ".join(_times(t.shape) for t in powers)}'
  )


def prepare_process() -> None:
  """Sets AOT_ENVIRONMENT. For commands that only compile; before libtpu loads.

  JAX_PLATFORMS stays the user's: 'cpu' keeps an audit off the chips of a TPU
  machine.
  """
  os.environ.update(AOT_ENVIRONMENT)


def require_libtpu() -> None:
  """Raises ConfigError if libtpu is not installed."""
  installed = importlib.util.find_spec('libtpu') is not None
  if not installed and 'TPU_LIBRARY_PATH' not in os.environ:
    raise ConfigError(
      "compiling for TPUs needs libtpu (no TPU): pip install -e '.[tpu]'"
    )


def load_devices(topology: Topology) -> list[jax.Device]:
  """Devices of `topology` to compile for; none of them needs to exist.

  The megacore of v4 is asked for, as JAX runs it: two TensorCores, one device.
  `wrap` is passed on: the compiler otherwise takes every dimension for open,
  and arranges the rings of an all-reduce for that (seen on v3 and TPU7x with
  libtpu 0.0.42; the operations, their sizes and groups are the same).

  Raises:
    ConfigError: if libtpu is not installed.
  """
  require_libtpu()
  megacore = topology.generation.name == 'v4'
  wrap = (*topology.wrap, False)[:3]
  return topologies.get_topology_desc(
    platform='tpu',
    topology_name=topology.name,
    chip_config_name='megacore' if megacore else 'default',
    chips_per_host_bounds=topology.host_bounds,
    num_slices=topology.slices,
    wrap=wrap,
  ).devices
