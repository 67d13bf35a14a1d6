"""Dropout and stochastic depth: what is dropped, and by what it is decided."""

import functools

import flax.linen as nn
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from conadv_jax import models
from conadv_jax.devices.mesh import (
  BATCH,
  REPLICATED,
  batch_sharding,
  local_places,
  make_mesh,
  per_device,
)
from conadv_jax.method.state import Stream, stream_key
from conadv_jax.models.norm import Layout, RoutedBatchNorm
from conadv_jax.models.stochastic import Dropout, DropPath

KEY = stream_key(0, Stream.DROPOUT, 5)
LAYOUT = Layout(groups=4, routes=(0, 1))
EXAMPLES = 64  # of a view of a group


def factors(module, layout=LAYOUT, key=KEY, features=(3,)):
  """What `module` multiplies the examples [G, V, b, ...] by."""
  shape = (layout.groups, len(layout.routes), EXAMPLES, *features)
  y = module.apply({}, layout.fold(jnp.ones(shape)), layout, rngs=rngs(key))
  return np.asarray(layout.unfold(y))


def rngs(key):
  return {} if key is None else {'dropout': key}


# ---- What is dropped -------------------------------------------------------


def test_drop_path_drops_whole_examples_and_scales_the_others():
  factor = factors(DropPath(0.25), features=(2, 2, 3))
  per_example = factor.reshape(-1, 12)
  assert (per_example == per_example[:, :1]).all()
  np.testing.assert_allclose(np.unique(factor), [0, 4 / 3], rtol=1e-6)


def test_dropout_drops_each_feature_for_itself_and_scales_the_others():
  factor = factors(Dropout(0.25), features=(16,)).reshape(-1, 16)
  np.testing.assert_allclose(np.unique(factor), [0, 4 / 3], rtol=1e-6)
  kept = np.corrcoef(factor.T > 0)
  # 512 examples: a standard deviation of 0.044 if nothing is correlated.
  assert np.abs(kept - np.eye(16)).max() < 0.25


@pytest.mark.parametrize('rate', [0.1, 0.5, 0.9])
@pytest.mark.parametrize('cls', [DropPath, Dropout])
def test_the_mean_is_kept(cls, rate):
  features = (1,) if cls is DropPath else (16,)
  factor = np.stack(
    [
      factors(
        cls(rate), key=stream_key(0, Stream.DROPOUT, t), features=features
      )
      for t in range(4)
    ]
  )
  deviation = np.sqrt(rate / (1 - rate) / factor.size)
  assert abs(factor.mean() - 1) < 4 * deviation
  share = (factor == 0).mean()
  assert abs(share - rate) < 4 * np.sqrt(rate * (1 - rate) / factor.size)


@pytest.mark.parametrize('cls', [DropPath, Dropout])
@pytest.mark.parametrize(('rate', 'key'), [(0.0, KEY), (0.5, None)])
def test_nothing_is_dropped_without_a_rate_or_a_key(cls, rate, key):
  x = jnp.asarray(np.random.default_rng(0).normal(size=(512, 3)))
  y = cls(rate).apply({}, x, LAYOUT, rngs=rngs(key))
  np.testing.assert_array_equal(y, x)


# ---- What decides ----------------------------------------------------------


@pytest.mark.parametrize('cls', [DropPath, Dropout])
def test_views_of_an_example_draw_independently(cls):
  kept = factors(cls(0.5)).reshape(4, 2, -1) > 0
  agree = (kept[:, 0] == kept[:, 1]).mean()
  assert 0.3 < agree < 0.7


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize('cls', [DropPath, Dropout])
def test_a_mask_does_not_depend_on_the_type(cls):
  wide = factors(cls(0.5))
  with jax.enable_x64(False):
    np.testing.assert_array_equal(wide, factors(cls(0.5)))


class TwoLayers(nn.Module):
  @nn.compact
  def __call__(self, x, layout):
    first = DropPath(0.5, name='first')(x, layout)
    return jnp.concatenate([first, DropPath(0.5, name='second')(x, layout)], -1)


def test_layers_steps_and_seeds_draw_differently():
  draws = [
    *np.moveaxis(factors(TwoLayers(), features=(1,)), -1, 0),
    factors(TwoLayers(), key=stream_key(0, Stream.DROPOUT, 6))[..., 0],
    factors(TwoLayers(), key=stream_key(1, Stream.DROPOUT, 5))[..., 0],
  ]
  for i, a in enumerate(draws):
    for b in draws[:i]:
      assert 0.3 < (a == b).mean() < 0.7


@functools.cache
def on_devices(cls, devices, group_size):
  """(factors of a batch that lies on `devices`, the compiled program)."""
  mesh = make_mesh(16, group_size, jax.devices()[:devices])
  groups = 16 // group_size
  module = cls(0.5)

  def apply(x, key):
    x = jnp.stack([x, x], 1)
    places = local_places(mesh, groups, group_size)
    layout = Layout(x.shape[0], (0, 1), examples=places.example)
    y = module.apply({}, layout.fold(x), layout, rngs=rngs(key))
    return jnp.swapaxes(layout.unfold(y), 1, 2)

  specs = (BATCH, REPLICATED)
  fn = per_device(mesh, apply, specs, BATCH)
  x = jax.device_put(np.ones((groups, group_size, 5)), batch_sharding(mesh))
  program = jax.jit(fn).lower(x, KEY).compile()
  return np.asarray(program(x, KEY)), program.as_text()


# (8, 2): a group per device. (8, 8): groups over four devices each.
@pytest.mark.parametrize('group_size', [2, 8])
@pytest.mark.parametrize('cls', [DropPath, Dropout])
def test_a_mask_does_not_depend_on_the_devices(cls, group_size):
  expected, _ = on_devices(cls, 1, group_size)
  actual, hlo = on_devices(cls, 8, group_size)
  np.testing.assert_array_equal(actual, expected)
  assert 0.2 < (expected == 0).mean() < 0.8
  assert not helpers.collectives(hlo)


@pytest.mark.parametrize('group_size', [2, 8])
def test_a_device_draws_only_its_share_of_a_mask(group_size):
  _, hlo = on_devices(Dropout, 8, group_size)
  sizes = {
    int(np.prod(shape)) for i in helpers.instructions(hlo) for shape in i.shapes
  }
  assert max(sizes) == 16 * 2 * 5 // 8


# ---- Who passes the key ----------------------------------------------------


class DropNet(nn.Module):
  """One batch norm, stochastic depth, dropout and a dense layer."""

  num_classes: int
  num_routes: int
  rate: float

  @nn.compact
  def __call__(self, x, routes, train, examples=None):
    layout = Layout(x.shape[0], routes, examples=examples)
    y = RoutedBatchNorm(self.num_routes, name='norm')(
      layout.fold(x), layout, train
    )
    y = y + DropPath(self.rate)(nn.relu(y), layout)
    y = Dropout(self.rate)(y.reshape(y.shape[0], -1), layout)
    return layout.unfold(nn.Dense(self.num_classes, name='head')(y))


def stepper(apply_fn, weights):
  """The function: index t -> (state, metrics) of step t from `weights`."""
  config = helpers.make_config({'method': 'conadv'})
  tx = optax.sgd(0.1)
  train_step = jax.jit(
    helpers.make_step(
      config,
      helpers.SPEC,
      apply_fn,
      tx,
      optax.constant_schedule(0.1),
      helpers.one_device(config),
    )
  )
  state = helpers.start_state(config, weights, tx)
  batches = helpers.random_batches(config, 2)

  def step(index):
    return train_step(state.replace(step=jnp.int32(index)), *batches)

  return step


def test_the_update_has_the_key_of_its_step_and_the_attack_none():
  calls = []

  def as_stats(key):  # batch statistics are numbers, of which means are taken
    return jax.random.key_data(key).astype(jnp.float32)

  def apply_fn(variables, x, routes, train, key=None, examples=None):
    calls.append((routes, key is None, examples is None))
    stats = {'key': 0 if key is None else as_stats(key)}
    return x.mean((3, 4)) @ variables['params']['kernel'], stats

  weights = helpers.Snapshot(
    {'kernel': jnp.ones((2, helpers.SPEC.num_classes))},
    {'key': jnp.zeros(2)},
  )
  state, _ = stepper(apply_fn, weights)(7)
  assert calls == [((1,), True, True), ((0, 1), False, False)]
  key = stream_key(helpers.make_config().seed, Stream.DROPOUT, 7)
  np.testing.assert_array_equal(state.batch_stats['key'], as_stats(key))


def test_dropping_changes_the_update_and_not_the_perturbation():
  def step_fn(rate):
    net = DropNet(helpers.SPEC.num_classes, 2, rate)
    x = jnp.zeros((2, 2, 3, *helpers.SPEC.image_shape))
    variables = jax.jit(lambda: net.init(jax.random.key(0), x, (0, 1), True))()
    weights = helpers.Snapshot(variables['params'], variables['batch_stats'])
    return stepper(models.make_apply_fn(net), weights)

  plain, _ = step_fn(0.0)(7)
  drop = step_fn(0.5)
  (dropping, metrics), (again, _), (later, other) = drop(7), drop(7), drop(8)
  np.testing.assert_array_equal(
    dropping.perturbation.images, plain.perturbation.images
  )
  assert jnp.abs(plain.perturbation.images).max() > 0
  kernels = [s.params['head']['kernel'] for s in (plain, dropping, later)]
  assert jnp.abs(kernels[0] - kernels[1]).max() > 1e-3
  assert jnp.abs(kernels[1] - kernels[2]).max() > 1e-3
  assert metrics['loss'] != other['loss']
  assert helpers.bits(dropping) == helpers.bits(again)


@functools.cache
def drop_net():
  """(apply_fn under jit, variables, images)."""
  net = DropNet(3, 1, 0.5)
  x = jnp.asarray(np.random.default_rng(0).normal(2, 3, (1, 1, 8, 2, 2, 3)))
  variables = jax.jit(lambda: net.init(jax.random.key(0), x, (0,), True))()
  apply_fn = jax.jit(models.make_apply_fn(net), static_argnums=(2, 3))
  return apply_fn, variables, x


def test_batch_norm_is_in_train_mode_without_a_key():
  apply_fn, variables, x = drop_net()
  undropped, stats = apply_fn(variables, x, (0,), True)
  np.testing.assert_allclose(
    stats['norm']['mean'][0], 0.1 * x.mean((0, 1, 2, 3, 4)), rtol=1e-5
  )
  dropped, same = apply_fn(variables, x, (0,), True, KEY)
  jax.tree.map(np.testing.assert_array_equal, stats, same)
  assert jnp.abs(dropped - undropped).max() > 0.1


def test_evaluation_drops_nothing_even_with_a_key():
  apply_fn, variables, x = drop_net()
  without, _ = apply_fn(variables, x, (0,), False)
  logits, _ = apply_fn(variables, x, (0,), False, KEY)
  np.testing.assert_array_equal(logits, without)


def test_existing_streams_keep_their_numbers():
  numbers = {'INIT': 0, 'ATTACK': 1, 'EVAL_ATTACK': 2, 'DROPOUT': 3}
  assert {stream.name: stream.value for stream in Stream}.items() >= (
    numbers.items()
  )
