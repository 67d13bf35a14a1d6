"""What is evaluated: the run's own examples, training examples, others."""

import json

import helpers
import jax.numpy as jnp
import numpy as np
import pytest

from conadv_jax import evaluate, experiment, models, train
from conadv_jax.base.errors import ConfigError
from conadv_jax.config import from_config_dict
from conadv_jax.export import export
from conadv_jax.run import reopen, summary
from configs import digits


@pytest.fixture(scope='module', autouse=True)
def tiny_network():
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(models.MODELS, 'tiny', models.Entry(helpers.TinyNet, 4))
    patch.setattr(summary, '_draw', lambda *_: None)  # compiles an attack
    yield


def settings(**fields):
  values = digits.get_config('batch_size=64')
  values.update_from_flattened_dict(
    {
      'model': 'tiny',
      'bn_group_size': 8,
      'max_steps': 6,
      'eval.attack': 'none',
      'eval.batch_size': 64,
      'attack_stats_every_steps': 0,
      **{name.replace('__', '.'): value for name, value in fields.items()},
    }
  )
  return from_config_dict(values)


@pytest.fixture(scope='module')
def directory(tmp_path_factory):
  """A run that evaluates 100 training examples, too."""
  path = tmp_path_factory.mktemp('run')
  train.train(settings(eval__train_split='train[:100]'), str(path))
  return path


def run_evaluate(directory, *flags):
  return evaluate.evaluate(
    ['prog', f'--workdir={directory}', '--config.eval.attack=none', *flags]
  )


def read(path):
  return json.loads(path.read_text())


def logits_of(directory, split, count):
  """(logits [N, K], labels [N]) of clean digits, by the network alone."""
  config = from_config_dict(read(directory / 'config.json')['config'])
  run = experiment.build(config)
  _, state = reopen.restore_newest(reopen.workdir.path_of(str(directory)), run)
  images, labels = run.spec.store.splits[split]
  x = (images[:count] - run.spec.mean[0]) / run.spec.std[0]
  variables = {'params': state.params, 'batch_stats': state.batch_stats}
  x = jnp.asarray(x, jnp.float32)[None, None]
  logits, _ = run.apply_fn(variables, x, (0,), False)
  return np.asarray(logits[0, 0], np.float64), labels[:count]


# ---- Training examples, and other splits ------------------------------------


def test_training_examples_are_evaluated_too(directory):
  logits, labels = logits_of(directory, 'train', 100)
  found = read(directory / 'summary.json')
  right = logits.argmax(-1) == labels
  assert found['train_top1'] == pytest.approx(100 * right.mean())
  log_p = logits - np.logaddexp.reduce(logits, -1, keepdims=True)
  loss = -log_p[np.arange(100), labels].mean()
  assert found['train_loss'] == pytest.approx(loss, rel=1e-5)
  own, of_train = found['evaluations']
  assert (own['data']['split'], own['top1']) == ('test', found['top1'])
  assert of_train['data']['split'] == 'train[:100]'
  assert of_train['data']['num_examples'] == 100
  assert of_train['data']['digest'] != own['data']['digest']
  assert of_train['top1'] == found['train_top1'] != found['top1']


def test_evaluate_measures_them_too_and_any_other_split(directory, tmp_path):
  before = read(directory / 'summary.json')
  rows = run_evaluate(directory)
  assert [row['data']['split'] for row in rows] == ['test', 'train[:100]']
  assert rows == before['evaluations']
  split = '--config.dataset.eval_split=train[:100]'
  (row,) = run_evaluate(directory, split, '--config.eval.train_split=')
  assert row == rows[1]
  split = '--config.dataset.eval_split=test[:50]'
  (row,) = run_evaluate(directory, split, '--config.eval.train_split=')
  after = read(directory / 'summary.json')
  assert after == before | {'evaluations': [*before['evaluations'], row]}
  logits, labels = logits_of(directory, 'test', 50)
  right = logits.argmax(-1) == labels
  assert row['top1'] == pytest.approx(100 * right.mean())
  output = tmp_path / 'm.safetensors'
  export.export(['prog', f'--workdir={directory}', f'--output={output}'])
  assert read(output.with_suffix('.json'))['top1'] == before['top1']


def test_a_wrong_split_is_refused_at_the_start(directory, tmp_path):
  for split, said in (('trian', "'trian'"), ('train[:9999]', 'out of range')):
    with pytest.raises(ConfigError, match=r'^eval\.train_split=') as error:
      train.train(settings(eval__train_split=split), str(tmp_path / 'run'))
    assert said in str(error.value) and 'train (1,437)' in str(error.value)
    assert not (tmp_path / 'run').exists()
    with pytest.raises(ConfigError, match=r'^eval\.train_split='):
      run_evaluate(directory, f'--config.eval.train_split={split}')
  with pytest.raises(ConfigError, match=r'^dataset\.eval_split='):
    run_evaluate(directory, '--config.dataset.eval_split=trian')


def test_only_evaluate_takes_another_split(directory, tmp_path):
  argv = ['prog', f'--workdir={directory}', f'--output={tmp_path}/m.stablehlo']
  with pytest.raises(ConfigError, match=r'^dataset\.eval_split='):
    export.export([*argv, '--config.dataset.eval_split=test[:50]'])
