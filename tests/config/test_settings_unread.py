"""Where a setting means nothing: it is refused, or RIDES says why it stays.

For each source, network, optimizer and schedule, a field that differs from its
default is read or refused; test_settings.py has the values.
"""

import contextlib

import observed
import pytest
from observed import (
  FAMILIES,
  attack,
  config_of,
  evaluation,
  network,
  opened,
  pixels,
  program,
  seen,
  updates,
)
from test_settings import AA, ADV, BASELINE, FIELDS, SCALED

from conadv_jax import experiment
from conadv_jax.base.errors import ConfigError
from conadv_jax.config import Config, from_config_dict, recipes
from conadv_jax.config.groups import OPTIMIZER_EPS

disk, registered = observed.disk, observed.registered


@contextlib.contextmanager
def unchecked():
  """Lets fields through that the rest of their group does not read."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Config, '_check_read', lambda self: None)
    yield


def assert_read_or_refused(what, base, name, value):
  """`name` has an effect, or is refused by name and value, with a fix."""
  changes = base | {name: value}
  try:
    found = seen(what, changes)
  except ConfigError as error:
    text = str(error)
    assert text.startswith(f'{name}={value!r}: '), text
    assert any(fix in text for fix in ('leave it', 'set it', 'set '))
    with unchecked(), contextlib.suppress(ConfigError):
      assert what(config_of(changes)) == seen(what, base), 'it has an effect'
    return 'refused'
  assert found != seen(what, base), f'{name} is accepted and not applied'
  return 'read'


def of_group(prefix):
  return [n for n in FIELDS if n.startswith(prefix) and not n.endswith('.name')]


@pytest.mark.parametrize('optimizer', OPTIMIZER_EPS)
def test_an_optimizer_reads_or_refuses(optimizer):
  base = SCALED | {'optimizer.name': optimizer}
  found = {
    name: assert_read_or_refused(updates, base, name, FIELDS[name].value)
    for name in of_group('optimizer.')
  }
  assert found['optimizer.learning_rate'] == 'read'
  assert 'refused' in found.values()


def test_nothing_reads_the_base_of_a_rate_that_does_not_scale():
  name = 'optimizer.base_batch_size'
  assert assert_read_or_refused(updates, {}, name, 64) == 'refused'
  # Its program multiplies by 0; the updates are the same.
  with pytest.raises(ConfigError, match=r'^optimizer\.nesterov=True: not read'):
    config_of({'optimizer.momentum': 0.0, 'optimizer.nesterov': True})


@pytest.mark.parametrize('schedule', ['polynomial', 'cosine', 'exponential'])
def test_a_schedule_reads_or_refuses(schedule):
  base = {'schedule.name': schedule}
  for name in of_group('schedule.'):
    assert_read_or_refused(updates, base, name, FIELDS[name].value)


@pytest.mark.parametrize(
  'name', ['ema.batch_stats', 'spike.window_steps', 'spike.max_in_a_row']
)
def test_what_is_off_has_no_settings(name):
  found = assert_read_or_refused(program, BASELINE, name, FIELDS[name].value)
  assert found == 'refused'


def test_an_attack_without_a_gradient_has_no_settings_of_one():
  base = ADV | {'attack.preset': 'random_signs'}
  values = {n: FIELDS[n].value for n in of_group('attack.')} | {
    'attack.random_start': 'ball',
  }
  del values['attack.preset'], values['attack.rule']  # these choose another
  found = {
    name: assert_read_or_refused(attack, base, name, value)
    for name, value in values.items()
  }
  assert {name for name, how in found.items() if how == 'refused'} == {
    'attack.step_size', 'attack.targeted', 'attack.train_mode',
    'attack.update_batch_stats',
  }  # fmt: skip
  name = 'attack.random_start'
  assert assert_read_or_refused(attack, ADV, name, 'extreme') == 'refused'


@pytest.mark.parametrize('policy', ['v0', 'reduced_imagenet'])
def test_other_policies_have_no_settings_of_randaugment(policy):
  base = AA | {'dataset.autoaugment': policy}
  for name in of_group('dataset.randaugment_'):
    found = assert_read_or_refused(pixels, base, name, FIELDS[name].value)
    assert found == 'refused'


WINDOW = 'shuffle_window_shards'
SOURCES = ('digits', 'arrays', 'folder', 'array_record', 'tfrecord')


@pytest.mark.parametrize('kind', SOURCES)
@pytest.mark.slow
def test_a_source_reads_or_refuses(kind, disk):
  """What is done with pixels is the same for all sources; see FIELDS."""
  base = BASELINE | disk[kind]
  split = base.get('dataset.eval_split', 'test')
  values = {n: FIELDS[n].value for n in of_group('dataset.')} | {
    'dataset.train_split': 'train[:9]',
    'dataset.eval_split': f'{split}[3:9]',
    'dataset.data_dir': '/nowhere/at/all',
  }
  if kind not in ('digits', 'arrays'):
    del values['dataset.data_dir']  # has errors of its own
  of_pixels = {
    'image_size_px', 'interpolation', 'antialias', 'eval_crop_ratio', 'pool',
    'crop_padding_px', 'random_flip',
  }  # fmt: skip
  refused = set()
  for name, value in values.items():
    field = name.removeprefix('dataset.')
    if field in of_pixels:
      try:
        config = config_of(base | {name: value})
        experiment.build(config).spec.open('eval', config.dataset)
      except ConfigError as error:
        assert str(error).startswith(f'{name}={value!r}: '), error
        refused.add(field)
    elif field in ('train_split', 'eval_split', 'cache', 'data_dir', WINDOW):
      if assert_read_or_refused(opened, base, name, value) == 'refused':
        refused.add(field)
  in_memory = {
    'data_dir', 'image_size_px', 'interpolation', 'antialias', 'cache',
    'eval_crop_ratio', WINDOW,
  }  # fmt: skip
  assert refused == {
    'digits': in_memory | {'random_flip'},
    'arrays': in_memory,
    'tfrecord': {'pool', 'crop_padding_px'},
  }.get(kind, {'pool', 'crop_padding_px', WINDOW})


def test_a_cache_has_no_windows(disk):
  base = BASELINE | disk['tfrecord'] | {'dataset.cache': 'raw'}
  name = 'dataset.shuffle_window_shards'
  assert assert_read_or_refused(opened, base, name, 1) == 'refused'


@pytest.mark.parametrize(
  'model',
  [
    m if m != 'efficientnet_b0' else pytest.param(m, marks=pytest.mark.slow)
    for m in FAMILIES
  ],
)
def test_a_network_reads_or_refuses(model):
  base = BASELINE | {'model': model}
  names = [*of_group('network.'), 'remat']
  if model in ('bare', 'vit_tiny'):  # FIELDS has those of batch norm
    names += ['bn_momentum', 'bn_epsilon', 'dtype']
  found = {
    name: assert_read_or_refused(network, base, name, FIELDS[name].value)
    for name in names
  }
  if model in ('bare', 'vit_tiny'):
    assert found['bn_momentum'] == found['bn_epsilon'] == 'refused'
  if 'dtype' in found:
    assert found['dtype'] == ('refused' if model == 'bare' else 'read')


# ---- What may stay, though nothing reads it ---------------------------------


def changed(prefix):
  return {n: c.value for n, c in FIELDS.items() if n.startswith(prefix)}


ATTACK = changed('attack.') | {
  'attack.rule': 'gradient',
  'attack.train_mode': True,
}
# {why: (what sees nothing of it, a configuration, what is set in it)}
RIDES = {
  'one recipe for a grid of methods: no adversarial view': (
    program, BASELINE, ATTACK | {'attack_stats_every_steps': 7}
  ),
  'the same: no weights are perturbed': (
    program, BASELINE, {
      'sam.rho': 0.5, 'sam.normalize': 'layerwise', 'sam.mask': 'norm_only',
      'sam.group_size': 4, 'sam.mix': 0.5,
    }
  ),
  'the same: no gradient perturbs them, or one that does not train': (
    program, {'method': 'msam'}, {'sam.group_size': 4, 'sam.mix': 0.5}
  ),
  'the same: AutoAugment alone': (program, {'method': 'autoaugment'}, ATTACK),
  'the same: no view aa': (
    pixels, BASELINE, {
      'dataset.autoaugment': 'randaugment', 'dataset.randaugment_layers': 1,
      'dataset.aa_shares_crop': True,
    }
  ),
  'the same: the weight of a view that is not there': (
    program, BASELINE, {'loss.view_weights': {'clean': 1, 'aa': 2, 'adv': 3}}
  ),
  'one recipe for a grid of data sets: no example in memory is bad': (
    opened, BASELINE, {'dataset.max_bad_share': 0.5}
  ),
  'one recipe for a grid of networks: no statistics of batch norm': (
    attack, ADV | {'model': 'vit_tiny'}, {'attack.train_mode': False}
  ),
  '`evaluate` takes PGD of a run that had FGSM': (
    evaluation, {'eval.attack': 'fgsm'}, {'eval.attack_steps': 3}
  ),
  'the recipe of a TPU runs on a CPU': (
    program, BASELINE | {'grad_buckets': 1}, {'xla_flags': 'overlap'}
  ),
}  # fmt: skip


@pytest.mark.parametrize('why', RIDES)
def test_what_may_stay_unread_is_accepted(why):
  what, base, changes = RIDES[why]
  assert seen(what, base) == seen(what, base | changes)


# ---- Command lines ----------------------------------------------------------


@pytest.mark.parametrize(
  'recipe, chosen',
  [
    ('imagenet_resnet50', {'optimizer.name': 'sgd'}),
    ('imagenet_resnet50', {'optimizer.name': 'lamb'}),
    ('imagenet_resnet50', {'schedule.name': 'exponential'}),
    ('imagenet_efficientnet:recipe=lars', {'schedule.name': 'cosine'}),
    ('digits', {'optimizer.scaling': 'none'}),
  ],
)
def test_an_override_that_chooses_drops_what_only_the_old_choice_reads(
  recipe, chosen
):
  config = from_config_dict(recipes.load(recipe, chosen))
  assert config != from_config_dict(recipes.load(recipe, {}))


@pytest.mark.parametrize(
  'overrides, message',
  [
    (
      {'optimizer.name': 'lamb', 'optimizer.momentum': '0.95'},
      r"^optimizer\.momentum=0\.95: not read with optimizer\.name='lamb'",
    ),
    ({'schedule.decay_rate': '0.9'}, r"schedule\.name='polynomial'"),
    ({'spike.window_steps': '9'}, r'leave it at 128, or change spike\.sigmas'),
  ],
)
def test_an_override_that_nothing_reads_is_refused(overrides, message):
  with pytest.raises(ConfigError, match=message):
    from_config_dict(recipes.load('digits', overrides))
