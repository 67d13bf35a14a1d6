"""The command on a run: its files, what it refuses, and what it repeats."""

import dataclasses
import hashlib
import json

import helpers
import numpy as np
import pytest

from conadv_jax import experiment, train
from conadv_jax.analysis import command, curvature, options, staleness
from conadv_jax.base.errors import ConfigError
from conadv_jax.config import from_config_dict
from conadv_jax.data.quarantine import Quarantine
from conadv_jax.run import metrics
from conadv_jax.run.evaluator import Evaluator, weights_of
from conadv_jax.run.reopen import parse_args, restore_newest
from configs import digits

QUICK = (
  '--examples=40', '--eigenvalues=2', '--probes=3', '--ascent_steps=2',
  '--points=3', '--grid=3',
)  # fmt: skip
ON_STEPS = 19  # the last step that is trained


def trained(directory, **fields):
  values = digits.get_config('batch_size=64')
  values.update_from_flattened_dict(
    {
      'model': 'tiny',
      'bn_group_size': 8,
      'max_steps': ON_STEPS,
      'log_every_steps': 1,
      'attack_stats_every_steps': 1,
      'attack.preset': 'paper',  # with random starts
      'checkpoint.every_steps': 2,
      'eval.every_steps': 0,
      'eval.attack': 'none',
      'plots': False,
      **{name.replace('__', '.'): value for name, value in fields.items()},
    }
  )
  train.train(from_config_dict(values), str(directory))
  return directory


@pytest.fixture(scope='module', autouse=True)
def tiny():
  with helpers.tiny_network():
    yield


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """A run with everything that can be analysed."""
  return trained(tmp_path_factory.mktemp('run'), noise_scale=True)


@pytest.fixture(scope='module')
def found(run, tmp_path_factory):
  """(output, what is found by everything, files of the run before)."""
  output = tmp_path_factory.mktemp('output')
  before = hashes(run)
  return output, analyse(run, *QUICK, f'--output={output}'), before


def analyse(directory, *flags):
  return command.analyse(['prog', f'--workdir={directory}', *flags])


def hashes(directory):
  return {
    path.relative_to(directory): hashlib.sha256(path.read_bytes()).hexdigest()
    for path in directory.rglob('*')
    if path.is_file()
  }


@pytest.mark.slow
def test_each_analysis_writes_a_picture_and_what_it_measured(run, found):
  output, results, before = found
  assert hashes(run) == before
  assert list(results) == list(command.ANALYSES)
  for name, (values, _) in results.items():
    assert (output / f'{name}.png').stat().st_size > 10_000
    content = json.loads((output / f'{name}.json').read_text())
    assert content['values'] == values
    assert all(isinstance(value, float) for value in values.values())
    assert content['versions']['jax'] and 'git_commit' in content
  asked = json.loads((output / 'sharpness.json').read_text())['asked']
  data = asked.pop('data')
  assert (data['split'], data['num_examples']) == ('train', 1437)
  assert asked == {
    'step': ON_STEPS, 'route': 'clean', 'use_ema': False, 'examples': 40,
    'seed': 0, 'rho': '0.05,0.1', 'rho_adaptive': '0.1,0.5', 'ascent_steps': 2,
  }  # fmt: skip
  assert {'lambda_max', 'lambda_2', 'trace', 'trace_stderr'} < set(
    results['curvature'].values
  )
  assert {
    'sharpness_0.05', 'sharpness_0.1', 'sharpness_adaptive_0.1',
    'sharpness_adaptive_0.5', 'weight_norm', 'loss', 'top1',
  } == set(results['sharpness'].values)  # fmt: skip


@pytest.mark.slow
def test_a_second_call_computes_nothing_and_replaces_nothing(
  run, found, monkeypatch, capsys
):
  output, results, _ = found
  before = hashes(output)
  monkeypatch.setattr(curvature, 'measure', None)
  flags = (*QUICK, f'--output={output}')
  assert analyse(run, '--what=curvature', *flags) == {
    'curvature': results['curvature']
  }
  assert 'curvature: is there already' in capsys.readouterr().out
  with pytest.raises(ConfigError, match=r'probes: 3 -> 4\n.*--output=DIR'):
    analyse(run, '--what=landscape,curvature', *flags, '--probes=4')
  with pytest.raises(ConfigError, match=r"route: 'clean' -> 'adv'"):
    analyse(run, '--what=sharpness', *flags, '--config.eval.route=adv')
  (output / 'noise.json').write_text('{}')
  with pytest.raises(ConfigError, match='noise.json: not the result'):
    analyse(run, '--what=noise', *flags)
  before.pop((output / 'noise.json').relative_to(output))
  assert before.items() < hashes(output).items()


@pytest.mark.slow
def test_one_step_of_staleness_is_what_the_run_saw(run, found, tmp_path):
  """It has compared its pending perturbation with a fresh one at each step."""
  rows = found[1]['staleness'].curves['rows']
  flags = ('--what=staleness', '--at=19,17', f'--output={tmp_path}')
  rows = rows + analyse(run, *flags)['staleness'].curves['rows']
  logged = {
    row['step']: row
    for row in metrics.read_metrics(run)
    if row['split'] == 'attack'
  }
  # From the start, step 0, and by hand: checkpoints are of later steps.
  assert [(row['step'], row['tau']) for row in rows] == [
    (step, tau) for step in (16, 17, 19) for tau in staleness.TAUS
  ]
  for row in rows:
    seen = logged[row['step']]
    if row['tau'] == 0:
      assert row['cosine'] == pytest.approx(1, abs=1e-6)
      assert row['agreement'] == 100
      assert row['loss'] == pytest.approx(seen['loss_fresh'], rel=1e-5)
      assert row['error'] == pytest.approx(100 - seen['top1_fresh'], abs=1e-4)
    if row['tau'] == 1:
      assert row['loss'] == pytest.approx(seen['loss_stale'], rel=1e-5)
      assert row['error'] == pytest.approx(100 - seen['top1_stale'], abs=1e-4)
      for ours, logged_as in (
        ('cosine', 'delta_cosine'),
        ('agreement', 'delta_agreement'),
      ):
        assert row[ours] == pytest.approx(seen[logged_as], rel=1e-5)
  for step in (16, 19):
    cosines = [row['cosine'] for row in rows if row['step'] == step]
    assert cosines[0] > cosines[1] > cosines[-1]


@pytest.mark.slow
def test_the_noise_scale_is_of_means_over_steps(run, found):
  values = found[1]['noise'].values
  rows = [r for r in metrics.read_metrics(run) if r['split'] == 'train']
  square, trace = (
    np.mean([row[name] for row in rows])
    for name in ('noise_square', 'noise_trace')
  )
  assert values['noise_square'] == pytest.approx(square, rel=1e-12)
  assert values['noise_scale'] == pytest.approx(trace / square, rel=1e-12)


@pytest.mark.slow
def test_what_a_run_lacks_is_left_out_or_refused(tmp_path, capsys):
  run = trained(tmp_path, method='baseline', max_steps=1)
  results = analyse(run, *QUICK)
  assert list(results) == ['curvature', 'sharpness', 'landscape']
  assert (run / 'analysis/curvature.png').exists()
  out = capsys.readouterr().out
  assert "left out: staleness: 'baseline' has no adversarial view" in out
  for name in ('staleness', 'noise'):
    with pytest.raises(ConfigError, match=f'^{name}: '):
      analyse(run, f'--what={name}')
  with pytest.raises(ConfigError, match="did you mean 'sharpness'"):
    analyse(run, '--what=sharpnes')


@pytest.mark.slow
def test_the_loss_is_that_of_an_evaluation_in_float32(tmp_path):
  run = trained(
    tmp_path,
    model='resnet8',
    method='baseline',
    max_steps=20,
    dtype='bfloat16',
    schedule__warmup_epochs=0.0,
  )
  _, config = parse_args(['prog', f'--workdir={run}'])

  def evaluated(dtype):
    of = experiment.build(dataclasses.replace(config, dtype=dtype))
    source = of.spec.open('train', config.dataset)
    _, state = restore_newest(run, of)
    weights = weights_of(config, state)
    return Evaluator(of, source, Quarantine())(weights)

  found = analyse(run, '--what=landscape', *QUICK, '--examples=2000')
  values, wide = found['landscape'].values, evaluated('float32')
  assert values['loss'] == pytest.approx(wide['loss'], rel=1e-6)
  assert values['top1'] == pytest.approx(wide['top1'], rel=1e-6)
  assert values['loss'] != pytest.approx(
    evaluated('bfloat16')['loss'], rel=1e-6
  )


@pytest.mark.parametrize(
  ('flag', 'message'),
  [
    ('--examples=0', 'examples=0: must be >= 1'),
    ('--probes=x', "probes='x': must be int"),
    ('--split=test', "unknown split 'test'"),
    ('--rho=0.1,-1', "rho='0.1,-1': must be positive"),
    ('--rho_adaptive=', "rho_adaptive='': must be positive"),
    ('--at=5,a', "at='5,a': must be numbers"),
  ],
)
def test_wrong_flags_are_refused(flag, message):
  with pytest.raises(ConfigError, match=message):
    print(options.parse(['prog', flag])[0].steps)
