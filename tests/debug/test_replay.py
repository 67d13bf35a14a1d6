"""A step of a run, repeated: the same bits, and the example that spoiled it."""

import hashlib
import json
import shutil

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conadv_jax import experiment, models, train
from conadv_jax.base.errors import ConfigError
from conadv_jax.config import from_config_dict
from conadv_jax.data.quarantine import Quarantine
from conadv_jax.debug import diagnosis, replay
from conadv_jax.method.staleness import pending_perturbation
from conadv_jax.run import feed, metrics, plots
from configs import digits

BAD_STEP, BAD_PLACE = 4, 21  # in the batch of that step


class TrapNet(helpers.TinyNet):
  """Has infinite logits for one image, where it is the first view."""

  image = np.full((8, 8, 1), np.inf)  # normalized

  def __call__(self, x, routes, train, examples=None):
    logits = super().__call__(x, routes, train, examples)
    return jnp.where(self.is_trapped(x)[..., None], jnp.inf, logits)

  def is_trapped(self, x):
    distance = jnp.abs(x - jnp.asarray(self.image, x.dtype)).max((-3, -2, -1))
    first = jnp.arange(x.shape[1])[None, :, None] == 0
    return (distance < 1e-3) & first


class DeepTrapNet(TrapNet):
  """Has no finite gradient either, for any weight."""

  def __call__(self, x, routes, train, examples=None):
    x *= jnp.where(self.is_trapped(x), jnp.nan, 1)[..., None, None, None]
    return super().__call__(x, routes, train, examples)


def settings(**fields):
  values = digits.get_config('batch_size=64')
  values.update_from_flattened_dict(
    {
      'model': 'trap',
      'bn_group_size': 8,
      'max_steps': 5,
      'log_every_steps': 1,
      'attack_stats_every_steps': 0,
      'plots': False,
      'attack.preset': 'paper',  # with random starts
      'eval.every_steps': 0,
      'eval.attack': 'none',
      'checkpoint.every_steps': 2,
      **{name.replace('__', '.'): value for name, value in fields.items()},
    }
  )
  return from_config_dict(values)


@pytest.fixture(scope='module', autouse=True)
def trap():
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(models.MODELS, 'tiny', models.Entry(helpers.TinyNet, 4))
    patch.setitem(models.MODELS, 'trap', models.Entry(TrapNet, 4))
    patch.setitem(models.MODELS, 'deep_trap', models.Entry(DeepTrapNet, 4))
    yield patch


@pytest.fixture(scope='module')
def spoiled(tmp_path_factory, trap):
  """A run in which one example of step BAD_STEP is not finite, and its id."""
  cfg = settings()
  run = experiment.build(cfg)
  ids = feed.ExampleIds(0, keep=9)
  source = run.spec.open('train', cfg.dataset)
  batches = list(feed.batches(run, source, Quarantine(), ids, 0, BAD_STEP))
  image = np.asarray(batches[-1]['clean']).reshape(64, 8, 8, 1)[BAD_PLACE]
  normalized = (image - np.array(run.spec.mean)) / np.array(run.spec.std)
  trap.setattr(TrapNet, 'image', normalized)
  workdir = tmp_path_factory.mktemp('spoiled')
  train.train(cfg, str(workdir))
  return workdir, int(ids[BAD_STEP - 1][BAD_PLACE])


def hashes(directory):
  return {
    path.relative_to(directory): hashlib.sha256(path.read_bytes()).hexdigest()
    for path in directory.rglob('*')
    if path.is_file()
  }


def test_a_bad_step_comes_out_bit_for_bit_and_names_its_example(
  spoiled, capsys
):
  workdir, bad_id = spoiled
  record = json.loads((workdir / f'bad_steps/{BAD_STEP}.json').read_text())
  assert record['loss'] == 'nan' and np.isfinite(record['loss_adv'])
  before = hashes(workdir)

  found = replay.main(['prog', f'--workdir={workdir}', f'--replay={BAD_STEP}'])
  assert found['from_step'] == 2
  assert found['reproduced'] == dict.fromkeys(
    ('example_ids', 'loss', 'grad_norm', 'loss_clean', 'loss_adv'), True
  )
  assert found['loss_adv'] == record['loss_adv']
  clean, adv = found['views']['clean'], found['views']['adv']
  worst = clean['examples'][0]
  assert (worst['id'], worst['place']) == (bad_id, BAD_PLACE)
  assert worst['loss'] == 'nan'
  assert all(isinstance(x['loss'], float) for x in clean['examples'][1:])
  assert all(x['nonfinite'] == 0 for x in adv['gradients'])
  assert found['nonfinite_state'] == {'before': [], 'after': []}
  for made in found['perturbation'].values():
    assert -16 <= made['min_px'] < 0 < made['max_px'] <= 16
    assert made['nonfinite'] == 0

  out = capsys.readouterr().out
  assert 'reproduced bit for bit' in out and f'{bad_id:>9}' in out
  after = hashes(workdir)
  new = {f'{BAD_STEP}_replay.json', f'{BAD_STEP}.png'}
  assert {path.name for path in after.keys() - before.keys()} == new
  assert all(after[path] == before[path] for path in before)
  stored = json.loads(
    (workdir / f'bad_steps/{BAD_STEP}_replay.json').read_text()
  )
  assert stored == found


@pytest.mark.slow
def test_a_healthy_step_reproduces_the_metrics_from_the_seed(
  spoiled, tmp_path, capsys
):
  """The only older checkpoint is damaged, so it starts at step 0."""
  directory = tmp_path / 'run'
  shutil.copytree(spoiled[0], directory)
  for data in (directory / 'checkpoints/2/state').rglob('*'):
    if data.is_file() and data.stat().st_size > 500:
      data.write_bytes(data.read_bytes()[:-100])
  found = replay.main(['prog', f'--workdir={directory}', '--replay=3'])
  assert found['from_step'] == 0
  assert 'damaged, skipped' in capsys.readouterr().out
  rows = metrics.read_metrics(directory)
  (row,) = (r for r in rows if (r['step'], r['split']) == (3, 'train'))
  names = ('loss', 'grad_norm', 'loss_clean', 'loss_adv')
  assert [found[name] for name in names] == [row[name] for name in names]
  assert found['reproduced'] == dict.fromkeys(names, True)
  # The diagnosis is another program: the same numbers but for rounding.
  for view in ('clean', 'adv'):
    loss = found['views'][view]['loss']
    assert loss == pytest.approx(row[f'loss_{view}'], rel=1e-5)
    largest = [x['loss'] for x in found['views'][view]['examples']]
    assert largest == sorted(largest, reverse=True) and largest[0] > loss


@pytest.mark.slow
def test_an_ascent_that_is_not_finite_is_named(spoiled, tmp_path, capsys):
  """Weights are moved along what the step before made of the example."""
  del spoiled  # its trap is set
  fields = {'model': 'deep_trap', 'method': 'consam', 'staleness_steps': None}
  train.train(settings(**fields), str(tmp_path))
  step = f'--replay={BAD_STEP}'
  found = replay.main(['prog', f'--workdir={tmp_path}', step])
  assert found['reproduced'] and all(found['reproduced'].values())
  state = found['nonfinite_state']
  assert state['before'] and not state['after']
  assert all(
    name.startswith('.perturbation.weights') for name in state['before']
  )
  assert 'not finite, before: .perturbation.weights' in capsys.readouterr().out


def test_what_differs_from_the_run_is_told():
  loss = np.float32(2.3)
  numbers = {
    'loss': float('nan'),
    'loss_adv': float(loss),
    'grad_norm': float('inf'),
    'top1_adv': 3.0,
  }
  record = {
    'example_ids': [4, 5],
    'loss': 'nan',
    'loss_adv': float(loss),
    'grad_norm': 'inf',
  }
  same = replay.compared(record, numbers, [4, 5])
  assert same == dict.fromkeys(record, True)
  assert 'bit for bit' in replay.verdict(7, same)
  row = {'step': 7, 'loss': None, 'loss_adv': float(loss), 'grad_norm': None}
  same = replay.compared(row, numbers, [4, 5])
  assert same == dict.fromkeys(('loss', 'loss_adv', 'grad_norm'), True)
  others = {
    'example_ids': [5, 4],
    'loss': 2.5,
    'loss_adv': float(np.nextafter(loss, np.float32(9))),
    'grad_norm': '-inf',
  }
  for name, value in others.items():
    same = replay.compared(record | {name: value}, numbers, [4, 5])
    assert [other for other in same if not same[other]] == [name]
    assert f'NOT reproduced, {name} differ' in replay.verdict(7, same)
  assert 'no numbers' in replay.verdict(7, replay.compared({}, numbers, []))


@pytest.mark.parametrize(
  'argv, message',
  [
    (['--replay=3'], 'missing --workdir'),
    (['--workdir=DIR'], 'missing --replay=STEP'),
    (['--workdir=DIR', '--replay=0'], 'replay=0: the run .* steps 1 to 5'),
    (['--workdir=DIR', '--replay=6'], 'replay=6: the run .* steps 1 to 5'),
    (['--workdir=EMPTY', '--replay=3'], 'holds no run'),
    (['--workdir=DIR', '--replay=3', '--config.seed=1'], 'seed=1: the run was'),
  ],
)
def test_wrong_usage_is_an_error(argv, message, spoiled, tmp_path):
  places = {'DIR': spoiled[0], 'EMPTY': tmp_path}
  for name, path in places.items():
    argv = [arg.replace(name, str(path)) for arg in argv]
  with pytest.raises(ConfigError, match=message):
    replay.main(['prog', *argv])


def test_another_data_set_is_refused(spoiled, tmp_path):
  directory = tmp_path / 'run'
  directory.mkdir()
  content = json.loads((spoiled[0] / 'config.json').read_text())
  content['data']['num_train'] = 7
  (directory / 'config.json').write_text(json.dumps(content))
  with pytest.raises(ConfigError, match='data.num_train: 7 -> 1437'):
    replay.main(['prog', f'--workdir={directory}', '--replay=3'])


@pytest.mark.slow
@pytest.mark.parametrize(
  'method, fields',
  [
    ('disadv', {'microbatches': 2, 'bn_group_size': 4}),
    ('baseline', {'bn_group_size': 32}),
    ('conadv', {'bn_group_size': 32}),
    ('consam', {'microbatches': 2, 'bn_group_size': 4}),
    ('sam', {'bn_group_size': 4, 'sam.group_size': 8, 'sam.rho': 1.0}),
    ('conadv_consam', {'bn_group_size': 8, 'sam.group_size': 8}),
    ('msam', {'bn_group_size': 8}),
  ],
)
def test_the_diagnosis_has_the_losses_and_gradients_of_the_step(method, fields):
  """Other layouts: an attack in the step, microbatches, groups over devices."""
  cfg = settings(model='tiny', method=method, staleness_steps=None, **fields)
  run = experiment.build(cfg)
  spec = run.spec
  batches = [
    run.put_batch(
      {name: x.reshape(-1, *x.shape[2:]) for name, x in batch.items()}
    )
    for batch in helpers.random_batches(cfg, 2, spec=spec)
  ]
  step_fn = run.compile_step()
  state = pending_perturbation(cfg, step_fn, run.init_state(), batches[0])
  found, delta = diagnosis.make_diagnosis_fn(run)(state, batches[0])
  places = jnp.array([0, 63, 17])
  images = diagnosis.make_images_fn(run)(batches[0], delta, places)
  clean = np.asarray(batches[0]['clean']).reshape(64, *spec.image_shape)
  np.testing.assert_array_equal(images['clean'], clean[np.asarray(places)])
  if delta is not None:
    moved = clean + np.asarray(delta).reshape(clean.shape)
    expected = np.clip(moved, 0, 255)[np.asarray(places)]
    np.testing.assert_allclose(images['adv'], expected, rtol=1e-6)
  found = jax.device_get(found)
  _, values = step_fn(state, *batches)
  for i, (view, _) in enumerate(cfg.views):
    loss = found['loss'][..., i].mean()
    assert loss == pytest.approx(float(values[f'loss_{view}']), rel=1e-5)
    top1 = 100 * (found['predicted'][..., i] == found['label']).mean()
    assert top1 == pytest.approx(float(values[f'top1_{view}']))
    leaves = np.sqrt((found['norms'][i] ** 2).sum())
    assert found['norm'][i] == pytest.approx(leaves, rel=1e-5)
  if len(cfg.views) == 1:
    expected = float(values['grad_norm'])
    assert found['norm'][0] == pytest.approx(expected, rel=1e-4)
  else:  # that of the mean is between the difference and the sum of both
    a, b = found['norm'] / 2
    assert abs(a - b) <= float(values['grad_norm']) <= a + b


def test_the_worst_examples_come_first():
  losses = np.array([0.5, np.nan, 3.0, -np.inf, 1.0, np.inf, 2.0])
  assert diagnosis.worst(losses, 5).tolist() == [1, 3, 5, 2, 6]


def test_pixels_that_are_not_finite_are_drawn(tmp_path):
  image = np.full((2, 4, 4, 3), 200.0)
  image[0, 0, 0, 0], image[1, 1, 1, 1] = np.nan, np.inf
  plots.images_by_row({'clean': image}, ['a', 'b'], 't', tmp_path / 'x.png')
  assert (tmp_path / 'x.png').read_bytes().startswith(b'\x89PNG')
