"""A network without batch norm: attention by hand, and views of it."""

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest

from conadv_jax import models
from conadv_jax.base.errors import ConfigError
from conadv_jax.models import summary, vit, weights


def key():
  return jax.random.key(0)


def tiny(**kwargs):
  return vit.ViT(**dict(num_classes=5, depth=2, width=8, heads=2) | kwargs)


def test_size_by_hand():
  block = 64 * 192 + 192 + 64 * 64 + 64 + 64 * 256 + 256 + 256 * 64 + 64
  norms = 4 * 64
  patches, positions = 48 * 64 + 64, 64 * 64
  parameters = patches + positions + 4 * (block + norms) + 2 * 64 + 650
  per_token = 48 * 64 + 4 * (3 + 1 + 4 + 4) * 64**2
  size = summary.size(models.create('vit_tiny', num_classes=10), 32)
  assert size.parameters == parameters == 207_946
  assert size.multiply_adds == 64 * per_token + 640


def test_a_token_is_a_square_of_the_image():
  model = tiny(depth=0, width=1, heads=1, patch_px=2)
  x = jnp.arange(16.0).reshape(1, 1, 1, 4, 4, 1)
  variables = jax.tree.map(jnp.ones_like, model.init(key(), x, (0,), False))
  _, captured = model.apply(
    variables, x, (0,), False, capture_intermediates=True, mutable=True
  )
  (tokens,) = captured['intermediates']['patches']['__call__']
  # 0 + 1 + 4 + 5 and so on, and a bias of one.
  np.testing.assert_array_equal(tokens[0, :, 0], [11, 19, 43, 51])


@pytest.mark.usefixtures('x64')
def test_attention_by_hand():
  block = vit.EncoderBlock(heads=2, dtype=jnp.float64, wide=jnp.float64)
  q, k, v = np.random.default_rng(0).normal(size=(3, 1, 3, 4))
  actual = block.apply({}, *map(jnp.asarray, (q, k, v)), method='attention')
  for head in (slice(0, 2), slice(2, 4)):
    shares = np.exp(q[0, :, head] @ k[0, :, head].T / np.sqrt(2))
    shares /= shares.sum(-1, keepdims=True)
    np.testing.assert_allclose(
      actual[0, :, head], shares @ v[0, :, head], 1e-12
    )


@pytest.mark.parametrize('train', [True, False])
def test_an_example_sees_neither_others_nor_its_route(train):
  model = tiny()
  x = networks.images(2, 2, 3, 8, 8, 3)
  variables = networks.random_variables(model, 8)
  assert variables.keys() == {'params'}
  logits, stats = networks.apply(model, variables, x, (0, 1), train)
  assert logits.shape == (2, 2, 3, 5) and stats == {}
  assert logits.std() > 0.1
  alone, _ = networks.apply(model, variables, x[1:, 1:, :1], (0,), train)
  np.testing.assert_allclose(alone[0, 0, 0], logits[1, 1, 0], 1e-4, 1e-5)


def test_positions_matter():
  model = tiny()
  x = networks.images(1, 1, 1, 8, 8, 3)
  variables = networks.random_variables(model, 8)
  logits, _ = networks.apply(model, variables, x)
  moved, _ = networks.apply(model, variables, jnp.roll(x, 4, axis=3))
  assert networks.relative_error(moved, logits) > 0.01


def test_bfloat16_is_for_activations_only():
  model = tiny(dtype=jnp.bfloat16)
  variables = networks.random_variables(model, 8)
  x = networks.images(1, 1, 2, 8, 8, 3)
  logits, _ = networks.apply(model, variables, x)
  assert {a.dtype for a in jax.tree.leaves((variables, logits))} == {
    jnp.dtype('float32')
  }
  expected, _ = networks.apply(tiny(), variables, x)
  assert 0 < networks.relative_error(logits, expected) < 0.05


def test_a_side_that_patches_do_not_divide_is_refused():
  with pytest.raises(ConfigError, match='9x8 pixels: .* of the 4 pixels'):
    model = models.create('vit_tiny', num_classes=5)
    model.init(key(), jnp.zeros((1, 1, 1, 9, 8, 3)), (0,), True)


def test_timm_has_no_such_network():
  with pytest.raises(ConfigError, match="'vit_tiny': timm has no such"):
    weights.to_state_dict('vit_tiny', {}, {}, 0)
