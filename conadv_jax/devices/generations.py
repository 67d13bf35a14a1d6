"""Peak rates of devices; sizes and slices of TPUs, each with its source."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping

_GIB = 2**30
_DOCS = 'docs.cloud.google.com/tpu/docs/'
_BOOK = 'jax-ml.github.io/scaling-book'

# Small slices of the 3D generations; larger ones are made of cubes of 4x4x4.
_SMALL_3D = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
_SHAPES_V5E = (
  (1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Generation:
  """Peak rates and sizes of one TPU generation, per JAX device or as named.

  Attributes:
    name: as libtpu and we write it; the part of a topology before the colon.
    device_kinds: JAX's names of its devices.
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
    runtime_version: software of a Cloud TPU VM; '' where the Cloud TPU API
      does not know the generation, only GKE and Compute Engine do.
    gke_machine_type: of a node with `chips_per_host` chips; '' if GKE has none.
    page: the documentation of Cloud TPU that figures are from.
    sources: field -> source, of the figures that are not from `page`.
    ici_hop_seconds: from one chip to the next, however few the bytes.
    dcn_latency_seconds: from one host to another, likewise.
  """

  name: str
  device_kinds: tuple[str, ...]
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
  runtime_version: str
  gke_machine_type: str
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
    'runtime_version': f'{_DOCS}runtimes',
  } | others


_NO_DCN = 'our assumption: one 100 Gbit/s interface per host'

GENERATIONS: Mapping[str, Generation] = {
  generation.name: generation
  for generation in (
    Generation(
      name='v3', device_kinds=('TPU v3',),
      accelerator_type='v3', counts_per_chip=2, devices_per_chip=2,
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
      runtime_version='tpu-ubuntu2204-base',
      gke_machine_type='',
      page='v3',
      sources=_sources(
        ici_bytes_per_sec=f'{_DOCS}v3: all-reduce of a pod, 340 TB/s, / chips',
        dcn_bytes_per_sec_per_host=_NO_DCN,
      ),
    ),
    Generation(
      name='v4', device_kinds=('TPU v4',),
      accelerator_type='v4', counts_per_chip=2, devices_per_chip=1,
      chips_per_host=4, single_host_shapes=(), max_chips=4096, shapes_2d=(),
      peak_flops_per_sec=275e12,
      hbm_bytes_per_sec=1200e9,
      hbm_limit_bytes=round(30.75 * _GIB),
      ici_bytes_per_sec=1.1e15 / 4096,
      dcn_bytes_per_sec_per_host=12.5e9,
      host_vcpus=240,
      runtime_version='tpu-ubuntu2204-base',
      gke_machine_type='ct4p-hightpu-4t',
      page='v4',
      sources=_sources(
        ici_bytes_per_sec=f'{_DOCS}v4: all-reduce of a pod, 1.1 PB/s, / chips',
        dcn_bytes_per_sec_per_host=_NO_DCN,
      ),
    ),
    Generation(
      name='v5e', device_kinds=('TPU v5 lite', 'TPU v5e'),
      accelerator_type='v5litepod', counts_per_chip=1,
      devices_per_chip=1, chips_per_host=4, single_host_shapes=((1, 1), (2, 4)),
      max_chips=256, shapes_2d=_SHAPES_V5E,
      peak_flops_per_sec=197e12,
      hbm_bytes_per_sec=819e9,
      hbm_limit_bytes=round(15.75 * _GIB),
      ici_bytes_per_sec=400e9 / 2,
      dcn_bytes_per_sec_per_host=6.4e12 / 8 / 256 * 4,
      host_vcpus=112,
      runtime_version='v2-alpha-tpuv5-lite',
      gke_machine_type='ct5lp-hightpu-4t',
      page='v5e',
      sources=_sources(host_vcpus='machine type ct5lp-hightpu-4t'),
    ),
    Generation(
      name='v5p', device_kinds=('TPU v5', 'TPU v5p'),
      accelerator_type='v5p', counts_per_chip=2, devices_per_chip=1,
      chips_per_host=4, single_host_shapes=(), max_chips=6144, shapes_2d=(),
      peak_flops_per_sec=459e12,
      hbm_bytes_per_sec=2765e9,
      hbm_limit_bytes=round(95.74 * _GIB),
      ici_bytes_per_sec=1200e9 / 2,
      dcn_bytes_per_sec_per_host=50e9 / 8 * 4,
      host_vcpus=208,
      runtime_version='v2-alpha-tpuv5',
      gke_machine_type='ct5p-hightpu-4t',
      page='v5p',
      sources=_sources(),
    ),
    Generation(
      name='v6e', device_kinds=('TPU v6 lite', 'TPU v6e'),
      accelerator_type='v6e', counts_per_chip=1, devices_per_chip=1,
      chips_per_host=4, single_host_shapes=((1, 1), (2, 4)), max_chips=256,
      shapes_2d=_SHAPES_V5E,
      peak_flops_per_sec=918e12,
      hbm_bytes_per_sec=1640e9,
      hbm_limit_bytes=round(31.25 * _GIB),
      ici_bytes_per_sec=800e9 / 2,
      dcn_bytes_per_sec_per_host=100e9 / 8 * 4,
      host_vcpus=180,
      runtime_version='v2-alpha-tpuv6e',
      gke_machine_type='ct6e-standard-4t',
      page='v6e',
      sources=_sources(),
    ),
    Generation(
      name='tpu7x', device_kinds=('TPU7x',),
      accelerator_type='tpu7x', counts_per_chip=2,
      devices_per_chip=2, chips_per_host=4, single_host_shapes=(),
      max_chips=9216, shapes_2d=(),
      peak_flops_per_sec=2307e12 / 2,
      hbm_bytes_per_sec=7380e9 / 2,
      hbm_limit_bytes=round(94.75 * _GIB),
      ici_bytes_per_sec=1200e9 / 2 / 2,
      dcn_bytes_per_sec_per_host=100e9 / 8 * 4,
      host_vcpus=224,
      runtime_version='',
      gke_machine_type='tpu7x-standard-4t',
      page='tpu7x',
      sources=_sources(),
    ),
  )
}  # fmt: skip
# By our name or by Cloud TPU's type.
BY_ANY_NAME: Mapping[str, Generation] = GENERATIONS | {
  generation.accelerator_type: generation for generation in GENERATIONS.values()
}

# Of GPUs: bfloat16 on tensor cores without sparsity, from NVIDIA's data sheets.
_GPU_FLOPS_PER_SEC = {'H100': 989e12, 'H200': 989e12, 'A100': 312e12}


def peak_flops_per_sec(device_kind: str) -> float | None:
  """Peak of one device in bfloat16; None of a CPU and what is not known."""
  for generation in GENERATIONS.values():
    if device_kind in generation.device_kinds:
      return generation.peak_flops_per_sec
  for name, peak in _GPU_FLOPS_PER_SEC.items():
    if name in device_kind:
      return peak
  return None
