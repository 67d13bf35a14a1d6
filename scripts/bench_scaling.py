"""How the cost of a training step grows, axis by axis.

  PYTHONPATH=. python scripts/bench_scaling.py --model resnet50 \\
      --resolution 224 --batch_size 128 --dtype bfloat16 \\
      --output results/bench_scaling_DEVICE.json
  python scripts/bench_scaling.py --quick --output FILE.json

Each axis changes one thing about the step that `train` runs, on random images
(scripts/bench/our_step.py), and holds all else:

  axis          what grows                         floor of the time
  batch         images of one device               proportional
  resolution    side of the images                 proportional to its square
  views         baseline, adv_only, conadv,        (3 V + 2) / 3 of the baseline
                conadv_aa: V views and an attack
  staleness     tau of conadv                      constant
  microbatches  parts of one batch                 constant
  devices       on a CPU, whose devices share its  constant
                cores: of one batch; else with
                --batch_size images each

All but `devices` use one device. The points of an axis take turns, chunk by
chunk, the order reversed each round; times are medians over rounds, ratios (to
the first point) medians of the ratios within a round. Then a line is fitted
to each series by least squares, in time and in memory, and the first point is
named that is off the line through its two neighbours by more than --tolerance.
On a CPU more devices than cores show nothing but their overhead.

  ratio, floor   to the first point; `to floor` is ratio over floor
  memory         peak of one device, as the compiler reports it
  state          what outlives a step: weights, optimizer, snapshots, images,
                 perturbation; of one device

Writes FILE.json, FILE.csv, FILE.md and FILE.png after each axis. Needs jax,
flax, optax, ml_collections and etils, and no TensorFlow.
"""

from __future__ import annotations

import argparse
import gc
import math
import pathlib
import sys
import time

import jax
from jax.extend import backend

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from conadv_jax import experiment, models
from conadv_jax.audit.compile import state_bytes
from conadv_jax.base import jax_platform, storage
from conadv_jax.base.errors import ConfigError
from conadv_jax.config import Config
from scripts.bench import files, our_step, scaling_report
from scripts.bench.machine import machine
from scripts.bench.scaling_report import AXES, Point
from scripts.bench.turns import measure

VIEWS = ('baseline', 'adv_only', 'conadv', 'conadv_aa')
# What is not given on the command line, without and with --quick.
FULL = {
  'model': 'resnet50',
  'resolution': 224,
  'resolutions': [64, 96, 128, 160, 192, 224, 256],
  'batch_size': 128,
  'batch_sizes': [2, 4, 8, 16, 32, 64, 128],
  'staleness': [0, 1, 2, 4],
  'microbatches': [1, 2, 4, 8],
  'repeats': 5,
  'seconds': 0.5,
}
QUICK = {
  'model': 'resnet8',
  'resolution': 8,
  'resolutions': [8, 12, 16],
  'batch_size': 8,
  'batch_sizes': [2, 4, 8],
  'staleness': [0, 1, 2],
  'microbatches': [1, 2, 4],
  'repeats': 3,
  'seconds': 0.05,
}


def is_cpu() -> bool:
  return jax.devices()[0].platform == 'cpu'


def default_devices() -> list[int]:
  """1, 2, 4, ...: of those there are, of a CPU's as many as it may have."""
  most = 4 if is_cpu() else len(jax.devices())
  return [2**i for i in range(most.bit_length())]


# ---- Axes -------------------------------------------------------------------


def places(args: argparse.Namespace, axis: str) -> list[tuple[float, dict]]:
  """(x, what is not as usual there), in the order of the series."""
  both = ('baseline', 'conadv')
  if axis == 'batch':
    return [
      (x, {'variant': v, 'batch_size': x, 'bn_group_size': x})
      for v in both
      for x in args.batch_sizes
    ]
  if axis == 'resolution':
    return [
      (x, {'variant': v, 'resolution': x})
      for v in both
      for x in args.resolutions
    ]
  if axis == 'views':
    floors = [(our_step.floor(configure(args, variant=v)), v) for v in VIEWS]
    return [(x, {'variant': v}) for x, v in floors]
  if axis == 'staleness':
    return [(x, {'variant': f'conadv@{x}'}) for x in args.staleness]
  counts = getattr(args, axis)
  group = args.batch_size // max(counts)
  if axis == 'microbatches':
    return [(x, {'microbatches': x, 'bn_group_size': group}) for x in counts]
  if is_cpu():
    return [(x, {'bn_group_size': group}) for x in counts]
  return [(x, {'batch_size': x * args.batch_size}) for x in counts]


def configure(
  args: argparse.Namespace,
  variant: str = 'conadv',
  resolution: int | None = None,
  **fields: int,
) -> Config:
  """One batch-norm group of --batch_size images, unless `fields` say else.

  Images are always ImageNet's, so that nothing else changes with their size.
  """
  size = args.batch_size
  dataset = {
    'name': 'imagenet2012',
    'image_size_px': resolution or args.resolution,
  }
  fields = {'batch_size': size, 'bn_group_size': size} | fields
  return our_step.configure(args, variant, dataset, **fields)


def make_points(args: argparse.Namespace, axis: str) -> list[Point]:
  """The points of an axis, ready to start."""
  points = []
  for x, changed in places(args, axis):
    config = configure(args, **changed)
    devices = jax.devices()[: x if axis == 'devices' else 1]
    run = experiment.build(config, devices)
    variant = changed.get('variant', 'conadv')
    series = variant if axis in ('batch', 'resolution') else 'conadv'
    point = Point(
      axis=axis,
      series='methods' if axis == 'views' else series,
      x=x,
      variant=variant,
      batch_size=config.batch_size,
      held=held(args, axis),
      state_bytes=sum(state_bytes(run).values()),
      step=our_step.contender(f'{variant} at {x:.3g}', run),
    )
    points.append(point)
  return points


def held(args: argparse.Namespace, axis: str) -> str:
  """What does not change along an axis."""
  size = f'{args.batch_size} images'
  pixels = f'{args.resolution} px'
  if axis == 'batch':
    return f'{pixels}, one batch-norm group'
  if axis == 'resolution':
    return size
  if axis == 'devices' and not is_cpu():
    return f'{size} per device, {pixels}'
  if axis in ('devices', 'microbatches'):
    group = args.batch_size // max(getattr(args, axis))
    return f'{size} in all, {pixels}, batch-norm groups of {group}'
  return f'{size}, {pixels}'


def set_cpu_devices(count: int) -> None:
  """Starts JAX again with so many devices; only of a CPU, and all else ends.

  From then on a CPU's devices share its threads, so this axis comes last.
  """
  backend.clear_backends()
  jax.config.update('jax_num_cpu_devices', count)


# ---- Command ----------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    '--axes', choices=AXES, nargs='+', help='some of them; default: all'
  )
  parser.add_argument('--model', choices=models.MODELS, help='our name of it')
  parser.add_argument('--resolution', type=int, help='of images, in pixels')
  parser.add_argument(
    '--resolutions', type=int, nargs='+', help='of that axis, ascending'
  )
  parser.add_argument(
    '--batch_size', type=int, help='images, on the other axes'
  )
  parser.add_argument(
    '--batch_sizes', type=int, nargs='+', help='of that axis, ascending'
  )
  parser.add_argument(
    '--staleness', type=int, nargs='+', help='of that axis, ascending'
  )
  parser.add_argument(
    '--microbatches', type=int, nargs='+', help='of that axis, ascending'
  )
  parser.add_argument(
    '--devices',
    type=int,
    nargs='+',
    help='of that axis, ascending; default: 1 2 4, or all that there are',
  )
  parser.add_argument(
    '--dtype',
    choices=('float32', 'bfloat16'),
    default='float32',
    help='of activations',
  )
  parser.add_argument('--optimizer', default='lars', help='lars, sgd, ...')
  parser.add_argument('--repeats', type=int, help='rounds')
  parser.add_argument(
    '--seconds', type=float, help='of a chunk of steps, about'
  )
  parser.add_argument(
    '--tolerance',
    type=float,
    default=0.1,
    help='share by which a point may be off the line of its neighbours',
  )
  parser.add_argument(
    '--resume', action='store_true', help='keep the axes in FILE.json'
  )
  parser.add_argument(
    '--quick',
    action='store_true',
    help='resnet8, 8 px, few points, some minutes on two cores',
  )
  parser.add_argument(
    '--output', type=storage.expand, required=True, help='FILE.json'
  )
  args = parser.parse_args(argv)
  for name, value in (QUICK if args.quick else FULL).items():
    if getattr(args, name) is None:
      setattr(args, name, value)
  args.devices = args.devices or default_devices()
  args.axes = [axis for axis in AXES if axis in (args.axes or AXES)]
  try:
    check(args)
  except ConfigError as error:
    parser.error(str(error))
  return args


def check(args: argparse.Namespace) -> None:
  """Raises ConfigError for what no point can be made of."""
  if args.output.suffix != '.json':
    raise ConfigError(f'--output {args.output}: must end with .json')
  for name in ('resolutions', 'batch_sizes', 'microbatches', 'devices'):
    values = getattr(args, name)
    if min(values) < 1 or values != sorted(set(values)):
      raise ConfigError(f'--{name} {values}: must be ascending, from 1')
  if args.staleness != sorted(set(args.staleness)):
    raise ConfigError(f'--staleness {args.staleness}: must be ascending')
  if min(args.repeats, args.batch_size) < 1:
    raise ConfigError('--repeats and --batch_size: must be at least 1')
  for name in ('microbatches', 'devices'):
    values = getattr(args, name)
    multiple = math.lcm(*values)
    if multiple > max(values) or args.batch_size % multiple:
      raise ConfigError(
        f'--{name} {values}: each must divide the largest, and that one '
        f'--batch_size {args.batch_size}'
      )
  if not is_cpu() and max(args.devices) > len(jax.devices()):
    raise ConfigError(
      f'--devices {args.devices}: there are {len(jax.devices())}'
    )
  for axis in args.axes:
    for _, changed in places(args, axis):
      configure(args, **changed)


def main(argv: list[str] | None = None) -> None:
  jax_platform.choose()
  args = parse(argv)
  settings = files.settings(args, ['axes'])
  rows = files.kept_rows(args, settings)
  kept = {row['axis'] for row in rows}
  report = {'machine': machine(), 'settings': settings, 'rows': rows}
  todo = [axis for axis in args.axes if axis not in kept]
  if 'devices' in todo and len(args.devices) == 1:
    print('no axis of devices: there is one; --devices says otherwise')
    todo.remove('devices')
  begin = time.perf_counter()
  for done, axis in enumerate(todo):
    if done:
      left = (time.perf_counter() - begin) / done * (len(todo) - done)
      print(f'{done} of {len(todo)} axes done, about {left:.0f} s left')
    print(f'{axis}: held: {held(args, axis)}', flush=True)
    if axis == 'devices' and is_cpu():
      set_cpu_devices(max(args.devices))
    points = make_points(args, axis)
    measure([point.step for point in points], args.repeats, args.seconds)
    rows += (new := scaling_report.make_rows(points))
    scaling_report.write(report, args.output)
    print(scaling_report.axis_table(new))
    fits = scaling_report.make_fits(new, args.tolerance)
    print(scaling_report.fit_table(fits, args.tolerance), flush=True)
    del points
    gc.collect()
    jax.clear_caches()
  print(f'written: {args.output}, and .csv, .md and .png beside it')


if __name__ == '__main__':
  main()
