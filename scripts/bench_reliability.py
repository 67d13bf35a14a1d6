"""What it costs to lose nothing: checkpoints, the finite check, the watchdog.

  python scripts/bench_reliability.py --output=results/bench_reliability.json

  checkpoints  of --model as ConAdv trains it: how long `save` keeps the
               loop, when the save is confirmed on disk, how long a restore
               takes, all beside orbax alone on the same disk; bytes
  checksums    one call over the state, which `save` and `restore` contain
  step         the training step of digits (resnet8) with no check, with loss
               and gradient norm checked, as it is (and batch statistics), and
               with spike detection
  watchdog     a call of `phase`, and the share of a core of its thread

Contenders take turns; medians over --repeats. Needs no TensorFlow.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from conadv_jax import experiment
from conadv_jax.base import jax_platform, storage
from conadv_jax.checkpoints import checksum
from conadv_jax.checkpoints.checkpoint import Checkpoints
from conadv_jax.config import from_config_dict
from conadv_jax.hosts.watchdog import Watchdog
from conadv_jax.method import spikes
from conadv_jax.method.staleness import pending_perturbation
from configs import digits, imagenet_resnet50

STEPS_PER_CALL = 20
PHASES = 100_000
IDLE_SECONDS = 10


# ---- Checkpoints ------------------------------------------------------------


def as_trained(state: Any) -> Any:
  """`state` with random weights, momentum, ...: zeros would compress away."""
  rng = np.random.default_rng(0)

  def fill(x):
    if not jnp.issubdtype(x.dtype, jnp.floating):
      return x
    values = rng.standard_normal(x.shape, np.float32)
    return jax.device_put(values.astype(x.dtype), x.sharding)

  return jax.block_until_ready(jax.tree.map(fill, state))


def checkpoint_rows(args, directory: pathlib.Path) -> dict[str, Any]:
  fields = imagenet_resnet50.get_config('method=conadv')
  fields.update(model=args.model, batch_size=256, bn_group_size=32)
  run = experiment.build(from_config_dict(fields))
  state = as_trained(run.init_state().replace(perturbation=None))
  first = seconds(lambda: checksum.checksums(state))
  rows = {'ours': [], 'orbax alone': [], 'checksums': []}
  ours = Checkpoints(epath.Path(directory / 'ours'))
  orbax = ocp.CheckpointManager(
    directory / 'orbax', options=ocp.CheckpointManagerOptions(max_to_keep=1)
  )
  like = run.abstract_state().replace(perturbation=None)
  for step in range(1, args.repeats + 2):
    rows['checksums'].append([seconds(lambda: checksum.checksums(state))])
    rows['ours'].append(
      three(
        lambda step=step: ours.save(step, state),
        lambda step=step: ours.wait(step),
        lambda step=step: ours.restore(like, step),
      )
    )
    rows['orbax alone'].append(
      three(
        lambda step=step: orbax.save(step, args=ocp.args.StandardSave(state)),
        orbax.wait_until_finished,
        lambda step=step: orbax.restore(
          step, args=ocp.args.StandardRestore(like)
        ),
      )
    )
  ours.close()
  orbax.close()
  files = directory.glob('ours/checkpoints/*/**/*')
  on_disk = sum(path.stat().st_size for path in files if path.is_file())
  weights = sum(x.nbytes for x in jax.tree.leaves(state.params))
  # The first of each compiles and opens.
  found = {who: np.median(times[1:], 0) for who, times in rows.items()}
  names = ('save_blocks_seconds', 'on_disk_after_seconds', 'restore_seconds')
  return {
    'model': args.model,
    'leaves': len(jax.tree.leaves(state)),
    'state_bytes': sum(x.nbytes for x in jax.tree.leaves(state)),
    'on_disk_bytes': on_disk,
    'on_disk_per_parameter_bytes': on_disk / weights,
    'checksums_seconds': float(found.pop('checksums')[0]),
    'checksums_first_seconds': first,
    **{
      who: dict(zip(names, map(float, row), strict=True))
      for who, row in found.items()
    },
  }


def three(
  save: Callable[[], Any], wait: Callable[[], Any], restore: Callable[[], Any]
) -> list[float]:
  """Seconds that `save` blocks, until `wait` returns, and of `restore`."""
  blocks = seconds(save)
  on_disk = blocks + seconds(wait)
  return [blocks, on_disk, seconds(restore)]


# ---- The training step ------------------------------------------------------


def step_rows(args) -> dict[str, float]:
  """Milliseconds of a step by what it checks."""

  def loss_and_norm(loss, grad_norm, stats):
    del stats
    return jnp.isfinite(loss) & jnp.isfinite(grad_norm)

  kinds = {
    'no check': ({}, lambda *_: jnp.bool_(True)),
    'loss and norm': ({}, loss_and_norm),
    'as it is': ({}, spikes.is_finite),
    'with spikes': ({'sigmas': 6.0}, spikes.is_finite),
  }
  calls = {}
  for name, (spike, is_finite) in kinds.items():
    fields = digits.get_config('method=conadv,batch_size=320')
    fields.spike.update(spike)
    run = experiment.build(from_config_dict(fields))
    with mock.patch.object(spikes, 'is_finite', is_finite):
      step_fn = run.compile_step()
    calls[name] = stepper(run, step_fn)
  times = {name: [] for name in calls}
  for _ in range(args.repeats * 4 + 1):
    for name, call in calls.items():
      times[name].append(seconds(call) / STEPS_PER_CALL)
  return {
    name: 1e3 * statistics.median(found[1:]) for name, found in times.items()
  }


def stepper(run: experiment.Run, step_fn) -> Callable[[], None]:
  """A call that takes STEPS_PER_CALL steps on a batch of random images."""
  config = run.config
  rng = np.random.default_rng(0)
  local = {
    'clean': rng.integers(
      0, 256, (config.batch_size, *run.spec.image_shape), np.uint8
    ),
    'label': rng.integers(0, 10, config.batch_size, np.int32),
  }
  batch = run.put_batch(local)
  state = pending_perturbation(config, step_fn, run.init_state(), batch)

  def call():
    nonlocal state
    for _ in range(STEPS_PER_CALL):
      state, _ = step_fn(state, batch, batch)
    jax.block_until_ready(state)

  return call


# ---- The watchdog -----------------------------------------------------------


def watchdog_rows() -> dict[str, float]:
  with Watchdog(1800) as watchdog:
    start = time.perf_counter()
    for step in range(PHASES):
      watchdog.phase('step', step)
    phase = (time.perf_counter() - start) / PHASES
    start = time.process_time()
    time.sleep(IDLE_SECONDS)
    share = (time.process_time() - start) / IDLE_SECONDS
  return {'phase_ns': 1e9 * phase, 'thread_percent_of_core': 100 * share}


# ---- Together ---------------------------------------------------------------


def seconds(call: Callable[[], Any]) -> float:
  start = time.perf_counter()
  call()
  return time.perf_counter() - start


def table(found: dict[str, Any]) -> str:
  saved, steps, dog = found['checkpoints'], found['step_ms'], found['watchdog']
  lines = [
    (
      f'{saved["model"]}: {saved["leaves"]} leaves, {saved["state_bytes"]:,} '
      f'bytes; on disk {saved["on_disk_bytes"]:,}, '
      f'{saved["on_disk_per_parameter_bytes"]:.2f} x the parameters'
    ),
    (
      f'checksums {saved["checksums_seconds"]:.3f} s, the first time '
      f'{saved["checksums_first_seconds"]:.1f} s'
    ),
    f'{"":<26}{"ours":>8}{"orbax":>8}{"ratio":>8}',
  ]
  for name, ours in saved['ours'].items():
    orbax = saved['orbax alone'][name]
    lines.append(f'{name:<26}{ours:>8.3f}{orbax:>8.3f}{ours / orbax:>8.2f}')
  lines += [
    f'step, {name:<20}{ms:>8.2f} ms, {ms / steps["no check"]:.3f}x'
    for name, ms in steps.items()
  ]
  lines.append(
    f'watchdog: {dog["phase_ns"]:.0f} ns a phase, its thread '
    f'{dog["thread_percent_of_core"]:.2f} % of a core'
  )
  return '\n'.join(lines)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--model', default='resnet50')
  parser.add_argument('--repeats', type=int, default=5)
  parser.add_argument(
    '--directory',
    type=storage.expand,
    help='where checkpoints go; default: a temporary one',
  )
  parser.add_argument('--output', type=storage.expand, help='a JSON file')
  args = parser.parse_args()
  jax_platform.choose()
  with tempfile.TemporaryDirectory(dir=args.directory) as directory:
    saved = checkpoint_rows(args, pathlib.Path(directory))
  device = jax.devices()[0]
  found = {
    'device': f'{len(jax.devices())} x {device.device_kind}',
    'jax': jax.__version__,
    'orbax': ocp.__version__,
    'checkpoints': saved,
    'step_ms': step_rows(args),
    'watchdog': watchdog_rows(),
  }
  print(table(found))
  if args.output:
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(found, indent=2) + '\n')


if __name__ == '__main__':
  main()
