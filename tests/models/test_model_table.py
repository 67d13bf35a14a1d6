"""The registry: sizes as published, options, and the printed table."""

import re

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest

from conadv_jax import experiment, models
from conadv_jax.base.errors import ConfigError
from conadv_jax.config import default_config, from_config_dict, to_dict
from conadv_jax.models import __main__, summary

# Nobody published these: our deviations from the CIFAR networks change them.
# Counted by hand for 10 classes in test_models.py; 64 channels and a bias for
# each class more.
# resnet18_cifar: ResNet-18 with a 3x3 stem in place of the 7x7 one.
# vit_tiny: counted in test_vit.py.
UNPUBLISHED = {
  'resnet8': 78_042 + 990 * 65,
  'resnet20': 272_474 + 990 * 65,
  'resnet18_cifar': 11_689_512 - (7**2 - 3**2) * 3 * 64,
  'vit_tiny': 207_946 + 990 * 65,
}


def build(name, options=None, **kwargs):
  fields = dict(num_classes=1000, num_routes=1) | kwargs
  return models.create(name, options, **fields)


@pytest.mark.parametrize('name', models.MODELS)
@pytest.mark.slow
def test_sizes_are_those_published(name):
  entry = models.get(name)
  assert (entry.parameters is None) == (name in UNPUBLISHED)
  model = build(name)
  size = summary.size(model, entry.resolution_px)
  assert size.parameters == (entry.parameters or UNPUBLISHED[name])
  if entry.multiply_adds:
    assert entry.source
    # Papers give two digits, and timm counts batch norms as well.
    published = pytest.approx(entry.multiply_adds, rel=0.05)
    assert size.multiply_adds == published


def test_multiply_adds_of_resnet50_by_hand():
  total = 112**2 * 64 * 7**2 * 3
  channels = 64
  for side, width, blocks in [
    (56, 64, 3),
    (28, 128, 4),
    (14, 256, 6),
    (7, 512, 3),
  ]:
    for block in range(blocks):
      # The first convolution of a stage still works at the side before.
      before = side if block or width == 64 else 2 * side
      total += before**2 * channels * width
      total += side**2 * (9 * width**2 + 4 * width**2)
      total += 0 if block else side**2 * channels * 4 * width
      channels = 4 * width
  total += 2048 * 1000
  assert summary.size(build('resnet50'), 224).multiply_adds == total
  assert total == 4_089_184_256


def test_resnet18_cifar_works_at_the_whole_side():
  total = 32**2 * 64 * 3**2 * 3 + 512 * 1000
  total += 4 * 32**2 * 9 * 64**2
  for side, width in [(16, 128), (8, 256), (4, 512)]:
    before = width // 2
    total += side**2 * width * (9 * before + 3 * 9 * width + before)
  assert summary.size(build('resnet18_cifar'), 32).multiply_adds == total


@pytest.mark.slow
@pytest.mark.parametrize('name', ['resnet50', 'efficientnet_b0'])
def test_multiply_adds_are_about_half_the_flops_that_xla_counts(name):
  model = build(name)
  variables = networks.abstract_variables(model, 224)
  x = jax.ShapeDtypeStruct((1, 1, 1, 224, 224, 3), jnp.float32)
  forward = jax.jit(lambda v, x: model.apply(v, x, (0,), False))
  flops = forward.lower(variables, x).cost_analysis()['flops']
  # Without padding, and with everything elementwise.
  assert flops / 2 == pytest.approx(
    summary.size(model, 224).multiply_adds, rel=0.1
  )


def test_multiply_adds_do_not_depend_on_how_they_are_computed():
  options = {'remat': 'blocks', 'network.space_to_depth': True}
  plain = summary.size(build('resnet18'), 64)
  assert summary.size(build('resnet18', options), 64) == plain


@pytest.mark.parametrize(
  'name',
  ['resnet18', 'resnet50d', pytest.param('seresnet50', marks=pytest.mark.slow)],
)
def test_bfloat16_is_for_activations_only(name):
  model = build(name, num_routes=2, dtype=jnp.bfloat16)
  variables = networks.abstract_variables(model)
  x = jax.ShapeDtypeStruct((2, 2, 3, 32, 32, 3), jnp.float32)
  apply_fn = models.make_apply_fn(model)
  logits, stats = jax.eval_shape(
    lambda v, x: apply_fn(v, x, (0, 1), True), variables, x
  )
  assert logits.shape == (2, 2, 3, 1000)
  leaves = jax.tree.leaves((variables, stats, logits))
  assert {leaf.dtype for leaf in leaves} == {np.dtype('float32')}
  assert jax.tree.structure(stats) == jax.tree.structure(
    variables['batch_stats']
  )


# ---- Options ----------------------------------------------------------------


def load(**fields):
  values = default_config()
  with values.unlocked():
    for name, value in fields.items():
      values.update_from_flattened_dict({name.replace('__', '.'): value})
  return from_config_dict(values)


def test_options_are_off_unless_set():
  config = load()
  assert config.remat == 'none'
  assert vars(config.network) == {
    'space_to_depth': False,
    'drop_path_rate': None,
    'dropout_rate': None,
  }
  again = from_config_dict(to_dict(config))
  assert again == config


@pytest.mark.parametrize(
  'field, value, message',
  [
    ('remat', 'block', "remat 'block'; did you mean 'blocks'"),
    ('network__drop_path_rate', 1.0, r'=1.0: must be in \[0, 1\)'),
    ('network__dropout_rate', -0.1, r'=-0.1: must be in \[0, 1\)'),
  ],
)
def test_options_out_of_range_are_refused(field, value, message):
  with pytest.raises(ConfigError, match=message):
    load(**{field: value})


def test_a_rate_that_is_no_number_is_refused():
  values = to_dict(load())
  values['network']['drop_path_rate'] = 'much'
  with pytest.raises(ConfigError, match="'much': must be float"):
    from_config_dict(values)


def test_options_reach_the_network():
  options = {
    'remat': 'blocks',
    'network.space_to_depth': True,
    'network.drop_path_rate': 0.1,
    'network.dropout_rate': None,
  }
  model = build('resnet50', options)
  fields = (model.remat, model.space_to_depth, model.drop_path_rate)
  assert fields == ('blocks', True, 0.1)
  # A zero is a value like others.
  model = build('efficientnet_b0', {'network.dropout_rate': 0.0})
  assert model.dropout_rate == 0


def test_options_of_a_configuration_reach_the_network():
  fields = dict(model='resnet18', remat='blocks', network__drop_path_rate=0.1)
  model = experiment.build(load(**fields), jax.devices()[:1]).model
  assert (model.remat, model.drop_path_rate) == ('blocks', 0.1)
  fields = dict(model='resnet18', network__dropout_rate=0.1)
  with pytest.raises(ConfigError, match='network.dropout_rate=0.1: model'):
    experiment.build(load(**fields), jax.devices()[:1])


@pytest.mark.parametrize(
  'name, field, value, able',
  [
    ('resnet8', 'remat', 'blocks', 'resnet18'),
    ('resnet8', 'network.drop_path_rate', 0.1, 'resnet18'),
    ('resnet50', 'network.dropout_rate', 0.2, 'efficientnet_b0'),
    ('resnet50d', 'network.space_to_depth', True, 'resnet50'),
    ('efficientnet_b0', 'network.space_to_depth', True, 'resnet50'),
  ],
)
def test_an_option_that_a_network_lacks_is_refused(name, field, value, able):
  pattern = f'{field}={value!r}: model {name!r} has no such .*{able}'
  with pytest.raises(
    ConfigError, match=re.escape(pattern).replace(r'\.\*', '.*')
  ):
    build(name, {field: value})


def test_a_network_gets_only_those_common_fields_that_it_has():
  common_fields = dict(num_routes=2, bn_momentum=0.5, platform='cpu')
  model = build('resnet8', **common_fields)
  assert (model.num_routes, model.bn_momentum) == (2, 0.5)
  assert model.platform == 'cpu'
  model = build('vit_tiny', **common_fields)
  assert not hasattr(model, 'num_routes')
  assert model.platform == 'cpu'
  with pytest.raises(TypeError, match='num_rows'):
    build('vit_tiny', num_rows=2)


# ---- The table --------------------------------------------------------------


def test_the_table_has_a_line_for_every_network(monkeypatch):
  entries = {k: models.MODELS[k] for k in ('resnet8', 'resnet18')}
  monkeypatch.setattr(models, 'MODELS', entries)
  header, *lines = __main__.lines()
  assert [line.split() for line in lines] == [
    ['resnet8', '32', '142,392', '-', '0.013', 'G', '-'],
    ['resnet18', '224', '11,689,512', '11,689,512', *'1.814 G 1.814 G'.split()],
  ]
  assert len({len(line) for line in (header, *lines)}) == 1
