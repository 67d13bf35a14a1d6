"""Convolutions for a CPU equal those of jax.lax, and are them elsewhere."""

import functools

import helpers
import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from conadv_jax import models
from conadv_jax.models import efficientnet, layers, network, resnet

NHWC = ('NHWC', 'HWIO', 'NHWC')
OWN = jax.lax.conv_general_dilated
FAST = layers.conv_on_cpu


def conv(fn, stride=1, padding='SAME', groups=1):
  """`fn` as a function of images and kernel."""
  return functools.partial(
    fn,
    window_strides=(stride, stride),
    padding=padding,
    dimension_numbers=NHWC,
    feature_group_count=groups,
  )


def normal(seed, *shape, dtype=np.float64):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.standard_normal(shape), dtype)


def primitives(fn, *args):
  return {e.primitive.name for e in jax.make_jaxpr(fn)(*args).eqns}


# Name: (shape of x, shape of w, stride, padding, groups) of each form.
FORMS = {
  'depthwise': ((3, 5, 4, 6), (3, 3, 1, 6), 1, 'SAME', 6),
  'depthwise, even side, stride 2': ((2, 6, 6, 3), (3, 3, 1, 3), 2, 'SAME', 3),
  'depthwise, valid': ((2, 6, 5, 3), (3, 2, 1, 3), 2, 'VALID', 3),
  'groups': ((2, 5, 5, 6), (3, 3, 3, 4), 2, [(1, 1), (1, 1)], 2),
  'groups of one channel': ((2, 5, 4, 3), (3, 3, 1, 6), 1, 'SAME', 3),
  '1x1': ((2, 7, 5, 3), (1, 1, 3, 4), 1, 'SAME', 1),
  '1x1, stride 2': ((2, 7, 6, 3), (1, 1, 3, 4), 2, [(0, 0), (0, 0)], 1),
  '2 px': ((2, 2, 2, 3), (3, 3, 3, 16), 1, 'SAME', 1),
  '4 to 2 px': ((2, 4, 4, 3), (3, 3, 3, 16), 2, [(1, 1), (1, 1)], 1),
  '2 px, many images': ((8, 2, 2, 3), (3, 3, 3, 4), 1, 'SAME', 1),
  '3x2 px, stride 2': ((9, 3, 2, 2), (3, 3, 2, 4), 2, [(1, 1), (0, 1)], 1),
  '2x3 px, valid': ((2, 2, 3, 2), (2, 3, 2, 3), 1, 'VALID', 1),
  '1 px': ((2, 1, 1, 3), (3, 3, 3, 4), 1, 'SAME', 1),
  '1 px, even kernel': ((2, 1, 1, 3), (2, 2, 3, 4), 2, 'SAME', 1),
  '4 px, many features': ((2, 4, 4, 2), (3, 3, 2, 64), 1, 'SAME', 1),
}


def arrays(name, dtype=np.float64):
  x_shape, w_shape, *options = FORMS[name]
  x = normal(1, *x_shape, dtype=dtype)
  return x, normal(2, *w_shape, dtype=dtype), options


def derivatives(fn):
  """Value; first derivatives by both modes; second ones in every order."""

  def loss(x, w):
    return jnp.sum(jnp.tanh(fn(x, w)) ** 2)

  grad = jax.grad(loss, (0, 1))
  return jax.jit(
    lambda *args: {
      'value': fn(*args),
      'forward': jax.jvp(fn, args, args),
      'reverse': jax.grad(loss, (0, 1))(*args),
      'forward over reverse': jax.jvp(grad, args, args)[1],
      'reverse over forward': jax.grad(
        lambda *a: jax.jvp(loss, a, a)[1], (0, 1)
      )(*args),
      'reverse over reverse': jax.grad(
        lambda *a: sum(jnp.vdot(g, g) for g in grad(*a)), (0, 1)
      )(*args),
    }
  )


# ---- The numbers -----------------------------------------------------------


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize('name', FORMS)
def test_values_and_derivatives_are_those_of_lax(name):
  x, w, options = arrays(name)
  # The form under test, not `jax.lax`'s own that would pass anyway.
  assert primitives(conv(FAST, *options), x, w) != {'conv_general_dilated'}, (
    'takes no other form'
  )
  helpers.assert_close(
    derivatives(conv(FAST, *options))(x, w),
    derivatives(conv(OWN, *options))(x, w),
    1e-12,
  )


def test_a_depthwise_convolution_by_hand():
  x = jnp.array([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]])[None, None]
  w = jnp.array([[1.0, 1.0], [10.0, 0.0], [100.0, 0.0]])[None, :, None]
  g = jnp.array([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0]])[None, None]
  y, vjp = jax.vjp(conv(FAST, groups=2), x, w)
  dx, dw = vjp(g)
  # Channel 0: zeros around 1, 2, 3. Channel 1: the left neighbour.
  np.testing.assert_array_equal(y[0, 0], [[210, 0], [321, 10], [32, 20]])
  np.testing.assert_array_equal(dx[0, 0], [[10, 1], [102, 0], [20, 0]])
  np.testing.assert_array_equal(dw[0, :, 0], [[4, 10], [7, 20], [2, 30]])


@pytest.mark.parametrize('groups', (1, 2))
def test_sums_of_bfloat16_are_in_float32(groups):
  """1200 ones: in bfloat16 the sum would stay at 256."""
  x = jnp.ones((300, 2, 2, 2), jnp.bfloat16)
  w = jnp.ones((1, 1, 2 // groups, 2), jnp.bfloat16)
  y, vjp = jax.vjp(jax.jit(conv(FAST, groups=groups)), x, w)
  dx, dw = vjp(jnp.ones_like(y))
  assert {a.dtype for a in (y, dx, dw)} == {jnp.dtype(jnp.bfloat16)}
  np.testing.assert_array_equal(dw.astype(np.float32), 1200)


# ---- Transformations -------------------------------------------------------

TRANSFORMATIONS = {
  'vmap over images': lambda f: jax.vmap(jax.grad(f, (0, 1)), (0, None)),
  'vmap over kernels': lambda f: jax.vmap(jax.grad(f, (0, 1)), (None, 0)),
  'remat': lambda f: jax.grad(jax.checkpoint(f), (0, 1)),
}


def loss_of_all_forms(fn):
  """4 px depthwise, groups of stride 2, 2 px, 1x1, 1 px: of [w, ...], x."""

  def loss(kernels, x):
    x = jnp.tanh(conv(fn, groups=8)(x, kernels[0]))
    x = jnp.tanh(conv(fn, 2, groups=2)(x, kernels[1]))
    x = jnp.tanh(conv(fn)(x, kernels[2]))
    x = jnp.tanh(conv(fn)(x, kernels[3]))
    return jnp.sum(conv(fn)(x[:, :1, :1], kernels[4]) ** 2)

  return loss


KERNEL_SHAPES = (
  (3, 3, 1, 8),
  (3, 3, 4, 8),
  (3, 3, 8, 16),
  (1, 1, 16, 3),
  (3, 3, 3, 2),
)


def kernels_and_images(count=16, dtype=np.float64):
  kernels = [
    normal(i, *shape, dtype=dtype) for i, shape in enumerate(KERNEL_SHAPES)
  ]
  return kernels, normal(9, count, 4, 4, 8, dtype=dtype)


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize('name', TRANSFORMATIONS)
def test_every_transformation_is_that_of_lax(name):
  kernels, x = kernels_and_images(2)
  if name == 'vmap over images':
    x = jnp.stack([x, 2 * x])
  if name == 'vmap over kernels':
    kernels = [jnp.stack([w, 2 * w]) for w in kernels]

  def run(fn):
    loss = loss_of_all_forms(fn)
    transform = TRANSFORMATIONS[name](lambda x, w: loss(w, x))
    return jax.jit(transform)(x, kernels)

  helpers.assert_close(run(FAST), run(OWN), 1e-12)


@pytest.mark.usefixtures('x64')
def test_shard_map_checks_it_and_gives_the_same():
  mesh = Mesh(np.array(jax.devices()), 'data', axis_types=(AxisType.Auto,))
  kernels, x = kernels_and_images()

  def per_device(kernels, x):
    own = jax.lax.pcast(kernels, 'data', to='varying')
    grads, dx = jax.grad(loss_of_all_forms(FAST), (0, 1))(own, x)
    return jax.lax.psum(grads, 'data'), dx

  sharded = jax.jit(
    jax.shard_map(
      per_device,
      mesh=mesh,
      in_specs=(P(), P('data')),
      out_specs=(P(), P('data')),
      check_vma=True,
    )
  )
  helpers.assert_close(
    sharded(kernels, x),
    jax.grad(loss_of_all_forms(OWN), (0, 1))(kernels, x),
    1e-12,
  )


@pytest.mark.usefixtures('x64')
def test_the_partitioner_sums_once():
  """Under jit alone, images split over devices: one all-reduce."""
  mesh = Mesh(np.array(jax.devices()), 'data', axis_types=(AxisType.Auto,))
  kernels, x = kernels_and_images()
  shardings = [jax.NamedSharding(mesh, spec) for spec in (P(), P('data'))]
  step = jax.jit(
    jax.grad(loss_of_all_forms(FAST), (0, 1)),
    in_shardings=tuple(shardings),
    out_shardings=tuple(shardings),
  )
  hlo = step.lower(kernels, x).compile().as_text()
  assert [i.kind for i in helpers.collectives(hlo)] == ['all-reduce']
  expected = jax.grad(loss_of_all_forms(OWN), (0, 1))(kernels, x)
  helpers.assert_close(step(kernels, x), expected, 1e-12)


def test_the_number_of_images_may_be_symbolic():
  kernels, x = kernels_and_images(3, np.float32)
  (n,) = jax.export.symbolic_shape('n')
  images = jax.ShapeDtypeStruct((n, *x.shape[1:]), x.dtype)
  loss = jax.jit(functools.partial(loss_of_all_forms(FAST), kernels))
  exported = jax.export.export(loss, platforms=('cpu',))(images)
  np.testing.assert_allclose(exported.call(x), loss(x), 1e-5)
  # Of a side that is not known the form is that of jax.lax.
  images = jax.ShapeDtypeStruct((1, n, n, 8), x.dtype)
  form = jax.make_jaxpr(conv(FAST, padding='VALID'))
  (equation,) = form(images, jnp.ones((1, 1, 8, 8))).eqns
  assert equation.primitive.name == 'conv_general_dilated'


# ---- Where it is jax.lax's own ---------------------------------------------

IMAGES = normal(1, 2, 5, 5, 4, dtype=np.float32)
KERNEL = normal(2, 3, 3, 1, 4, dtype=np.float32)
DENSE = normal(2, 3, 3, 4, 4, dtype=np.float32)
POINTWISE = normal(2, 1, 1, 4, 4, dtype=np.float32)
DEPTHWISE = {'dimension_numbers': NHWC, 'feature_group_count': 4}


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize(
  ('x', 'w', 'options'),
  (
    (IMAGES, DENSE, {'dimension_numbers': NHWC}),
    (IMAGES, KERNEL, DEPTHWISE | {'rhs_dilation': (2, 1)}),
    (
      IMAGES,
      KERNEL,
      DEPTHWISE | {'lhs_dilation': (1, 2), 'padding': [(1, 1), (1, 1)]},
    ),
    (IMAGES, KERNEL, DEPTHWISE | {'preferred_element_type': np.float64}),
    (IMAGES.transpose(0, 3, 1, 2), POINTWISE.transpose(3, 2, 0, 1), {}),
    (IMAGES.astype(int), KERNEL.astype(int), DEPTHWISE),
  ),
)
def test_other_convolutions_are_those_of_lax_to_the_operation(x, w, options):
  options = {'window_strides': (1, 1), 'padding': 'SAME'} | options
  own, fast = (
    jax.make_jaxpr(functools.partial(fn, **options))(x, w) for fn in (OWN, FAST)
  )
  assert str(own) == str(fast)


@pytest.mark.parametrize('platform', ('tpu', 'cuda', 'rocm', 'gpu', ''))
def test_elsewhere_it_is_the_function_of_lax(platform):
  assert layers.convolution(platform) is OWN
  assert layers.convolution('cpu') is FAST


NETWORKS = {
  'resnet': functools.partial(
    resnet.ResNet, blocks=(1, 1), bottleneck=True, width=8, se_ratio=0.25
  ),
  'efficientnet': functools.partial(
    efficientnet.EfficientNet,
    width_factor=0.25,
    stages=(efficientnet.Stage(2, 32, 5, 2, 6),),
  ),
}


def program(name, platform, lowered_for):
  """StableHLO of a gradient, lowered for other devices than those here."""
  model = NETWORKS[name](num_classes=3, platform=platform)
  variables = networks.abstract_variables(model, 32)
  x = jax.ShapeDtypeStruct((1, 1, 2, 32, 32, 3), jnp.float32)

  def loss(params, stats, x):
    both = {'params': params, 'batch_stats': stats}
    return models.make_apply_fn(model)(both, x, (0,), True)[0].sum()

  args = variables['params'], variables['batch_stats'], x
  traced = jax.jit(jax.grad(loss)).trace(*args)
  return traced.lower(lowering_platforms=(lowered_for,)).as_text()


@pytest.mark.parametrize('name', NETWORKS)
def test_the_program_for_a_tpu_is_that_of_lax_to_the_byte(monkeypatch, name):
  for_tpu = program(name, 'tpu', 'tpu')
  assert program(name, 'cpu', 'tpu') != for_tpu
  monkeypatch.setattr(network.layers, 'convolution', lambda platform: OWN)
  assert program(name, 'cpu', 'tpu') == for_tpu
