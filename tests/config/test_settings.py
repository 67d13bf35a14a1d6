"""Every setting has an effect that somebody can see.

FIELDS has a line for each field of `Config`: a value, and what it changes: the
programs, the batches, or what a run writes. A field that is not in it fails.
test_settings_unread.py has where a field means nothing.
"""

import dataclasses
import shutil
from typing import Any, NamedTuple

import jax
import observed
import pytest
from observed import (
  attack,
  attempts,
  bad_examples,
  bad_steps_in_a_row,
  begun,
  config_of,
  evaluated_too,
  evaluation,
  fed,
  flags,
  logged,
  network,
  opened,
  opening,
  pixels,
  program,
  seen,
  updates,
)

from conadv_jax import experiment, train
from conadv_jax.base import fields as field_room
from conadv_jax.base.errors import CheckpointError
from conadv_jax.config import Config
from conadv_jax.devices import sharded_optimizer
from conadv_jax.method import attack as attack_room
from conadv_jax.models import weights
from conadv_jax.run import (
  guard,
  metrics,
)
from scripts import make_fake_imagenet

disk, registered = observed.disk, observed.registered


class Case(NamedTuple):
  """`value` changes what `what` sees of a configuration with `base`."""

  value: Any
  what: Any
  base: dict[str, Any] = {}


class InRun(NamedTuple):
  """`value` changes what a run does; see `test_a_run_shows_its_settings`."""

  value: Any


BASELINE = {'method': 'baseline'}
RESNET = {'method': 'baseline', 'model': 'resnet18'}
EMA, SPIKE = {'ema.decay': 0.9}, {'spike.sigmas': 6.0}
ARRAYS = {'dataset.name': 'arrays'}
AA = {'method': 'conadv_aa', 'dataset.crop_padding_px': 1}
ADV = {'method': 'adv_only'}
SAM = {'method': 'consam'}
RANDOM_START = {'attack.random_start_prob': 1.0}
SCALED = {'optimizer.scaling': 'linear'}
EXPONENTIAL = {'schedule.name': 'exponential'}
RANDAUGMENT = AA | {'dataset.autoaugment': 'randaugment'}
FILES = {'files': 'folder'}  # the fields of that source

FIELDS = {
  'seed': Case(1, fed, BASELINE),
  'method': Case('disadv', program),
  'model': Case('vit_tiny', network, BASELINE),
  'network.space_to_depth': Case(True, network, RESNET),
  'network.drop_path_rate': Case(0.5, network, RESNET),
  'network.dropout_rate': Case(
    0.5, network, BASELINE | {'model': 'efficientnet_b0'}
  ),
  'init_from': Case('?', begun, BASELINE),
  'dataset.name': Case('arrays', fed, BASELINE),
  'dataset.data_dir': Case('?', opened, BASELINE | FILES),
  'dataset.train_split': Case('train[8:]', opened, BASELINE),
  'dataset.eval_split': Case('test[8:]', opened, BASELINE),
  'dataset.image_size_px': Case(24, pixels, BASELINE | FILES),
  'dataset.interpolation': Case('bilinear', pixels, BASELINE | FILES),
  'dataset.antialias': Case(False, pixels, BASELINE | FILES),
  'dataset.eval_crop_ratio': Case(0.5, pixels, BASELINE | FILES),
  'dataset.pool': Case(2, opened, BASELINE),
  'dataset.crop_padding_px': Case(2, fed, BASELINE),
  'dataset.random_flip': Case(True, pixels, BASELINE | ARRAYS),
  'dataset.autoaugment': Case('reduced_imagenet', pixels, AA),
  'dataset.randaugment_layers': Case(1, pixels, RANDAUGMENT),
  'dataset.randaugment_magnitude': Case(3.0, pixels, RANDAUGMENT),
  'dataset.aa_shares_crop': Case(True, pixels, AA),
  'dataset.cache': Case('decoded', opened, BASELINE | FILES),
  'dataset.shuffle_window_shards': Case(
    1, opened, BASELINE | {'files': 'tfrecord'}
  ),
  'dataset.max_bad_share': Case(0.5, bad_examples),
  'batch_size': Case(16, program, BASELINE),
  'epochs': Case(16.0, updates),
  'max_steps': Case(2, opening),
  'staleness_steps': Case(2, program),
  'bn_group_size': Case(8, program, BASELINE),
  'bn_momentum': Case(0.5, program, BASELINE),
  'bn_epsilon': Case(0.1, program, BASELINE),
  'dtype': Case('bfloat16', program, BASELINE),
  'microbatches': Case(2, program, BASELINE),
  'remat': Case('blocks', network, RESNET),
  'shard_optimizer': Case(True, program, BASELINE),
  'grad_allreduce_dtype': Case('bfloat16', program, BASELINE),
  'grad_buckets': Case(2, program, BASELINE),
  'xla_flags': Case('overlap', flags),
  'loss.label_smoothing': Case(0.3, program, BASELINE),
  'loss.view_weights': Case({'clean': 1.0, 'aa': 1.0, 'adv': 3.0}, program),
  'attack.preset': Case('paper', attack, ADV),
  'attack.rule': Case('none', attack, ADV),
  'attack.norm': Case('l2', attack, ADV),
  'attack.epsilon': Case(8.0, attack, ADV),
  'attack.step_size': Case(2.0, attack, ADV),
  'attack.steps': Case(3, attack, ADV),
  'attack.targeted': Case(True, attack, ADV),
  'attack.random_start': Case('extreme', attack, ADV | RANDOM_START),
  'attack.random_start_prob': Case(0.5, attack, ADV),
  'attack.train_mode': Case(False, attack, ADV),
  'attack.update_batch_stats': Case(True, attack, ADV),
  'sam.rho': Case(0.5, program, SAM),
  'sam.normalize': Case('layerwise', program, SAM),
  'sam.mask': Case('norm_only', program, SAM),
  'sam.group_size': Case(4, program, SAM | {'microbatches': 2}),
  'sam.mix': Case(0.5, program, {'method': 'sampa'}),
  'optimizer.name': Case('sgd', updates, BASELINE),
  'optimizer.learning_rate': Case(2.0, updates),
  'optimizer.base_batch_size': Case(64, updates, SCALED),
  'optimizer.scaling': Case('sqrt', updates),
  'optimizer.momentum': Case(0.5, updates),
  'optimizer.nesterov': Case(True, updates),
  'optimizer.weight_decay': Case(0.1, updates),
  'optimizer.lars_denominator': Case('sum_of_norms', updates),
  'optimizer.trust_coefficient': Case(0.1, updates),
  'optimizer.beta1': Case(0.5, updates, {'optimizer.name': 'lamb'}),
  'optimizer.beta2': Case(0.5, updates, {'optimizer.name': 'lamb'}),
  'optimizer.decay': Case(0.5, updates, {'optimizer.name': 'rmsprop'}),
  'optimizer.eps': Case(0.1, updates),
  'schedule.name': Case('cosine', updates),
  'schedule.warmup_epochs': Case(2.0, updates),
  'schedule.power': Case(1.0, updates),
  'schedule.end_learning_rate': Case(0.1, updates),
  'schedule.decay_rate': Case(0.5, updates, EXPONENTIAL),
  'schedule.decay_epochs': Case(1.0, updates, EXPONENTIAL),
  'ema.decay': Case(0.9, program, BASELINE),
  'ema.batch_stats': Case(False, program, BASELINE | EMA),
  'checkpoint.every_steps': InRun(1),
  'checkpoint.keep': InRun(2),
  'checkpoint.strict': InRun(True),
  'eval.batch_size': Case(16, evaluation, BASELINE),
  'eval.every_steps': InRun(2),
  'eval.attack': Case('pgd', evaluation),
  'eval.norm': Case('l2', evaluation),
  'eval.epsilon': Case(8.0, evaluation),
  'eval.attack_steps': Case(3, evaluation, {'eval.attack': 'pgd'}),
  'eval.restarts': Case(
    3, attempts, {'eval.attack': 'pgd', 'eval.attack_steps': 1}
  ),
  'eval.route': Case('adv', evaluation),
  'eval.use_ema': Case(True, evaluation, EMA),
  'eval.train_split': Case('train[:8]', evaluated_too),
  'log_every_steps': InRun(2),
  'attack_stats_every_steps': InRun(3),
  'noise_scale': Case(True, program, BASELINE | {'microbatches': 2}),
  'plots': InRun(True),
  'wandb_project': Case('?', logged, BASELINE),
  'max_nonfinite_steps': Case(3, bad_steps_in_a_row),
  'spike.sigmas': Case(6.0, program, BASELINE),
  'spike.window_steps': Case(8, program, BASELINE | SPIKE),
  'spike.max_in_a_row': Case(2, program, BASELINE | SPIKE),
  'profile.steps': InRun('2:3'),
  'compile_cache': InRun(''),
  'hang_timeout_seconds': InRun(600),
}


def names_of(cls):
  """Every field of `cls` and of its groups, dotted."""
  for name, kind in field_room.kinds(cls).items():
    if dataclasses.is_dataclass(kind):
      yield from names_of(kind)
    else:
      yield cls.prefix + name


def placed(disk, base):
  """`base` with the fields of the source that it names."""
  base = dict(base)
  return (disk[base.pop('files')] if 'files' in base else {}) | base


def test_every_field_has_its_line():
  assert list(FIELDS) == list(names_of(Config))


@pytest.mark.parametrize(
  'name', [name for name, case in FIELDS.items() if isinstance(case, Case)]
)
@pytest.mark.slow
def test_a_field_has_an_effect(name, disk, tmp_path, monkeypatch):
  case = FIELDS[name]
  base, value = placed(disk, case.base), case.value
  if name == 'attack.rule':
    rule = lambda attack, ascent, image, delta, aux: (delta, aux)  # noqa: E731
    monkeypatch.setitem(attack_room.RULES, 'none', rule)
  if name == 'shard_optimizer':
    monkeypatch.setattr(sharded_optimizer, 'SHARD_MULTIPLE', 8)
  if name == 'init_from':
    value = weights_saved(config_of(base | {'seed': 1}), tmp_path / 'w')
  if name == 'dataset.data_dir':
    value = make_fake_imagenet.write_folder(str(tmp_path / 'f'), 14, 10, seed=1)
  assert seen(case.what, base) != seen(case.what, base | {name: value})


def weights_saved(config, path):
  """Saves the weights that a run begins with; returns the file's name."""
  state = experiment.build(config).init_state()
  arrays = weights.to_arrays(state.params, state.batch_stats, 0)
  weights.save(str(path), arrays)
  return str(path)


def test_what_has_no_effect_is_found():
  assert seen(program, BASELINE) == seen(program, BASELINE | {'max_steps': 3})


# ---- What a run does --------------------------------------------------------


def run_of(changes, directory):
  """(config, work directory, limits of the watchdog) of a run of 4 steps."""
  config = config_of({'max_steps': 4, 'eval.attack': 'none'} | changes)
  limits = []

  class Watchdog(guard.Watchdog):
    def __init__(self, seconds):
      limits.append(seconds)
      super().__init__(seconds)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(guard, 'Watchdog', Watchdog)
    train.train(config, str(directory))
  return config, directory, limits


def done_of(directory, limits):
  """What a run shows of its settings, by field."""
  steps = {'train': [], 'attack': [], 'test': []}
  for row in metrics.read_metrics(directory):
    steps[row['split']].append(row['step'])
  saved = [p.name for p in (directory / 'checkpoints').iterdir()]
  return {
    'log_every_steps': steps['train'],
    'attack_stats_every_steps': steps['attack'],
    'eval.every_steps': steps['test'],
    'checkpoint.every_steps': sorted(int(s) for s in saved if s.isdecimal()),
    'plots': (directory / 'plots').exists(),
    'profile.steps': (directory / 'profile').exists(),
    'compile_cache': bool(jax.config.jax_compilation_cache_dir),
    'hang_timeout_seconds': limits,
  }


@pytest.mark.slow
def test_a_run_shows_its_settings(tmp_path, jax_cache):
  changes = {n: c.value for n, c in FIELDS.items() if isinstance(c, InRun)}
  keep, strict = changes.pop('checkpoint.keep'), 'checkpoint.strict'
  del changes[strict]
  _, _, limits = run_of({}, tmp_path / 'base')
  assert done_of(tmp_path / 'base', limits) == {
    'log_every_steps': [4],
    'attack_stats_every_steps': [],
    'eval.every_steps': [4],
    'checkpoint.every_steps': [4],
    'plots': False,
    'profile.steps': False,
    'compile_cache': True,
    'hang_timeout_seconds': [1800],
  }
  kept = {'checkpoint.keep': keep}
  _, _, limits = run_of(changes | kept, tmp_path / 'other')
  done = done_of(tmp_path / 'other', limits)
  assert done == {
    'log_every_steps': [2, 4],
    'attack_stats_every_steps': [3],
    'eval.every_steps': [2, 4],
    'checkpoint.every_steps': [3, 4],  # of 1 to 4, two are kept
    'plots': True,
    'profile.steps': True,
    'compile_cache': False,
    'hang_timeout_seconds': [600],
  }
  assert changes.keys() == done.keys()
  # A damaged one; test_damaged_checkpoints.py has it without `strict`.
  shutil.rmtree(tmp_path / 'other/checkpoints/4/state')
  (tmp_path / 'other/summary.json').unlink()
  with pytest.raises(CheckpointError, match=r'checkpoint\.strict=False'):
    run_of(changes | kept | {strict: True}, tmp_path / 'other')
