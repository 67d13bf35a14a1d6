"""Every setting has an effect that somebody can see, or is refused.

FIELDS has a line for each field of `Config`: a value, and what it changes: the
programs, the batches, or what a run writes. A field that is not in it fails.
Below it are the sources, networks, optimizers and methods for which a field
means nothing: they refuse it, or RIDES says why they need not.
"""

import contextlib
import dataclasses
import functools
import io
import json
import shutil
import types
from typing import Any, NamedTuple

import flax.linen as nn
import helpers
import jax
import numpy as np
import pytest
import tensorflow as tf

from conadv_jax import experiment, models, train
from conadv_jax.base import fields as field_room
from conadv_jax.base.errors import (
  CheckpointError,
  ConfigError,
  DataError,
  NonFiniteError,
)
from conadv_jax.config import Config, default_config, from_config_dict, recipes
from conadv_jax.config.groups import OPTIMIZER_EPS
from conadv_jax.data import datasets
from conadv_jax.data.quarantine import Quarantine
from conadv_jax.data.sources.source import Share
from conadv_jax.devices import sharded_optimizer
from conadv_jax.method import optim
from conadv_jax.models import efficientnet, resnet, vit
from conadv_jax.run import (
  bad_steps,
  evaluator,
  feed,
  guard,
  log,
  metrics,
  summary,
  workdir,
)
from scripts import make_fake_imagenet

TINY = {
  'model': 'tiny',
  'batch_size': 8,
  'bn_group_size': 4,
  'epochs': 8.0,
  'schedule.warmup_epochs': 1.0,
  'dataset.train_split': 'train[:32]',
  'dataset.eval_split': 'test[:16]',
  'eval.batch_size': 8,
}


class Bare(nn.Module):
  """A network that takes none of the common settings."""

  num_classes: int

  @nn.compact
  def __call__(self, x, routes, train, examples=None):
    return nn.Dense(self.num_classes)(x.reshape(*x.shape[:3], -1))


# Families with their first blocks, thin: tracing takes most of the time.
FAMILIES = {
  'tiny': models.Entry(helpers.TinyNet, 4),
  'bare': models.Entry(Bare, 4),
  'resnet18': dataclasses.replace(
    models.get('resnet18'),
    build=functools.partial(resnet.resnet18, width=8, blocks=(1, 1)),
  ),
  'efficientnet_b0': dataclasses.replace(
    models.get('efficientnet_b0'),
    build=functools.partial(
      efficientnet.efficientnet_b0,
      width_factor=0.25,
      stages=efficientnet.STAGES[:2],
    ),
  ),
  'vit_tiny': models.Entry(functools.partial(vit.vit_tiny, depth=1), 32),
}


def noise(count, seed):
  rng = np.random.default_rng(seed)
  images = rng.integers(0, 256, (count, 8, 8, 3)).astype(np.uint8)
  return images, np.arange(count) % 4


@pytest.fixture(scope='module', autouse=True)
def registered():
  """The networks, a data set of arrays, one device, and no pictures."""
  arrays = datasets.from_arrays(
    'arrays', noise(40, 0), noise(16, 1), allows_flip=True
  )
  build = functools.partial(experiment.build, devices=jax.devices()[:1])
  with pytest.MonkeyPatch.context() as patch:
    for name, entry in FAMILIES.items():
      patch.setitem(models.MODELS, name, entry)
    patch.setitem(datasets.DATASETS, 'arrays', arrays)
    patch.setattr(experiment, 'build', build)
    patch.setattr(summary, '_draw', lambda *_: None)
    yield


@pytest.fixture(scope='module')
def disk(tmp_path_factory):
  """{kind: fields of `dataset`} of each kind of source."""
  root = tmp_path_factory.mktemp('data')
  make_fake_imagenet.write_folder(str(root / 'folder'), 12, 10)
  for kind in ('array_record', 'tfrecord'):
    make_fake_imagenet.prepare(str(root / kind), kind, 12, 10, 3)
  sources = {
    'digits': {'crop_padding_px': 1},
    'arrays': {'name': 'arrays', 'crop_padding_px': 1},
  }
  for kind in ('folder', 'array_record', 'tfrecord'):
    sources[kind] = {
      'name': 'image_folder' if kind == 'folder' else 'imagenet2012',
      'data_dir': str(root / kind),
      'image_size_px': 16,
      'train_split': 'train',
      'eval_split': 'val' if kind == 'folder' else 'validation',
    }
  return {
    kind: {f'dataset.{name}': value for name, value in source.items()}
    for kind, source in sources.items()
  }


def config_of(changes):
  values = default_config().to_dict()
  for name, value in (TINY | changes).items():
    *groups, leaf = name.split('.')
    node = values
    for group in groups:
      node = node[group]
    node[leaf] = value
  return from_config_dict(values)


# ---- What a setting may change ---------------------------------------------


def program(config):
  """The training step, and the state before it."""
  run = experiment.build(config)
  return run.lower_step().as_text(), str(run.abstract_state())


def network(config):
  """The gradient of the network alone."""
  run = experiment.build(config)
  weights = run.abstract_state()
  x = jax.ShapeDtypeStruct((1, 1, 2, *run.spec.image_shape), 'float32')

  def loss(params, stats, x):
    variables = {'params': params, 'batch_stats': stats}
    logits, new = run.apply_fn(variables, x, (0,), True, jax.random.key(0))
    return logits.sum(), new

  gradient = jax.jit(jax.grad(loss, has_aux=True))
  return gradient.lower(weights.params, weights.batch_stats, x).as_text()


def updates(config):
  """The optimizer and the learning rate over the run."""
  run = experiment.build(config)
  params = {'kernel': jax.ShapeDtypeStruct((2, 3), 'float32')}
  state = jax.eval_shape(run.optimizer.init, params)
  text = jax.jit(run.optimizer.update).lower(params, state, params).as_text()
  rates = [float(run.schedule(t)) for t in range(run.steps.total)]
  # 'trust_ratios' of the metrics are of the optimizer too.
  ratios = ''
  if config.optimizer.name == 'lars':
    ratio = functools.partial(optim.kernel_trust_ratios, config.optimizer)
    ratios = jax.jit(ratio).lower(params, params).as_text()
  return text, rates, ratios


def evaluation(config):
  """The programs that evaluate, and which weights they are given."""
  run = experiment.build(config)
  source = run.spec.open('eval', config.dataset)
  batch = next(iter(evaluator.Evaluator(run, source, Quarantine())._batches()))
  state = run.abstract_state()
  weights = evaluator.weights_of(config, state)
  texts = {}
  for name in ('none', *config.eval.attacks):
    attack = None if name == 'none' else evaluator.eval_attack(config, name)
    fn = evaluator.make_eval_fn(run, attack, config.eval.route)
    texts[name] = fn.lower(weights, batch, np.int32(0)).as_text()
  return texts, weights is state.ema


def fed(config):
  """The sources, two batches for training and the eval split, as bytes."""
  run = experiment.build(config)
  source, eval_source = (
    run.spec.open(part, config.dataset) for part in ('train', 'eval')
  )
  ids = feed.ExampleIds(0, keep=9)
  batches = list(feed.batches(run, source, Quarantine(), ids, 0, 2))
  evaluate = evaluator.Evaluator(run, eval_source, Quarantine())
  batches += evaluate._host_batches(config.eval.batch_size)
  return (
    [type(source).__name__, getattr(source, '_kind', '')],
    [ids[t].tolist() for t in (0, 1)],
    [{k: np.asarray(x).tobytes() for k, x in b.items()} for b in batches],
  )


def pixels(config):
  """The views that are made of one image, by eight seeds."""
  from conadv_jax.data.images import views

  source = experiment.build(config).spec.open('train', config.dataset)
  if hasattr(source, 'images'):
    image = tf.constant(source.images[0])
  else:
    image = tf.constant(source.fetch(np.array([0]))[0])
  make = views.make_train_views(config.dataset, config.fed_views)
  made = [make(image, tf.constant([seed, 1])) for seed in range(8)]
  made.append({'eval': views.eval_view(config.dataset, image)})
  return [{k: x.numpy().tobytes() for k, x in m.items()} for m in made]


def opened(config):
  """The sources, the order for training, and the examples of both."""
  run = experiment.build(config)
  found = []
  for part in ('train', 'eval'):
    source = run.spec.open(part, config.dataset)
    share = Share(config.seed, 4, range(3))
    order = [int(e['id']) for e in source.order(share).as_numpy_iterator()]
    ids = np.arange(source.num_examples)
    if hasattr(source, 'images'):
      examples = source.images.tobytes()
    else:
      examples = b''.join(source.fetch(ids))
    found.append((type(source).__name__, len(ids), order, examples))
  return found


def opening(config):
  """What a run prints before it starts."""
  return log.opening(experiment.build(config))


def flags(config):
  """Options of the compiler of a TPU."""
  device = types.SimpleNamespace(device_kind='TPU v5 lite')
  mesh = types.SimpleNamespace(devices=np.array([device]))
  run = dataclasses.replace(experiment.build(config), mesh=mesh)
  return run.compiler_options


def bad_examples(config):
  """How many of 100 examples may be bad."""
  with contextlib.redirect_stdout(io.StringIO()):
    bad = Quarantine(max_share=workdir.quarantine(NOWHERE, config)._max_share)
    with contextlib.suppress(DataError):
      for i in range(100):
        bad.add('train', i, '', '', 100)
  return len(bad)


def bad_steps_in_a_row(config):
  """After how many steps that are not finite a run ends."""
  run = experiment.build(config)
  ids = [np.zeros(config.batch_size, np.int32)] * 40
  watch = bad_steps.NonFiniteWatch(run, NOWHERE, ids)
  watch._write = lambda record: None
  values = {'loss': np.nan, 'grad_norm': np.nan}
  for step in range(1, 30):
    try:
      watch.check(step, values | {'nonfinite_streak': step})
    except NonFiniteError:
      return step - 1
  return None


NOWHERE = workdir.path_of('/nowhere/at/all')


@functools.cache
def _seen(what, changes):
  return what(config_of(json.loads(changes)))


def seen(what, changes):
  return _seen(what, json.dumps(changes, sort_keys=True))


# ---- Every field ------------------------------------------------------------


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
  'attack.preset': Case('paper', program, ADV),
  'attack.rule': Case('none', program, ADV),
  'attack.norm': Case('l2', program, ADV),
  'attack.epsilon': Case(8.0, program, ADV),
  'attack.step_size': Case(2.0, program, ADV),
  'attack.steps': Case(3, program, ADV),
  'attack.targeted': Case(True, program, ADV),
  'attack.random_start_prob': Case(0.5, program, ADV),
  'attack.train_mode': Case(False, program, ADV),
  'attack.update_batch_stats': Case(True, program, ADV),
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
  'eval.epsilon': Case(8.0, evaluation),
  'eval.attack_steps': Case(3, evaluation, {'eval.attack': 'pgd'}),
  'eval.route': Case('adv', evaluation),
  'eval.use_ema': Case(True, evaluation, EMA),
  'log_every_steps': InRun(2),
  'attack_stats_every_steps': InRun(3),
  'max_nonfinite_steps': Case(3, bad_steps_in_a_row),
  'spike.sigmas': Case(6.0, program, BASELINE),
  'spike.window_steps': Case(8, program, BASELINE | SPIKE),
  'spike.max_in_a_row': Case(2, program, BASELINE | SPIKE),
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
def test_a_field_has_an_effect(name, disk, tmp_path, monkeypatch):
  case = FIELDS[name]
  base, value = placed(disk, case.base), case.value
  if name == 'attack.rule':
    from conadv_jax.method import attack

    rule = lambda attack, ascent, image, delta, aux: (delta, aux)  # noqa: E731
    monkeypatch.setitem(attack.RULES, 'none', rule)
  if name == 'shard_optimizer':
    monkeypatch.setattr(sharded_optimizer, 'SHARD_MULTIPLE', 8)
  if name == 'dataset.data_dir':
    value = make_fake_imagenet.write_folder(str(tmp_path / 'f'), 14, 10, seed=1)
  assert seen(case.what, base) != seen(case.what, base | {name: value})


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
    'hang_timeout_seconds': limits,
  }


def test_a_run_shows_its_settings(tmp_path):
  changes = {n: c.value for n, c in FIELDS.items() if isinstance(c, InRun)}
  keep = changes.pop('checkpoint.keep')
  changes.pop('checkpoint.strict')
  _, _, limits = run_of({}, tmp_path / 'base')
  assert done_of(tmp_path / 'base', limits) == {
    'log_every_steps': [4],
    'attack_stats_every_steps': [],
    'eval.every_steps': [4],
    'checkpoint.every_steps': [4],
    'hang_timeout_seconds': [1800],
  }
  _, _, limits = run_of(changes, tmp_path / 'other')
  done = done_of(tmp_path / 'other', limits)
  assert done == {
    'log_every_steps': [2, 4],
    'attack_stats_every_steps': [3],
    'eval.every_steps': [2, 4],
    'checkpoint.every_steps': [2, 3, 4],
    'hang_timeout_seconds': [600],
  }
  assert changes.keys() == done.keys()
  # The same run, two steps longer: two checkpoints stay.
  longer = changes | {'max_steps': 6, 'checkpoint.keep': keep}
  _, _, limits = run_of(longer, tmp_path / 'other')
  saved = done_of(tmp_path / 'other', limits)['checkpoint.every_steps']
  assert saved == [5, 6]
  # The newest is damaged: test_checkpoint.py has what happens if not strict.
  shutil.rmtree(tmp_path / 'other/checkpoints/6/state')
  (tmp_path / 'other/summary.json').unlink()
  with pytest.raises(CheckpointError, match=r'checkpoint\.strict=False'):
    run_of(longer | {'checkpoint.strict': True}, tmp_path / 'other')


# ---- Where a field means nothing --------------------------------------------


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
    found = what(config_of(changes))
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


@pytest.mark.parametrize('policy', ['v0', 'reduced_imagenet'])
def test_other_policies_have_no_settings_of_randaugment(policy):
  base = AA | {'dataset.autoaugment': policy}
  for name in of_group('dataset.randaugment_'):
    found = assert_read_or_refused(pixels, base, name, FIELDS[name].value)
    assert found == 'refused'


WINDOW = 'shuffle_window_shards'
SOURCES = ('digits', 'arrays', 'folder', 'array_record', 'tfrecord')


@pytest.mark.parametrize('kind', SOURCES)
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
        opened(config_of(base | {name: value}))
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


@pytest.mark.parametrize('model', FAMILIES)
def test_a_network_reads_or_refuses(model):
  base = BASELINE | {'model': model}
  names = [*of_group('network.'), 'remat']
  if model in ('tiny', 'bare', 'vit_tiny'):
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
    program, ADV | {'model': 'vit_tiny'}, {'attack.train_mode': False}
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
