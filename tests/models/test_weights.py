"""Weights in and out: names, layouts, rows, files, and what is refused."""

import json
import re
import struct

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
from references import formula, make

from conadv_jax import models
from conadv_jax.base.errors import ConfigError
from conadv_jax.models import resnet, weights

EXCHANGED = [name for name, e in models.MODELS.items() if e.timm_module]
# Names of resnet18 on few channels: what is checked here does not need more.
MODEL = resnet.resnet18(width=4, num_classes=5, num_routes=3)


def random_arrays():
  """Variables of MODEL, no two numbers alike."""
  shapes = networks.abstract_variables(MODEL)
  leaves, treedef = jax.tree.flatten(shapes)
  arrays = [
    formula.uniform(f'leaf {i}', leaf.shape).astype(np.float32)
    for i, leaf in enumerate(leaves)
  ]
  return jax.tree.unflatten(treedef, arrays)


def state_dict_of(variables, route=0):
  return weights.to_state_dict(
    'resnet18', variables['params'], variables['batch_stats'], route
  )


def assert_same_bytes(actual, expected):
  assert actual.keys() == expected.keys()
  for key, value in expected.items():
    value = np.asarray(value)
    assert actual[key].dtype == value.dtype, key
    assert actual[key].shape == value.shape, key
    assert actual[key].tobytes() == value.tobytes(), key


# ---- Layout and rows --------------------------------------------------------


def test_names_and_layouts_by_hand():
  variables = random_arrays()
  params, stats = variables['params'], variables['batch_stats']
  ours = state_dict_of(variables, route=1)
  kernel = params['stage2_block1']['conv1']['kernel']
  assert kernel.shape == (3, 3, 4, 8)
  for o, i, h, w in [(0, 0, 0, 0), (7, 2, 1, 0), (3, 1, 0, 2)]:
    assert ours['layer2.0.conv1.weight'][o, i, h, w] == kernel[h, w, i, o]
  head = params['head']['kernel']
  assert ours['fc.weight'][4, 31] == head[31, 4]
  pairs = {
    'bn1.weight': params['stem_norm']['scale'][1],
    'bn1.running_mean': stats['stem_norm']['mean'][1],
    'layer2.0.downsample.1.bias': params['stage2_block1']['norm_shortcut'][
      'bias'
    ][1],
    'layer4.1.bn2.running_var': stats['stage4_block2']['norm2']['var'][1],
    'fc.bias': params['head']['bias'],
  }
  for key, expected in pairs.items():
    np.testing.assert_array_equal(ours[key], expected)
  count = ours['layer1.0.bn1.num_batches_tracked']
  assert (count.shape, count.dtype, count) == ((), np.int64, 0)


@pytest.mark.parametrize('route', [0, 2])
def test_there_and_back_is_byte_equal_on_every_route(route):
  state_dict = state_dict_of(random_arrays(), route)
  shapes = networks.abstract_variables(MODEL)
  variables = weights.from_state_dict(state_dict, 'resnet18', shapes)
  for row in range(3):
    assert_same_bytes(state_dict_of(variables, row), state_dict)


def test_back_and_there_sets_the_chosen_routes_only():
  before = random_arrays()
  other = jax.tree.map(np.negative, before)
  after = weights.from_state_dict(
    state_dict_of(other, 0), 'resnet18', before, routes=[2]
  )
  assert jax.tree.structure(after) == jax.tree.structure(before)
  for row in (0, 1):
    kept, old = state_dict_of(after, row), state_dict_of(before, row)
    for key in old:
      in_norm = 'bn' in key or 'downsample.1' in key
      expected = old[key] if in_norm else -old[key]
      np.testing.assert_array_equal(kept[key], expected, key)
  assert_same_bytes(state_dict_of(after, 2), state_dict_of(other, 0))


@pytest.mark.parametrize('dtype', [np.float16, jnp.bfloat16])
def test_half_precision_weights_take_the_type_of_the_network(dtype, tmp_path):
  half = {
    key: value.astype(dtype)
    for key, value in state_dict_of(random_arrays()).items()
  }
  weights.save(tmp_path / 'half.safetensors', half)
  state_dict = weights.load(tmp_path / 'half.safetensors')
  assert_same_bytes(state_dict, half)
  shapes = networks.abstract_variables(MODEL)
  variables = weights.from_state_dict(state_dict, 'resnet18', shapes)
  assert {x.dtype for x in jax.tree.leaves(variables)} == {np.dtype('float32')}


@pytest.mark.parametrize('train', [False, True])
@pytest.mark.parametrize('jitted', [False, True])
@pytest.mark.slow
def test_loaded_weights_can_be_applied_as_they_are(train, jitted):
  """They are NumPy arrays, which lack what a traced index needs."""
  shapes = networks.abstract_variables(MODEL)
  variables = weights.from_state_dict(
    state_dict_of(networks.random_variables(MODEL)), 'resnet18', shapes
  )
  apply_fn = models.make_apply_fn(MODEL)
  x = networks.images(1, 2, 2, 32, 32, 3)

  def call(variables):
    return apply_fn(variables, x, (0, 2), train)

  expected = jax.jit(call)(jax.tree.map(jnp.asarray, variables))
  # As constants of a program, and one operation after the other.
  actual = jax.jit(lambda: call(variables))() if jitted else call(variables)
  for a, e in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
    assert networks.relative_error(a, e) < 1e-3


# ---- What does not fit ------------------------------------------------------


def test_missing_unexpected_and_misshaped_names_are_listed():
  state_dict = state_dict_of(random_arrays())
  del state_dict['layer1.0.conv1.weight']
  state_dict['layer1.0.conv9.weight'] = np.zeros(3)
  state_dict['fc.weight'] = np.zeros((1000, 32))
  shapes = networks.abstract_variables(MODEL)
  with pytest.raises(ConfigError) as info:
    weights.from_state_dict(state_dict, 'resnet18', shapes)
  assert str(info.value).splitlines() == [
    "the weights are not those of model 'resnet18':",
    '  missing: layer1.0.conv1.weight',
    '  unexpected: layer1.0.conv9.weight',
    '  of another shape: fc.weight (1000, 32), not (5, 32)',
  ]


def test_a_long_list_is_cut():
  shapes = networks.abstract_variables(MODEL)
  with pytest.raises(ConfigError, match=r'missing: (\S+; ){4}\S+ and 97 more'):
    weights.from_state_dict({}, 'resnet18', shapes)


def test_counts_of_batches_may_be_missing_or_not_zero():
  state_dict = state_dict_of(random_arrays())
  counts = [key for key in state_dict if key.endswith('num_batches_tracked')]
  assert len(counts) == 20
  state_dict[counts[0]] = np.array(7)
  for key in counts[1:]:
    del state_dict[key]
  shapes = networks.abstract_variables(MODEL)
  variables = weights.from_state_dict(state_dict, 'resnet18', shapes)
  assert state_dict_of(variables)[counts[0]] == 0


def test_a_network_that_timm_lacks_is_refused():
  with pytest.raises(ConfigError, match="model='resnet8': .*resnet18"):
    weights.to_state_dict('resnet8', {}, {}, 0)


# ---- Files ------------------------------------------------------------------


def test_a_file_gives_back_what_was_saved(tmp_path):
  path = str(tmp_path / 'weights.safetensors')
  state_dict = state_dict_of(random_arrays())
  weights.save(path, state_dict, {'method': 'conadv'})
  assert_same_bytes(weights.load(path), state_dict)


@pytest.mark.parametrize('content', [b'', b'not a safetensors file', None])
def test_a_file_that_is_none_is_refused(tmp_path, content):
  path = tmp_path / 'weights.safetensors'
  if content is not None:
    path.write_bytes(content)
  with pytest.raises(ConfigError, match=re.escape(str(path))):
    weights.load(str(path))


def test_a_type_that_no_network_has_is_refused(tmp_path):
  """As of a quantized file, which the reader for NumPy answers by KeyError."""
  header = {'w': {'dtype': 'F8_E4M3', 'shape': [2], 'data_offsets': [0, 2]}}
  text = json.dumps(header).encode()
  path = tmp_path / 'weights.safetensors'
  path.write_bytes(struct.pack('<Q', len(text)) + text + bytes(2))
  with pytest.raises(ConfigError, match='w is of type F8_E4M3; save it as'):
    weights.load(path)


# ---- timm -------------------------------------------------------------------


@pytest.mark.parity
@pytest.mark.parametrize('name', EXCHANGED)
def test_from_timm_and_back_is_byte_equal(name, tmp_path):
  import safetensors.torch

  theirs = make.timm_model(name)
  path = str(tmp_path / 'theirs.safetensors')
  safetensors.torch.save_file(theirs.state_dict(), path)
  model = models.create(name, num_classes=1000, num_routes=2)
  variables = weights.from_state_dict(
    weights.load(path), name, networks.abstract_variables(model)
  )
  ours = weights.to_state_dict(
    name, variables['params'], variables['batch_stats'], route=1
  )
  expected = {k: v.numpy() for k, v in theirs.state_dict().items()}
  assert_same_bytes(ours, expected)
  weights.save(path, ours)
  theirs.load_state_dict(safetensors.torch.load_file(path), strict=True)
