"""What can be seen of a setting: programs, batches, what a run says.

For test_settings.py and test_settings_unread.py. Each function takes a
configuration; two that differ in a field without effect look the same.
"""

import contextlib
import dataclasses
import functools
import io
import json
import tempfile
import types

import flax.linen as nn
import helpers
import jax
import numpy as np
import pytest
import tensorflow as tf
from etils import epath

from conadv_jax import experiment, models
from conadv_jax.base.errors import (
  DataError,
  NonFiniteError,
)
from conadv_jax.config import default_config, from_config_dict
from conadv_jax.data import datasets
from conadv_jax.data.quarantine import Quarantine
from conadv_jax.data.sources.source import Share
from conadv_jax.method import attack as attack_room
from conadv_jax.method import optim
from conadv_jax.method.state import Snapshot
from conadv_jax.models import efficientnet, resnet, vit
from conadv_jax.run import (
  bad_steps,
  evaluations,
  evaluator,
  feed,
  initial,
  log,
  metrics,
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
  'plots': False,
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
      stages=(efficientnet.STAGES[0]._replace(repeats=2),),
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
  """The networks, a data set of arrays, and one device."""
  arrays = datasets.from_arrays(
    'arrays', noise(40, 0), noise(16, 1), allows_flip=True
  )
  build = functools.partial(experiment.build, devices=jax.devices()[:1])
  with pytest.MonkeyPatch.context() as patch:
    for name, entry in FAMILIES.items():
      patch.setitem(models.MODELS, name, entry)
    patch.setitem(datasets.DATASETS, 'arrays', arrays)
    patch.setattr(experiment, 'build', build)
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


def attack(config):
  """The attack on a batch."""
  run = experiment.build(config)
  state, batch = run.abstract_state(), run.abstract_batch()
  weights = Snapshot(state.params, state.batch_stats)
  fn = jax.jit(functools.partial(attack_room.attack_batch, run.setup))
  return fn.lower(weights, batch, np.int32(0)).as_text()


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
  rates = jax.jit(run.schedule).lower(np.int32(0)).as_text()
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
  batch = next(iter(evaluator.Evaluator(run, source, Quarantine()).batches()))
  state = run.abstract_state()
  weights = evaluator.weights_of(config, state)
  texts = {}
  for name in ('none', *config.eval.attacks):
    attack = None if name == 'none' else evaluator.eval_attack(config, name)
    fn = evaluator.make_eval_fn(run, attack, config.eval.route)
    texts[name] = fn.lower(weights, batch, np.int32(0)).as_text()
  return texts, weights is state.ema


def attempts(config):
  """The result of an attack on the weights of the start."""
  run = experiment.build(config)
  source = run.spec.open('eval', config.dataset)
  state = run.init_state()
  weights = Snapshot(state.params, state.batch_stats)
  evaluate = evaluator.Evaluator(run, source, Quarantine())
  return evaluate(weights, *config.eval.attacks)


def begun(config):
  """The weights before step 0."""
  state, _ = initial.first_state(experiment.build(config))
  return [np.asarray(x).tobytes() for x in jax.tree.leaves(state.params)]


def logged(config):
  """Who is shown the numbers of a run, beside TensorBoard."""
  with (
    pytest.MonkeyPatch.context() as patch,
    tempfile.TemporaryDirectory() as directory,
  ):
    patch.setattr(metrics, 'WandbLog', lambda project, workdir: project)
    path = epath.Path(directory)
    writer = metrics.make_writer(path, 0, config.wandb_project)
    _, *others = writer._shown
    del writer._shown[1:]
    writer.close()
    return others


def evaluated_too(config):
  """How many training examples are evaluated, if any."""
  part = evaluations.train_part(config)
  return part and datasets.resolve(part).num_eval


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
