"""The worst case near the weights, where it can be computed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import surfaces

from conadv_jax.analysis import sharpness

W = jnp.array([1.0, -2.0, 0.5])
G = jnp.array([3.0, 1.0, -4.0])
ADAPTIVE = np.abs(np.array([3.0, -2.0, -2.0]))  # |w g|


def rise(loss, weights, scale, rho, steps=20):
  gradient = jax.value_and_grad(loss)
  losses = sharpness.worst_case(gradient, weights, scale, rho, steps, seed=0)
  return max(losses) - float(loss(weights))


def test_of_a_linear_loss_it_is_the_dual_norm_of_the_gradient():
  loss = lambda w: G @ w  # noqa: E731
  plain, adaptive = np.sqrt(26), np.linalg.norm(ADAPTIVE)
  assert rise(loss, W, 1.0, 0.1) == pytest.approx(0.1 * plain, rel=1e-5)
  found = rise(loss, W, jnp.abs(W), 0.1)
  assert found == pytest.approx(0.1 * adaptive, rel=1e-5)


def test_at_a_minimum_it_is_half_the_largest_eigenvalue():
  curvatures = jnp.array([1.0, 8.0, 3.0])
  loss = lambda w: (curvatures * (w - W) ** 2).sum() / 2  # noqa: E731
  assert rise(loss, W, 1.0, 0.1) == pytest.approx(0.01 / 2 * 8, rel=1e-4)
  # The adaptive one is that of T H T: 1, 32, 0.75.
  found = rise(loss, W, jnp.abs(W), 0.1)
  assert found == pytest.approx(0.01 / 2 * 32, rel=1e-4)


def test_a_loss_that_bends_down_is_highest_inside_the_ball():
  loss = lambda w: w.sum() - 5 * (w**2).sum()  # noqa: E731, at 0.1 each: 0.1
  found = rise(loss, jnp.zeros(2), 1.0, 1.0, steps=100)
  assert 0.08 < found <= 0.1


def test_the_result_is_a_lower_bound_and_nothing_is_nan_without_gradient():
  assert rise(lambda w: 0 * w.sum(), W, 1.0, 1.0) == 0


def rescaled(weights):
  """The same function: a kernel times 3, and the statistics that follow it."""
  params = jax.tree.map(lambda x: x, weights.params)
  stats = jax.tree.map(lambda x: x, weights.batch_stats)
  params['first']['kernel'] = 3 * params['first']['kernel']
  stats['norm']['mean'] = 3 * stats['norm']['mean']
  stats['norm']['var'] = 9 * stats['norm']['var']
  return weights.replace(params=params, batch_stats=stats)


@pytest.mark.usefixtures('x64')
def test_only_the_adaptive_one_ignores_the_scale_of_weights(monkeypatch):
  fields = {'dtype': 'float64', 'bn_epsilon': 1e-300}
  weights = surfaces.weights_of(**fields)
  one, other = (
    surfaces.measured(
      sharpness,
      surfaces.make(monkeypatch, w, **fields)[0],
      rho_adaptive='0.5,1',
      ascent_steps=5,
    ).values
    for w in (weights, rescaled(weights))
  )
  for rho in ('0.5', '1'):
    name = f'sharpness_adaptive_{rho}'
    assert one[name] == pytest.approx(other[name], rel=1e-9) and one[name] > 0
  assert one['loss'] == pytest.approx(other['loss'], rel=1e-12)
  for name in ('sharpness_0.05', 'sharpness_0.1', 'weight_norm'):
    assert one[name] != pytest.approx(other[name], rel=0.05)


def test_the_norm_is_that_of_the_kernels(monkeypatch):
  weights = surfaces.weights_of()
  surface, _ = surfaces.make(monkeypatch, weights)
  found = surfaces.measured(sharpness, surface, ascent_steps=2).values
  kernels = [weights.params[n]['kernel'] for n in ('first', 'head')]
  squares = sum(float((np.float64(k) ** 2).sum()) for k in kernels)
  assert found['weight_norm'] == pytest.approx(squares**0.5, rel=1e-6)
