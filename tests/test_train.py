"""Whole runs on real digits: determinism, resume, errors and exit codes."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys

import helpers
import jax
import numpy as np
import pytest

from conadv_jax import cli, evaluate, experiment, models, train
from conadv_jax.base.errors import ConfigError, NonFiniteError
from conadv_jax.checkpoints.checkpoint import Checkpoints
from conadv_jax.config import from_config_dict
from conadv_jax.data import sampler
from conadv_jax.data.quarantine import Quarantine
from conadv_jax.run import feed, metrics, training
from conadv_jax.run.evaluator import Evaluator, weights_of
from configs import digits

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(scope='module', autouse=True)
def tiny_network():
  """A network that compiles in a second, under the name `tiny`."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(models.MODELS, 'tiny', models.Entry(helpers.TinyNet, 4))
    yield


def settings(arg='batch_size=64', **fields):
  values = digits.get_config(arg)
  values.update_from_flattened_dict(
    {
      'model': 'tiny',
      'bn_group_size': 8,
      'max_steps': 20,
      'log_every_steps': 1,
      'attack_stats_every_steps': 5,
      'eval.every_steps': 7,
      'eval.attack': 'none',
      'checkpoint.every_steps': 10,
      'plots': False,
      **{name.replace('__', '.'): value for name, value in fields.items()},
    }
  )
  return from_config_dict(values)


def final_state(run, workdir, step):
  """The saved state of `step`, without its perturbation."""
  checkpoints = Checkpoints(workdir, keep=3)
  _, state, _ = checkpoints.restore(run.abstract_state(), step)
  checkpoints.close()
  return state


def rows_without_timings(workdir):
  return [
    json.dumps({k: v for k, v in row.items() if k not in metrics.TIMINGS})
    for row in metrics.read_metrics(workdir)
  ]


@pytest.fixture(scope='module')
def unbroken(tmp_path_factory):
  """A run of 20 steps: its settings and work directory."""
  workdir = tmp_path_factory.mktemp('unbroken')
  train.train(settings(plots=True), str(workdir))
  return workdir


@pytest.mark.slow
def test_the_same_seed_gives_the_same_metrics(unbroken, tmp_path):
  train.train(settings(), str(tmp_path))
  rows = rows_without_timings(tmp_path)
  assert rows == rows_without_timings(unbroken)
  assert len(rows) == 20 + 4 + 2 + 1  # train, attack, test, test at the end


@pytest.mark.slow
def test_another_seed_gives_other_metrics(unbroken, tmp_path):
  train.train(settings('batch_size=64,seed=1'), str(tmp_path))
  assert rows_without_timings(tmp_path) != rows_without_timings(unbroken)


def test_a_run_resumed_at_a_save_point_equals_the_unbroken_one(
  unbroken, tmp_path
):
  train.train(settings(max_steps=10), str(tmp_path))
  summary = json.loads((tmp_path / 'summary.json').read_text())
  assert summary['steps'] == 10
  train.train(settings(), str(tmp_path))

  run = experiment.build(settings())
  ours, theirs = (
    jax.tree_util.tree_leaves_with_path(final_state(run, path, 20))
    for path in (tmp_path, unbroken)
  )
  assert len(ours) == len(theirs) > 20
  for (name, a), (_, b) in zip(ours, theirs, strict=True):
    assert np.array_equal(a, b), jax.tree_util.keystr(name)
  # The first part ended with an evaluation at step 10 that the other lacks.
  first_end = [r for r in metrics.read_metrics(tmp_path) if r['step'] == 10]
  assert [r['split'] for r in first_end] == ['train', 'attack', 'test']
  rows = [
    row
    for row in rows_without_timings(tmp_path)
    if not ('"step": 10,' in row and '"split": "test"' in row)
  ]
  assert rows == rows_without_timings(unbroken)


@pytest.mark.slow
@pytest.mark.parametrize('tau', [1, 3])
def test_the_pending_perturbation_is_made_again_after_a_restore(tau, tmp_path):
  """δ_t, random start included, from a checkpoint that does not hold it."""
  cfg = settings(staleness_steps=tau, attack__preset='paper', max_steps=6)
  run = experiment.build(cfg)
  step_fn = run.compile_step()
  source = run.spec.open('train', cfg.dataset)

  def fed(start, count):
    ids = feed.ExampleIds(start, keep=9)
    return feed.batches(run, source, Quarantine(), ids, start, count)

  batches = list(fed(0, 6))
  state = training.pending_perturbation(
    cfg, step_fn, run.init_state(), batches[0]
  )
  for t in range(5):
    state, _ = step_fn(state, batches[t], batches[t + 1])
  checkpoints = Checkpoints(tmp_path, keep=1)
  checkpoints.save(5, state)
  checkpoints.wait(5)
  _, restored, _ = checkpoints.restore(run.abstract_state(), 5)
  checkpoints.close()
  assert restored.perturbation is None
  batch = next(fed(5, 1))
  restored = training.pending_perturbation(cfg, step_fn, restored, batch)
  assert np.any(np.asarray(state.perturbation.images))
  for (name, a), (_, b) in zip(
    jax.tree_util.tree_leaves_with_path(restored),
    jax.tree_util.tree_leaves_with_path(state),
    strict=True,
  ):
    assert np.array_equal(a, b), jax.tree_util.keystr(name)
  # Two donated steps after the restore.
  next_batch = next(fed(6, 1))
  for _ in range(2):
    restored, values = step_fn(restored, batch, next_batch)
  assert np.isfinite(values['loss'])


def test_a_run_writes_what_the_readme_says(unbroken):
  content = json.loads((unbroken / 'config.json').read_text())
  assert content['config']['batch_size'] == 64
  assert content['versions']['jax'] == jax.__version__
  assert content['devices']['count'] == 8
  summary = json.loads((unbroken / 'summary.json').read_text())
  for name in (
    'method', 'batch_size', 'seed', 'steps', 'epochs', 'top1', 'robust_top1',
    'images_per_sec', 'seconds',
  ):  # fmt: skip
    assert name in summary
  assert 0 <= summary['top1'] <= 100
  for name in ('training_curves.png', 'adversarial_images.png'):
    png = (unbroken / 'plots' / name).read_bytes()
    assert png.startswith(b'\x89PNG') and len(png) > 10_000
  assert list(unbroken.glob('events.out.tfevents.*'))
  row = metrics.read_metrics(unbroken)[0]
  assert {
    'loss', 'loss_clean', 'loss_adv', 'top1_clean', 'top1_adv', 'grad_norm',
    'trust_ratio_min', 'trust_ratio_max_layer', 'input_wait_percent',
  } <= set(row)  # fmt: skip


def test_tensorboard_has_the_values_of_metrics_jsonl(unbroken):
  from tensorboard.backend.event_processing import event_accumulator

  events = event_accumulator.EventAccumulator(
    str(unbroken), size_guidance={'scalars': 0}
  )
  events.Reload()
  written = {e.step: e.value for e in events.Scalars('train/loss')}
  expected = {
    row['step']: np.float32(row['loss'])
    for row in metrics.read_metrics(unbroken)
    if row['split'] == 'train'
  }
  assert written == expected


def test_a_directory_of_another_configuration_is_refused(unbroken):
  with pytest.raises(ConfigError, match=r'seed: 0 -> 7') as error:
    train.train(settings('batch_size=64,seed=7'), str(unbroken))
  assert 'another --workdir' in str(error.value)


def test_a_rerun_of_a_finished_run_changes_nothing(unbroken):
  """Also with other values of fields that do not alter the weights."""
  files = [unbroken / name for name in ('metrics.jsonl', 'summary.json')]
  before = [file.read_bytes() for file in files]
  changed = dataclasses.replace(settings(), log_every_steps=3, max_steps=20)
  summary = train.train(changed, str(unbroken))
  assert summary == json.loads(before[1])
  assert [file.read_bytes() for file in files] == before


def test_fewer_steps_than_were_trained_are_refused(unbroken):
  with pytest.raises(ConfigError, match='already at step 20'):
    train.train(settings(max_steps=10), str(unbroken))


def test_a_nonfinite_run_stops_with_the_example_ids(tmp_path):
  cfg = settings(
    optimizer__name='sgd',
    optimizer__learning_rate=1e30,
    schedule__warmup_epochs=0.0,
    max_nonfinite_steps=3,
  )
  with pytest.raises(NonFiniteError, match='3 steps in a row') as error:
    train.train(cfg, str(tmp_path))
  steps = sorted(int(file.stem) for file in tmp_path.glob('bad_steps/*.json'))
  assert len(steps) == 3 and steps[-1] - steps[0] == 2
  for step in steps:
    content = json.loads((tmp_path / f'bad_steps/{step}.json').read_text())
    ids, _ = sampler.example_ids(cfg.seed, step - 1, 64, 1437)
    assert content['example_ids'] == ids.tolist()
    next_ids, _ = sampler.example_ids(cfg.seed, step, 64, 1437)
    assert content['next_example_ids'] == next_ids.tolist()
  ids, _ = sampler.example_ids(cfg.seed, steps[0] - 1, 64, 1437)
  assert ', '.join(str(i) for i in ids[:8]) in str(error.value)
  assert not list((tmp_path / 'checkpoints').glob('[0-9]*'))


def test_missing_data_is_an_error_with_the_command(tmp_path):
  cfg = settings(
    dataset__name='cifar10', dataset__data_dir=str(tmp_path / 'none')
  )
  with pytest.raises(ConfigError, match='prepare_tfds.py --name=cifar10'):
    train.train(cfg, str(tmp_path / 'run'))


@pytest.mark.parametrize(
  'field, value, message',
  [
    ('model', 'resnet9', "did you mean 'resnet"),
    ('dataset.name', 'digit', "did you mean 'digits'"),
    ('dataset.random_flip', True, 'mirrored'),
    ('batch_size', 60, 'does not divide over 8 devices'),
    ('dtype', 'float64', 'JAX_ENABLE_X64'),
  ],
)
def test_wrong_settings_fail_before_anything_is_written(
  field, value, message, tmp_path
):
  fields = {field.replace('.', '__'): value}
  if field == 'batch_size':
    fields['bn_group_size'] = 60
  with pytest.raises(ConfigError, match=message):
    train.train(settings(**fields), str(tmp_path / 'run'))
  assert not (tmp_path / 'run').exists()


def exit_code(monkeypatch, main, *argv):
  monkeypatch.setattr(sys, 'argv', ['prog', *argv])
  with pytest.raises(SystemExit) as exit_:
    cli.run(main)
  return exit_.value.code


CONFIG = f'--config={ROOT}/configs/digits.py'


BROKEN_FILES = {
  'SYNTAX': 'def get_config(:',
  'ATTRIBUTE': 'import json\ndef get_config():\n  return json.nope()\n',
  'IMPORT': 'import there_is_no_such_module\n',
}


@pytest.mark.parametrize(
  'argv, message',
  [
    ([], 'missing --config'),
    ([CONFIG], 'missing --workdir'),
    ([f'{CONFIG}x', '--workdir=w'], 'digits.pyx'),
    ([CONFIG, '--workdir=w', '--config.attack.epz=1'], 'attack.epz'),
    ([CONFIG, '--workdir=w', '--config.seed=x'], 'seed'),
    ([CONFIG, '--wrkdir=w'], 'wrkdir'),
    ([CONFIG, '--workdir=w', 'stray'], 'stray'),
    ([f'{CONFIG}:metod=conadv', '--workdir=w'], "did you mean 'method'"),
    ([f'{CONFIG}:method=conadw', '--workdir=w'], "did you mean 'conadv'"),
    ([CONFIG, '--workdir=w', '--config.attack.epsilon=-1.0'], '>= 0'),
    ([CONFIG, '--workdir=w', '--config.staleness_steps=-1'], '>= 0'),
    ([CONFIG, '--workdir=w', '--config.optimizer.name=adam'], 'optimizer.name'),
    (['--config=SYNTAX', '--workdir=w'], 'SyntaxError'),
    (['--config=ATTRIBUTE', '--workdir=w'], "no attribute 'nope'"),
    (['--config=IMPORT', '--workdir=w'], "No module named 'there_is_no"),
  ],
)
def test_bad_usage_exits_with_2_and_says_why(
  argv, message, monkeypatch, capsys, tmp_path
):
  for name, source in BROKEN_FILES.items():
    (tmp_path / f'{name}.py').write_text(source)
    argv = [a.replace(name, f'{tmp_path}/{name}.py') for a in argv]
  assert exit_code(monkeypatch, train.main, *argv) == 2
  assert message in capsys.readouterr().err


def test_a_nonfinite_run_exits_with_4(monkeypatch, capsys):
  def main(argv):
    raise NonFiniteError('5 steps in a row')

  assert exit_code(monkeypatch, main) == 4
  assert '5 steps in a row' in capsys.readouterr().err


def test_evaluate_prints_a_table_and_adds_it_to_the_summary(unbroken, capsys):
  before = json.loads((unbroken / 'summary.json').read_text())['evaluations']
  rows = evaluate.evaluate(
    ['prog', f'--workdir={unbroken}', '--config.eval.attack_steps=2']
  )
  assert [row['attack'] for row in rows] == ['none', 'fgsm', 'pgd']
  assert rows[0]['top1'] >= rows[1]['top1']
  out = capsys.readouterr().out
  assert '360 examples' in out and f'{rows[2]["top1"]:.2f}' in out
  summary = json.loads((unbroken / 'summary.json').read_text())
  known = [row for row in before if row['attack'] not in ('none', 'fgsm')]
  assert summary['evaluations'] == known + rows
  assert summary['top1'] == pytest.approx(rows[0]['top1'])
  # The adversarial route gives other numbers, and is kept beside the others.
  more = evaluate.evaluate(
    ['prog', f'--workdir={unbroken}', '--config.eval.route=adv',
     '--config.eval.attack=none']
  )  # fmt: skip
  assert more[0]['loss'] != rows[0]['loss']
  summary = json.loads((unbroken / 'summary.json').read_text())
  assert summary['evaluations'] == known + rows + more


@pytest.mark.parametrize('name', ['attack.epsilon=8.0', 'model=resnet20'])
def test_evaluate_refuses_what_only_training_can_set(name, unbroken):
  argv = ['prog', f'--workdir={unbroken}', f'--config.{name}']
  with pytest.raises(ConfigError, match=f'{name.split("=")[0]}.*eval'):
    evaluate.evaluate(argv)


def test_evaluate_refuses_a_directory_without_a_run(tmp_path, monkeypatch):
  argv = [f'--workdir={tmp_path}']
  assert exit_code(monkeypatch, evaluate.evaluate, *argv) == 2


def test_evaluation_does_not_depend_on_the_batch_size(unbroken):
  """360 examples: smaller, not a divisor, and larger than the split."""
  results = []
  for size in (8, 104, 512):
    run = experiment.build(settings(eval__batch_size=size))
    state = final_state(run, unbroken, 20)
    source = run.spec.open('eval', run.config.dataset)
    weights = weights_of(run.config, state)
    evaluator = Evaluator(run, source, Quarantine())
    results.append(evaluator(weights, 'fgsm'))
  assert results[0]['top1'] == results[1]['top1'] == results[2]['top1']
  np.testing.assert_allclose(
    [r['loss'] for r in results], results[0]['loss'], rtol=1e-5
  )  # sums of float32 in another order


@pytest.mark.slow
def test_sigterm_saves_exits_with_42_and_the_rerun_finishes(tmp_path):
  command = [
    sys.executable, '-m', 'conadv_jax.train',
    '--config=configs/digits.py:batch_size=32', f'--workdir={tmp_path}',
    '--config.max_steps=40', '--config.log_every_steps=1',
  ]  # fmt: skip
  # As a user runs it: with the compiler's default optimization.
  environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''}
  with subprocess.Popen(
    command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
  ) as process:
    for line in process.stdout:
      if line.startswith('step 5/'):
        process.send_signal(signal.SIGTERM)
        break
    rest = process.stdout.read()
    assert process.wait(timeout=120) == 42, rest
  steps = [int(p.name) for p in (tmp_path / 'checkpoints').glob('[0-9]*')]
  assert len(steps) == 1 and 5 <= steps[0] < 40, rest
  assert not (tmp_path / 'summary.json').exists()
  again = subprocess.run(
    command, cwd=ROOT, env=environment, capture_output=True, text=True
  )
  assert again.returncode == 0, again.stderr
  assert f'resumed at step {steps[0]}' in again.stdout
  rows = metrics.read_metrics(tmp_path)
  train_steps = [r['step'] for r in rows if r['split'] == 'train']
  assert train_steps == list(range(1, 41))


@pytest.mark.slow
def test_ctrl_c_in_the_quickstart_saves_and_the_rerun_goes_on(tmp_path):
  command = [sys.executable, 'scripts/quickstart.py', f'--output={tmp_path}']
  environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''}
  options = dict(cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
  with subprocess.Popen(command, start_new_session=True, **options) as process:
    for line in process.stdout:
      if line.startswith('step 20/'):
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        break
    rest = process.stdout.read()
    assert process.wait(timeout=120) == 42, rest
  with subprocess.Popen(command, start_new_session=True, **options) as process:
    for line in process.stdout:
      if line.startswith('resumed at step '):
        os.killpg(process.pid, signal.SIGTERM)
        break
    rest = process.stdout.read()
    assert process.wait(timeout=120) == 42, rest
