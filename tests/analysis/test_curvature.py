"""Derivatives of the loss, eigenvalues and trace, against explicit matrices."""

import helpers
import jax
import numpy as np
import pytest
import surfaces

from conadv_jax.analysis import curvature

FLOAT64 = {'dtype': 'float64'}


def explicit(surface, run, weights, route=0):
  """(loss, gradient, Hessian) of the loss that `surfaces` writes out."""
  loss = surfaces.written_out(surface, run, weights, route)
  w = np.asarray(surface.weights)
  hessian = np.asarray(jax.jit(jax.hessian(loss))(w))
  return float(loss(w)), jax.jit(jax.grad(loss))(w), hessian


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize(
  ('devices', 'route'), [pytest.param(1, 0, marks=pytest.mark.slow), (8, 1)]
)
def test_the_derivatives_are_those_of_the_loss(monkeypatch, devices, route):
  weights = surfaces.weights_of(**FLOAT64)
  name = ('clean', 'adv')[route]
  surface, run = surfaces.make(monkeypatch, weights, devices, name, **FLOAT64)
  loss, gradient, hessian = explicit(surface, run, weights, route)
  assert surface.loss(surface.weights)[0] == pytest.approx(loss, rel=1e-12)
  found, g = surface.gradient(surface.weights)
  assert found == pytest.approx(loss, rel=1e-12)
  helpers.assert_close(g, gradient, 1e-12)
  v = np.random.default_rng(0).standard_normal(len(hessian))
  helpers.assert_close(surface.hessian_product(v), hessian @ v, 1e-12)


@pytest.mark.parametrize(
  'devices', [1, pytest.param(8, marks=pytest.mark.slow)]
)
def test_lanczos_is_eigh_of_the_explicit_hessian(monkeypatch, devices):
  """In float32, as it is measured."""
  weights = surfaces.weights_of()
  surface, run = surfaces.make(monkeypatch, weights, devices)
  _, _, hessian = explicit(surface, run, weights)
  expected = np.linalg.eigh(hessian.astype(np.float64))[0][::-1][:5]
  found = curvature.top_eigenvalues(
    surface.hessian_product, len(hessian), 5, seed=1
  )
  np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_eigenvalues_of_a_diagonal_are_its_largest():
  diagonal = np.array([3.0, -9.0, 1.0, 7.0, 0.0, 2.0, 5.0])
  found = curvature.top_eigenvalues(lambda v: diagonal * v, 7, 3, seed=0)
  np.testing.assert_allclose(found, [7, 5, 3], rtol=1e-8)


def test_what_has_not_converged_is_left_out(monkeypatch):
  monkeypatch.setattr(curvature, '_MAX_RESTARTS', 1)
  close = np.linspace(-1, 1, 3000)
  found = curvature.top_eigenvalues(lambda v: close * v, 3000, 3, seed=0)
  assert len(found) < 3


def test_signs_give_the_trace_of_a_diagonal_exactly():
  diagonal = np.arange(5.0)
  forms = curvature.quadratic_forms(lambda v: diagonal * v, 5, 3, seed=0)
  np.testing.assert_allclose(forms, 10)


def test_the_trace_is_within_its_interval(monkeypatch):
  weights = surfaces.weights_of()
  surface, run = surfaces.make(monkeypatch, weights)
  _, _, hessian = explicit(surface, run, weights)
  forms = curvature.quadratic_forms(
    surface.hessian_product, len(hessian), 50, seed=0
  )
  error = forms.std(ddof=1) / 50**0.5
  assert abs(forms.mean() - np.trace(hessian)) < 3 * error
  # Each form has the variance 2 * (sum of the squares beside the diagonal).
  beside = hessian - np.diag(np.diag(hessian))
  expected = (2 * (beside**2).sum() / 50) ** 0.5
  assert error == pytest.approx(expected, rel=0.3)
