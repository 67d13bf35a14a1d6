"""Studies: cells, searches, what a rerun keeps, what is refused.

Training is played by a program that writes what training would write, at once.
Whole trainings are in test_study_runs.py.
"""

import csv
import json

import pytest
from studies import STUDY, make

from conadv_jax.base.errors import ConfigError
from conadv_jax.run.lock import RunLock
from conadv_jax.study import command, design
from conadv_jax.study.design import Arm, Figure, Search
from conadv_jax.study.record import Record
from conadv_jax.study.search import _search as find_best


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


def test_of_equal_accuracies_the_loss_decides():
  search = Search({}, {'optimizer.learning_rate': (1.0, 2.0, 4.0)})
  study = make(searches={'s': search})

  def chosen(*scores):
    steps = find_best(study, 's')
    assert [cell.run for cell in next(steps)] == [
      f'optimizer.learning_rate={rate}' for rate in (1, 2, 4)
    ]
    rows = [{'status': 'done', 'top1': a} | b for a, b in scores]
    with pytest.raises(StopIteration) as end:
      steps.send(rows)
    return end.value.value['optimizer.learning_rate']

  lower, higher = {'loss': 0.1}, {'loss': 0.2}
  assert chosen((90.0, higher), (90.0, lower), (89.0, lower)) == 2.0
  assert chosen((89.0, lower), (90.0, higher), (90.0, higher)) == 2.0
  assert chosen((89.0, {}), (90.0, {}), (90.0, {})) == 2.0


def test_the_report_is_drawn_again_while_the_study_runs(study):
  path = study()
  done, text = calls(path), (path / 'report.md').read_text()
  (path / 'report.md').unlink()
  (path / 'batch_size.png').unlink()
  with RunLock(path):
    study('--report')
  assert (path / 'report.md').read_text() == text
  assert (path / 'batch_size.png').exists() and calls(path) == done


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


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'small': 'c'}, "unknown arm 'c'"),
    ({'figures': {'f': Figure(('a', 'c'))}}, "unknown arm 'c'"),
    ({'figures': {'f': Figure(('a',), 'batch')}}, "unknown axis 'batch'"),
    ({'figures': {'f': Figure(('a',), 'method')}}, "unknown axis 'method'"),
    ({'figures': {'minima': Figure(('a',))}}, 'choose another name'),
    ({'equivalent': (('a', 'c', 1.0),)}, "unknown arm 'c'"),
    ({'arms': {'a': Arm({}, 1, 'none')}}, "unknown search 'none'"),
    ({'analysed': ('c',)}, "unknown arm 'c'"),
    ({'analyse': ('curvature',)}, "'curvature'] are no flags of conadv_jax.an"),
    ({'analyse': ('--what=curve',)}, "unknown what 'curve'"),
    (
      {'searches': {'s': Search({}, {})}, 'validation': 't'},
      "validation='t': is the test split",
    ),
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


def test_runs_that_answer_what_is_asked_come_first():
  arms = {name: Arm({}, 2) for name in 'abcd'}
  study = make(arms=arms, small='d', large='b')
  names = [cell.name.removeprefix('final/') for cell in study.final_cells({})]
  assert names == [
    f'{arm}/seed={seed}'
    for arms in ('bd', 'ac')
    for seed in range(2)
    for arm in arms
  ]


def test_the_digest_tells_settings_but_not_places():
  def digest(**fields):
    names = {name.replace('__', '.'): value for name, value in fields.items()}
    return design.Cell('digits', 'final', 'a', 'seed=0', names).digest

  assert digest(epochs=6.0) == digest(epochs='6')
  assert digest(epochs=6.0) != digest(epochs=7.0)
  assert digest(seed=0) != digest(seed=1)
  assert digest() == digest(dataset__data_dir='/elsewhere')
  assert digest() == digest(microbatches=5)
  # What a preset says, said again: epsilon is 16 in the recipe, rho 0.05.
  assert digest() == digest(staleness_steps=1) != digest(staleness_steps=2)
  assert digest(method='sam') == digest(method='sam', sam__rho=0.05)
  assert digest(method='sam') != digest(method='sam', sam__rho=0.1)
  assert digest(method='sam', sam__rho=0.3) != digest(method='msam')
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


def test_a_study_may_build_on_a_shipped_one_of_its_name(tmp_path):
  file = tmp_path / 'digits.py'
  file.write_text(
    'import dataclasses\n'
    'from conadv_jax.study import design\n'
    '_, shipped = design.load("digits")\n'
    '@dataclasses.dataclass\n'  # which looks for this module by its name
    'class Mine:\n'
    '  study: "design.Study"\n'
    'STUDY = Mine(dataclasses.replace(shipped, arms={}, figures={}, small="",\n'
    '  large="", recover=(), equivalent=())).study\n'
  )
  assert design.load(str(file))[1].arms == {}
  assert design.load('digits')[1].arms


# ---- Flags ------------------------------------------------------------------


@pytest.mark.parametrize(
  'flags, message',
  [
    ([], 'missing --study'),
    (['--study=digits'], 'missing --workdir'),
    (['--study=digits', '--workdir=w', '--proceses=2'], '--proceses=2: no'),
    (['--study=digits', '--workdir=w', '--config.epochs=2'], 'epochs=2: no'),
    (['--study=digits', '--workdir=w', '--microbatches=2'], '=2: no flag'),
    (['--compare', 'a'], 'missing --output'),
    (['--study=digits', '--workdir={}', '--processes=0'], 'processes=0: must'),
  ],
)
def test_wrong_flags_are_named(flags, message, tmp_path):
  with pytest.raises(ConfigError, match=message):
    command.main(['', *(flag.format(tmp_path / 'w') for flag in flags)])


def test_how_it_runs_is_told_by_flags_and_kept_without_places(study):
  flags = '--config.microbatches=1', '--data_dir=/data'
  path = study(*flags)
  for row in Record(path, 'mine').rows():
    assert row['microbatches'] == 1
    assert not [name for name in row if 'dir' in name]
  calls = (path / 'calls.txt').read_text()
  assert (study() / 'calls.txt').read_text() == calls  # the same cells


def test_a_rerun_does_not_log_a_choice_again(study):
  path = study()
  log = path / 'study.log'
  chosen = [line for line in log.read_text().splitlines() if 'chose' in line]
  assert len(chosen) == 2
  (path / 'choices.json').unlink()  # as of a study that was stopped before
  study()
  again = [line for line in log.read_text().splitlines() if 'chose' in line]
  assert again == chosen
