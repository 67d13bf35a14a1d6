"""scripts/bench_scaling.py: lines, bends, axes, files, one small run."""

import csv
import json
import pathlib

import helpers
import pytest
from etils import epath

from conadv_jax import experiment
from scripts import bench_scaling
from scripts.bench import lines, scaling_report, turns
from scripts.bench.scaling_report import AXES, Point

ROOT = pathlib.Path(__file__).parents[1]
MISSING = ('tensorflow', 'tensorflow_datasets', 'sklearn', 'matplotlib')
SIZES = [2, 4, 8, 16, 32, 64]


def parse(*flags):
  return bench_scaling.parse(['--quick', '--output=x.json', *flags])


# ---- Lines ------------------------------------------------------------------


def test_a_line_is_found_again():
  line = lines.fit(SIZES, [5 + 2 * x for x in SIZES])
  assert line == pytest.approx((5, 2, 1))
  assert lines.fit([1, 2, 4], [3, 3, 3]) == (3, 0, None)
  # By hand: the residuals are 1/6, -1/3, 1/6, of a total of 2/3 * 7.
  assert lines.fit([0, 1, 2], [1, 2, 4]).r2 == pytest.approx(1 - 1 / 28)


@pytest.mark.parametrize(
  'time, at',
  [
    (lambda x: 5 + 2 * x, None),
    (lambda x: 5 + x + 2 * max(0, x - 16), 16),  # steeper from 16
    (lambda x: max(20, 2.5 * x), 8),  # nothing below 8 costs less than 20
    (lambda x: 5 + 2 * x + 0.9 * (x == 4), None),  # by 7 % only
    (lambda x: 5 + 2 * x + 1.5 * (x == 4), 4),  # by 12 %
  ],
)
def test_a_bend_is_found_where_it_is(time, at):
  # Each round is slower than the one before, as a whole.
  rounds = [[time(x) * slow for slow in (1, 1.5, 3)] for x in SIZES]
  found = lines.bend(SIZES, rounds, tolerance=0.1)
  assert (found and found[0]) == at


def test_one_disturbed_round_is_no_bend():
  rounds = [[x, x * (4 if x == 8 else 1), x] for x in SIZES]
  assert lines.bend(SIZES, rounds, tolerance=0.1) is None


# ---- Rows -------------------------------------------------------------------


def point(axis, x, seconds, series='conadv', peak=2**20):
  started = turns.Started(lambda count: None, 3.0, peak)
  step = turns.Contender('', 1, 1, lambda: started, started=started)
  step.seconds = seconds
  return Point(axis, series, x, 'conadv', 8, 'all else', 3 * 2**20, step)


def test_ratios_are_to_the_first_of_a_series_and_floors_of_the_axis():
  rows = scaling_report.make_rows(
    [point('resolution', 8, [1.0, 2.0, 2.0], 'baseline')]
    + [point('resolution', x, [1.0 * x, 2.0 * x, 9.0]) for x in (8, 16)]
  )
  large = rows[-1]
  assert large['ratio_to'] == 'resolution conadv 8' and large['ratio'] == 2
  assert large['floor'] == 4 and large['to_floor'] == 0.5
  assert large['value'] == 16e3 and large['images_per_sec'] == 0.5
  assert [row['ratio'] for row in rows[:2]] == [1, 1]


def test_fits_are_of_time_and_of_memory_and_leave_out_what_does_not_fit():
  points = [
    point('microbatches', k, [3 + k / 8] * 2, peak=2**20 * (10 + 64 / k))
    for k in (1, 2, 4)
  ]
  points.append(point('microbatches', 8, []))
  time, memory = scaling_report.make_fits(scaling_report.make_rows(points), 0.1)
  assert (time['a'], time['b']) == pytest.approx((3000, 125))
  assert (time['form'], time['unit'], time['leaves_at']) == ('x', 'ms', None)
  assert (memory['a'], memory['b']) == pytest.approx((10, 64))
  assert (memory['quantity'], memory['form']) == ('peak_bytes', '1/x')
  assert memory['unit'] == 'MiB' and memory['r2'] == pytest.approx(1)


def test_files_have_every_axis(tmp_path):
  rows = []
  for axis in AXES:
    slow = 3 if axis == 'batch' else 1
    times = [1.0, 2.0, 3.0 * slow, 4.0 * slow]
    rows += scaling_report.make_rows(
      [point(axis, x, [t]) for x, t in zip((1, 2, 3, 4), times, strict=True)]
    )
  report = {
    'machine': {'device': 'cpu', 'devices': 1},
    'settings': {
      'model': 'resnet8',
      'resolution': 8,
      'dtype': 'float32',
      'tolerance': 0.1,
    },
    'rows': rows,
  }
  path = epath.Path(tmp_path / 'new/out.json')
  scaling_report.write(report, path)
  assert json.loads(path.read_text()) == report
  found = {(f['axis'], f['quantity']): f['leaves_at'] for f in report['fits']}
  assert len(found) == 2 * len(AXES)
  assert found['batch', 'ms'] == 2 and found['devices', 'ms'] is None
  with path.with_suffix('.csv').open() as file:
    assert {row['axis'] for row in csv.DictReader(file)} == set(AXES)
  text = path.with_suffix('.md').read_text()
  assert '| batch | conadv, time |' in text and 'at 2: -' in text
  assert path.with_suffix('.png').read_bytes().startswith(b'\x89PNG')


# ---- Axes -------------------------------------------------------------------


def test_each_axis_changes_one_thing():
  args = parse()
  for axis in AXES:
    configs = [
      bench_scaling.configure(args, **changed)
      for _, changed in bench_scaling.places(args, axis)
    ]
    sizes = {(c.batch_size, c.dataset.image_size_px) for c in configs}
    groups = {c.bn_group_size for c in configs}
    taus = {c.staleness_steps for c in configs if c.is_adversarial}
    counts = {c.microbatches for c in configs}
    assert (len(sizes) > 1) == (axis in ('batch', 'resolution'))
    assert (len(groups) > 1) == (axis == 'batch')
    assert (len(taus) > 1) == (axis == 'staleness')
    assert (len(counts) > 1) == (axis == 'microbatches')


def test_the_axis_of_devices_takes_them_and_a_snapshot_costs_its_bytes():
  args = parse('--devices', '1', '2', '--staleness', '1', '2')
  points = bench_scaling.make_points(args, 'devices')
  assert [p.x for p in points] == [1, 2]
  assert points[1].state_bytes < points[0].state_bytes  # half of the images
  one, two = bench_scaling.make_points(args, 'staleness')
  config = bench_scaling.configure(args)
  (snapshot,) = experiment.build(config).abstract_state().snapshots
  leaves = [*snapshot.params.values(), snapshot.batch_stats]
  count = sum(x.size for x in bench_scaling.jax.tree.leaves(leaves))
  assert two.state_bytes - one.state_bytes == 4 * count


# ---- The command ------------------------------------------------------------


@pytest.mark.parametrize(
  'flags, message',
  (
    (['--axes', 'colour'], "invalid choice: 'colour'"),
    (['--output=x.csv'], 'must end with .json'),
    (['--batch_sizes', '4', '2'], 'must be ascending'),
    (['--staleness', '1', '0'], 'must be ascending'),
    (['--batch_sizes', '0', '2'], 'from 1'),
    (['--repeats=0'], 'must be at least 1'),
    (
      ['--batch_size=24', '--microbatches', '4', '6'],
      'each must divide the largest',
    ),
    (['--devices', '1', '16'], '--batch_size 8'),
    (['--optimizer=adam'], 'optimizer.name'),
  ),
)
def test_wrong_flags_are_refused(flags, message, capsys):
  with pytest.raises(SystemExit) as end:
    parse(*flags)
  assert end.value.code == 2
  assert message in capsys.readouterr().err


@pytest.mark.slow
def test_it_runs_on_more_devices_and_resumes(tmp_path, capsys):
  flags = ['--quick', '--repeats=2', '--seconds=0', '--batch_size=2']
  flags += ['--axes', 'devices', '--devices', '1', '2', '--microbatches', '1']
  flags += ['--model=vit_tiny']  # which compiles soonest
  output = tmp_path / 'out.json'
  done = helpers.run_without(
    MISSING, 'bench_scaling', *flags, f'--output={output}', cwd=tmp_path
  )
  assert done.returncode == 0, done.stderr
  assert 'held: 2 images in all, 8 px, batch-norm groups of 1' in done.stdout
  assert 'no out.png: matplotlib is not installed' in done.stdout
  report = json.loads(output.read_text())
  assert [row['x'] for row in report['rows']] == [1, 2]
  for row in report['rows']:
    assert row['unit'] == 'ms' and row['value'] > 0 and row['floor'] == 1
    # Temporaries are counted, those of a CPU too.
    assert row['peak_bytes'] > 1.2 * row['state_bytes'] > 0
  assert {fit['quantity'] for fit in report['fits']} == {'ms', 'peak_bytes'}
  capsys.readouterr()
  bench_scaling.main([*flags, f'--output={output}', '--resume'])
  assert 'held' not in capsys.readouterr().out
  assert json.loads(output.read_text()) == report
