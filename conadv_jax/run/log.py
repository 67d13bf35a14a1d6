"""The row and the line that a run logs of a step."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from conadv_jax import hosts
from conadv_jax.data.prefetch import Prefetcher
from conadv_jax.data.quarantine import Quarantine
from conadv_jax.devices.generations import peak_flops_per_sec
from conadv_jax.experiment import Run
from conadv_jax.method.staleness import Metrics
from conadv_jax.run import metrics


def readable(values: Metrics, kernels: Sequence[str]) -> dict[str, Any]:
  """Device metrics -> numbers; trust ratios -> the extreme ones by name."""
  values = dict(jax.device_get(values))
  ratios = values.pop('trust_ratios', None)
  if ratios is not None:
    for name, index in (('min', np.argmin(ratios)), ('max', np.argmax(ratios))):
      values[f'trust_ratio_{name}'] = ratios[index]
      values[f'trust_ratio_{name}_layer'] = kernels[index]
  return values


def mfu_percent(run: Run) -> float | None:
  """Returns the model FLOPs utilisation, in percent, of one image per second.

  FLOPs of a step over the peak of the devices; None where that is not known, as
  of CPUs. What `remat` computes again does not count (arXiv:2204.02311,
  appendix B).
  """
  peak = peak_flops_per_sec(run.mesh.devices.flat[0].device_kind)
  if peak is None:
    return None
  return 100 * run.flops_per_device(again=False) / run.config.batch_size / peak


def rates(
  step: int,
  progress: metrics.Progress,
  batches: Prefetcher,
  seconds_before: float,
  began: float,
  quarantine: Quarantine,
) -> dict[str, Any]:
  """Speed, the longest wait for input, and the bad examples of all hosts.

  Args:
    step: the last one that is done.
    progress: of this start of the run.
    batches: of this host.
    seconds_before: of training in earlier starts, whose steps count still.
    began: when the first start did, in seconds since the epoch.
    quarantine: of this host.
  """
  row = progress.report(step, batches.wait_seconds)
  row['seconds'] = seconds = seconds_before + progress.seconds
  row['goodput_percent'] = 100 * seconds / (time.time() - began)
  of_host = np.array([row['input_wait_percent'], len(quarantine)], np.float32)
  waits, counts = hosts.gather_arrays(of_host).T
  return row | {
    'input_wait_percent': waits.max(),
    'bad_examples': int(counts.sum()),
  }


def line(
  run: Run, step: int, row: dict[str, Any], progress: metrics.Progress
) -> str:
  """The line of progress that users see."""
  accuracy = ' '.join(
    f'{view} {row[f"top1_{view}"]:.1f} %' for view, _ in run.config.views
  )
  return (
    f'step {step}/{run.steps.stop}  loss {row["loss"]:.4f}  {accuracy}  '
    f'lr {row["learning_rate"]:.3g}  {row["images_per_sec"]:.0f} images/s  '
    f'input wait {row["input_wait_percent"]:.0f} %  ETA {progress.eta()}'
  )


def short_line(step: int, progress: metrics.Progress) -> str:
  """The line between two others of a slow run: `step` has begun."""
  return f'step {step}/{progress.stop_step}  ETA {progress.eta(step)}'


def opening(run: Run) -> str:
  """What is trained, on what, and for how long."""
  shapes = run.abstract_state()
  count = sum(leaf.size for leaf in jax.tree.leaves(shapes.params))
  config = run.config
  views = ', '.join(f'{view} (route {r})' for view, r in config.views)
  return (
    f'\n{config.model}: {count:,} parameters; views: {views}; '
    f'{run.groups} batch-norm groups of {config.bn_group_size}\n'
    f'{run.spec.num_train:,} training examples, {run.steps.total} steps of '
    f'{config.batch_size} = {config.epochs:g} epochs, warm-up '
    f'{run.steps.warmup} steps; stops at step {run.steps.stop}\n'
    f'{run.mesh.size} x {jax.devices()[0].device_kind}'
  )
