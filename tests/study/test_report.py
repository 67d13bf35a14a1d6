"""What a report says, and when it says that nothing is there."""

import json
import math

import pytest
from studies import make

from conadv_jax.study import plots, progress, report, results
from conadv_jax.study.design import Arm, Figure, Search
from conadv_jax.study.record import Record
from conadv_jax.study.statistics import Interval


@pytest.fixture
def canvases(monkeypatch):
  """The pictures that are drawn, by name."""
  drawn = {}
  monkeypatch.setattr(
    plots, 'save', lambda canvas, path: drawn.update({path.name: canvas})
  )
  return drawn


def test_the_report_answers_what_was_asked(study):
  path = study()
  text = (path / 'report.md').read_text()
  # By hand: every seed loses 2 points, and ConAdv gives back 1 of them.
  assert 'The gap G = baseline_64 - baseline_640 is 2.00 ± 0.00 points' in text
  row = '| conadv_640 | 3 | 10 | 1.5 | 3 | 2 | 3 | 1.00 ± 0.00 | 0.50 ± 0.00 |'
  assert f'{row} 0.50 ± 0.00 | yes |' in text
  assert '| conadv_640 - baseline_64 | 3 | -1.00 ± 0.00 | 0.5 | 1.000 |' in text
  # 78, 78.1 and 78.2: t of 2 degrees of freedom is 4.303, the error 0.1 / 3^.5.
  fitted = '99.50 ± 0.00 | 0.100 ± 0.000'
  row = f'| baseline_640 | 3 | 10 | 1.5 | 3 | 2 | {fitted} | 78.10 ± 0.25 |'
  assert row in text
  row = '| baseline_640 - baseline_64 | 3 | 0.00 ± 0.00 | 0.000 ± 0.000 |'
  assert f'{row} -2.00 ± 0.00 | 2.00 ± 0.00 |' in text
  row = '| small | optimizer.learning_rate | 8 | 10 | 3 | 2 | 99.50 | **90.00**'
  assert row in text
  assert '- final/autoaugment_640/seed=0: non-finite' in text
  unfit = 'baseline_64 (99.5 %), baseline_640 (99.5 %), conadv_640 (99.5 %)'
  assert (
    f'These arms did not fit 99.6 % of their training examples: {unfit}.'
    in text
  )
  assert 'Not complete' not in text and 'nan' not in text
  assert 'radius of 16 grey levels of 255, PGD in 10 steps.' in text
  assert (path / 'batch_size.png').stat().st_size > 10_000
  page = (path / 'report.html').read_text()
  assert '<td>conadv_640</td>' in page and 'batch_size.png' in page


def test_a_row_has_what_evaluations_and_analyses_found(tmp_path):
  path = tmp_path / 'cell'
  (path / 'analysis').mkdir(parents=True)
  (path / 'analysis' / 'sharpness.json').write_text(
    json.dumps({'values': {'sharpness_0.1': 2.5, 'top1': 100.0, 'loss': 0.0}})
  )
  (path / 'summary.json').write_text(
    json.dumps(
      {
        'top1': 80.0,
        'robust_top1_by_attack': {},
        'evaluations': [
          {
            'attack': attack, 'data': {'split': split}, 'top1': 1.0,
            'loss': loss, 'top5': 10 * loss, 'ece': 20 * loss,
          }
          for attack, split, loss in (
            ('none', 't', 0.5), ('fgsm', 't', 2.0), ('none', 'train', 0.1)
          )
        ],
      }
    )
  )  # fmt: skip
  cell = next(make().final_cells({}))
  row = results.row_of(cell, path, 'done')
  assert row['sharpness_0.1'] == 2.5 and row['top1'] == 80.0
  assert (row['loss'], row['top5'], row['ece']) == (0.5, 5.0, 10.0)


def test_intervals_as_text():
  nan = math.nan
  for found, text in (
    (Interval(1.234, 1.134, 1.334, 3), '1.23 ± 0.10'),
    (Interval(1.5, 0.9, 3.1, 3), '1.50 (0.90 to 3.10)'),
    (Interval(-0.001, nan, nan, 1), '0.00'),
    (Interval(nan, nan, nan, 0), ''),
  ):
    assert report.shown(found) == text


@pytest.fixture
def record(tmp_path):
  return Record(tmp_path / 'w', 'mine')


def add(record, arm, seed, phase='final', status='done', **values):
  """Adds the row of a run of an epoch and a second."""
  record.add(
    {
      'cell': f'{phase}/{arm}/seed={seed}', 'phase': phase, 'arm': arm,
      'seed': seed, 'status': status, 'digest': f'{arm}{seed}', 'steps': 1,
      'epochs': 1.0, 'flops': 1e15, 'seconds': 1.0, 'device': 'cpu', **values,
    }
  )  # fmt: skip


def test_minima_are_set_beside_the_accuracy(record, canvases):
  for arm, seed, top1, sharpness, adaptive in (
    ('a', 0, 80.0, 3.0, 0.05), ('a', 1, 81.0, 2.0, 0.06),
    ('b', 0, 82.0, 4.0, 0.001234),
  ):  # fmt: skip
    found = {'sharpness_0.1': sharpness, 'sharpness_adaptive_0.1': adaptive}
    add(record, arm, seed, top1=top1, **found, trace_stderr=1.0)
  text = report.write(make(), record)
  # What can be compared comes first, and errors are no measure.
  assert '| arm | seeds | sharpness adaptive 0.1 | sharpness 0.1 |' in text
  assert '| b | 1 | 0.00123 | 4.00 |' in text
  # Ranks 3 2 1 of 80 81 82 with 2 3 1 and 2 1 3; means of two arms.
  assert '| *correlation, runs* | *3* | *-0.50* | *0.50* |' in text
  assert '| *correlation, arms* | *2* | *-1.00* | *1.00* |' in text
  (panel,) = canvases['minima.png'].axes
  points = [marks.get_offsets().tolist() for marks in panel.collections]
  assert points == [
    [[0.05, 80], [0.06, 81]], [[pytest.approx(0.055), 80.5]],
    [[0.001234, 82]], [[0.001234, 82]],
  ]  # fmt: skip
  # A sharpness of 0, where nothing around is worse, has its place, too.
  assert panel.get_xscale() == 'log'
  add(record, 'b', 1, top1=82.0, **{'sharpness_adaptive_0.1': 0.0})
  report.write(make(), record)
  assert canvases['minima.png'].axes[0].get_xscale() == 'symlog'


def test_the_report_of_nothing_yet_says_what_is_not_there(record):
  study = make(
    small='a', large='b', recover=('b',), equivalent=(('a', 'b', 0.5),),
    figures={'f': Figure(('a', 'b'))},
    searches={'s': Search({}, {'optimizer.learning_rate': (1.0, 2.0)})},
  )  # fmt: skip
  text = report.write(study, record)
  assert (
    '**Not complete: 0 runs of the searches are done and at least 2 are left; '
    '0 of 3 runs of the arms are done.**\n'
  ) in text  # and no time, as none is known
  assert 'needs two seeds of both arms; pairs so far: 0.' in text
  assert '| a - b | 0 |  | 0.5 |  | - |' in text
  assert 'No run of an arm is done.' in text
  assert 'nan' not in text and '## Figures' not in text
  assert '## Minima' not in text and '## Along' not in text


def test_one_pair_is_no_gap_and_no_equivalence(record):
  add(record, 'a', 0, top1=80.0)
  add(record, 'b', 0, top1=79.0)
  study = make(small='a', large='b', equivalent=(('a', 'b', 0.5),))
  text = report.write(study, record)
  assert 'pairs so far: 1.' in text and 'recovery' not in text
  assert '| a - b | 1 | 1.00 | 0.5 |  | - |' in text
  assert 'nan' not in text


@pytest.mark.parametrize(
  'small, verdict',
  [((80.0, 82.0), 'It may be 0'), ((70.0, 71.0), 'The large batch loses')],
)
def test_a_gap_that_may_be_none_makes_the_test_void(record, small, verdict):
  for arm, values in {
    'a': small, 'b': (81.0, 81.9), 'c': (85.0, 85.9), 'd': (86.0, 86.9)
  }.items():  # fmt: skip
    for seed, top1 in enumerate(values):
      add(record, arm, seed, top1=top1)
  large = {'method': 'baseline', 'batch_size': 640}
  arms = {
    'a': Arm({'method': 'baseline'}, 2), 'b': Arm(large, 2),
    'c': Arm(large | {'method': 'conadv'}, 2),
    'd': Arm({'method': 'conadv', 'batch_size': 320}, 2),
  }  # fmt: skip
  study = make(
    small='a', large='b', recover=('c',), arms=arms,
    equivalent=(('c', 'b', 9.0), ('c', 'd', 0.5)),
  )  # fmt: skip
  text = report.write(study, record)
  assert verdict in text and 'so the test of recovery is void.**' in text
  assert '| 2 | 4.00 ± 0.00 | void | void | yes |' in text
  # A difference without spread: below the margin of 9, above that of 0.5.
  assert '| c - b | 2 | 4.00 ± 0.00 | 9 | < 0.001 | equivalent |' in text
  assert '| c - d | 2 | -1.00 ± 0.00 | 0.5 | 1.000 | not shown |' in text
  # What an arm at another batch size has over the large one, it did not give
  # back.
  of_gap, _, others = text.partition('## Arms')
  assert '| d |' not in of_gap and '| d |' in others


def test_what_is_left_and_how_long_it_takes(record):
  grid = {
    'optimizer.learning_rate': (1.0, 2.0, 4.0), 'attack.epsilon': (2.0, 8.0)
  }  # fmt: skip
  arms = {
    'a': Arm({'epochs': 30.0}, 3, 's'), 'b': Arm({'epochs': 50.0}, 1),
    'same': Arm({'epochs': 30.0}, 1, 's'),
  }  # fmt: skip
  study = make(
    fields={'epochs': 20.0}, arms=arms, searches={'s': Search({}, grid)}
  )
  assert progress.left(study, record).seconds == {}

  def searched(field, value, **values):
    name = f'search/s/{field}={value}'
    add(record, 's', 1000, 'search', cell=name, top1=90.0, **values)

  searched('optimizer.learning_rate', 1, seconds=10.0)
  searched('optimizer.learning_rate', 2, seconds=12.0)
  searched('optimizer.learning_rate', 4, status='failed', epochs=0)
  # One rate again and one epsilon, as the other is that of a run before; and
  # the arms, of which two share a run. 11 s an epoch.
  expected = 11.0 * (2 * 20 + 3 * 30 + 50)
  assert progress.left(study, record) == (
    2, 5, {'cpu': pytest.approx(expected)}
  )  # fmt: skip
  record.choose({'s': {'optimizer.learning_rate': 1.0}})
  add(record, 'a', 0, seconds=100.0, top1=90.0)
  add(record, 'b', 0, status='non-finite', epochs=0)
  searched('optimizer.learning_rate', 8, seconds=1.0, device='H200')
  # The arm's own pace; `same` has the digest of a run that is not left.
  assert progress.left(study, record)[:2] == (0, 3)
  text = report.write(study, record)
  assert '**Not complete: 1 of 5 runs of the arms are done.**' in text
  # On the CPU two runs at 100 s an epoch, one at 11; on the H200 three at 1.
  assert 'in one process: 0:01:30 on H200, 1:45:30 on cpu.' in text


# ---- Pictures ---------------------------------------------------------------


def test_figures_have_a_point_for_each_arm_on_its_axis(record, canvases):
  arms = {
    'small': Arm({'method': 'baseline', 'batch_size': 64}, 2, line='baseline'),
    'large': Arm({'method': 'baseline', 'batch_size': 640}, 2, line='baseline'),
    'other': Arm({'method': 'conadv', 'batch_size': 640}, 2),
  }
  for number, (name, arm) in enumerate(arms.items()):
    for seed in range(2):
      size = float(arm.fields['batch_size'])
      add(
        record, name, seed, top1=80.0 + number + seed, batch_size=size,
        seconds=10.0 + 5 * seed,
      )  # fmt: skip
  figures = {
    'along': Figure(tuple(arms)),
    'beside': Figure(tuple(arms), axis=''),
    'joined': Figure(tuple(arms), line='all'),
    'stale': Figure(tuple(arms), axis='staleness_steps'),
    'unset': Figure(tuple(arms), axis='network.dropout_rate'),
  }
  report.write(make(arms=arms, figures=figures), record)

  def lines(name):
    """{label: (x, y)} of the means in the first panel."""
    axis = canvases[f'{name}.png'].axes[0]
    return {
      bars.get_label(): [x.tolist() for x in bars.lines[0].get_data()]
      for bars in axis.containers
    }

  def sizes(*expected):
    return pytest.approx(expected, rel=0.03)  # lines stand beside each other

  assert lines('along') == {
    'baseline': [sizes(64, 640), [80.5, 81.5]], 'other': [sizes(640), [82.5]]
  }  # fmt: skip
  # Rows that do not have the field: what the method implies; 0 has its place.
  assert lines('stale') == {
    'baseline': [[0, 0], [80.5, 81.5]], 'other': [[1], [82.5]]
  }  # fmt: skip
  assert 'unset.png' not in canvases  # None is nowhere on an axis.
  # Side by side, nothing joins them.
  assert lines('beside') == {
    'small': [[0], [80.5]], 'large': [[1], [81.5]], 'other': [[2], [82.5]]
  }  # fmt: skip
  assert list(lines('joined')) == ['all']
  canvas = canvases['along.png']
  assert [axis.get_title() for axis in canvas.axes if axis.axison] == [
    'test top-1, %', 'training time, s, cpu'
  ]  # fmt: skip
  assert canvas.axes[0].get_xlabel() == 'batch size, examples'
  # Intervals over two seeds reach to 87.9 % and 44 s: drawn, and left out.
  assert canvas.axes[0].get_ylim()[1] > 87
  assert canvas.axes[1].get_ylim()[1] < 20


def test_times_of_several_devices_are_never_averaged(record, canvases):
  add(record, 'a', 0, top1=80.0, device='cpu', seconds=600.0)
  add(record, 'a', 1, top1=80.0, device='H200', seconds=14.0)
  add(record, 'b', 0, top1=80.0, device='H200', seconds=16.0)
  study = make(
    arms={'a': Arm({}, 2), 'b': Arm({}, 1)},
    figures={'f': Figure(('a', 'b'), axis='')},
  )
  text = report.write(study, record)
  assert '| PFLOP | s, H200 | s, cpu | test, % |' in text
  assert '| a | 2 | 1 | 1.0 | 1 | 14 | 600 | 80.00' in text
  assert '| b | 1 | 1 | 1.0 | 1 | 16 |  | 80.00 |' in text
  titles = [axis.get_title() for axis in canvases['f.png'].axes]
  assert titles[1:] == ['training time, s, H200', 'training time, s, cpu']


def test_places_without_a_measure_stay_empty(record, canvases):
  measures = ('top1', 'train_top1', 'train_loss', 'gap')
  add(record, 'a', 0, **dict.fromkeys(measures, 1.0))
  report.write(make(figures={'f': Figure(('a',), axis='')}), record)
  shown = [axis.axison for axis in canvases['f.png'].axes]
  assert shown == [True] * 5 + [False] * 3
