"""TPU slices by name.

A chip sits in a mesh or torus of chips (`shape`), linked by the inter-chip
interconnect (ICI); the data centre network (DCN) joins several slices. A
*device* is what JAX calls one: a TensorCore on v3 and TPU7x, else a chip.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re

from conadv_jax.base.errors import ConfigError, unknown
from conadv_jax.devices.generations import BY_ANY_NAME, GENERATIONS, Generation


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
    """Readable: 'v3:16x32', '2 x v3:32x32'."""
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
  """Returns the slice of `chips` nearest to a cube; None if there is none.

  docs.cloud.google.com/tpu/docs/types-topologies, "default topology".
  """
  fits = [s for s in generation.shapes if math.prod(s) == chips]

  def faces(shape: tuple[int, ...]) -> int:
    return sum(a * b for a, b in itertools.combinations(shape, 2))

  return min(fits, key=faces, default=None)


def parse(text: str, slices: int = 1) -> Topology:
  """Parses 'v3:16x32' (chips per dimension) or 'v3-1024' (Cloud TPU's type).

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
  if name not in BY_ANY_NAME:
    raise unknown('TPU generation', name, BY_ANY_NAME)
  if slices < 1:
    raise ConfigError(f'slices={slices}: must be >= 1')
  generation = BY_ANY_NAME[name]
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
  """Names the slice whose size is nearest to `chips`, and the usual ones."""
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
