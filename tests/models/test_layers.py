"""Convolutions equal those of jax.lax, and are them elsewhere than on a CPU."""

import functools
import re

import flax.linen as nn
import helpers
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from conadv_jax.models import layers

NHWC = ('NHWC', 'HWIO', 'NHWC')
OWN = jax.lax.conv_general_dilated
FAST = layers.conv_general_dilated


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


def takes_a_fast_way(fn, *args):
  return any('spec' in e.params for e in jax.make_jaxpr(fn)(*args).eqns)


def value_and_gradients(fn, x, w):
  """What `fn` gives, and its gradients for a cotangent of -3 to 3."""
  y, vjp = jax.vjp(jax.jit(fn), x, w)
  g = jnp.arange(y.size).reshape(y.shape) % 7 - 3
  return y, *vjp(g.astype(y.dtype))


# ---- The numbers -----------------------------------------------------------


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


@st.composite
def convolutions(draw):
  """(shape of x, shape of w, stride, padding, groups) of a fast way."""
  side = st.integers(3, 7)
  groups, channels, features, size = draw(
    st.sampled_from(
      [
        (4, 4, 4, 3),  # depthwise
        (3, 3, 6, 2),  # and with two kernels per channel
        (2, 2, 2, 1),
        (2, 6, 4, 3),  # groups
        (1, 3, 5, 1),  # 1x1
      ]
    )
  )
  pads = st.tuples(st.integers(-1, 2), st.integers(0, 2))
  explicit = st.tuples(pads, pads) if groups > 1 else st.nothing()
  return (
    (draw(st.integers(1, 4)), draw(side), draw(side), channels),
    (size, size, channels // groups, features),
    draw(st.integers(1, 3)),
    draw(st.sampled_from(['SAME', 'VALID']) | explicit),
    groups,
  )


@pytest.mark.usefixtures('x64')
@hypothesis.settings(
  max_examples=12,
  deadline=None,
  derandomize=True,
  suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(convolutions(), st.sampled_from([1, 2**20]))
def test_values_and_gradients_are_those_of_lax(monkeypatch, case, chunk_bytes):
  x_shape, w_shape, *options = case
  x, w = normal(1, *x_shape), normal(2, *w_shape)
  monkeypatch.setattr(layers, '_CHUNK_BYTES', chunk_bytes)
  assert takes_a_fast_way(conv(FAST, *options), x, w)
  helpers.assert_close(
    value_and_gradients(conv(FAST, *options), x, w),
    value_and_gradients(conv(OWN, *options), x, w),
    1e-12,
  )


@pytest.mark.parametrize('groups', (1, 2, 8))
def test_float32_is_close_to_float64(groups):
  size = 1 if groups == 1 else 3
  x = normal(1, 4, 9, 9, 8, dtype=np.float32)
  w = normal(2, size, size, 8 // groups, 8, dtype=np.float32)
  actual = value_and_gradients(conv(FAST, groups=groups), x, w)
  with jax.enable_x64(True):
    exact = conv(OWN, groups=groups)
    exact = value_and_gradients(exact, *(np.float64(a) for a in (x, w)))
  helpers.assert_close(actual, exact, 1e-6)


@pytest.mark.parametrize('groups', (1, 2))
def test_sums_of_bfloat16_are_in_float32(monkeypatch, groups):
  """1200 ones, four at a time: in bfloat16 the sum would stay at 512."""
  monkeypatch.setattr(layers, '_CHUNK_BYTES', 1)
  x = jnp.ones((300, 2, 2, 2), jnp.bfloat16)
  w = jnp.ones((1, 1, 2 // groups, 2), jnp.bfloat16)
  y, vjp = jax.vjp(jax.jit(conv(FAST, groups=groups)), x, w)
  dx, dw = vjp(jnp.ones_like(y))
  assert {a.dtype for a in (y, dx, dw)} == {jnp.dtype(jnp.bfloat16)}
  np.testing.assert_array_equal(dw.astype(np.float32), 1200)


# ---- Transformations -------------------------------------------------------


def hvp(f):
  """Forward over reverse, along the arguments themselves."""
  return lambda *args: jax.jvp(jax.grad(f, (0, 1)), args, args)


def scanned(f):
  def grad(x, w):
    def step(total, scale):
      return total + jax.grad(f, 1)(scale * x, w), None

    return jax.lax.scan(step, jnp.zeros_like(w), jnp.arange(1.0, 3.0))[0]

  return grad


TRANSFORMATIONS = {
  'jvp': lambda f: lambda *args: jax.jvp(f, args, args),
  'hvp': hvp,
  'jit of hvp': lambda f: jax.jit(hvp(f)),
  'reverse over forward': lambda f: jax.grad(
    lambda *args: jax.jvp(f, args, args)[1], (0, 1)
  ),
  'reverse over reverse': lambda f: jax.grad(
    lambda *args: sum(jnp.vdot(g, g) for g in jax.grad(f, (0, 1))(*args)),
    (0, 1),
  ),
  'vmap of grad': lambda f: jax.vmap(
    jax.grad(f, (0, 1)), in_axes=(None, 2), axis_size=2
  ),
  'vmap over images': lambda f: jax.vmap(jax.grad(f, (0, 1)), (0, None)),
  'grad of checkpoint': lambda f: jax.grad(jax.checkpoint(f), (0, 1)),
  'scan of grad': scanned,
}


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize('name', TRANSFORMATIONS)
def test_every_derivative_and_transformation_is_that_of_lax(name):
  transform = TRANSFORMATIONS[name]
  x, w = normal(1, 2, 5, 5, 4), normal(2, 3, 3, 1, 4)
  if name == 'vmap of grad':
    w = jnp.stack([w, 2 * w], 2)
  if name == 'vmap over images':
    x = jnp.stack([x, 2 * x])

  def loss(fn):
    # Two, so that a gradient goes through another.
    def f(x, w):
      y = jnp.tanh(conv(fn, stride=2, groups=4)(x, w))
      return jnp.sum(jnp.tanh(conv(fn, groups=4)(y, w)) ** 2)

    return f

  actual = jax.jit(transform(loss(FAST)))(x, w)
  expected = jax.jit(transform(loss(OWN)))(x, w)
  helpers.assert_close(actual, expected, 1e-12)


def test_linen_takes_it():
  def make(fn):
    return nn.Conv(6, (3, 3), feature_group_count=3, conv_general_dilated=fn)

  x = normal(1, 2, 5, 5, 3, dtype=np.float32)
  variables = make(FAST).init(jax.random.key(0), x)
  assert takes_a_fast_way(make(FAST).apply, variables, x)
  helpers.assert_close(
    make(FAST).apply(variables, x), make(OWN).apply(variables, x), 1e-6
  )


# ---- Where it is jax.lax's own ---------------------------------------------

IMAGES = normal(1, 2, 5, 5, 4, dtype=np.float32)
KERNEL = normal(2, 3, 3, 1, 4, dtype=np.float32)
DENSE = normal(2, 3, 3, 4, 4, dtype=np.float32)
POINTWISE = normal(2, 1, 1, 4, 4, dtype=np.float32)
PADDING = [(1, 1), (1, 1)]
DEPTHWISE = {'dimension_numbers': NHWC, 'feature_group_count': 4}


@pytest.mark.parametrize(
  ('x', 'w', 'options'),
  (
    (IMAGES, DENSE, {'dimension_numbers': NHWC}),
    (IMAGES, POINTWISE, {'dimension_numbers': NHWC, 'padding': PADDING}),
    (IMAGES, KERNEL, DEPTHWISE | {'rhs_dilation': (2, 1)}),
    (IMAGES, KERNEL, DEPTHWISE | {'lhs_dilation': (1, 2), 'padding': PADDING}),
    (IMAGES, KERNEL, DEPTHWISE | {'preferred_element_type': np.float64}),
    (IMAGES.transpose(0, 3, 1, 2), POINTWISE.transpose(3, 2, 0, 1), {}),
    (IMAGES[:0], KERNEL, DEPTHWISE),
    (IMAGES.astype(int), KERNEL.astype(int), DEPTHWISE),
  ),
)
@pytest.mark.usefixtures('x64')
def test_other_convolutions_are_those_of_lax_to_the_operation(x, w, options):
  options = {'window_strides': (1, 1), 'padding': 'SAME'} | options
  own, fast = (
    jax.make_jaxpr(functools.partial(fn, **options))(x, w) for fn in (OWN, FAST)
  )
  assert str(own) == str(fast)


def test_shapes_that_do_not_fit_raise_as_in_lax():
  with pytest.raises(ValueError, match='feature_group_count'):
    conv(FAST, groups=3)(IMAGES, KERNEL)


def loss_of_all_ways(fn):
  """5x5 depthwise of stride 2, two groups, 1x1: a loss of [w, w, w] and x."""

  def loss(kernels, x):
    x = jnp.tanh(conv(fn, 2, groups=8)(x, kernels[0]))
    x = jnp.tanh(conv(fn, groups=2)(x, kernels[1]))
    return jnp.sum(conv(fn)(x, kernels[2]) ** 2)

  return jax.jit(jax.value_and_grad(loss, (0, 1)))


KERNEL_SHAPES = ((5, 5, 1, 8), (3, 3, 4, 8), (1, 1, 8, 3))


def abstract(mesh, dtype=np.float32):
  """Kernels on every device, images [32, 16, 16, 8] over all of them."""

  def struct(shape, *spec):
    sharding = NamedSharding(mesh, P(*spec))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

  return list(map(struct, KERNEL_SHAPES)), struct(
    (32, 16, 16, 8), mesh.axis_names
  )


def make_mesh(devices):
  grid = np.array(devices).reshape(-1, 2)
  return Mesh(grid, ('data', 'bn'), axis_types=(AxisType.Auto,) * 2)


@pytest.mark.parametrize('platform', ('tpu', 'cuda', 'rocm'))
def test_elsewhere_the_program_is_that_of_lax_to_the_byte(platform):
  args = abstract(make_mesh(jax.devices()))

  def text(fn, platform):
    traced = loss_of_all_ways(fn).trace(*args)
    return traced.lower(lowering_platforms=(platform,)).as_text()

  assert text(FAST, platform) == text(OWN, platform)
  assert text(FAST, 'cpu') != text(OWN, 'cpu')


@pytest.mark.tpu_aot
@pytest.mark.parametrize('topology', ('v3:2x2', 'v5e:2x2'))
def test_the_tpu_compiler_makes_the_program_of_lax(monkeypatch, topology):
  from jax.experimental import topologies

  monkeypatch.setenv('TPU_SKIP_MDS_QUERY', '1')
  monkeypatch.setenv('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
  devices = topologies.get_topology_desc(
    platform='tpu', topology_name=topology
  ).devices
  args = abstract(make_mesh(devices))

  def text(fn):
    hlo = loss_of_all_ways(fn).lower(*args).compile().as_text()
    assert 'convolution' in hlo
    # Where in the source an instruction comes from: beside it, and in tables.
    hlo = re.sub(r', metadata=\{[^}]*\}', '', hlo)
    return hlo.split('\nFileNames')[0]

  assert text(FAST) == text(OWN)


# ---- Several devices -------------------------------------------------------


@pytest.mark.usefixtures('x64')
def test_a_sharded_batch_needs_one_all_reduce_and_gives_the_same(monkeypatch):
  """Though a device takes its four images one by one."""
  monkeypatch.setattr(layers, '_CHUNK_BYTES', 1)
  mesh = make_mesh(jax.devices())
  kernels, images = abstract(mesh, np.float64)
  step = loss_of_all_ways(FAST).lower(kernels, images).compile()
  hlo = step.as_text()
  assert [i.kind for i in helpers.collectives(hlo)] == ['all-reduce']
  # Forward, input gradient and kernel gradient of the depthwise convolution.
  assert sum(i.kind == 'while' for i in helpers.instructions(hlo)) == 3
  _, (_, dx) = step.output_shardings
  assert dx.is_equivalent_to(images.sharding, 4)

  values = [normal(i, *w.shape) for i, w in enumerate(kernels)]
  x = normal(9, *images.shape)
  actual = step(*jax.device_put((values, x), step.input_shardings[0]))
  helpers.assert_close(actual, loss_of_all_ways(OWN)(values, x), 1e-12)
