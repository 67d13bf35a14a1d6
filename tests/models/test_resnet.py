"""ResNets: equal to timm's, in every way of computing them."""

import functools
import json

import flax.linen as nn
import helpers
import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
from networks import relative_error
from references import formula, make

from conadv_jax import models
from conadv_jax.base.errors import ConfigError
from conadv_jax.method.optim import path_name
from conadv_jax.models import network, resnet, stochastic
from conadv_jax.models.norm import Layout, RoutedBatchNorm

FAST = ['resnet18', 'resnet50', 'resnet50d', 'seresnet50']
DEEP = ['resnet34', 'resnet101', 'resnet152', 'resnet200']
NAMES = FAST + [pytest.param(name, marks=pytest.mark.slow) for name in DEEP]
STORED = json.loads(make.FILE.read_text())
# float32 rounding through up to 200 layers; measured: below 1e-6.
TOLERANCE = 1e-5


def small(**kwargs):
  """A block of two convolutions per stage."""
  fields = dict(
    blocks=(1, 1, 1, 1),
    width=8,
    bottleneck=False,
    num_classes=10,
    num_routes=2,
  )
  return resnet.ResNet(**(fields | kwargs))


def same_shapes(model, other):
  same = jax.tree.map(
    lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype),
    networks.abstract_variables(model),
    networks.abstract_variables(other),
  )
  return all(jax.tree.leaves(same))


# ---- timm -------------------------------------------------------------------


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.slow
def test_logits_equal_the_stored_ones_of_timm(name):
  model = models.create(name, num_classes=1000, num_routes=1)
  x = formula.images(make.IMAGES, make.SIDE_PX)[None, None]
  logits, _ = networks.apply(model, networks.formula_variables(name, model), x)
  logits = np.asarray(logits)[0, 0, :, make.CLASSES]
  assert relative_error(logits, np.array(STORED[name])) < TOLERANCE


@pytest.mark.parity
@pytest.mark.parametrize('name', FAST + DEEP)
def test_logits_equal_those_of_timm(name):
  # An odd side, which is padded, and pooled in the shortcut of ResNet-D, in
  # other places than an even one.
  x = formula.images(2, 95)
  expected = make.timm_logits(make.timm_model(name), x)
  model = models.create(name, num_classes=1000, num_routes=1)
  logits, _ = networks.apply(
    model, networks.formula_variables(name, model), x[None, None]
  )
  assert relative_error(np.asarray(logits)[0, 0], expected) < TOLERANCE
  # The images matter to them.
  assert relative_error(expected[0], expected[1]) > 1000 * TOLERANCE


@pytest.mark.parity
@pytest.mark.usefixtures('x64')
def test_training_of_resnet50_equals_that_of_timm():
  networks.assert_training_equals_timm('resnet50', norms=53)


@pytest.mark.parity
def test_torchvision_names_the_plain_networks_alike():
  make.import_timm()
  import torchvision

  theirs = torchvision.models.resnet50(weights=None).state_dict()
  model = models.create('resnet50', num_classes=1000, num_routes=1)
  ours = networks.formula_state_dict('resnet50', model)
  assert {k: tuple(v.shape) for k, v in theirs.items()} == {
    k: v.shape for k, v in ours.items()
  }


# ---- Views and routes -------------------------------------------------------


@pytest.mark.usefixtures('x64')
def test_views_equal_separate_calls():
  assert networks.views_error(small(dtype=jnp.float64), (0, 1)) < 1e-12


@pytest.mark.slow
def test_views_in_bfloat16_equal_separate_calls():
  # Eight bits: 2^-8 per rounding, of which the 10 layers do some fifty, most of
  # them alike on both sides.
  assert networks.views_error(small(dtype=jnp.bfloat16), (1,)) < 0.05


# ---- Space to depth ---------------------------------------------------------


@pytest.mark.parametrize('side_px', [(2, 2), (8, 12), (32, 32)])
def test_space_to_depth_equals_the_convolution_of_stride_2(x64, side_px):
  x = formula.uniform('x', (2, *side_px, 3))
  kernel = formula.uniform('kernel', (7, 7, 3, 5))

  def outputs(function):
    def conv(x, kernel):
      numbers = ('NHWC', 'HWIO', 'NHWC')
      padding = [(3, 3), (3, 3)]
      return function(x, kernel, (2, 2), padding, dimension_numbers=numbers)

    y, vjp = jax.vjp(conv, jnp.asarray(x), jnp.asarray(kernel))
    return y, vjp(jnp.sin(y))

  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-11),
    outputs(resnet.space_to_depth_conv),
    outputs(jax.lax.conv_general_dilated),
  )


@pytest.mark.slow
def test_a_network_with_space_to_depth_has_the_same_weights_and_function(x64):
  plain = small(dtype=jnp.float64)
  other = small(dtype=jnp.float64, space_to_depth=True)
  assert same_shapes(plain, other)
  variables = networks.random_variables(plain)
  x = networks.images(1, 1, 3, 32, 32, 3, dtype='float64')
  helpers.assert_close(
    networks.apply(other, variables, x, (1,), True),
    networks.apply(plain, variables, x, (1,), True),
    1e-12,
  )


def test_space_to_depth_of_an_odd_side_is_refused():
  with pytest.raises(ConfigError, match='network.space_to_depth=True: .*33x32'):
    model = small(space_to_depth=True)
    jax.eval_shape(
      lambda: model.init(
        jax.random.key(0), jnp.zeros((1, 1, 1, 33, 32, 3)), (0,), True
      )
    )


# ---- Rematerialisation ------------------------------------------------------


def gradients_of(model, variables, x, key):
  def loss(params):
    both = variables | {'params': params}
    logits, stats = models.make_apply_fn(model)(both, x, (1,), True, key)
    return jnp.square(logits).sum(), (logits, stats)

  return jax.jit(jax.grad(loss, has_aux=True))(variables['params'])


@pytest.mark.slow
def test_rematerialisation_changes_no_value():
  fields = dict(drop_path_rate=0.5)
  plain, remat = small(**fields), small(**fields, remat='blocks')
  variables = networks.random_variables(plain)
  assert same_shapes(plain, remat)
  x, key = networks.images(1, 1, 4, 32, 32, 3), jax.random.key(3)
  expected = gradients_of(plain, variables, x, key)
  actual = gradients_of(remat, variables, x, key)
  helpers.assert_close(actual, expected, 1e-5)


@pytest.mark.slow
def test_rematerialisation_keeps_less_for_the_backward_pass():
  batch = 7
  x = jax.ShapeDtypeStruct((1, 1, batch, 64, 64, 3), jnp.float32)

  def kept_bytes(remat):
    """Of activations, which have an axis of examples."""
    model = small(blocks=(3, 4, 6, 3), bottleneck=True, remat=remat)
    apply_fn = models.make_apply_fn(model)

    def backward_pass(variables, x):
      function = lambda *args: apply_fn(*args, (0,), True)[0]  # noqa: E731
      return jax.vjp(function, variables, x)[1]

    kept = jax.eval_shape(backward_pass, networks.abstract_variables(model), x)
    return sum(
      a.size * a.dtype.itemsize
      for a in jax.tree.leaves(kept)
      if batch in a.shape
    )

  assert 0 < kept_bytes('blocks') < 0.3 * kept_bytes('none')


# ---- Stochastic depth, start ------------------------------------------------


def test_the_rate_of_stochastic_depth_rises_from_block_to_block():
  model = models.create(
    'resnet18',
    {'network.drop_path_rate': 0.7},
    num_classes=10,
    num_routes=1,
  )
  rates = []

  def record(next_function, args, kwargs, context):
    if isinstance(context.module, stochastic.DropPath):
      rates.append(context.module.rate)
    return next_function(*args, **kwargs)

  with nn.intercept_methods(record):
    networks.abstract_variables(model)
  np.testing.assert_allclose(rates, np.linspace(0, 0.7, 8))


def test_a_dropped_branch_leaves_the_shortcut():
  layout = Layout(groups=1, routes=(0,))
  block = resnet.Block(
    width=4,
    stride=1,
    bottleneck=False,
    avg_shortcut=False,
    se_ratio=0.0,
    drop_path_rate=1 - 1e-6,
    conv=network.conv,
    norm=functools.partial(RoutedBatchNorm, num_routes=1),
  )
  x = networks.images(3, 8, 8, 4)
  variables = jax.tree.map(
    lambda leaf: leaf + 0.5, block.init(jax.random.key(0), x, layout, False)
  )
  rngs = {stochastic.STREAM: jax.random.key(0)}
  dropped = block.apply(variables, x, layout, False, rngs=rngs)
  np.testing.assert_array_equal(dropped, nn.relu(x))
  assert np.abs(block.apply(variables, x, layout, False) - dropped).max() > 0.1


def test_initial_weights():
  model = small(width=16, num_classes=100)
  image = jnp.zeros((1, 2, 1, 8, 8, 3))
  init = jax.jit(lambda key: model.init(key, image, (0, 1), True))
  variables = init(jax.random.key(0))
  for path, leaf in jax.tree_util.tree_leaves_with_path(variables['params']):
    path = path_name(path)
    if path == 'head/kernel':
      assert leaf.std() == pytest.approx(0.01, rel=0.05)
    elif path.endswith('kernel'):
      # He, over the fan out: k * k * output channels.
      std = np.sqrt(2 / (np.prod(leaf.shape[:2]) * leaf.shape[3]))
      assert leaf.std() == pytest.approx(std, rel=4 / np.sqrt(leaf.size)), path
    else:
      one = path.endswith('scale') and 'norm2' not in path
      np.testing.assert_array_equal(leaf, float(one), path)
