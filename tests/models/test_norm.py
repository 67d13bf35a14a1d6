"""Routed, grouped batch norm against flax, by hand, and view by view."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conadv_jax.devices import sums
from conadv_jax.devices.mesh import (
  BATCH,
  REPLICATED,
  make_mesh,
  own_copy,
  per_device,
)
from conadv_jax.models.norm import Layout, RoutedBatchNorm

# Rounding only: both sides sum the same numbers, in another order.
TOLERANCE = {'float32': 2e-5, 'float64': 1e-12}


def normal(seed, *shape, dtype='float32'):
  x = np.random.default_rng(seed).normal(1.0, 2.0, shape)
  return jnp.asarray(x, dtype)


def random_variables(num_routes, channels, dtype='float32'):
  """Rows that all differ, so that a wrong row cannot pass unseen."""
  rows = (num_routes, channels)
  return {
    'params': {
      'scale': normal(1, *rows, dtype=dtype),
      'bias': normal(2, *rows, dtype=dtype),
    },
    'batch_stats': {
      'mean': normal(3, *rows, dtype=dtype),
      'var': jnp.abs(normal(4, *rows, dtype=dtype)) + 0.5,
    },
  }


@functools.partial(
  jax.jit, static_argnames=('layer', 'routes', 'train', 'bn_axis')
)
def run(layer, variables, x_GVbHWC, routes, train=True, bn_axis=None):
  """(output like x, batch statistics after the call)."""
  layout = Layout(x_GVbHWC.shape[0], routes, bn_axis)
  y, updates = layer.apply(
    variables, layout.fold(x_GVbHWC), layout, train, mutable=['batch_stats']
  )
  return layout.unfold(y), updates['batch_stats']


@functools.partial(jax.jit, static_argnames=('train', 'dtype'))
def run_flax(variables, x_NHWC, train, dtype):
  """The same with `nn.BatchNorm` and row 0 of `variables`."""
  layer = nn.BatchNorm(
    use_running_average=not train,
    momentum=0.9,
    epsilon=1e-5,
    dtype=dtype,
    param_dtype=dtype,
  )
  rows = jax.tree.map(lambda v: v[0], variables)
  y, updates = layer.apply(rows, x_NHWC, mutable=['batch_stats'])
  return y, updates['batch_stats']


def assert_close(actual, expected, tolerance):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, tolerance, tolerance),
    actual,
    expected,
  )


@pytest.mark.parametrize('train', [True, False])
@pytest.mark.parametrize('dtype', ['float32', 'float64'])
def test_one_group_equals_flax_batch_norm(dtype, train):
  with jax.enable_x64(dtype == 'float64'):
    x = normal(0, 1, 1, 6, 3, 2, 4, dtype=dtype)
    variables = random_variables(1, 4, dtype)
    layer = RoutedBatchNorm(1, dtype=jnp.dtype(dtype))
    y, stats = run(layer, variables, x, (0,), train)
    y_flax, stats_flax = run_flax(variables, x[0, 0], train, dtype)
    assert y.dtype == y_flax.dtype == dtype
    assert_close(y[0, 0], y_flax, TOLERANCE[dtype])
    rows = jax.tree.map(lambda v: v[0], stats)
    assert_close(rows, dict(stats_flax), TOLERANCE[dtype])


@pytest.mark.parametrize('train', [True, False])
def test_gradients_of_one_group_equal_those_of_flax(train):
  with jax.enable_x64(True):
    x = normal(0, 1, 1, 6, 3, 2, 4, dtype='float64')
    weights = normal(5, *x.shape, dtype='float64')
    variables = random_variables(1, 4, 'float64')
    layer = RoutedBatchNorm(1, dtype=jnp.float64)

    def loss(params, x):
      new = variables | {'params': params}
      return (run(layer, new, x, (0,), train)[0] * weights).sum()

    def loss_flax(params, x):
      new = variables | {'params': params}
      y, _ = run_flax(new, x[0, 0], train, 'float64')
      return (y * weights[0, 0]).sum()

    grads = jax.jit(jax.grad(loss, (0, 1)))(variables['params'], x)
    grads_flax = jax.jit(jax.grad(loss_flax, (0, 1)))(variables['params'], x)
    assert_close(grads, grads_flax, 1e-11)


def test_groups_equal_separate_calls_and_their_statistics_are_averaged():
  x = normal(0, 3, 1, 4, 2, 2, 5)
  variables = random_variables(1, 5)
  layer = RoutedBatchNorm(1)
  y, stats = run(layer, variables, x, (0,))
  alone = [run(layer, variables, x[g : g + 1], (0,)) for g in range(3)]
  for g, (y_alone, _) in enumerate(alone):
    assert_close(y[g], y_alone[0], 1e-6)
  mean = jax.tree.map(lambda *v: sum(v) / 3, *[s for _, s in alone])
  assert_close(stats, mean, 1e-6)
  # Within groups only: were the groups pooled, their different means would
  # count as variance.
  shift = jnp.arange(3.0).reshape(3, 1, 1, 1, 1, 1) * 100
  _, shifted = run(layer, variables, x + shift, (0,))
  assert_close(shifted['var'], stats['var'], 1e-2)


@pytest.mark.parametrize('train', [True, False])
def test_views_equal_separate_calls_with_their_routes(train):
  routes = (0, 2, 1)
  x = normal(0, 2, 3, 4, 2, 2, 5)
  variables = random_variables(3, 5)
  layer = RoutedBatchNorm(3)
  y, stats = run(layer, variables, x, routes, train)
  for view, route in enumerate(routes):
    y_alone, stats_alone = run(
      layer, variables, x[:, view : view + 1], (route,), train
    )
    assert_close(y[:, view], y_alone[:, 0], 1e-6)
    row = jax.tree.map(lambda v, r=route: v[r], (stats, stats_alone))
    assert_close(*row, 1e-6)


@pytest.mark.parametrize('train', [True, False])
def test_a_group_that_spans_devices_equals_one_that_does_not(train):
  x = normal(0, 2, 2, 4, 2, 2, 5)
  variables = random_variables(2, 5)
  layer = RoutedBatchNorm(2)
  whole, whole_stats = run(layer, variables, x, (0, 1), train)
  mesh = make_mesh(8, 4, jax.devices()[:4])
  assert mesh.shape == {'data': 2, 'bn': 2}

  def local(variables, x_GbVHWC):
    variables = own_copy(variables)
    x = jnp.swapaxes(x_GbVHWC, 1, 2)
    y, stats = run(layer, variables, x, (0, 1), train, bn_axis='bn')
    return jnp.swapaxes(y, 1, 2), sums.mean_over_devices(stats)

  specs = (BATCH, REPLICATED)
  spread, spread_stats = jax.jit(per_device(mesh, local, specs[::-1], specs))(
    variables, jnp.swapaxes(x, 1, 2)
  )
  assert_close(whole, jnp.swapaxes(spread, 1, 2), 1e-6)
  assert_close(whole_stats, spread_stats, 1e-6)


def test_running_statistics_after_two_steps_by_hand():
  layer = RoutedBatchNorm(1, momentum=0.75)
  layout = Layout(groups=2, routes=(0,))
  x1 = jnp.array([[1.0], [3.0], [5.0], [9.0]])  # means 2, 7; variances 1, 4
  x2 = jnp.array([[0.0], [0.0], [2.0], [6.0]])  # means 0, 4; variances 0, 4
  variables = layer.init(jax.random.key(0), x1, layout, True)
  _, updates = layer.apply(variables, x1, layout, True, mutable=['batch_stats'])
  stats = updates['batch_stats']
  # 0.75 * 0 + 0.25 * (2 + 7) / 2;  0.75 * 1 + 0.25 * (1 + 4) / 2
  np.testing.assert_allclose(stats['mean'], [[1.125]], 1e-6)
  np.testing.assert_allclose(stats['var'], [[1.375]], 1e-6)
  _, updates = layer.apply(
    variables | updates, x2, layout, True, mutable=['batch_stats']
  )
  stats = updates['batch_stats']
  # 0.75 * 1.125 + 0.25 * (0 + 4) / 2;  0.75 * 1.375 + 0.25 * (0 + 4) / 2
  np.testing.assert_allclose(stats['mean'], [[1.34375]], 1e-6)
  np.testing.assert_allclose(stats['var'], [[1.53125]], 1e-6)


@pytest.mark.parametrize('train', [True, False])
def test_init_with_one_route_makes_every_route_at_rest(train):
  x = normal(0, 6, 2, 2, 5)
  layer = RoutedBatchNorm(3)
  variables = layer.init(jax.random.key(0), x, Layout(2, (1,)), train)
  ones, zeros = np.ones((3, 5)), np.zeros((3, 5))
  expected = {
    'params': {'scale': ones, 'bias': zeros},
    'batch_stats': {'mean': zeros, 'var': ones},
  }
  jax.tree.map(np.testing.assert_array_equal, variables, expected)


def test_a_call_leaves_the_other_routes_bitwise_alone():
  x = normal(0, 2, 1, 4, 2, 2, 5)
  variables = random_variables(3, 5)
  layer = RoutedBatchNorm(3)

  def loss(params):
    y, stats = run(layer, variables | {'params': params}, x, (1,))
    return jnp.square(y).sum(), stats

  grads, stats = jax.jit(jax.grad(loss, has_aux=True))(variables['params'])
  others = np.array([0, 2])
  for name, old in variables['batch_stats'].items():
    np.testing.assert_array_equal(stats[name][others], old[others])
    assert (stats[name][1] != old[1]).all()
  for grad in grads.values():
    np.testing.assert_array_equal(grad[others], 0)
    assert (grad[1] != 0).all()


def test_views_on_the_same_route_move_it_once_to_their_average():
  x = normal(0, 1, 3, 4, 2, 2, 5)
  variables = random_variables(2, 5)
  layer = RoutedBatchNorm(2, momentum=0.9)
  y, stats = run(layer, variables, x, (1, 0, 1))
  means, variances = x.mean((0, 2, 3, 4)), x.var((0, 2, 3, 4))
  for name, views in (('mean', means), ('var', variances)):
    old = variables['batch_stats'][name]
    expected = 0.9 * old[1] + 0.1 * (views[0] + views[2]) / 2
    np.testing.assert_allclose(stats[name][1], expected, 1e-5)
    expected = 0.9 * old[0] + 0.1 * views[1]
    np.testing.assert_allclose(stats[name][0], expected, 1e-5)
  # Each view is still normalised by its own statistics.
  alone, _ = run(layer, variables, x[:, 2:], (1,))
  assert_close(y[:, 2], alone[:, 0], 1e-6)


def test_evaluation_uses_the_row_of_the_route():
  layer = RoutedBatchNorm(2, epsilon=1.0)
  variables = {
    'params': {
      'scale': jnp.array([[2.0], [3.0]]),
      'bias': jnp.array([[10.0], [20.0]]),
    },
    'batch_stats': {
      'mean': jnp.array([[1.0], [-1.0]]),
      'var': jnp.array([[3.0], [8.0]]),
    },
  }
  x = jnp.full((1, 2, 1, 1, 1, 1), 5.0)
  y, stats = run(layer, variables, x, (0, 1), train=False)
  # (5 - 1) / sqrt(3 + 1) * 2 + 10;  (5 + 1) / sqrt(8 + 1) * 3 + 20
  np.testing.assert_allclose(y.ravel(), [14.0, 26.0], 1e-6)
  y, _ = run(layer, variables, x, (1, 0), train=False)
  np.testing.assert_allclose(y.ravel(), [26.0, 14.0], 1e-6)
  jax.tree.map(np.testing.assert_array_equal, stats, variables['batch_stats'])


def test_bfloat16_images_have_float32_statistics():
  # a = 133 / 128 is a bfloat16; neither its square nor the mean, 3 / 4 a, is.
  # Not under jit, where XLA may keep more digits than the program asks for.
  a = 133 / 128
  x = jnp.full((1, 1, 16, 4, 4, 3), a, jnp.bfloat16).at[:, :, :4].set(0)
  layer = RoutedBatchNorm(1, momentum=0.0, dtype=jnp.bfloat16)
  layout = Layout(1, (0,))
  x = layout.fold(x)
  variables = layer.init(jax.random.key(0), x, layout, True)
  assert {v.dtype for v in jax.tree.leaves(variables)} == {jnp.dtype('float32')}
  y, updates = layer.apply(variables, x, layout, True, mutable=['batch_stats'])
  assert y.dtype == jnp.bfloat16
  stats = updates['batch_stats']
  np.testing.assert_allclose(stats['mean'], [[3 / 4 * a] * 3], 1e-6)
  np.testing.assert_allclose(stats['var'], [[3 / 16 * a**2] * 3], 1e-6)


def test_large_mean_and_small_variance_stay_finite_and_not_negative():
  # E[x^2] - E[x]^2 cancels to noise of either sign here.
  noise = 1e-3 * jax.random.normal(jax.random.key(0), (4, 1, 8, 4, 4, 64))
  layer = RoutedBatchNorm(1, momentum=0.0)
  variables = random_variables(1, 64)

  def outputs(x):
    y, stats = run(layer, variables, x, (0,))
    return jnp.square(y).sum(), (y, stats)

  gradient = jax.jit(jax.grad(outputs, has_aux=True))
  for mean in (1e3, -3e4):
    grad, (y, stats) = gradient(mean + noise)
    assert (stats['var'] >= 0).all()
    for array in jax.tree.leaves((grad, y, stats)):
      assert jnp.isfinite(array).all()


def test_statistics_do_not_need_pixels():
  x = normal(0, 8, 5)
  layer = RoutedBatchNorm(1)
  layout = Layout(2, (0,))
  variables = layer.init(jax.random.key(0), x, layout, True)
  y, _ = layer.apply(variables, x, layout, True, mutable=['batch_stats'])
  means = y.reshape(2, 4, 5).mean(1)
  np.testing.assert_allclose(means, np.zeros((2, 5)), atol=1e-6)


def test_layout_folds_and_unfolds():
  g, v, b = 3, 2, 8
  layout = Layout(g, (0, 1))
  index = np.stack(np.meshgrid(*map(np.arange, (g, v, b)), indexing='ij'), -1)
  folded = layout.fold(jnp.asarray(index))
  np.testing.assert_array_equal(folded, index.reshape(g * v * b, 3))
  np.testing.assert_array_equal(layout.unfold(folded), index)
