"""Speed of the input pipeline on one core, beside timm's and torchvision's.

  python scripts/bench_input.py --output=results/bench_input.json [--quick]
      [--data_dir=DIR] [--memory_batches=2000]

Every row is a process of its own on one core, over the same JPEG files (made
from scikit-learn's photos, 500x375 px mostly, unless --data_dir names a folder
of class sub-folders of train/). timm and torchvision (pip install -e .[parity])
read with a DataLoader of one worker process, which shares that core, with the
same crop, bicubic interpolation and AutoAugment policy. Rates are images per
second of processor time of all threads and processes, so that what else runs on
the machine matters little. Rows take turns, and the median of the rounds is
reported; ratios are within a round.

Then the break-down of our own time, the memory over many batches, and how many
host cores a TPU slice needs at a batch of 98,304.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import pathlib
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from conadv_jax.base import storage
from conadv_jax.config import default_config, from_config_dict
from scripts.bench.machine import cpu_name

SIZE_PX = 224
BATCH = 64
# Bytes that one step moves per device, and images of its share of the batch
# (ResNet-50, 224 px, bfloat16, compiled by XLA:TPU for v3; see docs/design.md).
STEP_BYTES = {'clean': 74.8e9 / 96, 'clean+aa': 101.4e9 / 96}
# name: (hosts, devices, HBM bytes/s of a device)
SLICES = {
  'v3-1024': (128, 1024, 450e9),
  'v4-1024': (128, 512, 1200e9),
  'v5e-256': (64, 256, 819e9),
  'v5p-256': (32, 128, 2765e9),
  'v6e-256': (64, 256, 1640e9),
}


@dataclasses.dataclass(frozen=True)
class Row:
  """A thing to time, and what its ratio is to."""

  name: str
  run: Callable[[pathlib.Path, int], float]  # -> images per CPU second
  peer_of: str = ''


# ---- Ours, and that of peers ------------------------------------------------


def _settings(**changes):
  dataset = from_config_dict(default_config()).dataset
  return dataclasses.replace(
    dataset, image_size_px=SIZE_PX, random_flip=True, **changes
  )


def _batches(
  root: pathlib.Path, views: tuple[str, ...], num_images: int, **changes
) -> Iterator[dict]:
  return _train_batches(
    root, views, BATCH, -(-num_images // BATCH), _settings(**changes)
  )


def _train_batches(root, views, batch_size, num_batches, settings):
  from conadv_jax.data import pipeline
  from conadv_jax.data.sources import image_folder
  from conadv_jax.data.sources.source import Share

  return pipeline.train_batches(
    image_folder.ImageFolder(str(root), 'train'),
    settings,
    Share(seed=0, batch_size=batch_size, steps=range(num_batches)),
    image_views=views,
    num_classes=1000,
  )


def ours(*views: str, **changes) -> Callable[[pathlib.Path, int], float]:
  def run(root, num_images):
    return _rate(_batches(root, views, num_images, **changes))

  return run


def _rate(batches: Iterator) -> float:
  """Images per CPU second, from the end of the second batch."""
  next(batches), next(batches)
  start = end = _cpu_seconds()
  count = 0
  for _ in batches:
    count += BATCH
    end = _cpu_seconds()  # now: worker processes end with the last batch
  return count / (end - start)


def _cpu_seconds() -> float:
  """Processor time of this process and its workers."""
  ticks = 0
  for process in multiprocessing.active_children():
    stat = pathlib.Path(f'/proc/{process.pid}/stat').read_text()
    ticks += sum(map(int, stat.rpartition(')')[2].split()[11:13]))
  return time.process_time() + ticks / os.sysconf('SC_CLK_TCK')


def peer(
  library: str, policy: str = ''
) -> Callable[[pathlib.Path, int], float]:
  def run(root, num_images):
    from scripts.bench import torch_input

    return _rate(
      torch_input.batches(root, library, policy, SIZE_PX, BATCH, num_images)
    )

  return run


ROWS = {
  row.name: row
  for row in (
    Row('clean', ours('clean')),
    Row('clean, no antialias', ours('clean', antialias=False)),
    Row(
      'clean, bilinear, no antialias',
      ours('clean', antialias=False, interpolation='bilinear'),
    ),
    Row('clean, timm', peer('timm'), 'clean'),
    Row('clean, torchvision', peer('torchvision'), 'clean'),
    Row('clean+aa, shared crop', ours('clean', 'aa', aa_shares_crop=True)),
    Row('clean+aa, own crops', ours('clean', 'aa')),
    Row(
      'clean+aa, own crops, no antialias',
      ours('clean', 'aa', antialias=False),
    ),
    # timm's v0 fails with current versions of Pillow: posterize to 0 bits.
    Row(
      'clean+aa (reduced_imagenet), own crops',
      ours('clean', 'aa', autoaugment='reduced_imagenet'),
    ),
    Row(
      'clean+aa (reduced_imagenet), own crops, timm',
      peer('timm', 'original'),
      'clean+aa (reduced_imagenet), own crops',
    ),
    Row(
      'clean+aa (reduced_imagenet), own crops, torchvision',
      peer('torchvision', 'imagenet'),
      'clean+aa (reduced_imagenet), own crops',
    ),
  )
}


# ---- Break-down -------------------------------------------------------------


def breakdown(root: pathlib.Path, num_images: int) -> list[dict]:
  """Milliseconds of processor time per image of each stage.

  Stages are added one by one to a plain tf.data pipeline on one thread; a
  stage's time is what it adds. The last is the pipeline of training.
  """
  import numpy as np

  from conadv_jax.data.sources import image_folder

  source = image_folder.ImageFolder(str(root), 'train')
  ids = np.random.default_rng(0).integers(source.num_examples, size=num_images)
  read, whole, window, crop, augment = _stages(source)
  t_read = _seconds(ids, read)
  t_whole = _seconds(ids, read, whole)
  t_window = _seconds(ids, read, window)
  t_crop = _seconds(ids, read, crop)
  t_aug = _seconds(ids, read, crop, augment)
  t_batch = _seconds(ids, read, crop, augment, batch=True)
  t_put = _seconds(ids, read, crop, augment, batch=True, put=True)
  stages = {
    'read': t_read,
    'decode the whole image (for comparison)': t_whole - t_read,
    'decode the crop': t_window - t_read,
    'resize, flip': t_crop - t_window,
    'AutoAugment v0': t_aug - t_crop,
    'batch': t_batch - t_aug,
    'transfer to the device': t_put - t_batch,
    'all of clean': 1 / _rate(_batches(root, ('clean',), num_images)),
    'all of clean+aa': 1 / _rate(_batches(root, ('clean', 'aa'), num_images)),
  }
  return [
    {'name': f'stage: {name}', 'value': 1e3 * value, 'unit': 'ms/image'}
    for name, value in stages.items()
  ]


def _stages(source) -> tuple[Callable, ...]:
  """Maps of (data, id): read, decode all, decode a crop, crop, augment."""
  import numpy as np
  import tensorflow as tf

  from conadv_jax.data.images import autoaugment, views

  make_views = views.make_train_views(_settings(), ['clean'])
  exact = {'channels': 3, 'dct_method': 'INTEGER_ACCURATE'}

  def read(_, example_id):
    record = tf.numpy_function(
      lambda i: source.fetch(np.array([i]))[0], [example_id], tf.string
    )
    return source.parse(tf.ensure_shape(record, []), example_id)[0], example_id

  def whole(data, example_id):
    return tf.io.decode_jpeg(data, **exact), example_id

  def window(data, example_id):
    begin, size, _ = tf.image.stateless_sample_distorted_bounding_box(
      tf.image.extract_jpeg_shape(data),
      tf.zeros([1, 0, 4]),
      tf.stack([example_id, example_id]),
      min_object_covered=0.0,
      aspect_ratio_range=(3 / 4, 4 / 3),
      area_range=(0.08, 1.0),
      max_attempts=100,
      use_image_if_no_bounding_boxes=True,
    )
    box = tf.concat([begin[:2], size[:2]], 0)
    return tf.io.decode_and_crop_jpeg(data, box, **exact), example_id

  def crop(data, example_id):
    seed = tf.stack([example_id, example_id])
    return make_views(data, seed)['clean'], example_id

  def augment(image, example_id):
    seed = tf.stack([example_id, example_id])
    return autoaugment.augment('v0', image, seed), example_id

  return read, whole, window, crop, augment


def _seconds(ids, *stages, batch: bool = False, put: bool = False) -> float:
  """Processor time per image of a pipeline of `stages` on one thread."""
  import jax
  import tensorflow as tf

  from conadv_jax.base import jax_platform

  jax_platform.choose()

  def image_only(image, _):
    return image

  def first_byte(data, _):
    if data.dtype == tf.string:
      return tf.cast(tf.strings.length(data), tf.uint8)
    return tf.reshape(data, [-1])[0]

  dataset = tf.data.Dataset.from_tensor_slices((ids, ids))
  for stage in stages:
    dataset = dataset.map(stage)
  # Handing over each element would cost more than some stages.
  dataset = dataset.map(image_only if batch else first_byte).batch(BATCH)
  options = tf.data.Options()
  options.threading.private_threadpool_size = 1
  options.experimental_optimization.map_parallelization = False
  elements = dataset.with_options(options).as_numpy_iterator()
  next(elements)
  start = time.process_time()
  for element in elements:
    if put:
      jax.device_put(element).block_until_ready()
  return (time.process_time() - start) / (len(ids) - BATCH)


def memory(root: pathlib.Path, num_batches: int) -> list[dict]:
  """Resident memory after a tenth of the batches, at the end, and its peak."""
  size = 8
  batches = _train_batches(
    root, ('clean', 'aa'), size, num_batches, _settings()
  )
  early = 0.0
  for i, _ in enumerate(batches):
    if i == num_batches // 10:
      early = _resident_mib()
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
  values = {
    f'resident after {num_batches // 10} batches of {size}': early,
    f'resident after {num_batches}': _resident_mib(),
    'peak': peak,
  }
  return [
    {'name': f'memory: {name}', 'value': value, 'unit': 'MiB'}
    for name, value in values.items()
  ]


def _resident_mib() -> float:
  pages = int(pathlib.Path('/proc/self/statm').read_text().split()[1])
  return pages * os.sysconf('SC_PAGE_SIZE') / 2**20


# ---- Processes --------------------------------------------------------------


def _worker(task: str, root: pathlib.Path, count: int) -> None:
  """What a child process does: one measurement, its result as JSON."""
  repository = pathlib.Path(__file__).resolve().parents[1]
  sys.path.insert(0, str(repository))
  os.environ['TF_CPP_MIN_LOG_LEVEL'] = '3'
  if task != 'memory':
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
  if task == 'breakdown':
    result = breakdown(root, count)
  elif task == 'memory':
    result = memory(root, count)
  else:
    result = ROWS[task].run(root, count)
  print(f'RESULT {json.dumps(result)}', flush=True)


def measure(task: str, root: pathlib.Path, count: int):
  """Runs `task` in a process of its own; None if a library is missing."""
  command = [sys.executable, __file__, '--task', task, '--root', str(root)]
  run = subprocess.run(
    [*command, '--count', str(count)],
    capture_output=True,
    text=True,
    env=os.environ | {'CUDA_VISIBLE_DEVICES': ''},
  )
  lines = [s for s in run.stdout.splitlines() if s.startswith('RESULT ')]
  if run.returncode or not lines:
    last = (run.stderr.strip().splitlines() or ['no output'])[-1]
    print(f'{task}: not measured: {last}', flush=True)
    return None
  return json.loads(lines[-1].removeprefix('RESULT '))


def _timed_rows(root: pathlib.Path, count: int, rounds: int) -> list[dict]:
  """All of ROWS, in turns."""
  rates: dict[str, list[float]] = {name: [] for name in ROWS}
  for turn in range(rounds):
    for name in ROWS:
      if len(rates[name]) < turn:
        continue  # it could not be measured before
      rate = measure(name, root, count)
      if rate is not None:
        rates[name].append(rate)
        print(
          f'{turn + 1}/{rounds}  {name}: {rate:.0f} images/s/core', flush=True
        )
  rows = []
  for name, values in rates.items():
    if not values:
      continue
    row = {'name': name, 'value': statistics.median(values)}
    row |= {'unit': 'images/s/core', 'rounds': values}
    peer_of = ROWS[name].peer_of
    if peer_of:
      ratios = [b / a for a, b in zip(rates[peer_of], values, strict=True)]
      row |= {'ratio_to': peer_of, 'ratio': statistics.median(ratios)}
    rows.append(row)
  return rows


def host_cores(rows: list[dict]) -> list[dict]:
  """Cores a host needs where the step runs at the speed of its memory."""
  rates = {row['name']: row['value'] for row in rows}
  needed = []
  for slice_name, (hosts, devices, bandwidth) in SLICES.items():
    for views, name in (
      ('clean', 'clean, no antialias'),
      ('clean+aa', 'clean+aa, own crops, no antialias'),
      ('clean+aa', 'clean+aa, shared crop'),
    ):
      images = bandwidth / STEP_BYTES[views] * devices / hosts
      needed.append(
        {
          'name': f'{slice_name}: {name}',
          'value': images / rates[name],
          'unit': 'cores/host',
          'images_per_sec_per_host': images,
        }
      )
  return needed


def _make_images(folder: str) -> pathlib.Path:
  from scripts import make_fake_imagenet

  print('making images ...', flush=True)
  root = pathlib.Path(folder) / 'images'
  make_fake_imagenet.write_folder(str(root), num_train=400, num_eval=10)
  return root


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--output', type=storage.expand)
  parser.add_argument('--quick', action='store_true')
  parser.add_argument('--data_dir', type=storage.expand)
  parser.add_argument('--memory_batches', type=int, default=2000)
  parser.add_argument('--task', help=argparse.SUPPRESS)
  parser.add_argument('--root', type=pathlib.Path, help=argparse.SUPPRESS)
  parser.add_argument('--count', type=int, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.task:
    _worker(args.task, args.root, args.count)
    return
  count, rounds = (6 * BATCH, 1) if args.quick else (24 * BATCH, 3)
  with tempfile.TemporaryDirectory() as folder:
    root = args.data_dir or _make_images(folder)
    rows = _timed_rows(root, count, rounds)
    rows += measure('breakdown', root, count) or []
    batches = 50 if args.quick else args.memory_batches
    rows += measure('memory', root, batches) or []
  rows += host_cores(rows)
  print()
  for row in rows:
    line = f'{row["name"]:<56}{row["value"]:>9.2f} {row["unit"]}'
    if 'ratio' in row:
      line += f', {row["ratio"]:.2f}x of ours'
    print(line)
  if args.output:
    machine = f'{cpu_name()}, {os.cpu_count()} cores, {platform.system()}'
    args.output.parent.mkdir(parents=True, exist_ok=True)
    content = {'machine': machine, 'rows': rows}
    args.output.write_text(json.dumps(content, indent=2) + '\n')


if __name__ == '__main__':
  main()
