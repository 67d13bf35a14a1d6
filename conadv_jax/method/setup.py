"""What a step is made of, and does not change."""

from __future__ import annotations

import dataclasses

import jax
import optax

from conadv_jax.config import Config
from conadv_jax.data.datasets import DatasetSpec
from conadv_jax.models import ApplyFn


@dataclasses.dataclass(frozen=True)
class Setup:
  """The static half of a training step; `TrainState` is the other.

  Attributes:
    config: every setting of the run.
    spec: the data set: sizes, classes, mean and deviation of the pixels.
    apply_fn: the network.
    mesh: the devices.
    optimizer: sees gradients and parameters as `sharded_optimizer.pack` does.
    schedule: updates done so far -> learning rate.
  """

  config: Config
  spec: DatasetSpec
  apply_fn: ApplyFn
  mesh: jax.sharding.Mesh
  optimizer: optax.GradientTransformation
  schedule: optax.Schedule
