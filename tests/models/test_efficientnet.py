"""EfficientNets: equal to timm's, in every way of computing them."""

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

from conadv_jax import experiment, models
from conadv_jax.method.optim import path_name
from conadv_jax.method.state import copied
from conadv_jax.models import efficientnet, network, stochastic
from conadv_jax.models.efficientnet import Stage

NAMES = [f'efficientnet_b{i}' for i in range(5)]
STORED = json.loads(make.FILE.read_text())
# float32 rounding through up to 5 * 61 layers; measured: below 2e-6.
TOLERANCE = 1e-5

tiny_net = functools.partial(
  efficientnet.EfficientNet,
  width_factor=0.25,
  stages=(Stage(1, 32, 3, 1, 1), Stage(2, 32, 5, 2, 2)),
)


def tiny(**kwargs):
  """Three blocks of 8 channels; the first and the last have a shortcut."""
  return tiny_net(**(dict(num_classes=10, num_routes=2) | kwargs))


# ---- timm -------------------------------------------------------------------


def test_logits_of_b0_equal_the_stored_ones_of_timm():
  name = 'efficientnet_b0'
  model = models.create(name, num_classes=1000, num_routes=1)
  x = formula.images(make.IMAGES, make.SIDE_PX)[None, None]
  variables = networks.formula_variables(name, model)
  logits, _ = networks.apply(model, variables, x)
  logits = np.asarray(logits)[0, 0, :, make.CLASSES]
  assert relative_error(logits, np.array(STORED[name])) < TOLERANCE


# Odd and even sides, which are padded differently, in every layer of stride 2.
@pytest.mark.parity
@pytest.mark.parametrize('side_px', [64, 95])
@pytest.mark.parametrize('name', NAMES)
def test_logits_equal_those_of_timm(name, side_px):
  x = formula.images(2, side_px)
  expected = make.timm_logits(make.timm_model(name), x)
  model = models.create(name, num_classes=1000, num_routes=1)
  variables = networks.formula_variables(name, model)
  logits, _ = networks.apply(model, variables, x[None, None])
  assert relative_error(np.asarray(logits)[0, 0], expected) < TOLERANCE
  # The images matter to them.
  assert relative_error(expected[0], expected[1]) > 1000 * TOLERANCE


@pytest.mark.parity
@pytest.mark.usefixtures('x64')
def test_training_of_b0_equals_that_of_timm():
  # 40, 20, 10, 5, 3, 2 pixels: even and odd ones before a stride.
  networks.assert_training_equals_timm('efficientnet_b0', 49, side_px=40)


# The first stage does not expand: timm numbers its batch norms differently.
@pytest.mark.parametrize(
  ('ours', 'theirs'),
  [
    ('stem', 'conv_stem'),
    ('stem_norm', 'bn1'),
    ('stage1_block1/conv_depthwise', 'blocks.0.0.conv_dw'),
    ('stage1_block1/norm_depthwise', 'blocks.0.0.bn1'),
    ('stage1_block1/se/reduce', 'blocks.0.0.se.conv_reduce'),
    ('stage1_block2/conv_project', 'blocks.0.1.conv_pw'),
    ('stage1_block2/norm_project', 'blocks.0.1.bn2'),
    ('stage2_block1/conv_expand', 'blocks.1.0.conv_pw'),
    ('stage2_block1/norm_expand', 'blocks.1.0.bn1'),
    ('stage2_block12/norm_depthwise', 'blocks.1.11.bn2'),
    ('stage7_block1/se/expand', 'blocks.6.0.se.conv_expand'),
    ('stage7_block1/conv_project', 'blocks.6.0.conv_pwl'),
    ('stage7_block1/norm_project', 'blocks.6.0.bn3'),
    ('head_conv', 'conv_head'),
    ('head_norm', 'bn2'),
    ('head', 'classifier'),
  ],
)
def test_names_of_timm(ours, theirs):
  assert efficientnet.timm_module(ours) == theirs


# ---- Sizes ------------------------------------------------------------------


@pytest.mark.parametrize(
  ('features', 'factor', 'expected'),
  [
    (32, 1.0, 32),
    (24, 1.1, 24),  # 26.4
    (40, 1.1, 48),  # 44: half way goes up
    (16, 1.4, 24),  # 22.4
    (1280, 1.1, 1408),
    (10, 1.1, 16),  # 11: 8 would be less than 90 %
    (8, 1.1, 8),  # 8.8: 8 is not
    (4, 0.5, 8),  # at least
  ],
)
def test_channels_are_rounded_to_multiples_of_eight(features, factor, expected):
  assert efficientnet.scaled_features(features, factor) == expected


@pytest.mark.parametrize(
  ('name', 'blocks'),
  [
    ('efficientnet_b0', [1, 2, 2, 3, 3, 4, 1]),
    ('efficientnet_b1', [2, 3, 3, 4, 4, 5, 2]),
    pytest.param(
      'efficientnet_b7', [4, 7, 7, 10, 10, 13, 4], marks=pytest.mark.slow
    ),
  ],
)
def test_blocks_of_each_stage(name, blocks):
  model = models.create(name, num_classes=10, num_routes=1)
  params = networks.abstract_variables(model)['params']
  names = [key.split('_')[0] for key in params if '_block' in key]
  assert [names.count(f'stage{i}') for i in range(1, 8)] == blocks


# ---- Padding ----------------------------------------------------------------


@pytest.mark.parametrize(
  ('size', 'pixels', 'expected'),
  [
    # Taps weigh 1, 10, ..., so that each output spells what it saw.
    (3, [1, 2, 3, 4], [321, 43]),  # nothing before, one after
    (3, [1, 2, 3], [210, 32]),  # one before, one after
    (5, [1, 2, 3, 4], [43210, 432]),  # one before, two after
    (5, [1, 2, 3], [32100, 321]),  # two before, two after
  ],
)
def test_a_convolution_of_stride_2_pads_like_tensorflow(size, pixels, expected):
  taps = 10.0 ** np.arange(size)
  kernel = np.outer(taps, taps)[..., None, None]
  x = np.outer(pixels, pixels)[None, ..., None].astype(np.float32)
  layer = network.conv(1, size, 2)
  y = layer.apply({'params': {'kernel': kernel.astype(np.float32)}}, x)
  np.testing.assert_allclose(
    y[0, ..., 0], np.outer(expected, expected), rtol=1e-6
  )


# ---- Views, types and rematerialisation -------------------------------------


def b0(**kwargs):
  return models.create(
    'efficientnet_b0', num_classes=10, num_routes=2, **kwargs
  )


@pytest.mark.slow
@pytest.mark.usefixtures('x64')
def test_views_equal_separate_calls():
  stages = tuple(stage._replace(repeats=1) for stage in efficientnet.STAGES)
  model = tiny(dtype=jnp.float64, stages=stages)
  assert networks.views_error(model, (1,)) < 1e-11


@pytest.mark.slow
def test_views_of_b0_in_bfloat16_equal_separate_calls():
  # Batch norms of 16 examples of one pixel amplify what the order of a sum
  # changes: bfloat16 itself is 0.23 from float32. Measured: 0.12.
  assert networks.views_error(b0(dtype=jnp.bfloat16), (1,), examples=16) < 0.2


@pytest.mark.slow
def test_views_in_bfloat16_equal_separate_calls():
  assert networks.views_error(tiny(dtype=jnp.bfloat16), (1,)) < 0.02


def test_bfloat16_stays_near_float32():
  # Eight bits: 2^-8 per rounding, through 16 layers; measured: 0.01.
  x = networks.images(1, 2, 4, 32, 32, 3)
  variables = networks.random_variables(tiny())
  expected, _ = networks.apply(tiny(), variables, x, (0, 1))
  half = tiny(dtype=jnp.bfloat16)
  logits, _ = networks.apply(half, variables, x, (0, 1))
  assert logits.dtype == jnp.float32
  assert 1e-4 < relative_error(logits, expected) < 0.03


@pytest.mark.slow
@pytest.mark.usefixtures('x64')
def test_rematerialisation_changes_no_value():
  fields = dict(dtype=jnp.float64, dropout_rate=0.5, drop_path_rate=0.9)
  variables = networks.random_variables(tiny(**fields))
  x = networks.images(1, 2, 8, 16, 16, 3, dtype='float64')

  def gradients(model):
    apply_fn = models.make_apply_fn(model)

    def loss_fn(params, x, key):
      both = variables | {'params': params}
      logits, stats = apply_fn(both, x, (0, 1), True, key)
      return jnp.square(logits).sum(), stats

    gradient = jax.jit(jax.grad(loss_fn, (0, 1), has_aux=True))
    keys = jax.random.split(jax.random.key(1))
    return [gradient(variables['params'], x, key) for key in keys]

  one, other = expected = gradients(tiny(**fields))
  helpers.assert_close(
    gradients(tiny(**fields, remat='blocks')), expected, 1e-12
  )
  # The masks, which are drawn again, matter.
  assert relative_error(one[0][1], other[0][1]) > 0.1


@pytest.mark.slow
def test_rematerialisation_keeps_only_the_input_of_a_block():
  batch = 7

  def kept(remat, repeats):
    """Elements of activations: of what has one entry per example."""
    stages = (Stage(1, 32, 3, 1, 1), Stage(repeats, 32, 5, 2, 6))
    model = tiny(stages=stages, remat=remat)
    apply_fn = models.make_apply_fn(model)

    def backward_pass(variables, x):
      def logits(*args):
        return apply_fn(*args, (0,), True)[0]

      return jax.vjp(logits, variables, x)[1]

    variables = networks.abstract_variables(model)
    x = jax.ShapeDtypeStruct((1, 1, batch, 32, 32, 3), jnp.float32)
    leaves = jax.tree.leaves(jax.eval_shape(backward_pass, variables, x))
    return sum(leaf.size for leaf in leaves if batch in leaf.shape)

  block_input = batch * 8 * 8 * 8
  assert kept('blocks', 3) - kept('blocks', 2) == block_input
  assert kept('none', 3) - kept('none', 2) > 10 * block_input


# ---- Dropping ---------------------------------------------------------------


def test_rates_of_stochastic_depth_and_dropout_of_b0():
  rates = {}

  def record(next_function, args, kwargs, context):
    if isinstance(context.module, stochastic.DropPath | stochastic.Dropout):
      rates['/'.join(context.module.path)] = context.module.rate
    return next_function(*args, **kwargs)

  with nn.intercept_methods(record):
    networks.abstract_variables(b0())
  assert rates.pop('dropout') == 0.2
  # By hand: the place of each block that has a shortcut, among the 16.
  places = {
    'stage2_block2': 2,
    'stage3_block2': 4,
    'stage4_block2': 6,
    'stage4_block3': 7,
    'stage5_block2': 9,
    'stage5_block3': 10,
    'stage6_block2': 12,
    'stage6_block3': 13,
    'stage6_block4': 14,
  }
  expected = {f'{k}/drop_path': 0.2 * i / 16 for k, i in places.items()}
  assert rates == pytest.approx(expected)


def test_rates_come_from_the_configuration():
  options = {'network.dropout_rate': 0.4, 'network.drop_path_rate': 0.0}
  model = models.create('efficientnet_b0', options, num_classes=9, num_routes=1)
  assert (model.dropout_rate, model.drop_path_rate) == (0.4, 0.0)


def test_a_dropped_branch_leaves_the_shortcut():
  model = tiny(drop_path_rate=0.75)  # of the last block, 2 / 3 of it: a half
  variables = networks.random_variables(model)
  x = networks.images(1, 1, 16, 16, 16, 3)

  @jax.jit
  def blocks(rngs):
    """Results of the last two blocks."""
    _, captured = model.apply(
      variables,
      x,
      (0,),
      True,
      rngs=rngs,
      capture_intermediates=lambda module, _: 'block' in (module.name or ''),
      mutable=['batch_stats', 'intermediates'],
    )
    captured = captured['intermediates']
    names = ('stage2_block1', 'stage2_block2')
    return [captured[name]['__call__'][0] for name in names]

  start, whole = blocks({})
  same_start, dropped = blocks({stochastic.STREAM: jax.random.key(0)})
  np.testing.assert_array_equal(same_start, start)
  kept = np.abs(dropped - start).max((1, 2, 3)) > 0
  assert 2 < kept.sum() < 14
  np.testing.assert_allclose(
    (dropped - start)[kept], 2 * (whole - start)[kept], rtol=1e-4, atol=1e-5
  )


# ---- Devices ----------------------------------------------------------------


@functools.cache
def trajectory(devices):
  """Two steps in float64 with much dropping: state and metrics of each."""
  config = helpers.make_config(
    {
      'model': 'tiny',
      'method': 'baseline',
      'batch_size': 16,
      'bn_group_size': 8,
      'dtype': 'float64',
    }
  )
  run = experiment.build(config, devices=jax.devices()[:devices])
  step = run.compile_step()
  batches = [
    run.put_batch({k: x.reshape(-1, *x.shape[2:]) for k, x in batch.items()})
    for batch in helpers.random_batches(config, 3, spec=run.spec)
  ]
  state, history = run.init_state(), []
  for batch, following in zip(batches, batches[1:], strict=False):
    state, metrics = step(state, batch, following)
    history.append(jax.device_get((copied(state), metrics)))
  return history


@pytest.mark.slow
@pytest.mark.usefixtures('x64')
def test_a_run_that_drops_does_not_depend_on_the_devices(monkeypatch):
  # The first block never drops.
  build = functools.partial(
    tiny_net,
    dropout_rate=0.5,
    drop_path_rate=0.9,
    stages=(Stage(2, 32, 3, 1, 1),),
  )
  monkeypatch.setitem(models.MODELS, 'tiny', models.Entry(build, 8))
  # Two groups over four devices each.
  # A bias before another batch norm has a gradient of nothing but rounding, so
  # errors are not relative.
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-11),
    trajectory(8),
    trajectory(1),
  )


# ---- Start ------------------------------------------------------------------


def test_initial_weights():
  model = tiny(width_factor=1.0, num_classes=100)
  image = jnp.zeros((1, 1, 1, 32, 32, 3))
  variables = jax.jit(
    lambda: model.init(jax.random.key(0), image, (0,), True)
  )()
  for path, leaf in jax.tree_util.tree_leaves_with_path(variables['params']):
    path = path_name(path)
    if path == 'head/kernel':
      # Uniform within 1 / sqrt(classes).
      assert 0.0999 < jnp.abs(leaf).max() <= 0.1
      assert leaf.std() == pytest.approx(0.1 / np.sqrt(3), rel=0.02)
    elif path.endswith('kernel'):
      # Over the fan out: k * k * output channels per input channel.
      outputs = 1 if 'depthwise' in path else leaf.shape[3]
      std = np.sqrt(2 / (np.prod(leaf.shape[:2]) * outputs))
      assert leaf.std() == pytest.approx(std, rel=4 / np.sqrt(leaf.size)), path
    else:
      np.testing.assert_array_equal(leaf, float(path.endswith('scale')), path)
