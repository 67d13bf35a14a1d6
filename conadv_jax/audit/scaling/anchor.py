"""The only public measurement to compare predicted step times with."""

from __future__ import annotations

import dataclasses

from conadv_jax.audit.scaling.predict import (
  Calibration,
  Prediction,
  StepCost,
  predict,
)
from conadv_jax.base.errors import ConfigError
from conadv_jax.devices.generations import GENERATIONS
from conadv_jax.devices.topology import Topology


@dataclasses.dataclass(frozen=True)
class Anchor:
  """A published step time.

  Attributes:
    name: of the run.
    topology: it ran on.
    examples_per_device: of one step.
    step_seconds: measured.
    source: of the measurement.
  """

  name: str
  topology: Topology
  examples_per_device: int
  step_seconds: float
  source: str


MLPERF_65536 = Anchor(
  name='MLPerf v0.7 ResNet-50 (JAX), batch 65,536, 224 px',
  # Four pods side by side, so that only the rings of 32 chips close.
  topology=Topology(GENERATIONS['v3'], (128, 32)),
  examples_per_device=8,
  step_seconds=14.2e-3,
  source=(
    "log of Google's submission: 1.1375 s per 80 steps, an evaluation "
    'included; on a mesh of 4,096 chips of v3 (arXiv 2011.03641), of 128x32 by '
    'our assumption'
  ),
)


@dataclasses.dataclass(frozen=True)
class AnchorCheck:
  """The roofline beside a measurement, and two ways to make up for the rest.

  Attributes:
    anchor: the measurement.
    prediction: at the roofline.
    ratio: predicted / measured, nothing overlaps.
    overlapped_ratio: predicted / measured, perfect overlap.
    compute_share: of the measured step, at the roofline.
    bandwidth_share: of it, in collectives.
    latency_share: of it, in collectives.
    unexplained_share: the rest; below 0 where the prediction is the longer.
    by_efficiency: the rest put down to computing that runs slower than the
      roofline in proportion, as if for any number of examples.
    by_overhead: the rest put down to time that every step loses, as if for any
      number of examples.
  """

  anchor: Anchor
  prediction: Prediction
  ratio: float
  overlapped_ratio: float
  compute_share: float
  bandwidth_share: float
  latency_share: float
  unexplained_share: float
  by_efficiency: Calibration
  by_overhead: Calibration


def check_anchor(cost: StepCost, anchor: Anchor = MLPERF_65536) -> AnchorCheck:
  """Predicts `anchor` from the cost of the same step, compiled by us.

  The calibrations assume that nothing overlapped. If anything did, the true
  efficiency is lower still.

  Args:
    cost: of the baseline step of the anchor's network and image size.
    anchor: measured.

  Raises:
    ConfigError: if the collectives alone are predicted longer than measured.
  """
  p = predict(cost, anchor.topology, anchor.examples_per_device)
  measured = anchor.step_seconds
  left = measured - p.collective_seconds
  if left <= 0:
    raise ConfigError(
      f'gradient_bytes={cost.gradient_bytes:.4g}: their collectives would take '
      f'{p.collective_seconds:.4g} s, the whole measured step {measured:.4g} s'
    )
  return AnchorCheck(
    anchor=anchor,
    prediction=p,
    ratio=p.step_seconds / measured,
    overlapped_ratio=p.overlapped_step_seconds / measured,
    compute_share=p.compute_seconds / measured,
    bandwidth_share=(p.collective_seconds - p.latency_seconds) / measured,
    latency_share=p.latency_seconds / measured,
    unexplained_share=1 - p.step_seconds / measured,
    by_efficiency=Calibration(
      'anchored, efficiency',
      efficiency=p.compute_seconds / left,
      source=anchor.name,
    ),
    by_overhead=Calibration(
      'anchored, overhead',
      overhead_seconds=max(0.0, left - p.compute_seconds),
      source=anchor.name,
    ),
  )
