"""How settings are given: recipes, their arguments, and flags."""

import pathlib

import pytest
from fields import values_of

from conadv_jax import cli
from conadv_jax.base.errors import ConfigError
from conadv_jax.config import flatten, from_config_dict, recipes, to_dict
from conadv_jax.config.recipes import parse_args
from conadv_jax.methods import METHODS

ROOT = pathlib.Path(__file__).parents[2]


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
