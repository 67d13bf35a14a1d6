"""Robust accuracy of a trained network: against Foolbox, AutoAttack, itself."""

import dataclasses
import functools
import importlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conadv_jax import evaluate, experiment, methods, train
from conadv_jax.config import from_config_dict
from conadv_jax.method.attack import sample_start
from conadv_jax.method.state import Snapshot, Stream, stream_key
from conadv_jax.run import autoattack, workdir
from conadv_jax.run.reopen import restore_newest
from configs import digits

EPSILON = 24.0


def settings(**fields):
  values = digits.get_config('method=disadv,batch_size=64')
  values.update_from_flattened_dict(
    {
      'epochs': 10.0,
      'schedule.warmup_epochs': 2.0,
      'eval.attack': 'none',
      'eval.every_steps': 0,
      'eval.epsilon': EPSILON,
      'attack_stats_every_steps': 0,
      'plots': False,
      **fields,
    }
  )
  return from_config_dict(values)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """(work directory, run, weights, test images, labels) of a ResNet-8."""
  path = tmp_path_factory.mktemp('trained')
  build = functools.partial(experiment.build, devices=jax.devices()[:1])
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(experiment, 'build', build)
    clean = methods.Attack('clean_start', steps=5)
    patch.setitem(methods.ATTACKS, 'clean_start', clean)
    result = train.train(settings(), str(path))
    assert result['top1'] > 95
    run = experiment.build(settings())
    _, state = restore_newest(workdir.path_of(str(path)), run)
    weights = Snapshot(state.params, state.batch_stats)
    weights = jax.device_get(weights)
    images, labels = run.spec.store.splits['test']
    yield path, run, weights, images, labels


def evaluated(trained, *flags):
  path, *_ = trained
  return evaluate.evaluate(['prog', f'--workdir={path}', *flags])


def top1(rows, **wanted):
  (row,) = [r for r in rows if all(r[k] == x for k, x in wanted.items())]
  return row['top1']


# ---- By itself --------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize('norm', ['linf', 'l2'])
def test_accuracy_falls_with_the_radius_and_is_the_clean_one_at_0(
  norm, trained
):
  radii = (
    [0, 4, 8, 16, 32, 64] if norm == 'linf' else [0, 32, 64, 128, 256, 512]
  )
  rows = evaluated(
    trained,
    f'--epsilons={",".join(map(str, radii))}',
    f'--config.eval.norm={norm}',
    '--config.eval.attack=fgsm,pgd',
    '--config.eval.attack_steps=5',
  )
  path, *_ = trained
  for attack in ('fgsm', 'pgd'):
    found = [top1(rows, attack=attack, epsilon=radius) for radius in radii]
    assert found[0] == rows[0]['top1']
    assert found == sorted(found, reverse=True) and found[-1] < found[0] - 30
    file = path / 'plots' / f'robustness_{attack}_{norm}.json'
    points = json.loads(file.read_text())['points']
    assert [point['top1'] for point in points] == found
    assert [point['epsilon'] for point in points] == radii
    png = file.with_suffix('.png').read_bytes()
    assert png.startswith(b'\x89PNG') and len(png) > 10_000


@pytest.mark.slow
def test_accuracy_falls_with_steps_and_with_restarts(trained):
  found = {}
  for steps, restarts in ((1, 1), (3, 1), (20, 1), (20, 4)):
    rows = evaluated(
      trained,
      '--config.eval.attack=pgd',
      f'--config.eval.attack_steps={steps}',
      f'--config.eval.restarts={restarts}',
    )
    assert (rows[1]['attack_steps'], rows[1]['restarts']) == (steps, restarts)
    found[steps, restarts] = rows[1]['top1'], rows[1]['loss']
  (one, _), (three, _), (more, loss), (again, worse) = found.values()
  assert one >= three >= more >= again and one > again
  assert worse > loss


# ---- Foolbox ----------------------------------------------------------------


def foolbox_top1(trained, name, norm, steps):
  foolbox = pytest.importorskip('foolbox')
  torch = pytest.importorskip('torch')
  _, run, weights, images, labels = trained
  network = autoattack.torch_network(run, weights)

  class Module(torch.nn.Module):
    def forward(self, x):
      return network(x)

  model = foolbox.PyTorchModel(Module().eval(), bounds=(0, 1), device='cpu')
  x = torch.from_numpy(np.float32(images).transpose(0, 3, 1, 2) / 255)
  if name == 'fgsm':
    kind = {'linf': 'LinfFastGradientAttack', 'l2': 'L2FastGradientAttack'}
    attack = getattr(foolbox.attacks, kind[norm])(random_start=False)
  else:
    kind = {'linf': 'LinfPGD', 'l2': 'L2PGD'}[norm]
    attack = getattr(foolbox.attacks, kind)(
      abs_stepsize=2.5 * radius_of(norm) / steps / 255,
      steps=steps,
      random_start=name == 'pgd',
    )
    # The same random start as ours; everything else is Foolbox's.
    start = x + torch.from_numpy(random_start(trained, norm))
    tensor = importlib.import_module('eagerpy').astensor(start)
    attack.get_random_start = lambda x, epsilon: tensor
  y = torch.from_numpy(np.int64(labels))
  _, _, success = attack(model, x, y, epsilons=[radius_of(norm) / 255])
  return 100 * (1 - success.numpy().mean())


def random_start(trained, norm):
  """That of the evaluation's one batch, [N, C, H, W] in units of 1."""
  _, run, _, images, labels = trained
  shape = (1, run.config.eval.batch_size, *images.shape[1:])
  attack = dataclasses.replace(
    methods.ATTACKS['pgd'], norm=norm, epsilon=radius_of(norm)
  )
  key = stream_key(run.config.seed, Stream.EVAL_ATTACK, 0)
  start = sample_start(attack, key, jnp.zeros(shape), jnp.zeros(shape[:2]), 10)
  delta = np.array(start.delta)[0, : len(images)]
  return delta.transpose(0, 3, 1, 2) / 255


def radius_of(norm):
  return EPSILON if norm == 'linf' else 150.0


@pytest.mark.parity
@pytest.mark.parametrize('norm', ['linf', 'l2'])
@pytest.mark.parametrize(
  'name, steps', [('fgsm', 1), ('clean_start', 10), ('pgd', 10)]
)
def test_robust_accuracy_agrees_with_foolbox(name, steps, norm, trained):
  expected = foolbox_top1(trained, name, norm, steps)
  clean, row = evaluated(
    trained,
    f'--config.eval.attack={name}',
    f'--config.eval.attack_steps={steps}',
    f'--config.eval.norm={norm}',
    f'--config.eval.epsilon={radius_of(norm)}',
  )
  assert abs(row['top1'] - expected) <= 0.5
  assert 5 < row['top1'] < clean['top1'] - 10


# ---- AutoAttack -------------------------------------------------------------


@pytest.mark.parity
@pytest.mark.parametrize(
  'norm, names', [('linf', 'apgd-ce,apgd-t'), ('l2', 'apgd-ce,fab-t')]
)
def test_autoattack_agrees_with_us_and_is_stronger_than_pgd(
  norm, names, trained, monkeypatch
):
  pytest.importorskip('pyautoattack')
  _, _, _, images, labels = trained
  returned, attack = [], autoattack.attack

  def recorded(*args, **kwargs):
    returned[:] = attack(*args, **kwargs)
    return returned

  monkeypatch.setattr(autoattack, 'attack', recorded)
  clean, pgd, ours = evaluated(
    trained,
    '--config.dataset.eval_split=test[:40]',
    f'--config.eval.norm={norm}',
    f'--config.eval.epsilon={radius_of(norm)}',
    '--config.eval.attack=pgd',
    '--config.eval.attack_steps=30',
    '--config.eval.restarts=5',
    f'--autoattack={names}',
  )
  adversarial, predicted = returned
  delta = adversarial - images[:40]
  size = {
    'linf': np.abs(delta).max((1, 2, 3)),
    'l2': np.sqrt((delta**2).sum((1, 2, 3))),
  }[norm]
  assert 1 < size.max() < radius_of(norm) * 1.001
  assert adversarial.min() >= 0 and adversarial.max() <= 255.001
  # Its own accuracy is that of our network on the images that it returns.
  assert ours['top1'] == 100 * (predicted == labels[:40]).mean()
  assert ours['attack'] == f'autoattack: {names.replace(",", ", ")}'
  assert (ours['norm'], ours['epsilon']) == (norm, radius_of(norm))
  assert ours['top1'] <= pgd['top1'] < clean['top1'] - 10
  assert pgd['top1'] - ours['top1'] < 10
