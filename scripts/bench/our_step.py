"""The step that `train` runs, on random images, as a `Contender`."""

from __future__ import annotations

import argparse
import time
from typing import Any

import jax
import numpy as np

from conadv_jax import experiment
from conadv_jax.config import Config, from_config_dict
from conadv_jax.methods import METHODS
from scripts.bench.turns import Contender, Started


def variant(text: str) -> str:
  """METHOD or METHOD@TAU of the command line."""
  method, _, staleness = text.partition('@')
  if method not in METHODS or (staleness and not staleness.isdigit()):
    raise argparse.ArgumentTypeError(
      f'{text!r}: METHOD or METHOD@TAU, of {", ".join(METHODS)}'
    )
  return text


def configure(
  args: argparse.Namespace,
  variant: str,
  dataset: dict[str, Any],
  **fields: Any,
) -> Config:
  """The configuration of METHOD or METHOD@TAU.

  Args:
    args: has `model`, `dtype` and `optimizer`.
    variant: METHOD or METHOD@TAU.
    dataset: fields of the group `dataset`.
    **fields: other fields, `batch_size` and `bn_group_size` among them.
  """
  method, _, staleness = variant.partition('@')
  return from_config_dict(
    {
      'model': args.model,
      'method': method,
      'staleness_steps': int(staleness) if staleness else None,
      'dtype': args.dtype,
      'dataset': dataset,
      'optimizer': {'name': args.optimizer, 'learning_rate': 1e-3},
    }
    | fields
  )


def floor(config: Config) -> float:
  """Arithmetic of a step of `config` over that of one clean view.

  A forward pass and the two halves of a backward pass cost F each: 3 F for each
  view that is trained on, and 2 F, with no gradient of weights unless it
  trains, for each gradient of the attack. An ascent of weights costs 3 F, or
  2 F without those of kernels, for each view but `adv`.
  """
  shares, cost = config.shares, 3 if config.adv_every else 2
  attacks = shares.get('adv', 0) * config.attack.steps
  each = 2 if config.sam.mask == 'norm_only' else 3
  ascents = each * len(config.ascent_views)
  return (3 * sum(shares.values()) + cost * attacks + ascents) / 3


def random_batch(run: experiment.Run) -> dict[str, np.ndarray]:
  """Random images and labels of a whole batch."""
  size, rng = run.config.batch_size, np.random.default_rng(0)
  shape = (size, *run.spec.image_shape)
  views = run.config.fed_views
  batch = {view: rng.integers(0, 256, shape, np.uint8) for view in views}
  return batch | {
    'label': rng.integers(0, run.spec.num_classes, size, np.int32)
  }


def contender(name: str, run: experiment.Run) -> Contender:
  """The compiled step of `run`, on images that lie on its devices."""

  def start():
    begin = time.perf_counter()
    step = run.compile_step()
    seconds = time.perf_counter() - begin
    images, state = run.put_batch(random_batch(run)), run.init_state()

    def take(count):
      nonlocal state
      for _ in range(count):
        state, _ = step(state, images, images)
      jax.block_until_ready(state)

    costs = step.cost_analysis() or {}
    return Started(take, seconds, peak_bytes(step), costs.get('flops'))

  return Contender(name, floor(run.config), run.flops_per_device(), start)


def peak_bytes(step: jax.stages.Compiled) -> int | None:
  """Memory of one device at the peak of a step, arguments included."""
  memory = step.memory_analysis()
  if memory is None:
    return None
  apart = memory.output_size_in_bytes - memory.alias_size_in_bytes
  total = memory.argument_size_in_bytes + memory.temp_size_in_bytes + apart
  if jax.default_backend() == 'cpu':  # whose peak leaves out temporaries
    return total
  return getattr(memory, 'peak_memory_in_bytes', 0) or total
