"""Cross-entropy and accuracy by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conadv_jax.method import losses

# Probabilities 1/6, 2/6, 3/6.
LOGITS = jnp.log(jnp.array([1.0, 2.0, 3.0]))


@pytest.mark.parametrize('label, expected', [(0, 6.0), (1, 3.0), (2, 2.0)])
def test_cross_entropy_is_minus_log_of_the_probability(label, expected):
  loss = losses.cross_entropy(LOGITS, jnp.array(label))
  np.testing.assert_allclose(loss, np.log(expected), 1e-6)


def test_label_smoothing_spreads_over_all_classes():
  # s = 0.3: the target is 0.7 + 0.1 on the label and 0.1 on each other class.
  loss = losses.cross_entropy(LOGITS, jnp.array(0), 0.3)
  expected = 0.8 * np.log(6) + 0.1 * np.log(3) + 0.1 * np.log(2)
  np.testing.assert_allclose(loss, expected, 1e-6)
  loss = losses.cross_entropy(LOGITS, jnp.array(2), 0.3)
  expected = 0.1 * np.log(6) + 0.1 * np.log(3) + 0.8 * np.log(2)
  np.testing.assert_allclose(loss, expected, 1e-6)


@pytest.mark.parametrize('smoothing', [0.0, 0.3])
def test_gradient_is_probability_minus_target(smoothing):
  grad = jax.grad(losses.cross_entropy)(LOGITS, jnp.array(1), smoothing)
  target = np.array([0, 1, 0]) * (1 - smoothing) + smoothing / 3
  np.testing.assert_allclose(grad, np.array([1, 2, 3]) / 6 - target, 1e-6, 1e-7)


def test_losses_are_per_example_and_not_reduced():
  logits = jnp.stack([LOGITS, LOGITS[::-1]])[:, None]
  labels = jnp.array([[0], [0]])
  loss = losses.cross_entropy(logits, labels)
  np.testing.assert_allclose(loss, np.log([[6.0], [2.0]]), 1e-6)
  assert losses.cross_entropy(logits, labels, 0.1).shape == (2, 1)


@pytest.mark.parametrize('smoothing', [0.0, 0.1])
def test_large_logits_stay_finite(smoothing):
  logits = jnp.array([1e4, 0.0, -1e4])
  value, grad = jax.value_and_grad(losses.cross_entropy)(
    logits, jnp.array(2), smoothing
  )
  expected = (1 - smoothing) * 2e4 + smoothing * 1e4
  np.testing.assert_allclose(value, expected, 1e-6)
  assert jnp.isfinite(grad).all()


def test_top1_is_one_where_the_largest_logit_is_the_labels():
  logits = jnp.array([[[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]]])
  hits = losses.top1(logits, jnp.array([[1, 1]]))
  assert hits.dtype == jnp.float32
  np.testing.assert_array_equal(hits, [[1.0, 0.0]])


def test_top1_takes_the_first_of_equal_logits():
  logits = jnp.array([[1.0, 5.0, 5.0]] * 3 + [[0.0, 0.0, 0.0]])
  hits = losses.top1(logits, jnp.array([0, 1, 2, 0]))
  np.testing.assert_array_equal(hits, [0.0, 1.0, 0.0, 1.0])
