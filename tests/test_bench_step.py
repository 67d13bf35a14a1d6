"""scripts/bench_step.py: floors, ratios, files, and what it does without."""

import csv
import itertools
import json
import pathlib

import helpers
import pytest
from etils import epath

from conadv_jax.base.errors import ConfigError
from conadv_jax.methods import METHODS
from scripts import bench_step
from scripts.bench import files, step_report, turns

ROOT = pathlib.Path(__file__).parents[1]
# All of a GPU machine that has JAX and nothing else of ours, and no PyTorch.
MISSING = (
  'tensorflow', 'tensorflow_datasets', 'clu', 'tensorboard', 'sklearn',
  'matplotlib', 'torch', 'timm',
)  # fmt: skip


def parse(*flags):
  return bench_step.parse(['--quick', '--output=x.json', *flags])


def contender(name, floor, *seconds, is_peer=False):
  started = turns.Started(lambda count: None, 3.0, 2**20, 1e9)
  one = turns.Contender(name, floor, 2e9, lambda: started, is_peer)
  one.started, one.seconds = started, list(seconds)
  return one


# ---- The floor --------------------------------------------------------------


@pytest.mark.parametrize(
  ('variant', 'expected'),
  {
    'baseline': 1,
    'autoaugment': 1,
    'disadv': 8 / 3,
    'conadv': 8 / 3,
    'conadv@2': 8 / 3,
    'conadv_shared_bn': 8 / 3,
    'conadv_aa_only': 8 / 3,
    'conadv_aa': 11 / 3,
    'conadv_from_aa': 11 / 3,
    'adv_only': 5 / 3,
    'sam': 2,
    'consam': 2,
    'msam': 1,
    'conadv_consam': 11 / 3,
  }.items(),
)
def test_the_floor_of_each_method(variant, expected):
  config = bench_step.make_config(parse(), variant, 4)
  assert bench_step.floor(config) == expected
  if '@' in variant:
    assert config.staleness_steps == 2


def test_every_method_of_one_group_is_timed_by_default():
  args = bench_step.parse(['--model=resnet18', '--output=x.json'])
  assert set(METHODS) - {'fast_advprop'} < set(args.methods)
  assert 'conadv@2' in args.methods


# ---- Turns and rows ---------------------------------------------------------


def test_all_take_turns_and_what_does_not_fit_is_left_out(monkeypatch, capsys):
  took = []
  clock = itertools.count()
  monkeypatch.setattr(turns.time, 'perf_counter', lambda: next(clock))

  def make(name, fits):
    def take(count):
      took.append(name)
      if not fits and len(took) > 6:
        raise RuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating')

    return turns.Contender(name, 1, 1, lambda: turns.Started(take, 0, None))

  def never():
    raise RuntimeError('CUDA out of memory. Tried to allocate 1 GiB')

  all_ = [make('a', True), make('b', False), turns.Contender('c', 1, 1, never)]
  turns.measure(all_, 3, target=1)
  assert ''.join(took) == 'aabb' + 'bbaa' + 'aab' + 'aa'
  assert [len(one.seconds) for one in all_] == [3, 0, 0]
  assert [one.note for one in all_] == ['', 'out of memory', 'out of memory']
  assert 'c: out of memory' in capsys.readouterr().out


def test_other_errors_end_the_benchmark():
  def broken():
    raise RuntimeError('shapes do not match')

  with pytest.raises(RuntimeError, match='shapes'):
    turns.measure([turns.Contender('a', 1, 1, broken)], 1, 1)


def test_ratios_are_within_rounds_and_to_the_peer_of_the_same_floor():
  all_ = [
    contender('baseline', 1, 1.0, 2.0, 4.0),
    contender('conadv', 8 / 3, 3.0, 6.0, 12.0),
    contender('conadv_aa', 11 / 3, 4.0, 8.0, 16.0),
    contender('torch plain', 1, 2.0, 4.0, 8.0, is_peer=True),
    contender('torch AdvProp', 8 / 3, 6.0, 12.0, 24.0, is_peer=True),
  ]
  rows = step_report.make_rows(all_, 16, devices=2, peak=1e9)
  rows = {row['variant']: row for row in rows}
  conadv = rows['conadv']
  assert conadv['ratio'] == 3 and conadv['ratio_to'] == 'baseline batch 16'
  assert conadv['to_floor'] == pytest.approx(9 / 8)
  assert (conadv['peer'], conadv['to_peer']) == ('torch AdvProp', 0.5)
  assert (conadv['value'], conadv['min'], conadv['max']) == (6e3, 3e3, 12e3)
  assert conadv['images_per_sec'] == 32 / 6
  assert conadv['share_of_peak'] == pytest.approx(2e9 / 6 / 1e9)
  assert rows['baseline']['to_peer'] == 0.5
  assert rows['conadv_aa']['peer'] is None
  assert rows['torch AdvProp']['ratio'] == 3
  assert rows['torch AdvProp']['ratio_to'] == 'torch plain batch 16'


def test_files_have_a_row_for_what_does_not_fit(tmp_path):
  lost = contender('conadv', 8 / 3)
  lost.started, lost.note = None, 'out of memory'
  rows = []
  for batch in (2, 4):
    all_ = [contender('baseline', 1, 1.0, 1.5), lost]
    rows += step_report.make_rows(all_, batch, 1, 1e9)
  report = {
    'machine': {'device': 'cpu', 'devices': 1},
    'settings': {'model': 'resnet8', 'resolution': 8, 'dtype': 'float32'},
    'rows': rows,
  }
  path = epath.Path(tmp_path / 'new/out.json')
  step_report.write(report, path)
  assert json.loads(path.read_text()) == report
  with path.with_suffix('.csv').open() as file:
    table = list(csv.DictReader(file))
  assert [row['note'] for row in table] == ['', 'out of memory'] * 2
  assert tuple(table[0]) == step_report.COLUMNS
  lines = path.with_suffix('.md').read_text().splitlines()
  assert '| conadv | out of memory |' in lines[3]
  assert len({line.count('|') for line in lines if line}) == 1
  assert path.with_suffix('.png').read_bytes().startswith(b'\x89PNG')


# ---- The command ------------------------------------------------------------


@pytest.mark.parametrize(
  ('flags', 'message'),
  (
    (['--bath_sizes=4'], 'unrecognized arguments'),
    (['--methods', 'conadvv'], "'conadvv': METHOD or METHOD@TAU"),
    (['--methods', 'disadv@1'], 'staleness_steps=1'),
    (['--batch_sizes', '0'], 'must be at least 1'),
    (['--optimizer=adam'], 'optimizer.name'),
    (['--output=x.csv'], 'must end with .json'),
  ),
)
def test_wrong_flags_are_refused(flags, message, capsys):
  with pytest.raises(SystemExit) as end:
    parse(*flags)
  assert end.value.code == 2
  assert message in capsys.readouterr().err


def test_resume_keeps_rows_of_the_same_settings_only(tmp_path):
  path = tmp_path / 'x.json'
  path.write_text(json.dumps({'settings': {'a': 1}, 'rows': [{'b': 2}]}))
  args = parse('--resume', f'--output={path}')
  assert files.kept_rows(args, {'a': 1}) == [{'b': 2}]
  with pytest.raises(ConfigError, match='other settings'):
    files.kept_rows(args, {'a': 2})
  args.resume = False
  assert files.kept_rows(args, {'a': 2}) == []


@pytest.mark.slow
def test_it_runs_where_there_is_jax_and_little_else(tmp_path):
  flags = ['--quick', '--batch_sizes', '2', '--repeats=1', '--seconds=0']
  output = tmp_path / 'out.json'
  flags += ['--methods', 'baseline', f'--output={output}']
  done = helpers.run_without(MISSING, 'bench_step', *flags, cwd=tmp_path)
  assert done.returncode == 0, done.stderr
  assert 'pip install torch==' in done.stdout
  assert 'no out.png: matplotlib is not installed' in done.stdout
  report = json.loads(output.read_text())
  assert report['machine']['matmul_flops_per_sec'] > 0
  (row,) = report['rows']
  assert row['name'] == 'baseline batch 2' and row['unit'] == 'ms'
  assert row['value'] > 0 and row['ratio'] == 1 and row['peak_bytes'] > 0
  assert output.with_suffix('.csv').exists()


@pytest.mark.parity
@pytest.mark.parametrize('kind', ('plain', 'advprop'))
def test_a_step_of_the_peer(kind):
  import numpy as np

  torch = pytest.importorskip('torch')
  from scripts.bench import torch_step

  rng = np.random.default_rng(0)
  task = torch_step.Task(
    model='resnet8',
    num_classes=10,
    images=rng.integers(0, 256, (4, 8, 8, 1), np.uint8),
    labels=rng.integers(0, 10, 4, np.int32),
    mean=(77.8,),
    std=(95.9,),
    bfloat16=False,
    drop_rate=0.0,
    drop_path_rate=0.0,
    epsilon=4.0,
    label_smoothing=0.1,
  )
  torch.manual_seed(0)
  net, step = torch_step.make_step(kind, task, 'cpu')
  step()
  parameters = list(net.parameters())
  assert all(p.requires_grad and p.grad.abs().sum() > 0 for p in parameters)
  # 77,754 are those of our resnet8; the others are the auxiliary norms'.
  assert sum(p.numel() for p in net.parameters()) == (
    77_754 if kind == 'plain' else 78_426
  )
  means = [v for k, v in net.state_dict().items() if k.endswith('running_mean')]
  assert all(mean.abs().sum() > 0 for mean in means)
