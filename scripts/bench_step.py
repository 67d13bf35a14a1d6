"""Time of a training step by method and batch, beside PyTorch's.

  PYTHONPATH=. python scripts/bench_step.py --model resnet50 \\
      --resolution 224 --batch_sizes 2 8 32 128 --dtype bfloat16 \\
      --output results/bench_step_DEVICE.json
  python scripts/bench_step.py --quick --output FILE.json

Our steps are those that `train` runs, on random images that lie on the devices:
a method of METHODS, or METHOD@TAU for another staleness, with one batch-norm
group per device. Beside them on one CPU or GPU: `torch plain` and `torch
AdvProp` (scripts/bench/torch_step.py), with timm's network. All of a batch size
take turns, chunk by chunk, the order reversed each round; times are medians
over rounds, ratios medians of the ratios within a round.

  ratio           to our `baseline`; of `torch AdvProp` to `torch plain`
  floor           the same in arithmetic: 3 passes per view that is trained on
                  and 2 per gradient of the attack, 3 per ascent of weights,
                  over 3; `to floor` is ratio over floor
  to peer         to the step of PyTorch with the same floor
  share of peak   FLOPs of convolutions and dense layers, counted as in papers
                  (on padding too), per second, over those of a large matmul in
                  JAX, in the same type on the same device
  memory          ours as the compiler reports it, PyTorch's its allocator's
  compile         PyTorch's: until its first step is done

PyTorch uses one thread of a CPU or all, whichever is faster; its optimizer is
SGD with momentum, ours LARS unless --optimizer says otherwise.

Writes FILE.json, FILE.csv, FILE.md and FILE.png after each batch size. Needs
jax, flax, optax, ml_collections and etils, and no TensorFlow. PyTorch and JAX
share the memory of a GPU: XLA_PYTHON_CLIENT_PREALLOCATE=false is set unless it
is in the environment. TF32 is allowed in both.
"""

from __future__ import annotations

import argparse
import gc
import os
import pathlib
import sys
import time
from typing import Any

# Before JAX starts: else it takes most of the memory of a GPU at once.
os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')

import jax

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from conadv_jax import experiment, models
from conadv_jax.base import jax_platform, storage
from conadv_jax.base.errors import ConfigError
from conadv_jax.config import Config
from conadv_jax.methods import METHODS
from scripts.bench import files, step_report
from scripts.bench.machine import machine
from scripts.bench.our_step import (
  configure,
  contender,
  floor,
  random_batch,
  variant,
)
from scripts.bench.turns import Contender, Started, measure, seconds_of

# Data sets of fixed sizes; all other sizes are crops of ImageNet.
DATASETS = {8: 'digits', 28: 'fashion_mnist', 32: 'cifar10'}
PEERS = {'torch plain': 'baseline', 'torch AdvProp': 'disadv'}  # same floor
INSTALL = (
  "no PyTorch, so no peer's rows; to have them:\n"
  '  pip install torch==2.13.0\n'
  '  pip install --no-deps torchvision==0.28.0 timm==1.0.31'
)
# What is not given on the command line, without and with --quick.
FULL = {
  'model': 'resnet50',
  'resolution': 224,
  'batch_sizes': [2, 4, 8, 16, 32, 64, 128],
  # Those that a device can train with one batch-norm group.
  'methods': [*(m for m in METHODS if not METHODS[m].adv_every), 'conadv@2'],
  'repeats': 5,
  'seconds': 0.5,
}
QUICK = {
  'model': 'resnet8',
  'resolution': 8,
  'batch_sizes': [16],
  'methods': ['baseline', 'disadv', 'conadv'],
  'repeats': 3,
  'seconds': 0.05,
}


def make_config(args: argparse.Namespace, variant: str, batch: int) -> Config:
  """The configuration of METHOD or METHOD@TAU with `batch` on each device."""
  crop = 0 if args.resolution in DATASETS else args.resolution
  dataset = {
    'name': DATASETS.get(args.resolution, 'imagenet2012'),
    'image_size_px': crop,
  }
  devices = len(jax.devices())
  return configure(
    args, variant, dataset, batch_size=batch * devices, bn_group_size=batch
  )


def ours(args: argparse.Namespace, variant: str, batch: int) -> Contender:
  """The step that `train` runs."""
  return contender(variant, experiment.build(make_config(args, variant, batch)))


def find_peer(args: argparse.Namespace) -> Any:
  """The module of PyTorch's steps; None, with the reason printed."""
  if args.no_peer:
    return None
  devices = jax.devices()
  if len(devices) > 1 or devices[0].platform not in ('cpu', 'gpu'):
    print(f'no peer: it runs on one CPU or GPU, not on {devices}')
    return None
  try:
    import torch

    from scripts.bench import torch_step

    if args.model not in torch_step.SMALL:
      torch_step.import_timm()
      if models.get(args.model).timm_module is None:
        print(f'no peer: timm has no {args.model}')
        return None
  except ImportError as error:
    print(f'{error}: {INSTALL}')
    return None
  if devices[0].platform == 'gpu' and not torch.cuda.is_available():
    print('no peer: this PyTorch sees no GPU')
    return None
  return torch_step


def peer(
  args: argparse.Namespace, module: Any, name: str, batch: int
) -> Contender:
  """PyTorch's step `name`, of the sizes of our method of the same floor."""
  run = experiment.build(make_config(args, PEERS[name], batch))
  local, config = random_batch(run), run.config
  task = module.Task(
    model=args.model,
    num_classes=run.spec.num_classes,
    images=local['clean'],
    labels=local['label'],
    mean=run.spec.mean,
    std=run.spec.std,
    bfloat16=args.dtype == 'bfloat16',
    drop_rate=getattr(run.model, 'dropout_rate', 0.0),
    drop_path_rate=getattr(run.model, 'drop_path_rate', 0.0),
    epsilon=config.attack.epsilon,
    label_smoothing=config.loss.label_smoothing,
  )
  device = 'cpu' if jax.devices()[0].platform == 'cpu' else 'cuda'
  kind = name.removeprefix('torch ').lower()

  def start():
    return Started(*module.start(kind, task, device, args.compile_peer))

  flops = run.flops_per_device()
  return Contender(
    name, floor(config), flops, start, is_peer=True, release=module.release
  )


def matmul_flops_per_sec(dtype: str) -> float:
  """FLOP/s of products of large random matrices, the best of a few."""
  side, count = (1024, 2) if jax.devices()[0].platform == 'cpu' else (8192, 20)
  a, b = jax.random.normal(jax.random.key(0), (2, side, side), dtype)
  product = jax.jit(lambda x: x @ b / side**0.5)

  def chain():
    x = a
    for _ in range(count):
      x = product(x)
    jax.block_until_ready(x)

  best = min(seconds_of(chain) for _ in range(6))
  return 2 * side**3 * count / best


# ---- Command ----------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--model', choices=models.MODELS, help='our name of it')
  parser.add_argument('--resolution', type=int, help='of images, in pixels')
  parser.add_argument(
    '--batch_sizes', type=int, nargs='+', help='images per device'
  )
  parser.add_argument(
    '--dtype',
    choices=('float32', 'bfloat16'),
    default='float32',
    help='of activations',
  )
  parser.add_argument(
    '--methods',
    type=variant,
    nargs='+',
    help='METHOD or METHOD@TAU; default: all, and conadv@2',
  )
  parser.add_argument(
    '--optimizer', default='lars', help='ours: lars, sgd, ...'
  )
  parser.add_argument('--repeats', type=int, help='rounds')
  parser.add_argument(
    '--seconds', type=float, help='of a chunk of steps, about'
  )
  parser.add_argument(
    '--no_peer', action='store_true', help='ours only, without PyTorch'
  )
  parser.add_argument(
    '--compile_peer', action='store_true', help='PyTorch by torch.compile'
  )
  parser.add_argument(
    '--resume', action='store_true', help='keep the batch sizes in FILE.json'
  )
  parser.add_argument(
    '--quick',
    action='store_true',
    help='resnet8, 8 px, three methods, about a minute',
  )
  parser.add_argument(
    '--output', type=storage.expand, required=True, help='FILE.json'
  )
  args = parser.parse_args(argv)
  for name, value in (QUICK if args.quick else FULL).items():
    if getattr(args, name) is None:
      setattr(args, name, value)
  if args.output.suffix != '.json':
    parser.error(f'--output {args.output}: must end with .json')
  if min(args.repeats, *args.batch_sizes) < 1:
    parser.error('--repeats and --batch_sizes: must be at least 1')
  try:
    for name in args.methods:
      experiment.build(make_config(args, name, args.batch_sizes[0]))
  except ConfigError as error:
    parser.error(str(error))
  return args


def main(argv: list[str] | None = None) -> None:
  jax_platform.choose()
  args = parse(argv)
  settings = files.settings(args, ['batch_sizes'])
  rows = files.kept_rows(args, settings)
  kept = {row['batch_size'] for row in rows}
  module, peak = find_peer(args), matmul_flops_per_sec(args.dtype)
  on_gpu = jax.devices()[0].platform == 'gpu'
  tf32 = 'allowed in both' if on_gpu else 'none'
  report = {
    'machine': machine() | {'matmul_flops_per_sec': peak, 'tf32': tf32},
    'settings': settings,
    'rows': rows,
  }
  print(f'matmul in {args.dtype}: {peak / 1e12:.2f} TFLOP/s')
  todo = [size for size in args.batch_sizes if size not in kept]
  begin = time.perf_counter()
  for done, batch in enumerate(todo):
    if done:
      left = (time.perf_counter() - begin) / done * (len(todo) - done)
      print(f'{done} of {len(todo)} sizes done, about {left:.0f} s left')
    print(f'batch {batch} per device', flush=True)
    contenders = [ours(args, name, batch) for name in args.methods]
    if module:
      contenders += [peer(args, module, name, batch) for name in PEERS]
    measure(contenders, args.repeats, args.seconds)
    devices = len(jax.devices())
    rows += step_report.make_rows(contenders, batch, devices, peak)
    step_report.write(report, args.output)
    print(step_report.table(rows[-len(contenders) :]), flush=True)
    del contenders
    gc.collect()
    jax.clear_caches()
    if module:
      module.release()
  print(f'written: {args.output}, and .csv, .md and .png beside it')


if __name__ == '__main__':
  main()
