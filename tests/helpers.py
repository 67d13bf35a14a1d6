"""Small configs, batches, weights and a network that several files share."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from conadv_jax import models
from conadv_jax.config import Config, default_config, from_config_dict
from conadv_jax.data import datasets
from conadv_jax.devices import mesh
from conadv_jax.method import staleness
from conadv_jax.method.setup import Setup
from conadv_jax.method.spikes import no_spikes
from conadv_jax.method.staleness import StepFn
from conadv_jax.method.state import (
  Snapshot,
  TrainState,
  copied,
)
from conadv_jax.method.step import train_step
from conadv_jax.models.norm import Layout, RoutedBatchNorm

# Two channels with different means, so that a swapped one shows.
SPEC = dataclasses.replace(
  datasets.get_spec('digits'),
  name='tiny',
  num_classes=5,
  image_shape=(4, 4, 2),
  mean=(100.0, 140.0),
  std=(60.0, 80.0),
)


def make_config(fields: dict[str, Any] | None = None) -> Config:
  """The defaults for two groups of three, with dotted `fields` changed."""
  values = default_config()
  fields = {
    'batch_size': 6,
    'bn_group_size': 3,
    'optimizer.learning_rate': 0.3,
    'schedule.warmup_epochs': 0.0,
  } | (fields or {})
  if fields.get('optimizer.name', 'lars') == 'lars':
    fields = {'optimizer.trust_coefficient': 0.2} | fields
  values.update_from_flattened_dict(fields)
  return from_config_dict(values)


class TinyNet(nn.Module):
  """Two 3x3 convolutions, each with batch norm and relu; mean; dense.

  Has the fields that `models.create` gives, so that it can be one of MODELS.
  """

  num_classes: int
  num_routes: int
  bn_axis: str | None = None
  bn_momentum: float = 0.9
  bn_epsilon: float = 1e-5
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, routes, train, examples=None):
    """x: [G, V, b, H, W, C] -> logits [G, V, b, K]."""
    layout = Layout(x.shape[0], routes, self.bn_axis, examples)
    y = layout.fold(x)
    for i, features in enumerate((3, 4), start=1):
      y = nn.Conv(
        features,
        (3, 3),
        use_bias=False,
        dtype=self.dtype,
        param_dtype=self.dtype,
        name=f'conv{i}',
      )(y)
      y = RoutedBatchNorm(
        self.num_routes,
        self.bn_momentum,
        self.bn_epsilon,
        self.dtype,
        name=f'norm{i}',
      )(y, layout, train)
      y = nn.relu(y)
    logits = nn.Dense(
      self.num_classes, dtype=self.dtype, param_dtype=self.dtype, name='head'
    )(y.mean((1, 2)))
    return layout.unfold(logits)


@contextlib.contextmanager
def tiny_network() -> Iterator[None]:
  """Has `TinyNet` under the name `tiny`."""
  # Not above: processes that import this file may not need it.
  import pytest

  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(models.MODELS, 'tiny', models.Entry(TinyNet, 4))
    yield


def tiny_net(
  config: Config, network: type[TinyNet] = TinyNet
) -> tuple[nn.Module, models.ApplyFn]:
  """`network` for `SPEC` and `config`, and its `apply_fn`."""
  model = network(
    num_classes=SPEC.num_classes,
    num_routes=len(config.routes),
    bn_momentum=config.bn_momentum,
    bn_epsilon=config.bn_epsilon,
    dtype=jnp.dtype(config.dtype),
  )
  return model, models.make_apply_fn(model)


def random_weights(
  config: Config, seed: int = 0, network: type[TinyNet] = TinyNet
) -> Snapshot:
  """Weights and statistics of `network`, every row of them different."""
  model, _ = tiny_net(config, network)
  routes = tuple(range(len(config.routes)))
  image = jax.ShapeDtypeStruct(
    (1, len(routes), 1, *SPEC.image_shape), jnp.dtype(config.dtype)
  )
  shapes = jax.eval_shape(
    lambda x: model.init(jax.random.key(0), x, routes, True), image
  )
  rng = np.random.default_rng(seed)

  def draw(path, shape):
    noise = rng.standard_normal(shape.shape)
    value = {
      'kernel': lambda: noise / np.sqrt(np.prod(shape.shape[:-1])),
      'scale': lambda: 1 + 0.2 * noise,
      'bias': lambda: 0.1 * noise,
      'mean': lambda: 0.3 * noise,
      'var': lambda: np.exp(0.3 * noise),
    }[path[-1].key]()
    return jnp.asarray(value, shape.dtype)

  values = jax.tree_util.tree_map_with_path(draw, dict(shapes))
  return Snapshot(values['params'], values['batch_stats'])


def start_state(config: Config, weights: Snapshot, tx: Any) -> TrainState:
  """The state before step 0 from `weights`; no buffer is in it twice."""
  zero = jnp.zeros((), jnp.int32)
  return copied(
    TrainState(
      step=zero,
      params=weights.params,
      batch_stats=weights.batch_stats,
      opt_state=tx.init(weights.params),
      snapshots=(weights,) * config.num_snapshots,
      ema=weights if config.ema.decay else None,
      perturbation=staleness.blank(config, 1, weights.params, SPEC.image_shape),
      nonfinite_steps=zero,
      nonfinite_streak=zero,
      spikes=no_spikes(config),
    )
  )


def make_step(config, spec, apply_fn, optimizer, schedule, mesh) -> StepFn:
  """The training step, not jitted."""
  setup = Setup(config, spec, apply_fn, mesh, optimizer, schedule)
  return functools.partial(train_step, setup)


def one_device(config: Config) -> mesh.Mesh:
  """The mesh of `config` on the first device."""
  return mesh.make_mesh(
    config.batch_size,
    config.bn_group_size,
    jax.devices()[:1],
    config.microbatches,
  )


def load_part(
  spec: datasets.DatasetSpec, part: str, data_dir: str | os.PathLike[str]
) -> Any:
  """The source of a data set in `data_dir`; `part` is 'train' or 'eval'."""
  config = from_config_dict(default_config()).dataset
  return spec.open(part, dataclasses.replace(config, data_dir=str(data_dir)))


def random_batches(
  config: Config,
  count: int,
  seed: int = 0,
  spec: datasets.DatasetSpec = SPEC,
) -> list[dict[str, np.ndarray]]:
  """Batches `[G, b, ...]` of noise, many of its pixels at 0 or 255."""
  rng = np.random.default_rng(seed)
  layout = (config.batch_size // config.bn_group_size, config.bn_group_size)

  def image():
    pixels = rng.normal(128, 120, layout + spec.image_shape)
    return np.clip(pixels, 0, 255).astype(np.uint8)

  return [
    {view: image() for view in config.fed_views}
    | {'label': rng.integers(0, spec.num_classes, layout).astype(np.int32)}
    for _ in range(count)
  ]


def run_without(
  packages: Iterable[str], script: str, *flags: str, cwd: pathlib.Path
) -> subprocess.CompletedProcess[str]:
  """Runs scripts/SCRIPT.py in `cwd` as if `packages` were not installed."""
  code = (
    f'import sys; sys.modules |= dict.fromkeys({tuple(packages)!r});'
    f' from scripts import {script}; {script}.main()'
  )
  root = str(pathlib.Path(__file__).parents[1])
  return subprocess.run(
    [sys.executable, '-c', code, *flags],
    env=os.environ | {'PYTHONPATH': root, 'JAX_PLATFORMS': 'cpu'},
    cwd=cwd,
    capture_output=True,
    text=True,
    check=False,
  )


def printed_by(code: str) -> str:
  """What `code` prints in a process of its own."""
  return subprocess.run(
    [sys.executable, '-c', code],
    cwd=pathlib.Path(__file__).parents[1],
    capture_output=True,
    text=True,
    check=True,
  ).stdout


def scaled_error(actual: Any, expected: Any) -> float:
  """Largest |actual - expected| over largest |expected|, of one array."""
  actual, expected = np.asarray(actual), np.asarray(expected)
  assert actual.shape == expected.shape, (actual.shape, expected.shape)
  error = np.abs(actual.astype(np.float64) - expected).max(initial=0.0)
  return error / (np.abs(expected).max(initial=0.0) or 1.0)


def assert_close(actual: Any, expected: Any, tolerance: float) -> None:
  """Every leaf within `tolerance` of the leaf's largest expected value."""
  actual = jax.tree_util.tree_leaves_with_path(actual)
  expected = jax.tree_util.tree_leaves_with_path(expected)
  assert [p for p, _ in actual] == [p for p, _ in expected]
  for (path, a), (_, e) in zip(actual, expected, strict=True):
    error = scaled_error(a, e)
    # Written so that an error of nan fails.
    assert error <= tolerance, f'{jax.tree_util.keystr(path)}: off by {error}'


def assert_batches_equal(got: list[dict], expected: list[dict]) -> None:
  """The same arrays, of the same types, in each batch."""
  assert len(got) == len(expected)
  for one, other in zip(got, expected, strict=True):
    assert one.keys() == other.keys()
    for key in one:
      assert one[key].dtype == other[key].dtype
      np.testing.assert_array_equal(one[key], other[key])


def bits(tree: Any) -> list[bytes]:
  """The bytes of every leaf: equal only where nan equals nan, too."""
  return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of compiled HLO text."""

  name: str
  kind: str  # e.g. 'all-reduce'
  shapes: tuple[tuple[int, ...], ...]  # one, or those of a tuple
  operands: tuple[str, ...]
  source: str  # op_name: of a parameter, the argument it is
  is_root: bool


_INSTRUCTION = re.compile(
  r'\s*(?P<root>ROOT )?%(?P<name>[\w.-]+) = (?P<type>.*?) (?P<kind>[\w-]+)'
  r'\((?P<operands>[^)]*)\)(?P<rest>.*)'
)


def instructions(hlo: str) -> Iterator[Instruction]:
  """The instructions of all computations of a compiled program."""
  for match in filter(None, map(_INSTRUCTION.match, hlo.splitlines())):
    shapes = re.findall(r'[a-z]\w*\[([\d,]*)\]', match['type'])
    source = re.search(r'op_name="((?:[^"\\]|\\.)*)"', match['rest'])
    yield Instruction(
      name=match['name'],
      kind=match['kind'],
      shapes=tuple(tuple(map(int, filter(None, s.split(',')))) for s in shapes),
      operands=tuple(re.findall(r'%([\w.-]+)', match['operands'])),
      source=source[1].replace('\\', '') if source else '',
      is_root=match['root'] is not None,
    )


_COLLECTIVE = re.compile(
  '(all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all|'
  'ragged-all-to-all|collective-broadcast)(-start)?'
)


def collectives(hlo: str) -> list[Instruction]:
  """Every instruction that talks to other devices."""
  return [i for i in instructions(hlo) if _COLLECTIVE.fullmatch(i.kind)]


class Entry:
  """The data flow of the entry computation of a compiled program."""

  def __init__(self, hlo: str):
    start = hlo.index('\nENTRY ')
    found = list(instructions(hlo[start : hlo.index('\n}', start)]))
    self._by_name = {i.name: i for i in found}
    (self.root,) = (i for i in found if i.is_root)

  def ancestors(self, names: Iterable[str]) -> list[Instruction]:
    """What the instructions `names` are computed from, and themselves."""
    seen, todo = {}, list(names)
    while todo:
      name = todo.pop()
      if name not in seen:
        seen[name] = self._by_name[name]
        todo.extend(seen[name].operands)
    return list(seen.values())
