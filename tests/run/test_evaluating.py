"""What is evaluated: the run's own examples, training examples, others."""

import csv
import hashlib
import json
import re

import helpers
import jax.numpy as jnp
import numpy as np
import pytest

from conadv_jax import evaluate, experiment, train
from conadv_jax.base.errors import ConfigError
from conadv_jax.config import from_config_dict
from conadv_jax.export import export
from conadv_jax.models import weights
from conadv_jax.run import autoattack, reopen
from configs import digits


@pytest.fixture(scope='module', autouse=True)
def tiny_network():
  with helpers.tiny_network():
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
      'plots': False,
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


@pytest.mark.slow
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
  argv = [
    'prog',
    f'--workdir={directory}',
    f'--output={tmp_path}/m.safetensors',
  ]
  with pytest.raises(ConfigError, match=r'^dataset\.eval_split='):
    export.export([*argv, '--config.dataset.eval_split=test[:50]'])


# ---- Flags ------------------------------------------------------------------


@pytest.mark.parametrize(
  'flags, message',
  [
    (['--epsilons=1,x'], '--epsilons=1,x: must be numbers'),
    (['--epsilons=-1'], 'must be numbers >= 0'),
    (['--epsilons=1'], 'set --config.eval.attack'),
    (['--set=v3'], "unknown --set 'v3'; did you mean 'v2'"),
    (['--set=v2', '--config.dataset.eval_split=test'], 'dataset.eval_split'),
    (['--set=v2', '--autoattack=standard'], 'leave out --set'),
    (['--autoattack=pgd'], "unknown --autoattack 'pgd'"),
    (['--weights=w.safetensors'], '--output=FILE.json go together'),
    (['--output=w.json'], '--weights=FILE.safetensors'),
    (['--config.eval.norm=l3'], "eval.norm 'l3'"),
    (['--config.eval.restarts=0'], 'eval.restarts=0'),
  ],
)
def test_wrong_flags_are_refused(flags, message, directory):
  with pytest.raises(ConfigError, match=re.escape(message)):
    run_evaluate(directory, *flags)


def test_autoattack_needs_its_package_and_few_examples(directory, monkeypatch):
  monkeypatch.setattr(autoattack.importlib.util, 'find_spec', lambda _: None)
  with pytest.raises(ConfigError, match=r'torch.*\[robust\]'):
    run_evaluate(directory, '--autoattack=apgd-ce,square')
  monkeypatch.setattr(autoattack.importlib.util, 'find_spec', lambda name: name)
  monkeypatch.setattr(autoattack, 'MAX_EXAMPLES', 359)
  with pytest.raises(ConfigError, match=r'360 examples .*eval_split=SPLIT'):
    run_evaluate(directory, '--autoattack=standard')


# ---- By class and by radius -------------------------------------------------


def test_the_table_by_class_adds_up(directory, capsys):
  rows = run_evaluate(
    directory,
    '--per_class',
    '--config.eval.attack=fgsm',
    '--config.eval.train_split=',
  )
  said = capsys.readouterr().out
  (path,) = (directory / 'evaluations').glob('per_class_digits_test_*.csv')
  assert str(path) in said and '10 classes' in said
  table = list(csv.DictReader(path.read_text().splitlines()))
  assert list(table[0]) == [
    'label',
    'class',
    'examples',
    'clean',
    'fgsm linf 16',
  ]
  count = np.array([int(row['examples']) for row in table])
  assert count.sum() == 360
  for name, row in zip(('clean', 'fgsm linf 16'), rows, strict=True):
    top1 = np.array([float(row[name]) for row in table])
    assert (count * top1).sum() / 360 == pytest.approx(row['top1'])
  robust = [float(row['fgsm linf 16']) for row in table]
  assert robust == sorted(robust)
  logits, labels = logits_of(directory, 'test', 360)
  right = logits.argmax(-1) == labels
  for row in table:
    of_class = labels == int(row['label'])
    assert row['class'] == row['label']
    assert float(row['clean']) == pytest.approx(100 * right[of_class].mean())


def test_a_curve_begins_at_the_clean_accuracy(directory):
  clean, *rows = run_evaluate(
    directory,
    '--epsilons=8,2',
    '--config.eval.attack=fgsm',
    '--config.eval.train_split=',
  )
  assert [row['epsilon'] for row in rows] == [2.0, 8.0]
  what = read(directory / 'plots' / 'robustness_fgsm_linf.json')
  assert [point['epsilon'] for point in what['points']] == [0.0, 2.0, 8.0]
  assert what['points'][0]['top1'] == clean['top1']
  assert what['data']['split'] == 'test' and what['attack'] == 'fgsm'
  assert (directory / 'plots' / 'robustness_fgsm_linf.png').exists()


# ---- Weights in a file ------------------------------------------------------


def run_file(file, output, *flags):
  return evaluate.evaluate(
    ['prog', '--config=digits:method=conadv,batch_size=64',
     '--config.model=tiny', '--config.bn_group_size=8', f'--weights={file}',
     f'--output={output}', '--config.eval.attack=none', *flags]
  )  # fmt: skip


def own_row(directory):
  """The clean row of the run on its eval split."""
  (row,) = (
    row
    for row in read(directory / 'summary.json')['evaluations']
    if (row['data']['split'], row['attack']) == ('test', 'none')
  )
  return row


def test_an_exported_file_has_the_accuracy_of_its_run(directory, tmp_path):
  file, output = tmp_path / 'm.safetensors', tmp_path / 'to' / 'results.json'
  export.export(['prog', f'--workdir={directory}', f'--output={file}'])
  (row,) = run_file(file, output)
  own = own_row(directory)
  for name in ('top1', 'loss', 'ece', 'top5'):
    assert row[name] == pytest.approx(own[name], rel=1e-5)
  assert row['weights'] == {
    'file': str(file),
    'sha256': hashlib.sha256(file.read_bytes()).hexdigest(),
  }
  assert row['data'] == own['data'] and row['step'] is None
  found = read(output)
  assert found['evaluations'] == [row]
  assert found['config']['model'] == 'tiny' and 'eval' not in found['config']
  # The same again takes its own place; other routes have the same weights.
  (again,) = run_file(file, output, '--config.eval.route=adv')
  assert again['top1'] == row['top1']
  run_file(file, output)
  routes = [row['route'] for row in read(output)['evaluations']]
  assert routes == ['adv', 'clean']
  with pytest.raises(ConfigError, match='another configuration'):
    run_file(file, output, '--config.seed=1')


def test_files_that_are_not_the_networks_are_refused(directory, tmp_path):
  file, output = tmp_path / 'm.safetensors', tmp_path / 'results.json'
  for arrays, message in (
    ({'params/head/kernel': np.zeros((3, 3))}, "not those of model 'tiny'"),
    ({'fc.weight': np.zeros((3, 3))}, 'timm has no such network'),
  ):
    weights.save(str(file), arrays)
    with pytest.raises(ConfigError, match=message):
      run_file(file, output)
  file.write_text('no')
  with pytest.raises(ConfigError, match='not a safetensors file'):
    run_file(file, output)
  output.write_text('{"a": 1}')
  with pytest.raises(ConfigError, match='holds something else'):
    run_file(file, output)
  assert read(output) == {'a': 1}
