"""Directions as long as the filters, and what is found along them."""

import numpy as np
import pytest
import surfaces
from jax.flatten_util import ravel_pytree

from conadv_jax.analysis import landscape


def test_a_direction_has_the_filter_norms_of_the_weights():
  rng = np.random.default_rng(0)
  params = {
    'conv': {'kernel': rng.normal(0, 3, (3, 3, 2, 4))},
    'head': {'bias': np.ones(5), 'kernel': rng.normal(0, 1, (40, 5))},
    'norm': {'bias': np.ones((2, 4)), 'scale': np.ones((2, 4))},
  }
  _, unravel = ravel_pytree(params)
  direction = landscape.filter_normalized(params, seed=1)
  d = unravel(direction)
  for name, count in (('conv', 4), ('head', 5)):
    for i in range(count):
      found, expected = (
        np.linalg.norm(np.ravel(x[name]['kernel'][..., i])) for x in (d, params)
      )
      assert found == pytest.approx(expected, rel=1e-6)
  assert not any(map(np.any, [d['head']['bias'], *d['norm'].values()]))
  same = landscape.filter_normalized(params, seed=1)
  np.testing.assert_array_equal(direction, same)
  other = landscape.filter_normalized(params, seed=2)
  cosine = direction @ other / (direction @ direction)
  assert 0 < abs(cosine) < 0.3


def test_a_plane_of_a_quadratic_loss():
  weights = np.array([1.0, 2.0, 3.0])
  directions = np.array([[1.0, 0, 0], [0, 2.0, 0]])
  places = np.array([[[0, 0], [1, 0]], [[0, -1], [2, 0.5]]])
  found = landscape.along(
    lambda w: (float(w @ w), float(w[1])), weights, directions, places
  )
  expected = [[[14, 2], [17, 2]], [[10, 0], [27, 3]]]
  np.testing.assert_array_equal(found, expected)


def test_the_curves_are_those_of_the_moved_network(monkeypatch):
  weights = surfaces.weights_of()
  surface, run = surfaces.make(monkeypatch, weights)
  fields = {'points': 3, 'grid': 3, 'span': 0.5, 'seed': 4}
  values, curves = surfaces.measured(landscape, surface, **fields)
  loss = surfaces.written_out(surface, run, weights)
  one, two = (landscape.filter_normalized(surface.params, s) for s in (4, 5))
  w = np.asarray(surface.weights)
  line = [float(loss(w + x * one)) for x in (-0.5, 0, 0.5)]
  np.testing.assert_allclose(curves['loss'], line, rtol=1e-5)
  assert values['loss'] == curves['loss'][1]
  # Rows of the plane are places along direction 2.
  corner = float(loss(w - 0.5 * one + 0.5 * two))
  assert curves['plane_loss'][2, 0] == pytest.approx(corner, rel=1e-5)
  np.testing.assert_allclose(curves['plane_loss'][1], curves['loss'], rtol=1e-6)
  assert values['line_rise'] == pytest.approx(np.mean(line) - line[1], rel=1e-4)
