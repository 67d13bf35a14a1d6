"""A scaling study of one step: predictions, a check, and all assumptions."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from conadv_jax.audit.scaling.anchor import AnchorCheck, check_anchor
from conadv_jax.audit.scaling.predict import (
  ROOFLINE,
  Calibration,
  Row,
  Scaling,
  StepCost,
  scale,
)
from conadv_jax.devices.generations import Generation


class Assumption(NamedTuple):
  """A number or a choice that the forecast rests on."""

  name: str
  value: float | str
  unit: str
  source: str


@dataclasses.dataclass(frozen=True)
class Study:
  """Weak and strong scaling of one step on one generation.

  Attributes:
    weak: one `Scaling` per calibration, the roofline first.
    strong: likewise.
    anchor: the check, or None where there was no cost to check with.
    assumptions: everything that the rows rest on.
  """

  weak: tuple[Scaling, ...]
  strong: tuple[Scaling, ...]
  anchor: AnchorCheck | None
  assumptions: tuple[Assumption, ...]


def make_study(
  cost: StepCost,
  generation: Generation,
  *,
  examples_per_device: int,
  batch_size: int,
  examples_to_train: int,
  max_examples_per_device: int | None = None,
  anchor_cost: StepCost | None = None,
) -> Study:
  """Predicts weak and strong scaling of `cost`.

  Both are at the roofline and, with `anchor_cost`, at two calibrations.

  Args:
    cost: of the step in question.
    generation: of the slices.
    examples_per_device: of weak scaling.
    batch_size: of strong scaling.
    examples_to_train: of the whole run: epochs times examples.
    max_examples_per_device: that HBM holds; more are accumulated.
    anchor_cost: of the step of `anchor.MLPERF_65536`, compiled by us for v3.

  Raises:
    ConfigError: for a number out of range; the message names it.
  """
  check = None if anchor_cost is None else check_anchor(anchor_cost)
  calibrations = (ROOFLINE,)
  if check is not None:
    calibrations += (check.by_efficiency, check.by_overhead)

  def over_devices(mode: str, size: int) -> tuple[Scaling, ...]:
    return tuple(
      scale(
        mode,
        cost,
        generation,
        size,
        examples_to_train,
        calibration,
        max_examples_per_device,
      )
      for calibration in calibrations
    )

  return Study(
    weak=over_devices('weak', examples_per_device),
    strong=over_devices('strong', batch_size),
    anchor=check,
    assumptions=_assumptions(
      cost, generation, calibrations, max_examples_per_device
    ),
  )


def _assumptions(
  cost: StepCost,
  generation: Generation,
  calibrations: Sequence[Calibration],
  max_examples_per_device: int | None,
) -> tuple[Assumption, ...]:
  hardware = (
    ('peak_flops_per_sec', 'FLOP/s per device'),
    ('hbm_bytes_per_sec', 'bytes/s per device'),
    ('ici_bytes_per_sec', 'bytes/s out of a device, one direction'),
    ('ici_hop_seconds', 's per hop'),
    ('dcn_bytes_per_sec_per_host', 'bytes/s out of a host, one direction'),
    ('dcn_latency_seconds', 's per exchange between slices'),
  )
  bn = cost.batch_norm
  step = (
    ('flops_per_example', cost.flops_per_example, 'FLOP'),
    ('bytes_per_example', cost.bytes_per_example, 'bytes'),
    ('fixed_flops', cost.fixed_flops, 'FLOP per microbatch'),
    ('fixed_bytes', cost.fixed_bytes, 'bytes per microbatch'),
  )
  given = (
    ('gradient_bytes', cost.gradient_bytes, 'bytes all-reduced per step'),
    ('batch_norm.group_size', bn.group_size, 'examples; 0 = within a device'),
    ('batch_norm.all_reduces', bn.all_reduces, 'per microbatch, over devices'),
    ('batch_norm.bytes', bn.bytes, 'bytes of all of these'),
    ('max_examples_per_device', max_examples_per_device or 'no limit', ''),
  )
  rows = [
    Assumption(name, getattr(generation, name), unit, generation.source(name))
    for name, unit in hardware
  ]
  rows += [Assumption(*values, cost.origin) for values in step]
  for c in calibrations:
    rows += [
      Assumption(
        f'{c.name}: efficiency', c.efficiency, 'of computing', c.source
      ),
      Assumption(
        f'{c.name}: overhead', c.overhead_seconds, 's per microbatch', c.source
      ),
    ]
  rows += [Assumption(*values, 'given by the caller') for values in given]
  choices = (
    ('overlap', 'none, or perfect', 'of the gradients with computing'),
    ('all-reduce', 'reduce-scatter, all-gather', 'all links of a chip busy'),
    ('sum within a chip', 'free', 'where it has two devices'),
    ('closed rings', 'Topology.wrap', 'which dimensions of a slice'),
    ('input, evaluation, checkpoints', 'free', 'no device waits for them'),
    ('stragglers', 'none', 'every device takes the same time'),
    ('examples to train', 'the same', 'for every batch size'),
    ('calibration', 'the same', 'for every method and generation'),
  )
  rows += [Assumption(*row, 'our assumption') for row in choices]
  return tuple(rows)


# ---- JSON --------------------------------------------------------------------


def as_json(study: Study) -> dict[str, Any]:
  """Converts `study` to plain dicts and lists; shares are of 1."""
  check = study.anchor
  return {
    'weak': [_scaling_json(s) for s in study.weak],
    'strong': [_scaling_json(s) for s in study.strong],
    'anchor': None if check is None else _anchor_json(check),
    'assumptions': [a._asdict() for a in study.assumptions],
  }


def _scaling_json(scaling: Scaling) -> dict[str, Any]:
  return {
    'calibration': dataclasses.asdict(scaling.calibration),
    'rows': [_row_json(row) for row in scaling.rows],
  }


def _row_json(row: Row) -> dict[str, Any]:
  p = row.prediction
  of_step = (
    'batch_size', 'examples_per_device', 'microbatches', 'flop_seconds',
    'byte_seconds', 'compute_seconds', 'collective_seconds', 'latency_seconds',
    'step_seconds', 'overlapped_step_seconds',
  )  # fmt: skip
  of_run = ('steps', 'train_seconds', 'efficiency', 'overlapped_efficiency')
  return {
    'devices': p.topology.devices,
    'topology': p.topology.name,
    'slices': p.topology.slices,
    'hosts': p.topology.hosts,
    **{name: getattr(p, name) for name in of_step},
    'examples_per_sec': p.batch_size / p.step_seconds,
    **{name: getattr(row, name) for name in of_run},
  }


def _anchor_json(check: AnchorCheck) -> dict[str, Any]:
  p = check.prediction
  of_check = (
    'ratio', 'overlapped_ratio', 'compute_share', 'bandwidth_share',
    'latency_share', 'unexplained_share',
  )  # fmt: skip
  return {
    'name': check.anchor.name,
    'source': check.anchor.source,
    'devices': p.topology.devices,
    'examples_per_device': p.examples_per_device,
    'measured_step_seconds': check.anchor.step_seconds,
    'predicted_step_seconds': p.step_seconds,
    **{name: getattr(check, name) for name in of_check},
    'efficiency': check.by_efficiency.efficiency,
    'overhead_seconds': check.by_overhead.overhead_seconds,
  }
