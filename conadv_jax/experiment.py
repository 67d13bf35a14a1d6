"""Config -> everything static of a run: mesh, network, optimizer, steps.

Training, evaluation and audits build the same `Run`, so that what is
measured or audited is what trains. It needs neither data nor TensorFlow.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from conadv_jax import models
from conadv_jax.base.errors import ConfigError
from conadv_jax.base.fields import check
from conadv_jax.config import Config, Steps
from conadv_jax.data import datasets, slices
from conadv_jax.devices import sharded_optimizer, xla_flags
from conadv_jax.devices.mesh import (
  batch_sharding,
  bn_axis,
  local_positions,
  make_mesh,
  put_batch,
  replicated,
  state_shardings,
)
from conadv_jax.method import noise, optim, sam, schedules, staleness
from conadv_jax.method.setup import Setup
from conadv_jax.method.spikes import no_spikes
from conadv_jax.method.staleness import StepFn
from conadv_jax.method.state import (
  Snapshot,
  Stream,
  TrainState,
  copied,
  stream_key,
)
from conadv_jax.method.step import train_step
from conadv_jax.models import summary


@dataclasses.dataclass(frozen=True)
class Run:
  """What a run does not change; made by `build`."""

  config: Config
  spec: datasets.DatasetSpec
  steps: Steps
  mesh: jax.sharding.Mesh
  apply_fn: models.ApplyFn
  optimizer: optax.GradientTransformation
  schedule: optax.Schedule
  model: Any

  @property
  def groups(self) -> int:
    return self.config.batch_size // self.config.bn_group_size

  @functools.cached_property
  def setup(self) -> Setup:
    """What the training step is made of."""
    return Setup(
      config=self.config,
      spec=self.spec,
      apply_fn=self.apply_fn,
      mesh=self.mesh,
      optimizer=self.optimizer,
      schedule=self.schedule,
    )

  @functools.cached_property
  def step_fn(self) -> StepFn:
    """The training step, not jitted: (state, batch, next batch) -> ..."""
    return functools.partial(train_step, self.setup)

  def init_state(self, weights: Snapshot | None = None) -> TrainState:
    """The state before step 0, made on the devices in one program.

    Its perturbation is zero: `pending_perturbation` makes the real one.

    Args:
      weights: to begin with, of all routes; None draws them.
    """
    shardings = jax.tree.map(lambda s: s.sharding, self.abstract_state())
    state = jax.jit(self._init, out_shardings=shardings)(weights)
    # jit hands arguments through: one buffer may be there more than once.
    return copied(state) if weights else state

  def abstract_state(self) -> TrainState:
    """Shapes, types and shardings of the state."""
    return self._abstract_state

  @functools.cached_property
  def _abstract_state(self) -> TrainState:
    # Kept: a start needs it four times, and tracing a large network is slow.
    shapes = jax.eval_shape(self._init)
    shardings = state_shardings(
      self.mesh,
      shapes,
      lambda x: self.config.shard_optimizer and sharded_optimizer.is_large(x),
      in_groups=sam.in_groups(self.config),
    )
    return jax.tree.map(
      lambda s, sharding: jax.ShapeDtypeStruct(
        s.shape, s.dtype, sharding=sharding
      ),
      shapes,
      shardings,
    )

  def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, types and shardings of a training batch."""
    layout = (self.groups, self.config.bn_group_size)
    sharding = batch_sharding(self.mesh)

    def array(shape, dtype):
      return jax.ShapeDtypeStruct(layout + shape, dtype, sharding=sharding)

    image = array(self.spec.image_shape, jnp.uint8)
    batch = {view: image for view in self.config.fed_views}
    return batch | {'label': array((), jnp.int32)}

  def jit_step(self) -> jax.stages.Wrapped:
    """The training step under jit: state donated, shardings pinned."""
    state, batch = self.abstract_state(), self.abstract_batch()
    state_shardings = jax.tree.map(lambda s: s.sharding, state)
    batch_shardings = jax.tree.map(lambda s: s.sharding, batch)
    return jax.jit(
      self.step_fn,
      in_shardings=(state_shardings, batch_shardings, batch_shardings),
      out_shardings=(state_shardings, replicated(self.mesh)),
      donate_argnums=0,
      # The oldest snapshot is not read, but its buffer is to be reused.
      keep_unused=True,
    )

  def compile_step(self) -> jax.stages.Compiled:
    """The compiled training step: the one program of a run."""
    return self.lower_step().compile(compiler_options=self.compiler_options)

  def lower_step(self) -> jax.stages.Lowered:
    """The training step, traced for the shapes of the run."""
    batch = self.abstract_batch()
    return self.jit_step().lower(self.abstract_state(), batch, batch)

  @property
  def compiler_options(self) -> dict[str, bool]:
    """What `xla_flags` stands for on these devices."""
    kind = self.mesh.devices.flat[0].device_kind
    return xla_flags.compiler_options(self.config.xla_flags, kind)

  def flops_per_device(self, *, again: bool = True) -> float:
    """Counts FLOPs of convolutions and dense layers of a step, per device.

    With F for a forward pass over the clean images, V trained views and an
    attack of k steps,

      V * (3 F - S) + k * 2 F

    where S is the gradient of the pixels through the first layer, which
    training does not need. `remat` adds a forward pass to each. A view that
    only a share of the examples has counts as that share, and so does its
    attack, whose backward pass is whole then: 3 F. An ascent of weights adds
    3 F - S for each view but `adv`, and 2 F - S with `sam.mask=norm_only`. A
    multiply-add counts as two, on padding too, as in papers; XLA does not count
    padding.

    Args:
      again: whether to count what `remat` computes a second time.
    """
    config = self.config
    layers = summary.multiply_adds(self.model, self.spec.image_shape)
    forward, stem = 2 * sum(layers), 2 * layers[0]
    once_more = forward if again and config.remat != 'none' else 0
    view = 3 * forward - stem + once_more
    gradient = (3 if config.adv_every else 2) * forward + once_more
    attack = config.shares.get('adv', 0) * config.attack.steps
    per_example = sum(config.shares.values()) * view + attack * gradient
    ascent = view - (forward if config.sam.mask == 'norm_only' else 0)
    per_example += len(config.ascent_views) * ascent
    return config.batch_size / self.mesh.size * per_example

  def local_positions(self) -> np.ndarray:
    """Places in the global batch that this host feeds, flat."""
    positions = local_positions(
      batch_sharding(self.mesh),
      self.groups,
      self.config.bn_group_size,
    )
    return positions.reshape(-1)

  def put_batch(self, local: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """This host's share of a training batch -> global arrays [G, b, ...]."""
    return put_batch(
      batch_sharding(self.mesh),
      self.groups,
      self.config.bn_group_size,
      local,
    )

  def _init(self, now: Snapshot | None = None) -> TrainState:
    config = self.config
    key = stream_key(config.seed, Stream.INIT, 0)
    routes = tuple(range(len(config.routes)))
    image = (1, len(routes), 1, *self.spec.image_shape)
    if now is None:
      variables = self.model.init(key, jnp.zeros(image), routes, True)
      now = Snapshot(variables['params'], variables.get('batch_stats', {}))
    zero = jnp.zeros((), jnp.int32)
    devices, image_shape = self.mesh.shape['bn'], self.spec.image_shape
    return TrainState(
      step=zero,
      params=now.params,
      batch_stats=now.batch_stats,
      opt_state=self.optimizer.init(sharded_optimizer.pack(config, now.params)),
      snapshots=(now,) * config.num_snapshots,
      ema=now if config.ema.decay else None,
      perturbation=staleness.blank(config, devices, now.params, image_shape),
      nonfinite_steps=zero,
      nonfinite_streak=zero,
      spikes=no_spikes(config),
    )


def _check_network(config: Config) -> None:
  """Refuses what a network without batch norm, say, has no use for."""
  for field in ('bn_momentum', 'bn_epsilon', 'dtype'):
    value, default = getattr(config, field), getattr(Config, field)
    check(
      value == default or models.takes(config.model, field),
      field,
      value,
      f'model {config.model!r} has no such setting; leave it at {default!r}',
    )


def _check_groups(config: Config, mesh: jax.sharding.Mesh) -> None:
  """Refuses parts of a batch that cannot be divided between views."""
  parts = config.microbatches * mesh.shape['data']
  groups, every = config.batch_size // config.bn_group_size, config.adv_every
  fix = (
    f'method {config.method!r} attacks one of {every} batch-norm groups, and '
    f'each of {parts} devices and microbatches has {groups / parts:g}; set a '
    f'multiple of {every * parts * config.bn_group_size}, or smaller groups'
  )
  ok = not every or groups % (every * parts) == 0
  check(ok, 'batch_size', config.batch_size, fix)


def _check_trace(config: Config, steps: Steps) -> None:
  _, end = config.profile.span
  fix = f'the run has steps 1 to {steps.stop}'
  check(end <= steps.stop + 1, 'profile.steps', config.profile.steps, fix)


def _make_model(
  config: Config, spec: datasets.DatasetSpec, mesh: jax.sharding.Mesh
) -> Any:
  options = {f'network.{k}': v for k, v in vars(config.network).items()}
  return models.create(
    config.model,
    {'remat': config.remat} | options,
    num_classes=spec.num_classes,
    num_routes=len(config.routes),
    bn_axis=bn_axis(mesh),
    bn_momentum=config.bn_momentum,
    bn_epsilon=config.bn_epsilon,
    dtype=jnp.dtype(config.dtype),
    platform=mesh.devices.flat[0].platform,
  )


def build(
  config: Config,
  devices: Sequence[jax.Device] | None = None,
  spec: datasets.DatasetSpec | None = None,
  *,
  trains: bool = True,
) -> Run:
  """Builds the `Run` of `config` on `devices` (default: all).

  Args:
    config: every setting of the run.
    devices: of the mesh.
    spec: of the data set; None looks at its files.
    trains: whether the step is to run. If not, only weights are read, and parts
      of a batch need not be those that the training had on its devices.

  Raises:
    ConfigError: for an unknown data set, model or slice, a setting that has no
      use in them, a batch that does not divide over the devices, or a flip that
      the data set does not allow.
  """
  spec = spec or datasets.resolve(config.dataset)
  if config.dataset.random_flip and not spec.allows_flip:
    raise ConfigError(
      f'dataset.random_flip=True: a mirrored image of {spec.name!r} is not of '
      'its class; set it to False'
    )
  if config.eval.train_split:  # Raises for a wrong slice.
    slices.parse(config.eval.train_split, spec.splits, 'eval.train_split')
  if config.dtype == 'float64' and not jax.config.jax_enable_x64:
    raise ConfigError("dtype='float64': set JAX_ENABLE_X64=1")
  steps = Steps.of(config, spec.num_train)
  _check_trace(config, steps)
  mesh = make_mesh(
    config.batch_size, config.bn_group_size, devices, config.microbatches
  )
  if trains:
    _check_groups(config, mesh)
    noise.check_parts(config, mesh)
    sam.check_parts(config, mesh)
  sharded_optimizer.check_shards(config, mesh)
  _check_network(config)
  peak = config.optimizer.peak_learning_rate(config.batch_size)
  schedule = schedules.make_schedule(config.schedule, steps, peak)
  optimizer = optim.make_optimizer(config.optimizer, schedule)
  model = _make_model(config, spec, mesh)
  return Run(
    config=config,
    spec=spec,
    steps=steps,
    mesh=mesh,
    apply_fn=models.make_apply_fn(model),
    optimizer=optimizer,
    schedule=schedule,
    model=model,
  )
