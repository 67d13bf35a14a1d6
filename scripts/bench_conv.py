"""Speed of convolutions and their gradients on the CPU: ours, XLA's, PyTorch's.

  python scripts/bench_conv.py --output=results/bench_conv.json [--quick]

Every row is timed in two units: `ms` by the clock and `cpu ms` over all
threads, which a busy machine disturbs less; medians, and the contenders of a
row take turns. The ratio is to XLA's own in the same unit.

  floor    the row's FLOPs at the speed of a float32 matmul of 1024 x 1024
  xla      jax.lax.conv_general_dilated
  ours     conadv_jax.models.layers, where it has another way
  im2col   a scan over chunks of im2col columns and a matmul: dense kernel
           gradients, for which `layers` leaves the way to XLA
  pytorch  with as many threads, if it is installed (pip install -e .[parity])

The last rows are whole training steps: forward, backward and SGD. Where
`im2col` beats `xla` by much, `layers` should do without XLA there, too.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import itertools
import json
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import flax.linen as nn
import jax
import jax.numpy as jnp

from conadv_jax.models import MODELS, layers

HAS_TORCH = importlib.util.find_spec('torch') is not None
CHUNK_BYTES = 2**20


@dataclasses.dataclass(frozen=True)
class Shape:
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

  @property
  def out_px(self) -> int:
    return -(-self.side_px // self.stride)

  @property
  def padding(self) -> tuple[int, int]:
    total = max((self.out_px - 1) * self.stride + self.size - self.side_px, 0)
    return total // 2, total - total // 2

  @property
  def flops(self) -> int:
    macs = self.size**2 * self.channels * self.features // self.groups
    return 2 * self.n * self.out_px**2 * macs

  def arrays(self) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Images, kernel, and the gradient of the result."""
    shapes = (
      (self.n, self.side_px, self.side_px, self.channels),
      (self.size, self.size, self.channels // self.groups, self.features),
      (self.n, self.out_px, self.out_px, self.features),
    )
    keys = jax.random.split(jax.random.key(0), 3)
    return tuple(map(jax.random.normal, keys, shapes))


SHAPES = (
  Shape(128, 28, 16, 16),
  Shape(128, 28, 32, 32),
  Shape(128, 14, 64, 64),
  Shape(16, 56, 64, 64),
  Shape(128, 8, 16, 16),
  Shape(128, 28, 16, 32, stride=2),
  Shape(16, 64, 3, 64, size=7, stride=2),
  Shape(128, 28, 16, 32, size=1, stride=2),
  Shape(128, 14, 64, 64, size=1),
  Shape(128, 14, 96, 96, groups=96),
  Shape(128, 28, 96, 96, groups=96),
  Shape(128, 14, 96, 96, size=5, groups=96),
  Shape(128, 28, 96, 96, size=5, groups=96),
  Shape(128, 28, 96, 96, size=5, stride=2, groups=96),
  Shape(32, 28, 64, 64, groups=8),
)
STEPS = (  # network, batch, side and channels of its images
  ('resnet8', 128, 28, 1),
  ('resnet8', 128, 32, 3),
  ('resnet20', 128, 28, 1),
  ('resnet20', 128, 32, 3),
  ('efficientnet_b0', 16, 64, 3),
)


# ---- One convolution --------------------------------------------------------


def directions(fn: Callable, shape: Shape) -> dict[str, Callable]:
  """What is timed -> jitted function of images, kernel and gradient."""
  conv = functools.partial(
    fn,
    window_strides=(shape.stride, shape.stride),
    padding=[shape.padding] * 2,
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    feature_group_count=shape.groups,
  )

  def kernel(x, w, g):
    return jax.linear_transpose(lambda w: conv(x, w), w)(g)

  def images(x, w, g):
    return jax.linear_transpose(lambda x: conv(x, w), x)(g)

  found = {'kernel gradient': kernel}
  if shape.groups > 1:
    forward = {'forward': lambda x, w, g: conv(x, w)}
    found = forward | found | {'input gradient': images}
  return {name: jax.jit(f) for name, f in found.items()}


def im2col(shape: Shape) -> Callable:
  """Kernel gradient of a dense convolution."""
  image_bytes = 4 * shape.out_px**2 * shape.size**2 * shape.channels
  most = min(shape.n, max(1, CHUNK_BYTES // image_bytes))
  each = next(n for n in range(most, 0, -1) if shape.n % n == 0)
  stop = (shape.out_px - 1) * shape.stride + 1

  def split(a):
    return a.reshape(-1, each, *a.shape[1:])

  def add(total, xg):
    x, g = xg
    x = jnp.pad(x, ((0, 0), shape.padding, shape.padding, (0, 0)))
    taps = itertools.product(range(shape.size), repeat=2)
    step = shape.stride
    columns = [x[:, i : i + stop : step, j : j + stop : step] for i, j in taps]
    columns = jnp.concatenate(columns, -1)
    columns = columns.reshape(-1, columns.shape[-1])
    return total + g.reshape(-1, shape.features).T @ columns, None

  def gradient(x, w, g):
    zeros = jnp.zeros((shape.features, w.size // shape.features))
    dw, _ = jax.lax.scan(add, zeros, (split(x), split(g)))
    return dw.T.reshape(w.shape)

  return jax.jit(gradient)


def torch_directions(shape: Shape) -> dict[str, Callable]:
  """The same on NCHW arrays, and without arguments."""
  import torch
  from torch.nn import functional, grad

  x, w, g = (torch.tensor(jax.device_get(a)) for a in shape.arrays())
  low, high = shape.padding
  x = functional.pad(x.permute(0, 3, 1, 2), (low, high) * 2).contiguous()
  w, g = w.permute(3, 2, 0, 1).contiguous(), g.permute(0, 3, 1, 2).contiguous()
  options = {'stride': shape.stride, 'groups': shape.groups}
  return {
    'forward': lambda: functional.conv2d(x, w, **options),
    'kernel gradient': lambda: grad.conv2d_weight(x, w.shape, g, **options),
    'input gradient': lambda: grad.conv2d_input(x.shape, w, g, **options),
  }


def conv_rows(shape: Shape, flops_per_ms: dict[str, float], args) -> list[dict]:
  arrays = shape.arrays()
  contenders = {
    'xla': directions(jax.lax.conv_general_dilated, shape),
    'ours': directions(layers.conv_general_dilated, shape),
    'im2col': {'kernel gradient': im2col(shape)},
    'pytorch': torch_directions(shape) if HAS_TORCH else {},
  }
  if shape.groups > 1 or shape.size == 1:
    del contenders['im2col']
  else:  # XLA's own
    del contenders['ours']
  found = []
  for direction in contenders['xla']:
    calls = {}
    for who, by_direction in contenders.items():
      if direction in by_direction:
        fn = by_direction[direction]
        calls[who] = fn if who == 'pytorch' else functools.partial(fn, *arrays)
    times = medians(calls, args)
    times['floor'] = {u: shape.flops / f for u, f in flops_per_ms.items()}
    found += rows(f'{shape} {direction}', times)
  return found


# ---- A training step --------------------------------------------------------


def jax_step(name: str, batch: int, side_px: int, channels: int, fn: Callable):
  """A compiled step without arguments, all convolutions made by `fn`."""
  linen_conv = nn.Conv

  def conv(*args, **kwargs):
    return linen_conv(*args, **kwargs | {'conv_general_dilated': fn})

  net = MODELS[name].build(num_classes=10, num_routes=1)
  x = jax.random.normal(
    jax.random.key(0), (1, 1, batch, side_px, side_px, channels)
  )

  def loss(params, stats):
    variables = {'params': params, 'batch_stats': stats}
    rngs = {'dropout': jax.random.key(2)}
    logits, moved = net.apply(
      variables, x, (0,), True, mutable=['batch_stats'], rngs=rngs
    )
    return -jax.nn.log_softmax(logits)[..., 0].mean(), moved['batch_stats']

  def step(params, stats):
    grads, stats = jax.grad(loss, has_aux=True)(params, stats)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), stats

  with mock.patch.object(nn, 'Conv', conv):
    init = jax.jit(lambda key: net.init(key, x, (0,), False))
    variables = init(jax.random.key(1))
    args = variables['params'], variables['batch_stats']
    compiled = jax.jit(step).lower(*args).compile()
  return functools.partial(compiled, *args)


def torch_resnet(blocks_per_stage: int, channels: int):
  """The network of `models.resnet_small`."""
  from torch import nn as tnn

  def conv_norm(fan_in, features, size, stride=1):
    conv = tnn.Conv2d(fan_in, features, size, stride, size // 2, bias=False)
    return tnn.Sequential(conv, tnn.BatchNorm2d(features))

  class Block(tnn.Module):
    def __init__(self, fan_in, features, stride):
      super().__init__()
      self.branch = tnn.Sequential(
        conv_norm(fan_in, features, 3, stride),
        tnn.ReLU(),
        conv_norm(features, features, 3),
      )
      self.shortcut = tnn.Identity()
      if fan_in != features:
        self.shortcut = conv_norm(fan_in, features, 1, stride)

    def forward(self, x):
      return (self.branch(x) + self.shortcut(x)).relu()

  modules, width = [conv_norm(channels, 16, 3), tnn.ReLU()], 16
  for stage, block in itertools.product(range(3), range(blocks_per_stage)):
    stride = 2 if stage and not block else 1
    modules.append(Block(width, 16 * 2**stage, stride))
    width = 16 * 2**stage
  pool = tnn.AdaptiveAvgPool2d(1), tnn.Flatten()
  return tnn.Sequential(*modules, *pool, tnn.Linear(width, 10))


def torch_step(name: str, batch: int, side_px: int, channels: int):
  import torch

  net = torch_resnet({'resnet8': 1, 'resnet20': 3}[name], channels)
  optimizer = torch.optim.SGD(net.parameters(), lr=1e-6)
  x = torch.randn(batch, channels, side_px, side_px)
  labels = torch.zeros(batch, dtype=torch.long)

  def step():
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(net(x), labels).backward()
    optimizer.step()

  return step


def step_rows(name: str, *shape: int, args) -> list[dict]:
  calls = {
    'xla': jax_step(name, *shape, jax.lax.conv_general_dilated),
    'ours': jax_step(name, *shape, layers.conv_general_dilated),
  }
  if HAS_TORCH and name.startswith('resnet'):
    calls['pytorch'] = torch_step(name, *shape)
  batch, side_px, channels = shape
  times = medians(calls, args)
  return rows(f'step {name} {batch}x{side_px}px {channels} channels', times)


# ---- Timing -----------------------------------------------------------------


def medians(calls: dict[str, Callable], args) -> dict[str, dict[str, float]]:
  """Name -> unit -> median time of a call; the calls take turns."""
  seen = {name: [] for name in calls}
  for round_ in range(args.rounds + 1):
    for name, call in calls.items():
      wall, cpu = time.perf_counter(), time.process_time()
      jax.block_until_ready(call())
      wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
      if round_:  # the first one compiles
        seen[name].append((1e3 * wall, 1e3 * cpu))
  return {
    name: {
      unit: statistics.median(values)
      for unit, values in zip(
        ('ms', 'cpu ms'), zip(*found, strict=True), strict=True
      )
    }
    for name, found in seen.items()
  }


def rows(name: str, times: dict[str, dict[str, float]]) -> list[dict]:
  found = []
  for who, by_unit in times.items():
    for unit, value in by_unit.items():
      other = times['xla'][unit]
      row = {'name': f'{name} {who}', 'value': value, 'unit': unit}
      ratio_to = f'{name} xla' if who != 'xla' else None
      row |= {
        'ratio_to': ratio_to,
        'ratio': value / other if ratio_to else None,
      }
      found.append(row)
  print(
    f'{name:52}',
    *(
      f'{who} {by_unit["ms"]:.1f} ({by_unit["cpu ms"]:.1f})'
      for who, by_unit in times.items()
    ),
    sep='  ',
    flush=True,
  )
  return found


def matmul_flops_per_ms(args) -> dict[str, float]:
  a = jax.random.normal(jax.random.key(0), (1024, 1024))
  times = medians(
    {'matmul': functools.partial(jax.jit(jnp.matmul), a, a)}, args
  )
  return {unit: 2 * 1024**3 / value for unit, value in times['matmul'].items()}


def benchmark(args: argparse.Namespace) -> Iterator[dict]:
  flops_per_ms = matmul_flops_per_ms(args)
  gflops = {unit: value / 1e6 for unit, value in flops_per_ms.items()}
  print(f'matmul: {gflops["ms"]:.0f} GFLOP/s, {gflops["cpu ms"]:.0f} a core')
  yield {
    'name': 'matmul 1024',
    'value': gflops['ms'],
    'unit': 'GFLOP/s',
    'ratio_to': None,
    'ratio': None,
  }
  print('median ms (cpu ms) of each:')
  for shape in SHAPES[:: 4 if args.quick else 1]:
    yield from conv_rows(shape, flops_per_ms, args)
  for step in STEPS[:: 4 if args.quick else 1]:
    yield from step_rows(*step, args=args)


def machine() -> dict[str, Any]:
  model = platform.processor()
  info = pathlib.Path('/proc/cpuinfo')
  if info.exists():
    names = [x for x in info.read_text().splitlines() if 'model name' in x]
    model = names[0].split(':')[1].strip() if names else model
  return {
    'cpu': model,
    'cores': os.cpu_count(),
    'python': platform.python_version(),
    'jax': jax.__version__,
  }


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--output', required=True, type=pathlib.Path)
  parser.add_argument('--rounds', type=int, default=7)
  parser.add_argument('--quick', action='store_true')
  args = parser.parse_args()
  args.rounds = 3 if args.quick else args.rounds
  info = machine()
  if HAS_TORCH:
    import torch

    torch.set_num_threads(os.cpu_count())
    info['torch'] = torch.__version__
  report = {'machine': info, 'rows': list(benchmark(args))}
  args.output.parent.mkdir(parents=True, exist_ok=True)
  args.output.write_text(json.dumps(report, indent=1) + '\n')


if __name__ == '__main__':
  main()
