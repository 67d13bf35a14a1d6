"""Predicts step times on other slices: a roofline and an alpha-beta model.

  compute     max(FLOPs / peak, bytes / HBM rate) / efficiency + overhead
  collective  alpha * hops + beta * bytes, of gradients and of batch norm
  step        compute + both collectives; with perfect overlap
              max(compute, gradients) + batch norm

FLOPs and bytes come from a compiled program. `study` lists everything else as
an assumption.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from conadv_jax.audit.scaling.collective_time import (
  CollectiveTime,
  all_reduce,
  group_all_reduce,
)
from conadv_jax.base.errors import ConfigError
from conadv_jax.devices.generations import Generation
from conadv_jax.devices.topology import Topology, squarest_shape

DEVICE_COUNTS = tuple(2**k for k in range(3, 13))


class Compiled(NamedTuple):
  """What XLA counts for one step and one device.

  Attributes:
    examples_per_device: of one microbatch.
    flops: multiply and add counted as two.
    bytes: "bytes accessed": operands and results of every instruction.
  """

  examples_per_device: int
  flops: float
  bytes: float


def _check_numbers(cost: Any) -> None:
  for field in dataclasses.fields(cost):
    value = getattr(cost, field.name)
    if isinstance(value, int | float) and not 0 <= value < math.inf:
      raise ConfigError(f'{field.name}={value!r}: must be >= 0 and finite')


@dataclasses.dataclass(frozen=True)
class BatchNormCost:
  """Batch statistics that are summed over devices; none by default.

  Attributes:
    group_size: examples that share statistics.
    all_reduces: of one microbatch, where a group spans devices.
    bytes: of all of these together.
  """

  group_size: int = 0
  all_reduces: int = 0
  bytes: float = 0.0

  def __post_init__(self):
    _check_numbers(self)


@dataclasses.dataclass(frozen=True)
class StepCost:
  """Cost of a step on one device, for any number of examples.

  Attributes:
    flops_per_example: and `bytes_per_example`, grow with the examples.
    fixed_flops: and `fixed_bytes`, do not: weights, gradients, optimizer.
    gradient_bytes: summed over all devices once per step.
    origin: how it was found, for the list of assumptions.
    batch_norm: all-reduces of groups that span devices.
  """

  flops_per_example: float
  bytes_per_example: float
  fixed_flops: float
  fixed_bytes: float
  gradient_bytes: float
  origin: str
  batch_norm: BatchNormCost = BatchNormCost()

  def __post_init__(self):
    _check_numbers(self)

  @classmethod
  def from_compiled(
    cls,
    first: Compiled,
    second: Compiled,
    gradient_bytes: float,
    batch_norm: BatchNormCost = BatchNormCost(),
  ) -> StepCost:
    """Draws a line through two compiled programs that differ in examples.

    If its fixed part is below 0, because the compiler chose another layout, the
    line goes through 0 and the larger program.
    """
    small, large = sorted((first, second), key=_checked_examples)
    distance = large.examples_per_device - small.examples_per_device
    if not distance:
      raise ConfigError(
        f'examples_per_device={large.examples_per_device}: given twice; '
        'fixed and growing cost are told apart by two different numbers'
      )

    def fixed(y_small: float, y_large: float) -> float:
      slope = (y_large - y_small) / distance
      return max(0.0, y_large - slope * large.examples_per_device)

    fixed_flops = fixed(small.flops, large.flops)
    fixed_bytes = fixed(small.bytes, large.bytes)
    return cls(
      flops_per_example=(large.flops - fixed_flops) / large.examples_per_device,
      bytes_per_example=(large.bytes - fixed_bytes) / large.examples_per_device,
      fixed_flops=fixed_flops,
      fixed_bytes=fixed_bytes,
      gradient_bytes=gradient_bytes,
      origin=(
        f'compiled at {small.examples_per_device} and '
        f'{large.examples_per_device} examples per device'
      ),
      batch_norm=batch_norm,
    )


def _checked_examples(compiled: Compiled) -> int:
  if compiled.examples_per_device < 1:
    raise ConfigError(
      f'examples_per_device={compiled.examples_per_device}: must be >= 1'
    )
  return compiled.examples_per_device


# ---- One step ----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Calibration:
  """How far computing falls short of the roofline.

  Attributes:
    name: for tables and plots.
    efficiency: roofline / achieved time.
    overhead_seconds: of every microbatch, whatever its size.
    source: where both are from.
  """

  name: str
  efficiency: float = 1.0
  overhead_seconds: float = 0.0
  source: str = 'a bound, not a forecast'

  def __post_init__(self):
    if not 0 < self.efficiency < math.inf:
      raise ConfigError(f'efficiency={self.efficiency!r}: must be > 0')
    if not 0 <= self.overhead_seconds < math.inf:
      raise ConfigError(
        f'overhead_seconds={self.overhead_seconds!r}: must be >= 0'
      )


ROOFLINE = Calibration('roofline')


@dataclasses.dataclass(frozen=True)
class Prediction:
  """Times of one step on one slice, or on several.

  Attributes:
    topology: the slices.
    examples_per_device: of the whole step.
    microbatches: parts that a device processes its examples in.
    flop_seconds: at peak FLOPs.
    byte_seconds: at peak HBM rate.
    compute_seconds: the longer of both, calibrated.
    gradients: their all-reduce.
    batch_norm: the all-reduces of groups that span devices.
  """

  topology: Topology
  examples_per_device: int
  microbatches: int
  flop_seconds: float
  byte_seconds: float
  compute_seconds: float
  gradients: CollectiveTime
  batch_norm: CollectiveTime

  @property
  def batch_size(self) -> int:
    return self.examples_per_device * self.topology.devices

  @property
  def collective_seconds(self) -> float:
    return self.gradients.seconds + self.batch_norm.seconds

  @property
  def latency_seconds(self) -> float:
    """The part of `collective_seconds` that does not depend on bytes."""
    return self.gradients.latency_seconds + self.batch_norm.latency_seconds

  @property
  def step_seconds(self) -> float:
    """Nothing overlaps."""
    return self.compute_seconds + self.collective_seconds

  @property
  def overlapped_step_seconds(self) -> float:
    """The gradients' all-reduce overlaps perfectly, batch norm's do not."""
    return (
      max(self.compute_seconds, self.gradients.seconds)
      + self.batch_norm.seconds
    )


def predict(
  cost: StepCost,
  topology: Topology,
  examples_per_device: int,
  calibration: Calibration = ROOFLINE,
  max_examples_per_device: int | None = None,
) -> Prediction:
  """Predicts a step of `examples_per_device` on each device of `topology`.

  A device that cannot hold its examples at once processes them in the fewest
  equal microbatches that fit. Each pays the fixed cost and the collectives of
  batch norm: an upper bound, since the optimizer runs only once.

  Raises:
    ConfigError: if a number of examples is below 1.
  """
  for name, value in (
    ('examples_per_device', examples_per_device),
    ('max_examples_per_device', max_examples_per_device),
  ):
    if value is not None and value < 1:
      raise ConfigError(f'{name}={value!r}: must be >= 1')
  n = examples_per_device
  most = max_examples_per_device or n
  parts = next(m for m in range(1, n + 1) if n % m == 0 and n // m <= most)
  rates = topology.generation
  flops = cost.flops_per_example * n + cost.fixed_flops * parts
  moved_bytes = cost.bytes_per_example * n + cost.fixed_bytes * parts
  flop_seconds = flops / rates.peak_flops_per_sec
  byte_seconds = moved_bytes / rates.hbm_bytes_per_sec
  return Prediction(
    topology=topology,
    examples_per_device=n,
    microbatches=parts,
    flop_seconds=flop_seconds,
    byte_seconds=byte_seconds,
    compute_seconds=(
      max(flop_seconds, byte_seconds) / calibration.efficiency
      + calibration.overhead_seconds * parts
    ),
    gradients=all_reduce(cost.gradient_bytes, topology),
    batch_norm=_batch_norm(cost, topology, n // parts, parts),
  )


def _batch_norm(
  cost: StepCost, topology: Topology, examples: int, microbatches: int
) -> CollectiveTime:
  """Of all microbatches of a step, with `examples` per device in each."""
  bn = cost.batch_norm
  if not bn.all_reduces:
    return CollectiveTime(0.0, 0.0)
  span = math.ceil(bn.group_size / examples)
  count = bn.all_reduces * microbatches
  one = group_all_reduce(bn.bytes / bn.all_reduces, topology, span)
  return CollectiveTime(*(count * seconds for seconds in one))


# ---- Many devices ------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Row:
  """A step on one number of devices, and what a training run makes of it.

  Attributes:
    prediction: of the step.
    steps: to see all examples that the run is to see.
    train_seconds: `steps` of them, nothing overlaps, no input or evaluation.
    efficiency: examples per second and device, relative to the fewest devices.
    overlapped_efficiency: likewise, of the step with perfect overlap.
  """

  prediction: Prediction
  steps: int
  train_seconds: float
  efficiency: float
  overlapped_efficiency: float


@dataclasses.dataclass(frozen=True)
class Scaling:
  """Rows over device counts: `mode` is 'weak' or 'strong'."""

  mode: str
  calibration: Calibration
  rows: tuple[Row, ...]


def slices_of(generation: Generation, devices: int) -> Topology | None:
  """Divides `devices` into the fewest equal slices, each the squarest.

  A slice has at most the largest power of two of chips that a pod holds.
  Returns None if no slices of the generation add up to `devices`.
  """
  chips, rest = divmod(devices, generation.devices_per_chip)
  largest = 2 ** (generation.max_chips.bit_length() - 1)
  slices = math.ceil(chips / largest)
  shape = squarest_shape(generation, chips // max(slices, 1))
  if rest or shape is None or chips % slices:
    return None
  return Topology(generation, shape, slices)


def scale(
  mode: str,
  cost: StepCost,
  generation: Generation,
  size: int,
  examples_to_train: int,
  calibration: Calibration = ROOFLINE,
  max_examples_per_device: int | None = None,
) -> Scaling:
  """Predicts the step on every one of DEVICE_COUNTS that has a slice.

  Args:
    mode: 'weak', with `size` examples on each device; or 'strong', with `size`
      examples in all, on the counts of devices that divide it.
    cost: of the step.
    generation: of the slices.
    size: see `mode`.
    examples_to_train: of the whole run: epochs times examples.
    calibration: of the time of computing.
    max_examples_per_device: that HBM holds; more are accumulated.

  Raises:
    ConfigError: if no count of devices divides a strong `size`.
  """
  found = (slices_of(generation, devices) for devices in DEVICE_COUNTS)
  slices = [topology for topology in found if topology is not None]
  examples = [(topology, size) for topology in slices]
  if mode == 'strong':
    examples = [
      (topology, size // topology.devices)
      for topology in slices
      if size >= 1 and size % topology.devices == 0
    ]
  if not examples:
    raise ConfigError(
      f'batch_size={size}: does not divide over any of '
      f'{", ".join(map(str, DEVICE_COUNTS))} devices; use a multiple of '
      f'{DEVICE_COUNTS[0]}'
    )
  predictions = [
    predict(cost, topology, each, calibration, max_examples_per_device)
    for topology, each in examples
  ]
  return Scaling(mode, calibration, _rows(predictions, examples_to_train))


def _rows(
  predictions: Sequence[Prediction], examples_to_train: int
) -> tuple[Row, ...]:
  if examples_to_train < 1:
    raise ConfigError(f'examples_to_train={examples_to_train!r}: must be >= 1')
  base = predictions[0]
  rows = []
  for p in predictions:
    steps = max(1, round(examples_to_train / p.batch_size))
    # Per device and example, relative to the first row.
    work = p.examples_per_device / base.examples_per_device
    rows.append(
      Row(
        prediction=p,
        steps=steps,
        train_seconds=steps * p.step_seconds,
        efficiency=work * base.step_seconds / p.step_seconds,
        overlapped_efficiency=(
          work * base.overlapped_step_seconds / p.overlapped_step_seconds
        ),
      )
    )
  return tuple(rows)
