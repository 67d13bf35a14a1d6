"""Measures what the CPU's forms of convolutions gain over XLA's own.

  python scripts/bench_conv.py --output=results/bench_conv.json [--quick]

Rows are of one convolution (value, both gradients) and of whole training steps
(forward, backward, SGD), in milliseconds: the median of rounds in which the
contenders take turns. `ratio` is the time of `ours`
(`conadv_jax.models.layers`) to that of `xla` (`jax.lax`): below 1 it pays.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from conadv_jax import models
from conadv_jax.base import storage
from conadv_jax.models import layers
from scripts.bench.machine import machine

PLATFORMS = {'xla': '', 'ours': 'cpu'}


class Shape(NamedTuple):
  """A square convolution with 'SAME' padding."""

  n: int
  side_px: int
  channels: int
  features: int
  size: int = 3
  stride: int = 1
  groups: int = 1

  def __str__(self):
    kind = '' if self.groups == 1 else f' groups {self.groups}'
    return (
      f'{self.n}x{self.side_px}px {self.channels}->{self.features} '
      f'{self.size}x{self.size}/{self.stride}{kind}'
    )


SHAPES = (
  # ResNet-50, images of 64 pixels: the last stages, and 1x1.
  Shape(16, 2, 512, 512),
  Shape(16, 4, 512, 512, stride=2),
  Shape(16, 4, 256, 256),
  Shape(16, 8, 256, 256, stride=2),
  Shape(16, 16, 64, 256, size=1),
  Shape(16, 16, 256, 64, size=1),
  Shape(16, 16, 256, 512, size=1, stride=2),
  Shape(16, 2, 512, 2048, size=1),
  # ResNet-50, 224 pixels.
  Shape(8, 7, 512, 512),
  Shape(8, 56, 64, 256, size=1),
  # resnet8 on digits.
  Shape(320, 2, 64, 64),
  Shape(320, 4, 32, 64, stride=2),
  Shape(320, 8, 16, 32, size=1, stride=2),
  # EfficientNet-B0, 64 and 224 pixels.
  Shape(16, 32, 32, 32, groups=32),
  Shape(16, 32, 96, 96, stride=2, groups=96),
  Shape(16, 16, 144, 144, size=5, stride=2, groups=144),
  Shape(16, 4, 672, 672, size=5, groups=672),
  Shape(8, 112, 32, 32, groups=32),
  Shape(8, 56, 144, 144, groups=144),
  Shape(32, 28, 64, 64, groups=8),
)
STEPS = (  # network, batch, side in pixels and channels of its images
  ('resnet8', 320, 8, 1),
  ('resnet20', 128, 32, 3),
  ('resnet50', 16, 64, 3),
  ('efficientnet_b0', 16, 64, 3),
)


def conv_step(shape: Shape, platform_: str) -> Callable[[], Any]:
  """Returns a compiled call: value of a convolution and both gradients."""
  conv = functools.partial(
    layers.convolution(platform_),
    window_strides=(shape.stride, shape.stride),
    padding='SAME',
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    feature_group_count=shape.groups,
  )
  n, side, channels, features, size, _, groups = shape
  keys = jax.random.split(jax.random.key(0), 2)
  x = jax.random.normal(keys[0], (n, side, side, channels))
  w = jax.random.normal(keys[1], (size, size, channels // groups, features))

  @jax.jit
  def step(x, w):
    y, vjp = jax.vjp(conv, x, w)
    return y, vjp(y)

  return functools.partial(step.lower(x, w).compile(), x, w)


def train_step(
  name: str, batch: int, side: int, channels: int, platform_: str
) -> Callable[[], Any]:
  """Returns a compiled call: a step of SGD without momentum."""
  model = models.create(name, num_classes=10, num_routes=1, platform=platform_)
  apply_fn = models.make_apply_fn(model)
  shape = (1, 1, batch, side, side, channels)
  x = jax.random.normal(jax.random.key(0), shape)
  init = jax.jit(lambda key: model.init(key, x, (0,), False))

  def loss(params, stats):
    variables = {'params': params, 'batch_stats': stats}
    logits, stats = apply_fn(variables, x, (0,), True, jax.random.key(2))
    return -jax.nn.log_softmax(logits)[..., 0].mean(), stats

  @jax.jit
  def step(params, stats):
    grads, stats = jax.grad(loss, has_aux=True)(params, stats)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), stats

  variables = init(jax.random.key(1))
  args = variables['params'], variables.get('batch_stats', {})
  return functools.partial(step.lower(*args).compile(), *args)


def rows(
  name: str, make: Callable[[str], Callable[[], Any]], rounds: int
) -> Iterator[dict[str, Any]]:
  """Times what `make` returns for each platform."""
  calls = {who: make(platform_) for who, platform_ in PLATFORMS.items()}
  seen = {who: [] for who in calls}
  for round_ in range(rounds + 1):
    for who, call in calls.items():
      start = time.perf_counter()
      jax.block_until_ready(call())
      if round_:  # the first one fills caches
        seen[who].append(1e3 * (time.perf_counter() - start))
  times = {who: statistics.median(values) for who, values in seen.items()}
  ratio = times['ours'] / times['xla']
  print(
    f'{name:40} xla {times["xla"]:9.2f}  ours {times["ours"]:9.2f}  '
    f'ratio {ratio:.2f}',
    flush=True,
  )
  compared = {'ours': {'ratio_to': f'{name} xla', 'ratio': ratio}}
  for who, value in times.items():
    row = {'name': f'{name} {who}', 'value': value, 'unit': 'ms'}
    yield row | compared.get(who, {'ratio_to': None, 'ratio': None})


def benchmark(quick: bool) -> Iterator[dict[str, Any]]:
  rounds = 3 if quick else 7
  for shape in SHAPES[:: 4 if quick else 1]:
    yield from rows(str(shape), functools.partial(conv_step, shape), rounds)
  for step in STEPS[:: 4 if quick else 1]:
    name, batch, side, channels = step
    yield from rows(
      f'step {name} {batch}x{side}px {channels} channels',
      functools.partial(train_step, *step),
      rounds,
    )


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--output', required=True, type=storage.expand)
  parser.add_argument('--quick', action='store_true')
  args = parser.parse_args()
  report = {'machine': machine(), 'rows': list(benchmark(args.quick))}
  args.output.parent.mkdir(parents=True, exist_ok=True)
  args.output.write_text(json.dumps(report, indent=1) + '\n')


if __name__ == '__main__':
  main()
