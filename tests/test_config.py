"""Settings: what is refused, with which message, and what is filled in."""

import dataclasses
import json
import pathlib

import helpers
import pytest

from conadv_jax import cli
from conadv_jax.base import fields as field_room
from conadv_jax.base.errors import ConfigError
from conadv_jax.config import (
  Config,
  Steps,
  default_config,
  describe,
  flatten,
  from_config_dict,
  notices,
  recipes,
  to_dict,
)
from conadv_jax.config.recipes import parse_args
from conadv_jax.methods import ATTACKS, METHODS, Attack, Method

ROOT = pathlib.Path(__file__).parents[1]


def values_of(fields=None):
  """The defaults as nested dicts, with dotted `fields` set."""
  values = default_config().to_dict()
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


def test_a_method_may_stand_for_an_attack():
  # AdvProp: five steps of 1 grey level in a ball of 4, from a random start.
  attack = load({'method': 'advprop'}).attack
  assert attack == ATTACKS['pgd'].resolved()
  assert (attack.steps, attack.step_size, attack.epsilon) == (5, 1.0, 4.0)
  assert load({'method': 'noise'}).attack == ATTACKS['random_signs']
  assert load({'method': 'disadv'}).attack == ATTACKS['fgsm'].resolved()
  # Its fields may differ, its name may not.
  attack = load({'method': 'advprop', 'attack.steps': 3}).attack
  assert (attack.preset, attack.steps) == ('pgd', 3)
  attack = load({'method': 'fast_advprop'}).attack
  assert (attack.steps, attack.step_size, attack.epsilon) == (1, 1.0, 1.0)
  message = error_of({'method': 'fast_advprop', 'attack.targeted': True})
  assert message.startswith('attack.targeted=True: ') and 'unset' in message
  message = error_of({'method': 'advprop', 'attack.preset': 'fgsm'})
  assert "attack.preset='fgsm': method 'advprop' stands for 'pgd'" in message
  assert "use method 'disadv'" in message


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
  if name != 'sgd':  # which has none
    assert load(fields).optimizer.eps == 0.5


@pytest.mark.parametrize(
  'method, views, fed, routes',
  [
    ('baseline', ['clean'], ('clean',), ('clean',)),
    ('autoaugment', ['aa'], ('aa',), ('clean',)),
    ('disadv', ['clean', 'adv'], ('clean',), ('clean', 'adv')),
    ('conadv', ['clean', 'adv'], ('clean',), ('clean', 'adv')),
    (
      'conadv_aa', ['clean', 'aa', 'adv'], ('clean', 'aa'),
      ('clean', 'aa', 'adv'),
    ),
    ('conadv_shared_bn', ['clean', 'adv'], ('clean',), ('clean',)),
    ('adv_only', ['adv'], ('clean',), ('clean',)),
    ('conadv_aa_only', ['aa', 'adv'], ('aa', 'clean'), ('clean', 'adv')),
    (
      'conadv_from_aa', ['clean', 'aa', 'adv'], ('clean', 'aa'),
      ('clean', 'aa', 'adv'),
    ),
  ],
)  # fmt: skip
def test_views_and_routes_of_the_methods(method, views, fed, routes):
  config = load({'method': method})
  assert [view for view, _ in config.views] == views
  assert config.fed_views == fed
  assert config.routes == routes
  assert config.is_adversarial == ('adv' in views)
  for view, route in config.views:
    assert config.routes[config.route_of(view)] == route
  assert config.eval.route == 'clean'


@pytest.mark.parametrize('tau', [0, 1, 2])
def test_a_method_of_your_own_needs_nothing_else(tau, monkeypatch):
  views = (('adv', 'b'), ('aa', 'a'), ('mine', 'b'))
  monkeypatch.setitem(METHODS, 'own', Method(views, tau, attacked='mine'))
  config = load({'method': 'own'})
  assert config.staleness_steps == tau and config.routes == ('b', 'a')
  assert config.fed_views == ('aa', 'mine') and config.eval.route == 'b'
  assert config.loss.weights_of({'mine': 1, 'adv': 1}) == (0.5, 0.5)
  assert from_config_dict(to_dict(config)) == config


PAIR = (('clean', 'clean'), ('adv', 'adv'))
ONE_ROUTE = (('clean', 'clean'), ('adv', 'clean'))


@pytest.mark.parametrize(
  'args, message',
  [
    (((),), 'needs views'),
    (((('aa', 'a'), ('aa', 'b')), None), 'each of them once'),
    (((('adv', 'adv'),),), "needs a number with a view 'adv'"),
    (((('clean', 'clean'),), 1), 'else None'),
    (((('clean', 'clean'),), None, 'clean', None, 5), 'adv_every=5: needs'),
    ((PAIR, 1, 'clean', None, 5), 'with staleness_steps=0'),
    ((PAIR, 0, 'clean', None, 1), 'adv_every=1: needs 2'),
    ((ONE_ROUTE, 0, 'clean', None, 5), 'on routes of their own'),
    (((('adv', 'adv'),), 1, 'adv'), 'attack another view'),
  ],
)
def test_a_method_that_cannot_be_is_refused(args, message):
  with pytest.raises(ConfigError, match=message):
    Method(*args)


def test_an_attack_of_your_own_trains_and_evaluates(monkeypatch):
  attack = Attack('own', rule='momentum', steps=3, epsilon=8.0)
  monkeypatch.setitem(ATTACKS, 'own', attack)
  config = load({'attack.preset': 'own', 'eval.attack': 'none, own'})
  assert config.attack == attack.resolved()
  assert (config.attack.rule, config.attack.step_size) == ('momentum', 2.0)
  assert config.eval.attacks == ('none', 'own')


def test_eval_attacks_by_name():
  for text, names in {
    'none': (), 'all': ('fgsm', 'pgd'), 'paper': ('paper',),
    'pgd, fgsm': ('pgd', 'fgsm'),
  }.items():  # fmt: skip
    assert load({'eval.attack': text}).eval.attacks == names


@pytest.mark.parametrize(
  'name', ['attack.epsilon', 'attack.step_size', 'eval.epsilon']
)
def test_a_fraction_of_a_grey_level_is_warned_of_once(name, capsys):
  notices._warn_of_fraction.cache_clear()
  for _ in range(2):
    load({name: 0.05})
  lines = capsys.readouterr().err.splitlines()
  assert [line for line in lines if f'{name}=0.05 is read as grey' in line]
  assert len(lines) == 1, lines


def test_a_step_that_follows_a_whole_epsilon_is_not_warned_of(capsys):
  notices._warn_of_fraction.cache_clear()
  config = load({'attack.preset': 'pgd', 'attack.epsilon': 1.0})
  from_config_dict(to_dict(config))
  assert config.attack.step_size == 0.25
  assert not capsys.readouterr().err


def test_view_weights_sum_to_one():
  loss = load({'loss.view_weights': {'clean': 1, 'aa': 2, 'adv': 3}}).loss
  assert loss.weights_of({'clean': 1, 'adv': 1}) == (0.25, 0.75)
  assert loss.weights_of({'clean': 0.75, 'adv': 0.25}) == (0.5, 0.5)
  all_views = dict.fromkeys(('clean', 'aa', 'adv'), 1)
  assert sum(loss.weights_of(all_views)) == pytest.approx(1)


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


def test_arguments_of_a_config_file_are_typed_like_their_defaults():
  defaults = dict(method='conadv', batch_size=320, lr=0.5, flip=False)
  assert parse_args(None, defaults) == defaults
  assert parse_args('', defaults) == defaults
  parsed = parse_args('method=disadv,batch_size=64,lr=2,flip=True', defaults)
  assert parsed == dict(method='disadv', batch_size=64, lr=2.0, flip=True)
  assert type(parsed['lr']) is float
  assert parse_args('flip=false', defaults)['flip'] is False


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
    parse_args(arg, defaults)


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
  steps = steps_of(10, batch_size=96, epochs=1.0, schedule__warmup_epochs=0.9)
  assert (steps.total, steps.stop, steps.warmup) == (1, 1, 0)
  assert steps.decay == 1


def test_warmup_is_never_longer_than_the_run():
  steps = steps_of(
    1000, batch_size=96, epochs=2.0, schedule__warmup_epochs=1.99
  )
  assert steps.warmup == steps.total == 21


# ---- Recipes ---------------------------------------------------------------


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('name', recipes.shipped())
def test_every_recipe_loads_for_each_method(name, method):
  values = recipes.load(f'{name}:method={method}', {})
  assert from_config_dict(values).method == method
  assert flatten(values).keys() == flatten(values_of()).keys()


@pytest.mark.parametrize('name', recipes.shipped())
def test_a_recipe_may_be_named_or_given_as_a_file(name):
  by_name = recipes.load(name, {})
  assert by_name == recipes.load(f'{ROOT}/configs/{name}.py', {})
  assert by_name == recipes.load(f'{ROOT}/configs/{name}.py:', {})


def test_an_unknown_recipe_lists_those_that_there_are():
  with pytest.raises(ConfigError) as info:
    recipes.load('digit:method=conadv', {})
  assert "unknown recipe 'digit'; did you mean 'digits'" in str(info.value)
  assert all(name in str(info.value) for name in recipes.shipped())


@pytest.mark.parametrize(
  'name, argument, value',
  [
    ('digits', 'batch_size', '32'),
    ('cifar10', 'batch_size', '64'),
    ('fashion_mnist_14px', 'batch_size', '128'),
    ('fashion_mnist_14px', 'epochs', '24'),
    ('digits', 'method', 'baseline'),
    ('digits', 'seed', '7'),
    ('imagenet_resnet50', 'batch_size', '4096'),
    ('imagenet_resnet50', 'batch_size', '98304'),
    ('imagenet_resnet50', 'batch_size', '4k'),
    ('imagenet_efficientnet', 'batch_size', '65536'),
    ('imagenet_efficientnet', 'model', 'efficientnet_b5'),
  ],
)
def test_what_a_recipe_computes_follows_an_override(name, argument, value):
  expected = recipes.load(f'{name}:{argument}={value}', {})
  assert recipes.load(name, {argument: value}) == expected
  other = {'batch_size': '16384', 'method': 'disadv', 'seed': '3'}
  if argument in other:
    text = f'{name}:{argument}={other[argument]}'
    assert recipes.load(text, {argument: value}) == expected
  # Other overrides come after the recipe's own settings.
  both = recipes.load(name, {'bn_group_size': '16', argument: value})
  assert both == {**expected, 'bn_group_size': 16}


def test_an_override_that_the_recipe_refuses_says_so():
  with pytest.raises(ConfigError, match='RMSProp collapses .* recipe=lars'):
    recipes.load('imagenet_efficientnet:recipe=rmsprop', {'batch_size': '32k'})


OWN = """
from conadv_jax.config import default_config
def get_config():
  c = default_config()
  c.attack.epsilon = {value}
  return c
"""


def test_a_recipe_of_your_own_works_from_any_folder(tmp_path, monkeypatch):
  (tmp_path / 'own.py').write_text(OWN.format(value=8))
  monkeypatch.chdir(tmp_path)
  config = from_config_dict(recipes.load('own.py', {'batch_size': '64'}))
  assert (config.attack.epsilon, config.batch_size) == (8.0, 64)
  with pytest.raises(ConfigError, match='own.py takes no arguments'):
    recipes.load('own.py:seed=1', {})


@pytest.mark.parametrize(
  'value, message',
  [("'x'", 'own.py, line 5: TypeError'), ('y', 'own.py, line 5: NameError')],
)
def test_an_error_in_a_recipe_says_its_line(value, message, tmp_path):
  (tmp_path / 'own.py').write_text(OWN.format(value=value))
  with pytest.raises(ConfigError, match=message):
    recipes.load(f'{tmp_path}/own.py', {})


def test_a_file_that_makes_no_config_says_so(tmp_path):
  (tmp_path / 'own.py').write_text('')
  with pytest.raises(ConfigError, match='defines no get_config'):
    recipes.load(f'{tmp_path}/own.py', {})


# ---- Command lines ---------------------------------------------------------


@pytest.mark.parametrize(
  'flags, name, value',
  [
    (['--config.seed=3'], 'seed', 3),
    (['-config.seed=3'], 'seed', 3),
    (['--config.seed', '3'], 'seed', 3),
    (['--config.seed=1', '--config.seed=2'], 'seed', 2),
    (['--config.staleness_steps=2'], 'staleness_steps', 2),
    (['--config.staleness_steps=None'], 'staleness_steps', 1),
    (['--config.attack.epsilon=3'], 'attack.epsilon', 3.0),
    (['--config.attack.epsilon=1e1'], 'attack.epsilon', 10.0),
    (['--config.attack.norm=l2'], 'attack.norm', 'l2'),
    (['--config.network.drop_path_rate=0.1'], 'network.drop_path_rate', 0.1),
    (['--config.dataset.antialias=false'], 'dataset.antialias', False),
    (['--config.dataset.antialias=False'], 'dataset.antialias', False),
    (['--noconfig.dataset.antialias'], 'dataset.antialias', False),
    (['--config.dataset.random_flip'], 'dataset.random_flip', True),
    (['--config.dataset.random_flip=1'], 'dataset.random_flip', True),
    (['--config.dataset.data_dir='], 'dataset.data_dir', ''),
    (['--config.dataset.data_dir=a=b'], 'dataset.data_dir', 'a=b'),
    (['--config.eval.attack=fgsm,pgd'], 'eval.attack', 'fgsm,pgd'),
    (['--config.loss.view_weights.adv=2'], 'loss.view_weights.adv', 2.0),
    (
      ['--config.dataset.train_split=train[:50%]'], 'dataset.train_split',
      'train[:50%]',
    ),
  ],
)  # fmt: skip
def test_an_override_may_be_spelled(flags, name, value):
  argv = ['train', '--config', 'digits', *flags, '--workdir', 'w']
  values, workdir = cli.parse_config_file(argv)
  assert workdir == 'w'
  found = flatten(to_dict(from_config_dict(values)))[name]
  assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
  'flag, message',
  [
    ('--config.batch_size=4.5', 'batch_size.*4.5.*needs a int'),
    ('--config.epochs=x', "epochs='x': must be float"),
    ('--config.dataset.antialias=maybe', "antialias='maybe': must be bool"),
    ('--config.attack=pgd', 'attack: is a group'),
    ('--config.loss.view_weights=1', 'loss.view_weights: is a group'),
    ('--config.seed.x=1', "unknown config field 'seed.x'"),
    ('--config.atack.steps=1', "field 'atack'; did you mean 'attack'"),
    ('--config.epochs', 'needs a value'),
    ('--config.epoch', "unknown config field 'epoch'; did you mean 'ep"),
    ('--wrkdir=w', "unknown flag '--wrkdir'; did you mean '--workdir'"),
    ('stray', "unexpected argument 'stray'"),
  ],
)
def test_a_bad_override_says_what_is_wrong(flag, message):
  with pytest.raises(ConfigError, match=message):
    cli.parse_config_file(['train', '--config=digits', '--workdir=w', flag])


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
