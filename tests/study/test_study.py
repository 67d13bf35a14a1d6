"""Studies: cells, searches, what a rerun keeps, and the report.

Training is played by a program that writes what training would write, at once.
Whole trainings are in test_study_runs.py.
"""

import csv
import json
import os
import signal
import sys
import textwrap
import threading
import time

import helpers
import pytest

from conadv_jax.base.errors import ConfigError, Preempted
from conadv_jax.config import to_dict
from conadv_jax.run.lock import RunLock
from conadv_jax.study import command, compare, design, report, results, runner
from conadv_jax.study.design import Arm, Figure, Search, Study
from conadv_jax.study.record import Record

# Validation accuracy has its best at rate 8 and epsilon 2; test accuracy tells
# the arms apart; one arm fails, one is not finite.
FAKE = """
import json, os, pathlib, sys
flags = dict(f.lstrip('-').split('=', 1) for f in sys.argv[1:])
flags = {k.removeprefix('config.'): v for k, v in flags.items()}
path = pathlib.Path(flags['workdir'])
with open(path.parents[3] / 'calls.txt', 'a') as file:
  file.write(str(path.relative_to(path.parents[3])) + '\\n')
method = flags['method']
if method == os.environ.get('FAIL'):
  print('reading ...\\nerror: the disk is on fire')
  sys.exit(1)
if method == 'autoaugment':
  print('error: the loss is not finite')
  sys.exit(4)
rate = float(flags.get('optimizer.learning_rate', 8))
epsilon = float(flags.get('attack.epsilon', 2))
top1 = 90 - abs(rate - 8) - abs(epsilon - 2)
if flags['dataset.eval_split'] == 'test':
  seed = int(flags['seed'])
  batch = int(flags['batch_size'])
  top1 = 80 + 0.1 * seed - (2 if batch > 64 else 0) + (method == 'conadv')
summary = dict(
  steps=10, epochs=1.5, top1=top1, train_top1=99.5, train_loss=0.1,
  robust_top1_by_attack={'fgsm': top1 / 2}, images_per_sec=1.0, seconds=2.0,
  nonfinite_steps=0, spike_steps=0, flops=3e15,
)
(path / 'summary.json').write_text(json.dumps(summary))
"""

STUDY = """
from conadv_jax.study.design import Arm, Figure, Search, Study

def fields(method, batch_size):
  return {'method': method, 'batch_size': batch_size}

STUDY = Study(
  config='digits',
  fields={'epochs': 6.0},
  validation='train[80%:]',
  test='test',
  searches={
    'small': Search(
      fields('baseline', 64),
      {'optimizer.learning_rate': (2.0, 4.0, 8.0, 16.0),
       'optimizer.weight_decay': (1e-4, 2e-4)},
    ),
    'conadv': Search(
      fields('conadv', 640),
      {'optimizer.learning_rate': (1.0, 2.0, 4.0, 8.0),
       'attack.epsilon': (4.0, 8.0)},
    ),
  },
  arms={
    'baseline_64': Arm(fields('baseline', 64), 3, 'small', 'baseline'),
    'baseline_640': Arm(fields('baseline', 640), 3, 'small', 'baseline'),
    'conadv_640': Arm(fields('conadv', 640), 3, 'conadv', 'conadv'),
    'autoaugment_640': Arm(fields('autoaugment', 640), 1),
  },
  small='baseline_64',
  large='baseline_640',
  min_train_top1=99.6,
  recover=('conadv_640',),
  equivalent=(('conadv_640', 'baseline_64', 0.5),),
  figures={'batch_size': Figure(('baseline_64', 'baseline_640', 'conadv_640'))},
)
"""


@pytest.fixture
def study(tmp_path, monkeypatch):
  """Runs the study with the program above; returns a function."""
  fake, file = tmp_path / 'fake.py', tmp_path / 'mine.py'
  fake.write_text(FAKE)
  file.write_text(STUDY)
  monkeypatch.setattr(runner, '_TRAIN', (sys.executable, str(fake)))

  def run(*flags, file=file):
    command.main(['', f'--study={file}', f'--workdir={tmp_path / "w"}', *flags])
    return tmp_path / 'w'

  return run


def calls(path):
  return (path / 'calls.txt').read_text().splitlines()


def rows_of(path):
  with (path / 'study.csv').open() as file:
    return {row['cell']: row for row in csv.DictReader(file)}


def test_searches_choose_on_validation_before_the_test_split_is_seen(study):
  path = study()
  choices = json.loads((path / 'choices.json').read_text())
  assert choices == {
    'small': {'optimizer.learning_rate': 8.0, 'optimizer.weight_decay': 1e-4},
    # 8 was at the upper end, so 16 was tried; 4 at the lower, so 2 and 1.
    'conadv': {'optimizer.learning_rate': 8.0, 'attack.epsilon': 2.0},
  }
  rows = rows_of(path)
  tried = {name for name in rows if name.startswith('search/conadv/')}
  rates = {f'search/conadv/optimizer.learning_rate={r}' for r in '1248'}
  assert tried == rates | {
    'search/conadv/optimizer.learning_rate=16',
    *(f'search/conadv/attack.epsilon={e}' for e in '1248'),
  }
  done = calls(path)
  first_test = next(i for i, c in enumerate(done) if c.startswith('cells/fin'))
  assert all(c.startswith('cells/search/') for c in done[:first_test])
  assert all(c.startswith('cells/final/') for c in done[first_test:])
  log = (path / 'study.log').read_text()
  assert log.index('all choices are fixed') < log.index('final/')
  assert log.index('search/') < log.index('all choices are fixed')


def test_arms_take_what_was_chosen_and_every_seed(study):
  rows = rows_of(study())
  for seed in range(3):
    row = rows[f'final/conadv_640/seed={seed}']
    assert row['seed'] == str(seed) and row['status'] == 'done'
    assert row['optimizer.learning_rate'] == '8'
    assert row['attack.epsilon'] == '2'
    assert row['dataset.eval_split'] == 'test'
    assert float(row['top1']) == pytest.approx(79 + 0.1 * seed)
    assert float(row['gap']) == pytest.approx(20.5 - 0.1 * seed)
    assert float(row['top1_fgsm']) == float(row['top1']) / 2
  assert rows['final/autoaugment_640/seed=0']['status'] == 'non-finite'


def test_a_value_that_a_search_has_tried_already_is_not_run_again(study):
  path = study()
  name = 'search/small/optimizer.weight_decay=0.0001'
  assert rows_of(path)[name]['top1'] == '90'
  assert f'cells/{name}' not in calls(path)


def test_a_rerun_runs_nothing_and_writes_the_same(study):
  path = study()
  table, before = (path / 'study.csv').read_text(), len(calls(path))
  study()
  assert len(calls(path)) == before
  assert (path / 'study.csv').read_text() == table


def test_only_what_has_no_row_is_run_and_the_directory_may_move(
  study, tmp_path
):
  path = study()
  table = (path / 'study.csv').read_text()
  kept = [
    line
    for line in table.splitlines(keepends=True)
    if 'final/conadv_640/seed=1' not in line
  ]
  (path / 'study.csv').write_text(''.join(kept))
  before = len(calls(path))
  study('--processes=2')
  assert calls(path)[before:] == ['cells/final/conadv_640/seed=1']
  assert (path / 'study.csv').read_text() == table


def test_a_failed_run_is_a_row_and_is_tried_again(study, monkeypatch):
  monkeypatch.setenv('FAIL', 'autoaugment')
  path = study()
  name = 'final/autoaugment_640/seed=0'
  assert rows_of(path)[name]['status'] == 'failed'
  assert rows_of(path)[name]['error'] == 'the disk is on fire'
  text = (path / 'report.md').read_text()
  assert f'- {name}: failed' in text
  monkeypatch.delenv('FAIL')
  before = len(calls(path))
  study()
  assert calls(path)[before:] == [f'cells/{name}']
  assert rows_of(path)[name]['status'] == 'non-finite'


def test_arms_of_the_same_settings_share_a_run_and_its_repetition(
  study, tmp_path, monkeypatch
):
  again = "    'again': Arm(fields('conadv', 640), 1, 'conadv'),\n"
  last = "    'autoaugment_640'"
  (tmp_path / 'mine.py').write_text(STUDY.replace(last, again + last))
  path = study()
  names = ('final/conadv_640/seed=0', 'final/again/seed=0')
  assert sum(call.endswith(names) for call in calls(path)) == 1
  rows = rows_of(path)
  for name in names:
    rows[name]['status'] = 'failed'
  fields = list(next(iter(rows.values())))
  with (path / 'study.csv').open('w', newline='') as file:
    writer = csv.DictWriter(file, fields, lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows.values())
  before = len(calls(path))
  study()
  assert len(calls(path)[before:]) == 1
  assert {rows_of(path)[name]['status'] for name in names} == {'done'}


def test_an_arm_whose_search_fails_wholly_ends_the_study(study, monkeypatch):
  monkeypatch.setenv('FAIL', 'conadv')
  with pytest.raises(ConfigError, match="search 'conadv': every run over opt"):
    study()


def test_another_study_in_the_directory_is_refused(study, tmp_path):
  study()
  other = tmp_path / 'other.py'
  other.write_text(STUDY)
  with pytest.raises(ConfigError, match="holds the study 'mine', not 'other'"):
    study(file=other)


def test_rows_of_other_settings_are_refused(study, tmp_path):
  study()
  (tmp_path / 'mine.py').write_text(STUDY.replace('6.0', '7.0'))
  with pytest.raises(ConfigError, match='was run with other settings'):
    study()


def test_two_at_once_in_a_directory_are_refused(study, tmp_path):
  path = study()
  with RunLock(path), pytest.raises(ConfigError, match='in use'):
    study()


def test_a_wrong_setting_is_an_error_before_anything_runs(study, tmp_path):
  text = STUDY.replace("'epochs': 6.0", "'epochs': -1.0")
  (tmp_path / 'mine.py').write_text(text)
  with pytest.raises(ConfigError, match='epochs=-1.0: must be > 0'):
    study()
  assert not (tmp_path / 'w' / 'calls.txt').exists()


# ---- What a study file may say ----------------------------------------------


def make(**changes):
  arms = {
    'a': Arm({'method': 'baseline'}, 2),
    'b': Arm({'method': 'conadv', 'batch_size': 640}, 1),
  }
  values = dict(config='digits', validation='v', test='t', arms=arms) | changes
  return Study(**values)


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'small': 'c'}, "unknown arm 'c'"),
    ({'figures': {'f': Figure(('a', 'c'))}}, "unknown arm 'c'"),
    ({'equivalent': (('a', 'c', 1.0),)}, "unknown arm 'c'"),
    ({'arms': {'a': Arm({}, 1, 'none')}}, "unknown search 'none'"),
    ({'recover': ('b',)}, 'needs arms `small` and `large`'),
    (
      {
        'searches': {
          'x': Search({}, {'optimizer.learning_rate': (1, 2, 4)}),
          'y': Search({}, {'optimizer.learning_rate': (1, 2)}),
        }
      },
      'searches of unequal budget',
    ),
  ],
)
def test_wrong_studies_are_refused(changes, message):
  with pytest.raises(ConfigError, match=message):
    make(**changes)


def test_cells_go_seed_by_seed_so_that_pairs_come_early():
  names = [cell.name for cell in make().final_cells({})]
  assert names == ['final/a/seed=0', 'final/b/seed=0', 'final/a/seed=1']


def test_the_digest_tells_settings_but_not_places():
  def digest(**fields):
    names = {name.replace('__', '.'): value for name, value in fields.items()}
    return design.Cell('digits', 'final', 'a', 'seed=0', names).digest

  assert digest(epochs=6.0) == digest(epochs='6')
  assert digest(epochs=6.0) != digest(epochs=7.0)
  assert digest(seed=0) != digest(seed=1)
  assert digest() == digest(dataset__data_dir='/elsewhere')
  # A field at its default is as if it were not there.
  assert digest() == digest(loss__label_smoothing=0.1)


@pytest.mark.parametrize(
  'text, message',
  [
    ('nothing', "unknown study 'nothing'"),
    ('missing.py', 'there is no such file'),
  ],
)
def test_a_study_that_is_not_there_is_named(text, message):
  with pytest.raises(ConfigError, match=message):
    design.load(text)


def test_a_file_without_a_study_is_refused(tmp_path):
  (tmp_path / 's.py').write_text('x = 1\n')
  with pytest.raises(ConfigError, match='defines no STUDY'):
    design.load(str(tmp_path / 's.py'))


def test_an_error_in_a_study_file_has_its_line(tmp_path):
  (tmp_path / 's.py').write_text('x = 1\nSTUDY = x.y\n')
  with pytest.raises(ConfigError, match='s.py, line 2: AttributeError'):
    design.load(str(tmp_path / 's.py'))


@pytest.mark.parametrize('name', design.shipped())
def test_shipped_studies_have_valid_cells(name):
  _, study = design.load(name)
  chosen = {
    search: {field: values[0] for field, values in found.grid.items()}
    for search, found in study.searches.items()
  }
  cells = list(study.final_cells(chosen))
  cells += [
    study.trial(search, {}, field, value)
    for search, found in study.searches.items()
    for field, values in found.grid.items()
    for value in values
  ]
  assert len({cell.name for cell in cells}) == len(cells)
  for cell in cells:
    assert cell.config.dataset.eval_split == (
      study.test if cell.phase == 'final' else study.validation
    )


# ---- Flags ------------------------------------------------------------------


@pytest.mark.parametrize(
  'flags, message',
  [
    ([], 'missing --study'),
    (['--study=digits'], 'missing --workdir'),
    (['--study=digits', '--workdir=w', '--proceses=2'], '--proceses=2'),
    (['--compare', 'a'], 'missing --output'),
    (['--study=digits', '--workdir={}', '--processes=0'], 'processes=0: must'),
  ],
)
def test_wrong_flags_are_named(flags, message, tmp_path):
  with pytest.raises(ConfigError, match=message):
    command.main(['', *(flag.format(tmp_path / 'w') for flag in flags)])


# ---- Stopping ---------------------------------------------------------------

SLEEPER = """
import pathlib, signal, sys, time
path = pathlib.Path(sys.argv[-1].partition('=')[2])
def stop(*_):
  (path / 'saved').touch()
  sys.exit(42)
signal.signal(signal.SIGTERM, stop)
(path / 'began').touch()
time.sleep(60)
"""


def test_a_signal_saves_the_runs_and_says_how_to_go_on(tmp_path, monkeypatch):
  fake = tmp_path / 'sleep.py'
  fake.write_text(SLEEPER)
  monkeypatch.setattr(runner, '_TRAIN', (sys.executable, str(fake)))
  record = Record(tmp_path / 'w', 'mine')
  cells = list(make().final_cells({}))
  began = tmp_path / 'w' / 'cells' / cells[0].name / 'began'

  def interrupt():
    while not began.exists():
      time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGINT)

  threading.Thread(target=interrupt).start()
  with runner.Runner(record, 1, [], []) as running:
    with pytest.raises(Preempted, match='3 runs left; run the same command'):
      running.run(cells)
  assert (began.parent / 'saved').exists()
  assert record.rows() == []


def test_a_run_that_is_left_behind_is_waited_for(tmp_path, monkeypatch, capfd):
  monkeypatch.setattr(runner, '_TRAIN', (sys.executable, '-c', ''))
  monkeypatch.setattr(runner, '_LOCK_SECONDS', 0.1)
  monkeypatch.setattr(results, 'row_of', lambda cell, *_: fake_row(cell))
  record = Record(tmp_path / 'w', 'mine')
  cell = next(make().final_cells({}))
  directory = tmp_path / 'w' / 'cells' / cell.name
  directory.mkdir(parents=True)
  held = RunLock(directory)
  held.__enter__()
  threading.Timer(1.0, held.release).start()
  start = time.monotonic()
  with runner.Runner(record, 1, [], []) as running:
    running.run([cell])
  assert time.monotonic() - start > 1
  assert capfd.readouterr().out.count('waiting: workdir=') == 1


def fake_row(cell):
  return {
    'cell': cell.name, 'phase': cell.phase, 'arm': cell.arm, 'seed': 0,
    'status': 'done', 'digest': cell.digest, 'top1': 1.0, 'steps': 1,
    'seconds': 1.0,
  }  # fmt: skip


# ---- The report -------------------------------------------------------------


def test_the_report_answers_what_was_asked(study):
  path = study()
  text = (path / 'report.md').read_text()
  # By hand: every seed loses 2 points, and ConAdv gives back 1 of them.
  assert 'The gap G = baseline_64 - baseline_640 is 2.00 ± 0.00 points' in text
  assert '| conadv_640 | 3 | 1.00 ± 0.00 | 0.50 ± 0.00 | yes |' in text
  assert '| conadv_640 - baseline_64 | 3 | -1.00 ± 0.00 | 0.5 | 1.000 |' in text
  # 78, 78.1 and 78.2: t of 2 degrees of freedom is 4.303, the error 0.1 / 3^.5.
  assert '| baseline_640 | 3 | 10 | 1.5 | 3 | 2 | 99.50 ± 0.00 | 78.10' in text
  assert '78.10 ± 0.25' in text
  assert '| small | optimizer.learning_rate | 8 | 99.50 | **90.00** |' in text
  assert '- final/autoaugment_640/seed=0: non-finite' in text
  unfit = 'baseline_64, baseline_640, conadv_640'
  assert f'so their length binds as well: {unfit}.' in text
  assert (path / 'batch_size.png').stat().st_size > 10_000
  page = (path / 'report.html').read_text()
  assert '<td>conadv_640</td>' in page and 'batch_size.png' in page


def test_what_analyses_found_becomes_columns_but_not_the_accuracy(tmp_path):
  path = tmp_path / 'cell'
  (path / 'analysis').mkdir(parents=True)
  (path / 'analysis' / 'sharpness.json').write_text(
    json.dumps({'values': {'sharpness_0.1': 2.5, 'top1': 100.0, 'loss': 0.0}})
  )
  (path / 'summary.json').write_text(
    json.dumps({'top1': 80.0, 'robust_top1_by_attack': {}})
  )
  cell = next(make().final_cells({}))
  row = results.row_of(cell, path, 'done')
  assert row['sharpness_0.1'] == 2.5 and row['top1'] == 80.0
  assert 'loss' not in row


def test_minima_are_set_beside_the_accuracy(tmp_path):
  record = Record(tmp_path / 'w', 'mine')
  for arm, seed, top1, sharpness in (
    ('a', 0, 80.0, 3.0), ('a', 1, 81.0, 2.0), ('b', 0, 82.0, 1.0)
  ):  # fmt: skip
    record.add(
      {
        'cell': f'final/{arm}/seed={seed}', 'phase': 'final', 'arm': arm,
        'seed': seed, 'status': 'done', 'digest': 'x', 'top1': top1,
        'steps': 1, 'epochs': 1.0, 'flops': 1e15, 'seconds': 1.0,
        'sharpness_0.1': sharpness,
      }
    )  # fmt: skip
  text = report.write(make(), record)
  assert '| arm | sharpness 0.1 |' in text
  assert '| b | 1.000 |' in text
  assert '| *correlation* | *-1.00* |' in text


def test_the_report_of_nothing_yet_says_so(tmp_path):
  record = Record(tmp_path / 'w', 'mine')
  study = make(small='a', large='b', figures={'f': Figure(('a', 'b'))})
  text = report.write(study, record)
  assert '0 of 3 runs' in text


def test_a_gap_that_may_be_none_makes_the_test_void(tmp_path):
  record = Record(tmp_path / 'w', 'mine')
  for arm, values in (('a', (80.0, 82.0)), ('b', (81.0, 80.0))):
    for seed, top1 in enumerate(values):
      record.add(
        {
          'cell': f'final/{arm}/seed={seed}', 'phase': 'final', 'arm': arm,
          'seed': seed, 'status': 'done', 'digest': 'x', 'top1': top1,
          'steps': 1, 'epochs': 1.0, 'flops': 1e15, 'seconds': 1.0,
        }
      )  # fmt: skip
  text = report.write(make(small='a', large='b'), record)
  assert 'It may be 0, so the test of recovery is void.' in text


def test_errors_are_read_from_the_end_of_a_log(tmp_path):
  (tmp_path / 'log.txt').write_text(
    textwrap.dedent("""\
      step 1
      error: first
      step 2
      error: second, of
      two lines
    """)
  )
  assert results.last_error(tmp_path) == 'second, of\ntwo lines'
  assert results.last_line(tmp_path) == 'two lines'


# ---- Runs beside each other -------------------------------------------------


def test_compare_needs_runs(tmp_path):
  with pytest.raises(ConfigError, match='holds no metrics.jsonl'):
    compare.draw([str(tmp_path)], str(tmp_path / 'x.png'))


def made_run(path, top1):
  """A work directory whose run has 10 steps an epoch, evaluated twice."""
  path.mkdir()
  config = helpers.make_config({})
  content = {'config': to_dict(config), 'steps': {'per_epoch': 10}}
  (path / 'config.json').write_text(json.dumps(content))
  rows = [
    {'step': 20, 'split': 'train', 'loss': 2.0, 'top1_clean': 9.0},
    *(
      {'step': 10 * epoch, 'split': 'test', 'top1': value}
      for epoch, value in top1.items()
    ),
  ]
  text = ''.join(json.dumps(row) + '\n' for row in rows)
  (path / 'metrics.jsonl').write_text(text)
  return str(path)


def test_a_published_curve_is_drawn_and_compared_with(tmp_path, capsys):
  run = made_run(tmp_path / 'a', {1: 0.5, 6: 3.0, 92: 76.0})
  output = tmp_path / 'x.png'
  compare.draw([run], str(output), 'mlperf_64k')
  lines = capsys.readouterr().out.splitlines()
  # Epoch 6 is between 4 (2.2) and 8 (4.9); 92 is the last (76.07).
  assert [line.split() for line in lines[1:3]] == [
    ['6.0', '3.00', '-0.55'],
    ['92.0', '76.00', '-0.07'],
  ]
  with_it = output.read_bytes()
  compare.draw([run], str(output))
  assert output.read_bytes() != with_it
  early = made_run(tmp_path / 'b', {1: 0.5})
  compare.draw([early], str(output), 'mlperf_64k')
  assert 'no evaluation where that is known' in capsys.readouterr().out
  compare.draw([run], str(output), 'mlperf_40k')  # with a gap from 10 to 62
  assert [x.split()[0] for x in capsys.readouterr().out.splitlines()[1:-1]] == [
    '6.0'
  ]
  with pytest.raises(ConfigError, match="unknown reference 'mlperf'.*_64k"):
    compare.draw([run], str(output), 'mlperf')
