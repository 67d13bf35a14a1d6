"""Methods, attacks and optimizers fill in what is not set."""

import pytest
from fields import error_of, load

from conadv_jax.base.errors import ConfigError
from conadv_jax.config import from_config_dict, notices, to_dict
from conadv_jax.methods import ATTACKS, METHODS, Attack, Method


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
