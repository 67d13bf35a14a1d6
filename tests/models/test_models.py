"""Small ResNets: size, shapes, and views that keep to themselves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conadv_jax import models
from conadv_jax.base.errors import ConfigError
from conadv_jax.method.optim import path_name

# name: (parameters with 3 channels, 10 classes and one route; channels of all
# batch norms). By hand for resnet8: kernels 27 * 16, 2 * 9 * 16^2, 9 * 16 * 32
# + 9 * 32^2 + 16 * 32, four times that; head 64 * 10 + 10; scale and bias of
# 16 + 2 * 16 + 3 * 32 + 3 * 64 channels.
SIZES = {
  'resnet8': (78_042, 336),
  'resnet20': (272_474, 784),
}
NAMES = sorted(SIZES)
# One shape, so that the tests share two compiled programs.
SHAPE = (2, 2, 4, 8, 8, 3)
# Compiling takes longer than running these few examples.
UNOPTIMISED = {'xla_backend_optimization_level': '0'}


@functools.cache
def build(name, num_routes=2, dtype=jnp.float32):
  """(model, apply_fn under jit)."""
  model = models.create(
    name, num_classes=10, num_routes=num_routes, dtype=dtype
  )
  apply_fn = jax.jit(
    models.make_apply_fn(model),
    static_argnums=(2, 3),
    compiler_options=UNOPTIMISED,
  )
  return model, apply_fn


def image(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), 'float32')


def init(name, num_routes=2, dtype=jnp.float32):
  model, _ = build(name, num_routes, dtype)
  # As for a call with one route: every row is made all the same.
  return model.init(
    jax.random.key(0), jnp.zeros((1, 1, 1, 8, 8, 3)), (0,), True
  )


def shapes_of(*args):
  return jax.eval_shape(lambda: init(*args))


@functools.cache
def initial_variables(name):
  return jax.jit(lambda: init(name), compiler_options=UNOPTIMISED)()


@functools.cache
def random_variables(name):
  """Every row different, and no scale of zero to hide half of the network."""
  leaves, treedef = jax.tree_util.tree_flatten_with_path(shapes_of(name))
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    noise = rng.normal(size=leaf.shape)
    last = path[-1].key
    if last == 'kernel':
      return noise * np.sqrt(2 / np.prod(leaf.shape[:-1]))
    if last in ('scale', 'var'):
      return np.exp(0.2 * noise)
    return 0.2 * noise

  leaves = [jnp.asarray(draw(p, leaf), leaf.dtype) for p, leaf in leaves]
  return jax.tree.unflatten(treedef, leaves)


@pytest.mark.parametrize('num_routes', [1, 3])
@pytest.mark.parametrize('name', NAMES)
def test_number_of_parameters(name, num_routes):
  shapes = shapes_of(name, num_routes)

  def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))

  size, channels = SIZES[name]
  # A route more is a scale and a bias, a mean and a variance per channel.
  assert count(shapes['params']) == size + (num_routes - 1) * 2 * channels
  assert count(shapes['batch_stats']) == num_routes * 2 * channels


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('train', [True, False])
@pytest.mark.parametrize(
  'shape', [(2, 2, 3, 8, 8, 3), (1, 2, 2, 28, 28, 3), (1, 2, 1, 9, 7, 3)]
)
def test_logits_have_shape_g_v_b_k(name, train, shape):
  model, _ = build(name)
  apply_fn = models.make_apply_fn(model)
  variables = shapes_of(name)
  x = jax.ShapeDtypeStruct(shape, jnp.float32)
  logits, stats = jax.eval_shape(
    lambda v, x: apply_fn(v, x, (0, 1), train), variables, x
  )
  assert logits.shape == shape[:3] + (10,)
  same = jax.tree.map(
    lambda new, old: (new.shape, new.dtype) == (old.shape, old.dtype),
    stats,
    variables['batch_stats'],
  )
  assert all(jax.tree.leaves(same))


@pytest.mark.parametrize('name', NAMES)
def test_bfloat16_is_for_activations_only(name):
  model, _ = build(name, 2, jnp.bfloat16)
  apply_fn = models.make_apply_fn(model)
  variables = shapes_of(name, 2, jnp.bfloat16)
  x = jax.ShapeDtypeStruct((1, 2, 2, 8, 8, 3), jnp.float32)
  logits, stats = jax.eval_shape(
    lambda v, x: apply_fn(v, x, (0, 1), True), variables, x
  )
  wide = jax.tree.leaves((variables, stats, logits))
  assert {leaf.dtype for leaf in wide} == {jnp.dtype('float32')}


def test_unknown_model_names_the_nearest():
  with pytest.raises(ConfigError, match="'resnet9'; did you mean 'resnet"):
    models.create('resnet9', num_classes=10, num_routes=1)


@pytest.mark.parametrize(
  'name', ['resnet8', pytest.param('resnet20', marks=pytest.mark.slow)]
)
def test_initial_logits_are_finite_and_near_zero(name):
  _, apply_fn = build(name)
  logits, _ = apply_fn(initial_variables(name), image(*SHAPE), (0, 1), True)
  assert jnp.isfinite(logits).all()
  # No class is preferred at first: the loss starts near log K.
  log_p = jax.nn.log_softmax(logits)
  assert (jnp.abs(log_p + np.log(10)) < 0.5).all()


@pytest.mark.parametrize('name', NAMES)
def test_the_last_scale_of_each_block_starts_at_zero_and_no_other(name):
  params = jax.tree_util.tree_leaves_with_path(
    initial_variables(name)['params']
  )
  params = {path_name(path): leaf for path, leaf in params}
  blocks = {p.split('/')[0] for p in params if '_block' in p}
  scales = {p: leaf for p, leaf in params.items() if p.endswith('/scale')}
  zero = {p for p, leaf in scales.items() if not leaf.any()}
  assert zero == {f'{block}/norm2/scale' for block in blocks}
  for path in scales.keys() - zero:
    np.testing.assert_array_equal(scales[path], 1)
  for path, leaf in params.items():
    if path.endswith('/bias'):
      np.testing.assert_array_equal(leaf, 0)


@pytest.mark.parametrize('train', [True, False])
@pytest.mark.parametrize(
  'name', ['resnet8', pytest.param('resnet20', marks=pytest.mark.slow)]
)
def test_views_and_groups_equal_separate_calls(name, train):
  _, apply_fn = build(name)
  variables = random_variables(name)
  x = image(*SHAPE)
  logits, stats = apply_fn(variables, x, (0, 1), train)
  assert logits.std() > 0.1  # the network does not just say nothing
  alone = {}
  for g in range(2):
    for v in range(2):
      one = x[g : g + 1, v : v + 1]
      logits_alone, alone[g, v] = apply_fn(variables, one, (v,), train)
      # Rounding through up to 20 layers, which convolutions of another batch
      # size sum in another order; logits are of order 1.
      np.testing.assert_allclose(logits[g, v], logits_alone[0, 0], 1e-4, 1e-5)
  for v in range(2):
    jax.tree.map(
      lambda new, a, b, v=v: np.testing.assert_allclose(
        new[v], (a[v] + b[v]) / 2, 1e-4, 1e-5
      ),
      stats,
      alone[0, v],
      alone[1, v],
    )


@pytest.mark.parametrize('train', [True, False])
@pytest.mark.parametrize('name', NAMES)
def test_routes_choose_different_functions(name, train):
  _, apply_fn = build(name)
  x = jnp.broadcast_to(image(2, 1, 4, 8, 8, 3), SHAPE)
  logits, _ = apply_fn(random_variables(name), x, (0, 1), train)
  assert jnp.abs(logits[:, 0] - logits[:, 1]).max() > 0.01


@pytest.mark.parametrize('name', NAMES)
def test_evaluation_leaves_the_statistics_as_they_were(name):
  _, apply_fn = build(name)
  variables = random_variables(name)
  x = image(*SHAPE)
  _, stats = apply_fn(variables, x, (0, 1), False)
  jax.tree.map(np.testing.assert_array_equal, stats, variables['batch_stats'])
  _, moved = apply_fn(variables, x, (0, 1), True)
  same = jax.tree.map(
    lambda a, b: bool((a == b).any()), moved, variables['batch_stats']
  )
  assert not any(jax.tree.leaves(same))


@pytest.mark.parametrize('name', NAMES)
def test_an_example_does_not_see_the_others_in_evaluation(name):
  _, apply_fn = build(name)
  variables = random_variables(name)
  x = image(*SHAPE)
  logits, _ = apply_fn(variables, x, (0, 1), False)
  other = x.at[:, :, 1:].set(100.0)
  changed, _ = apply_fn(variables, other, (0, 1), False)
  np.testing.assert_allclose(changed[:, :, 0], logits[:, :, 0], 1e-5, 1e-6)
