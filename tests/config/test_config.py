"""Settings: what is refused, and with which message."""

import dataclasses
import json

import pytest
from fields import error_of, load, values_of

from conadv_jax import cli
from conadv_jax.base import fields as field_room
from conadv_jax.base.errors import ConfigError
from conadv_jax.config import (
  Config,
  describe,
  flatten,
  from_config_dict,
  to_dict,
)
from conadv_jax.methods import ATTACKS, METHODS, Attack

# ---- Names and types ------------------------------------------------------


@pytest.mark.parametrize(
  'name, nearest',
  [
    ('batchsize', 'batch_size'),
    ('stalenes_steps', 'staleness_steps'),
    ('attack.epsilonn', 'attack.epsilon'),
    ('optimizer.learning_rte', 'optimizer.learning_rate'),
    ('schedule.warmup_steps', 'schedule.warmup_epochs'),
  ],
)
def test_unknown_field_names_the_nearest(name, nearest):
  message = error_of({name: 1})
  assert f"unknown config field '{name}'; did you mean '{nearest}'?" in message


def test_unknown_field_lists_those_of_its_group():
  message = error_of({'attack.epz': 4.0})
  assert "unknown config field 'attack.epz'" in message
  for field in dataclasses.fields(Attack):
    assert f'attack.{field.name}' in message
  assert 'optimizer.' not in message


@pytest.mark.parametrize(
  'name, nearest',
  [('attack.epsilonpx', 'attack.epsilon'), ('btch_size', 'batch_size')],
)
def test_unknown_override_names_the_nearest(name, nearest):
  argv = ['train', '--config=digits', '--workdir=unused']
  message = f"unknown config field '{name}'; did you mean '{nearest}'"
  with pytest.raises(ConfigError, match=message):
    cli.parse_config_file([*argv, f'--config.{name}=3'])


def test_an_override_sets_its_field():
  argv = ['train', '--config=digits', '--workdir=unused']
  values, _ = cli.parse_config_file([*argv, '--config.attack.epsilon=3.0'])
  assert from_config_dict(values).attack.epsilon == 3.0


@pytest.mark.parametrize(
  'name',
  [
    'seed',
    'method',
    'epochs',
    'dataset',
    'dataset.name',
    'attack',
    'attack.norm',
    'eval.route',
    'loss.view_weights',
  ],
)
def test_a_field_of_no_older_run_takes_its_default(name):
  values = to_dict(load())
  *groups, leaf = name.split('.')
  node = values
  for group in groups:
    node = node[group]
  del node[leaf]
  assert from_config_dict(values) == load()


def test_nothing_at_all_is_the_default():
  assert from_config_dict({}) == load()


def test_renamed_fields_are_all_listed_with_their_new_names():
  values = values_of({'attack.epsilon_px': 4.0, 'dataset.num_train': 100})
  values['eval']['pgd_steps'] = 3
  with pytest.raises(ConfigError) as info:
    from_config_dict(values)
  for line in (
    'attack.epsilon_px -> attack.epsilon',
    'eval.pgd_steps -> eval.attack_steps',
    "dataset.num_train -> dataset.train_split, 'train[:N]'",
  ):
    assert line in str(info.value)


def test_a_renamed_override_says_the_new_name():
  argv = ['train', '--config=digits', '--workdir=w']
  old = ['--config.attack.step_size_px=1', '--config.eval.epsilon_px', '2']
  with pytest.raises(ConfigError) as info:
    cli.parse_config_file([*argv, *old])
  assert 'attack.step_size_px -> attack.step_size' in str(info.value)
  assert 'eval.epsilon_px -> eval.epsilon' in str(info.value)


@pytest.mark.parametrize(
  'name, value, kind',
  [
    ('batch_size', 'abc', 'int'),
    ('batch_size', True, 'int'),
    ('batch_size', 320.0, 'int'),
    ('batch_size', None, 'int'),
    ('staleness_steps', '1', 'int'),
    ('epochs', '90', 'float'),
    ('epochs', True, 'float'),
    ('model', 8, 'str'),
    ('dataset.random_flip', 1, 'bool'),
    ('dataset.random_flip', 'False', 'bool'),
    ('attack.targeted', 0, 'bool'),
    ('attack.epsilon', 'abc', 'float'),
    ('optimizer.eps', 'abc', 'float'),
    ('loss.view_weights.adv', 'abc', 'float'),
  ],
)
def test_wrong_type_names_field_value_and_type(name, value, kind):
  message = error_of({name: value})
  assert f'{name}={value!r}: must be {kind}' in message


@pytest.mark.parametrize('name', ['attack', 'dataset', 'loss.view_weights'])
@pytest.mark.parametrize('value', [3, None, 'pgd'])
def test_a_group_must_be_a_group(name, value):
  assert f'{name}={value!r}: must be a ' in error_of({name: value})


def test_an_int_is_a_float_where_one_is_needed():
  epochs = load({'epochs': 90}).epochs
  assert epochs == 90.0 and type(epochs) is float


# ---- Choices and ranges ---------------------------------------------------


@pytest.mark.parametrize(
  'name, value, nearest',
  [
    ('method', 'conavd', 'conadv'),
    ('dtype', 'bfloat61', 'bfloat16'),
    ('attack.preset', 'pdg', 'pgd'),
    ('attack.norm', 'l-inf', 'linf'),
    ('optimizer.name', 'larz', 'lars'),
    ('optimizer.scaling', 'linar', 'linear'),
    ('optimizer.lars_denominator', 'sum_of_norm', 'sum_of_norms'),
    ('schedule.name', 'polynom', 'polynomial'),
    ('eval.attack', 'fsgm', 'fgsm'),
    ('eval.route', 'clear', 'clean'),
  ],
)
def test_unknown_choice_names_the_nearest(name, value, nearest):
  message = error_of({name: value})
  assert f"unknown {name} '{value}'; did you mean '{nearest}'?" in message


@pytest.mark.parametrize(
  'name',
  ['method', 'dtype', 'attack.preset', 'optimizer.name', 'schedule.name'],
)
@pytest.mark.parametrize('value', ['zzz', 3, ['conadv']], ids=str)
def test_a_choice_that_resembles_nothing_is_a_config_error_too(name, value):
  assert name in error_of({name: value})


@pytest.mark.parametrize(
  'name, value',
  [
    ('seed', -1),
    ('seed', 2**31),
    ('batch_size', 0),
    ('batch_size', -64),
    ('epochs', 0.0),
    ('epochs', float('nan')),
    ('epochs', float('inf')),
    ('max_steps', -1),
    ('staleness_steps', -1),
    ('bn_group_size', 0),
    ('bn_momentum', 1.0),
    ('bn_momentum', -0.1),
    ('bn_epsilon', 0.0),
    ('dataset.crop_padding_px', -1),
    ('loss.label_smoothing', 1.0),
    ('loss.label_smoothing', -0.1),
    ('loss.view_weights.adv', -1.0),
    ('attack.epsilon', -1.0),
    ('attack.epsilon', float('nan')),
    ('attack.step_size', -1.0),
    ('attack.steps', -1),
    ('attack.random_start_prob', 1.1),
    ('attack.random_start_prob', -0.1),
    ('optimizer.learning_rate', 0.0),
    ('optimizer.base_batch_size', 0),
    ('optimizer.momentum', 1.0),
    ('optimizer.weight_decay', -1e-4),
    ('optimizer.trust_coefficient', 0.0),
    ('optimizer.beta1', 1.0),
    ('optimizer.beta2', -0.1),
    ('optimizer.decay', 1.0),
    ('optimizer.eps', -1.0),
    ('schedule.warmup_epochs', -1.0),
    ('schedule.power', 0.0),
    ('schedule.end_learning_rate', -1.0),
    ('schedule.decay_rate', 0.0),
    ('schedule.decay_rate', 1.1),
    ('schedule.decay_epochs', 0.0),
    ('ema.decay', 1.0),
    ('checkpoint.every_steps', -1),
    ('checkpoint.keep', 0),
    ('eval.batch_size', 0),
    ('eval.every_steps', -1),
    ('eval.epsilon', -1.0),
    ('eval.attack_steps', 0),
    ('log_every_steps', 0),
    ('attack_stats_every_steps', -1),
    ('max_nonfinite_steps', 0),
  ],
)
def test_value_out_of_range_is_named(name, value):
  assert error_of({name: value}).startswith(f'{name}={value!r}: must be ')


@pytest.mark.parametrize('fields', [
  {'attack.epsilon': 0.0},
  {'bn_momentum': 0.0},
  {'optimizer.momentum': 0.0},
  {'loss.label_smoothing': 0.0},
  {'schedule.warmup_epochs': 59.9},
  {'schedule.end_learning_rate': 4.0},
  {'schedule.name': 'exponential', 'schedule.decay_epochs': 54.9},
  {'seed': 2**31 - 1},
  {'checkpoint.every_steps': 0},
])  # fmt: skip
def test_values_at_the_edge_are_allowed(fields):
  load(fields)


@pytest.mark.parametrize(
  'fields, parts',
  [
    (
      {'batch_size': 100},
      ['batch_size=100', 'bn_group_size=64', 'nearest: batch_size=128'],
    ),
    ({'batch_size': 300, 'bn_group_size': 128}, ['nearest: batch_size=256']),
    ({'batch_size': 10}, ['nearest: batch_size=64']),
    (
      {'method': 'baseline', 'staleness_steps': 1},
      ['staleness_steps=1', "'baseline' perturbs with no gradient"],
    ),
    (
      {'method': 'disadv', 'staleness_steps': 1},
      ['staleness_steps=1', "for more, use 'conadv'"],
    ),
    (
      {'epochs': 4.0, 'schedule.warmup_epochs': 5.0},
      ['schedule.warmup_epochs=5.0', 'must be less than epochs=4.0'],
    ),
    (
      {'epochs': 5.0, 'schedule.warmup_epochs': 5.0},
      ['schedule.warmup_epochs=5.0', 'must be less than epochs=5.0'],
    ),
    (
      {'schedule.end_learning_rate': 4.1},
      ['schedule.end_learning_rate=4.1', 'must not exceed the peak, 4.0'],
    ),
    (
      {
        'schedule.name': 'cosine',
        'schedule.end_learning_rate': 3.0,
        'optimizer.scaling': 'linear',
        'batch_size': 128,
      },
      ['schedule.end_learning_rate=3.0', 'the peak, 2.0 at batch_size=128'],
    ),
    (
      {'schedule.name': 'exponential', 'schedule.decay_epochs': 55.0},
      ['schedule.decay_epochs=55.0', 'must be less than the 55.0 epochs'],
    ),
    (
      {'loss.view_weights': {'clean': 1.0}},
      ['loss.view_weights', "['adv']", 'without a weight'],
    ),
    (
      {'loss.view_weights': {'clean': 0.0, 'aa': 1.0, 'adv': 0.0}},
      ['loss.view_weights', 'must not all be 0'],
    ),
    (
      {'method': 'fast_advprop', 'loss.view_weights': {'clean': 1, 'adv': 0}},
      ["'fast_advprop' has a loss of ['adv'], which must not all be 0"],
    ),
    (
      {'attack.train_mode': False, 'attack.update_batch_stats': True},
      ['attack.update_batch_stats=True', 'attack.train_mode=True'],
    ),
    ({'eval.use_ema': True}, ['eval.use_ema=True', 'set ema.decay > 0']),
    ({'method': 'baseline', 'eval.route': 'adv'}, ['eval.route', 'clean']),
  ],
)  # fmt: skip
def test_settings_that_contradict_each_other_say_so(fields, parts):
  message = error_of(fields)
  for part in parts:
    assert part in message


def test_a_view_weight_of_no_view_is_unknown():
  weights = {'clean': 1.0, 'aa': 1.0, 'adv': 1.0, 'avd': 2.0}
  message = error_of({'loss.view_weights': weights})
  assert 'loss.view_weights' in message and 'avd' in message


# ---- Round trip and arguments ---------------------------------------------


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('preset', sorted(ATTACKS))
def test_round_trip_through_json(method, preset):
  if METHODS[method].attack:
    preset = None
  config = load({'method': method, 'attack.preset': preset})
  text = json.dumps(to_dict(config), allow_nan=False)
  assert from_config_dict(json.loads(text)) == config


def test_a_config_does_not_change():
  config, values = load(), values_of()
  with pytest.raises(dataclasses.FrozenInstanceError):
    config.seed = 1
  before = json.dumps(values)
  from_config_dict(values)
  assert json.dumps(values) == before, 'the input was filled in place'


def test_flatten_and_describe_name_every_field_once():
  config = load()
  flat = flatten(to_dict(config))
  assert flat['attack.epsilon'] == 4.0 and flat['seed'] == 0
  lines = describe(config).splitlines()
  assert [line.split()[0] for line in lines] == list(flat)


# ---- Documentation ---------------------------------------------------------


def undocumented(cls):
  """Fields of `cls` and its groups that say nothing of what they are."""
  for field in dataclasses.fields(cls):
    kind = field_room.kinds(cls)[field.name]
    if dataclasses.is_dataclass(kind):
      yield from undocumented(kind)
    elif len(field.metadata.get('doc', '')) < 5:
      yield cls.prefix + field.name


def test_every_field_says_what_it_is():
  assert not list(undocumented(Config))


def test_the_search_for_undocumented_fields_finds_one():
  @dataclasses.dataclass(frozen=True)
  class Some(field_room.Group):
    prefix = 'some.'
    a: int = field_room.setting(1, 'of something')
    b: int = 1

  assert list(undocumented(Some)) == ['some.b']
