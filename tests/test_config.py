"""Settings: what is refused, with which message, and what is filled in."""

import ast
import dataclasses
import importlib.util
import inspect
import io
import json
import pathlib
import tokenize

import helpers
import ml_collections
import pytest

from conadv_jax import cli
from conadv_jax.base.errors import ConfigError
from conadv_jax.config import (
  ATTACK_PRESETS,
  METHODS,
  Attack,
  Config,
  Steps,
  describe,
  flatten,
  from_config_dict,
  parse_args,
  to_dict,
)
from configs import common

ROOT = pathlib.Path(common.__file__).parent.parent
CONFIG_FILES = sorted((ROOT / 'configs').glob('*.py'))
METHODS = sorted(METHODS)


def values_of(fields=None):
  """configs/common.py as nested dicts, with dotted `fields` set."""
  values = common.get_config().to_dict()
  for name, value in (fields or {}).items():
    *groups, leaf = name.split('.')
    node = values
    for group in groups:
      node = node[group]
    node[leaf] = value
  return values


def load(fields=None):
  return from_config_dict(values_of(fields))


def error_of(fields):
  with pytest.raises(ConfigError) as info:
    load(fields)
  return str(info.value)


# ---- Names and types ------------------------------------------------------


@pytest.mark.parametrize(
  'name, nearest',
  [
    ('batchsize', 'batch_size'),
    ('stalenes_steps', 'staleness_steps'),
    ('attack.epsilon', 'attack.epsilon'),
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


# ml_collections loads config files by a method that Python 3.12 drops.
@pytest.mark.filterwarnings('ignore:the load_module:DeprecationWarning')
@pytest.mark.parametrize(
  'name, nearest',
  [('attack.epsilonpx', 'attack.epsilon'), ('btch_size', 'batch_size')],
)
def test_unknown_override_names_the_nearest(name, nearest):
  argv = ['train', f'--config={ROOT}/configs/common.py', '--workdir=unused']
  message = f"unknown config field '{name}'; did you mean '{nearest}'"
  with pytest.raises(ConfigError, match=message):
    cli.parse_config_file([*argv, f'--config.{name}=3'])


@pytest.mark.filterwarnings('ignore:the load_module:DeprecationWarning')
def test_an_override_sets_its_field():
  argv = ['train', f'--config={ROOT}/configs/common.py', '--workdir=unused']
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
    'eval.route',
  ],
)
def test_missing_field_is_named(name):
  values = values_of()
  *groups, leaf = name.split('.')
  node = values
  for group in groups:
    node = node[group]
  del node[leaf]
  with pytest.raises(ConfigError, match=f'missing config fields: {name};'):
    from_config_dict(values)


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
    ('attack.steps', 0),
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
    ('eval.pgd_steps', 0),
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
  {'schedule.warmup_epochs': 60.0},
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
      ['staleness_steps=1', "'baseline' has no adversarial view"],
    ),
    (
      {'method': 'disadv', 'staleness_steps': 1},
      ['staleness_steps=1', "use method 'conadv'"],
    ),
    (
      {'epochs': 4.0, 'schedule.warmup_epochs': 5.0},
      ['schedule.warmup_epochs=5.0', 'epochs=4.0'],
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


# ---- Presets --------------------------------------------------------------


@pytest.mark.parametrize(
  'method, tau', [('baseline', 0), ('disadv', 0), ('conadv', 1)]
)
def test_the_method_fills_the_staleness(method, tau):
  assert load({'method': method}).staleness_steps == tau


def test_an_explicit_staleness_beats_the_methods():
  for tau in (0, 1, 4):
    config = load({'method': 'conadv', 'staleness_steps': tau})
    assert config.staleness_steps == tau


@pytest.mark.parametrize(
  ('flags', 'buckets'), [('none', 0), ('overlap', 1), ('multislice', 1)]
)
def test_flags_say_how_gradients_are_summed_unless_the_field_does(
  flags, buckets
):
  assert load({'xla_flags': flags}).grad_buckets == buckets
  assert load({'xla_flags': flags, 'grad_buckets': 3}).grad_buckets == 3


def test_the_attack_preset_fills_only_what_is_none():
  attack = load({'attack.preset': 'pgd', 'attack.steps': 7}).attack
  assert (attack.steps, attack.step_size) == (7, 1.0)
  assert attack.random_start_prob == 1.0
  # False and 0.0 are values, not gaps.
  attack = load(
    {
      'attack.preset': 'paper',
      'attack.targeted': False,
      'attack.random_start_prob': 0.0,
    }
  ).attack
  assert not attack.targeted and attack.random_start_prob == 0.0


def test_steps_are_sized_by_the_ball_unless_set():
  attack = load({'attack.preset': 'fgsm', 'attack.epsilon': 9.0}).attack
  assert attack.step_size == 9.0
  fields = {'attack.epsilon': 9.0, 'attack.step_size': 2.0}
  assert load(fields).attack.step_size == 2.0
  attack = load({'attack.preset': 'pgd', 'attack.epsilon': 9.0}).attack
  assert attack.step_size == 9.0 / 4


@pytest.mark.parametrize(
  'name, eps', [('lars', 0.0), ('sgd', 0.0), ('lamb', 1e-6), ('rmsprop', 1e-3)]
)
def test_the_optimizer_fills_its_eps(name, eps):
  assert load({'optimizer.name': name}).optimizer.eps == eps
  fields = {'optimizer.name': name, 'optimizer.eps': 0.5}
  assert load(fields).optimizer.eps == 0.5


@pytest.mark.parametrize(
  'method, views, routes, is_adversarial',
  [
    ('baseline', ['clean'], ('clean',), False),
    ('autoaugment', ['aa'], ('clean',), False),
    ('disadv', ['clean', 'adv'], ('clean', 'adv'), True),
    ('conadv', ['clean', 'adv'], ('clean', 'adv'), True),
    ('conadv_aa', ['clean', 'aa', 'adv'], ('clean', 'aa', 'adv'), True),
  ],
)
def test_views_and_routes_of_the_methods(method, views, routes, is_adversarial):
  config = dataclasses.replace(
    load(), method=method, staleness_steps=int('conadv' in method)
  )
  assert [view for view, _ in config.views] == views
  assert config.routes == routes
  assert config.is_adversarial == is_adversarial


def test_view_weights_sum_to_one():
  loss = load({'loss.view_weights': {'clean': 1, 'aa': 2, 'adv': 3}}).loss
  assert loss.weights_of(('clean', 'adv')) == (0.25, 0.75)
  assert sum(loss.weights_of(('clean', 'aa', 'adv'))) == pytest.approx(1)


# ---- Round trip and arguments ---------------------------------------------


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('preset', sorted(ATTACK_PRESETS))
def test_round_trip_through_json(method, preset):
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


def test_arguments_of_a_config_file_are_typed_like_their_defaults():
  defaults = dict(method='conadv', batch_size=320, lr=0.5, flip=False)
  assert parse_args(None, **defaults) == defaults
  assert parse_args('', **defaults) == defaults
  parsed = parse_args('method=disadv,batch_size=64,lr=2,flip=True', **defaults)
  assert parsed == dict(method='disadv', batch_size=64, lr=2.0, flip=True)
  assert type(parsed['lr']) is float
  assert parse_args('flip=false', **defaults)['flip'] is False


@pytest.mark.parametrize(
  'arg, message',
  [
    ('metod=disadv', "config argument 'metod'; did you mean 'method'"),
    ('batch_size', "'batch_size': batch_size needs a int"),
    ('method', "'method': method needs a str"),
    ('batch_size=big', "'batch_size=big': batch_size needs a int"),
    ('batch_size=', "'batch_size=': batch_size needs a int"),
    ('batch_size=1.5', 'needs a int'),
    ('flip=1', "'flip=1': flip needs a bool"),
  ],
)
def test_bad_arguments_of_a_config_file(arg, message):
  defaults = dict(method='conadv', batch_size=320, flip=False)
  with pytest.raises(ConfigError, match=message):
    parse_args(arg, **defaults)


# ---- Steps ----------------------------------------------------------------


def steps_of(num_examples=1_281_167, **fields):
  config = helpers.make_config(
    {'batch_size': 98_304, 'bn_group_size': 96, 'epochs': 90.0}
    | {name.replace('__', '.'): value for name, value in fields.items()}
  )
  return Steps.of(config, num_examples)


def test_imagenet_at_96k_over_90_epochs_is_1173_steps():
  # 1,281,167 * 90 / 98,304 = 1172.94; 41 epochs are 534.34, 2.4 are 31.28.
  steps = steps_of(schedule__warmup_epochs=41.0)
  assert steps == Steps(
    total=1173,
    stop=1173,
    warmup=534,
    decay=31,
    per_epoch=pytest.approx(13.03271),
  )


@pytest.mark.parametrize(
  'max_steps, stop',
  [(0, 1173), (1, 1), (1172, 1172), (1173, 1173), (5000, 1173)],
)
def test_max_steps_stops_early_and_leaves_the_schedule(max_steps, stop):
  steps = steps_of(max_steps=max_steps, schedule__warmup_epochs=41.0)
  assert steps.stop == stop
  assert dataclasses.replace(steps, stop=1173) == steps_of(
    schedule__warmup_epochs=41.0
  )


def test_short_runs_have_at_least_one_step():
  # 10 examples at a batch of 96 are a tenth of a step.
  steps = steps_of(10, batch_size=96, epochs=1.0, schedule__warmup_epochs=1.0)
  assert (steps.total, steps.stop, steps.warmup) == (1, 1, 0)
  assert steps.decay == 1


def test_warmup_is_never_longer_than_the_run():
  steps = steps_of(1000, batch_size=96, epochs=2.0, schedule__warmup_epochs=2.0)
  assert steps.warmup == steps.total == 21


# ---- Config files ---------------------------------------------------------


def read_config(path, method):
  """The ConfigDict of the file at `path` for `method`."""
  spec = importlib.util.spec_from_file_location(f'config_{path.stem}', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if inspect.signature(module.get_config).parameters:
    return module.get_config(f'method={method}')
  values = module.get_config()
  values.method = method
  return values


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('path', CONFIG_FILES, ids=lambda path: path.stem)
def test_every_config_file_loads_for_each_method(path, method):
  values = read_config(path, method)
  assert isinstance(values, ml_collections.ConfigDict)
  assert from_config_dict(values).method == method


@pytest.mark.parametrize('path', CONFIG_FILES, ids=lambda path: path.stem)
def test_every_config_file_has_the_fields_of_common(path):
  values = read_config(path, 'conadv').to_dict()
  assert flatten(values).keys() == flatten(values_of()).keys()


def dataclass_fields(cls, prefix=''):
  """Dotted names of the fields of `cls`, without those that are groups."""
  hints = inspect.get_annotations(cls, eval_str=True)
  for name, kind in hints.items():
    if dataclasses.is_dataclass(kind):
      yield from dataclass_fields(kind, f'{prefix}{name}.')
    else:
      yield prefix + name


def commented_fields(source):
  """Dotted names that `c.name = ...` sets, with a comment in or above it."""
  tokens = tokenize.generate_tokens(io.StringIO(source).readline)
  comments = {
    token.start[0]
    for token in tokens
    if token.type == tokenize.COMMENT and len(token.string) > 4
  }
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Assign):
      name = ast.unparse(node.targets[0])
      above = source.splitlines()[node.lineno - 2].startswith('  #')
      lines = range(node.lineno - above, node.end_lineno + 1)
      if name.startswith('c.') and comments & set(lines):
        yield name.removeprefix('c.')


def test_common_documents_every_field_by_a_comment():
  source = pathlib.Path(common.__file__).read_text(encoding='utf-8')
  documented = list(commented_fields(source))
  assert len(documented) == len(set(documented))
  assert set(dataclass_fields(Config)) <= set(documented)


def test_the_reader_of_comments_finds_a_missing_one():
  source = """if True:
  c.a = 1  # of examples
  c.b = 2
  c.c.d = f(
    3,  # in pixels
  )
  # None = off.
  c.e = 4
  c.f = 5
"""
  assert list(commented_fields(source)) == ['a', 'c.d', 'e']
