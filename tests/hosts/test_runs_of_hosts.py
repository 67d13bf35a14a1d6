"""Whole runs of two and four hosts."""

import json
import os
import shutil
import signal
import time

import multihost
import numpy as np
import pytest

from conadv_jax.base import errors
from conadv_jax.data import sampler
from conadv_jax.run import metrics

ROOT = multihost.ROOT


def arguments(workdir, *more):
  return [
    multihost.TINY, 'train', '--config=configs/digits.py:batch_size=32',
    f'--workdir={workdir}', '--config.model=tiny', '--config.bn_group_size=8',
    '--config.max_steps=6', '--config.log_every_steps=1',
    '--config.attack_stats_every_steps=3', '--config.eval.every_steps=4',
    '--config.eval.batch_size=104', '--config.eval.attack=fgsm',
    '--config.checkpoint.every_steps=3', '--config.plots=False', *more,
  ]  # fmt: skip


def steps_saved(workdir):
  return sorted(int(p.name) for p in (workdir / 'checkpoints').glob('[0-9]*'))


def assert_rows_close(actual, expected, tolerance):
  assert len(actual) == len(expected) > 10
  for a, e in zip(actual, expected, strict=True):
    a, e = ({k: v for k, v in r.items() if k not in metrics.TIMINGS}
            for r in (a, e))  # fmt: skip
    assert a.keys() == e.keys()
    for name, value in e.items():
      if isinstance(value, str):
        assert a[name] == value, name
      else:
        np.testing.assert_allclose(
          a[name], value, rtol=tolerance, atol=tolerance, err_msg=name
        )


@pytest.mark.slow
@pytest.mark.parametrize(('group_size', 'num_hosts'), [(8, 2), (32, 4)])
def test_hosts_train_as_one_process_with_as_many_devices(
  group_size, num_hosts, tmp_path
):
  """In float64; groups of 8 are local, the group of 32 spans all devices.

  Only sums are in another order, by which the log differs in its last digits.
  """
  runs = {}
  for count in (1, num_hosts):
    workdir = tmp_path / f'run{count}'
    more = (
      '--config.dtype=float64', f'--config.bn_group_size={group_size}',
      '--config.plots=True',
    )  # fmt: skip
    with multihost.Hosts(
      tmp_path / f'logs{count}',
      count,
      arguments(workdir, *more),
      devices_per_host=4 // count,
      environment={
        'JAX_ENABLE_X64': '1',
        'RECORD_IDS': str(tmp_path / f'logs{count}'),
      },
    ) as run:
      run.ends_with(0)
      for host in range(1, count):
        assert 'step 1/6' not in run.log(host)
    ids = multihost.recorded_ids(tmp_path / f'logs{count}', count, 32)
    summary = json.loads((workdir / 'summary.json').read_text())
    rows = metrics.read_metrics(workdir)
    runs[count] = (ids, summary, rows)

    files = sorted(p.name for p in workdir.iterdir())
    assert [f for f in files if not f.startswith('events.')] == [
      'checkpoints', 'config.json', 'metrics.jsonl', 'plots', 'summary.json'
    ]  # fmt: skip
    assert len(files) == 6  # with TensorBoard's events
    assert steps_saved(workdir) == [3, 6]
    content = json.loads((workdir / 'config.json').read_text())
    assert content['devices'] == {'kind': 'cpu', 'count': 4, 'hosts': count}

  expected_ids, expected_summary, expected_rows = runs[1]
  np.testing.assert_array_equal(
    expected_ids, [sampler.example_ids(0, t, 32, 1437)[0] for t in range(7)]
  )
  ids, summary, rows = runs[num_hosts]
  np.testing.assert_array_equal(ids, expected_ids)
  assert_rows_close(rows, expected_rows, 1e-12)
  for name in ('top1', 'robust_top1', 'steps', 'nonfinite_steps'):
    assert summary[name] == expected_summary[name], name


@pytest.mark.slow
@pytest.mark.parametrize(
  'host, number, text',
  [
    (0, signal.SIGINT, 'step 3/'),
    (1, signal.SIGTERM, 'compiling the training step'),
  ],
)
def test_a_signal_to_one_host_stops_all_and_the_rerun_finishes(
  host, number, text, tmp_path
):
  workdir = tmp_path / 'run'
  with multihost.Hosts(
    tmp_path / 'first', 2, arguments(workdir, '--config.max_steps=9000')
  ) as run:
    run.wait_for(0, text)
    run.send(host, number)
    run.ends_with(42)
    if 'compiling' in text:
      # Nothing is lost, so nobody waits for the end of it.
      told = f'host {host} stopped: {number.name}: no step was taken since'
      assert told in run.log(1 - host)
      assert not (workdir / 'checkpoints').exists() or not steps_saved(workdir)
    else:
      for one in (0, 1):
        assert f'host {one} of 2: {number.name}: saved step' in run.log(one)
      assert 'will save' in run.log(host)
      assert 'will save' not in run.log(1 - host)
  saved = max(steps_saved(workdir), default=0)
  logged = [r['step'] for r in metrics.read_metrics(workdir)
            if r['split'] == 'train']  # fmt: skip
  assert logged == list(range(1, saved + 1))
  assert saved == 0 if 'compiling' in text else 3 <= saved < 9000

  more = (f'--config.max_steps={saved + 4}',)
  with multihost.Hosts(tmp_path / 'again', 2, arguments(workdir, *more)) as run:
    run.ends_with(0)
    assert (f'resumed at step {saved}' in run.log(0)) == (saved > 0)
  assert json.loads((workdir / 'summary.json').read_text())['steps'] == (
    saved + 4
  )


@pytest.mark.slow
def test_a_run_of_two_hosts_goes_on_with_the_same_bits_on_one(tmp_path):
  """In float64; one process of four devices resumes what two hosts began."""
  wide = ('--config.dtype=float64', '--config.max_steps=3')

  def run(name, count, *more):
    directory = tmp_path / name
    logs = tmp_path / f'logs_{name}{len(more)}'
    environment = {'JAX_ENABLE_X64': '1', 'RECORD_IDS': str(logs)}
    with multihost.Hosts(
      logs,
      count,
      arguments(directory, *wide, *more),
      devices_per_host=4 // count,
      environment=environment,
    ) as started:
      started.ends_with(0)
      ids = multihost.recorded_ids(logs, count, 32)
      return started.log(0), ids, metrics.read_metrics(directory)

  run('two', 2)
  shutil.copytree(tmp_path / 'two', tmp_path / 'one')
  logs, ids, rows = zip(
    run('two', 2, '--config.max_steps=6'),
    run('one', 1, '--config.max_steps=6'),
    strict=True,
  )
  assert all('resumed at step 3' in log for log in logs)
  assert 'damaged' not in logs[1]  # the checksums of host 1's leaves, too
  np.testing.assert_array_equal(*ids)
  np.testing.assert_array_equal(
    ids[0], [sampler.example_ids(0, t, 32, 1437)[0] for t in range(3, 7)]
  )
  assert_rows_close(*rows, 1e-12)


@pytest.mark.slow
def test_wrong_clocks_change_nothing(tmp_path):
  """Test 30: host 0 jumps by an hour, host 1 is ten minutes behind."""
  runs = {}
  for name, clocks in (
    ('right', {}),
    ('wrong', {0: {'CLOCK': '0,3600'}, 1: {'CLOCK': '-600'}}),
  ):
    directory = tmp_path / name
    start = time.monotonic()
    with multihost.Hosts(
      tmp_path / f'logs_{name}',
      2,
      arguments(directory, '--config.checkpoint.keep=9'),
      environment_of_host=clocks,
    ) as run:
      run.ends_with(0)
    took = time.monotonic() - start
    assert steps_saved(directory) == [3, 6]
    runs[name] = rows = metrics.read_metrics(directory)
    for row in (row for row in rows if row['split'] == 'train'):
      assert 0 < row['seconds'] < took and row['images_per_sec'] > 32 / took
      assert 0 <= row['input_wait_percent'] <= 100
  assert_rows_close(runs['wrong'], runs['right'], 0)


@pytest.mark.slow
@pytest.mark.parametrize('host', [0, 1])
def test_a_host_whose_input_fails_saves_with_all_and_names_itself(
  host, tmp_path
):
  """Batches 0 to 6 are there, for 6 steps; the failure is known two before."""
  workdir = tmp_path / 'run'
  more = ('--config.max_steps=50', '--config.checkpoint.every_steps=50',
          '--config.eval.every_steps=0')  # fmt: skip
  with multihost.Hosts(
    tmp_path / 'first',
    2,
    arguments(workdir, *more),
    environment_of_host={host: {'INPUT_FAILS_AT': '7'}},
  ) as run:
    run.ends_with(errors.STORAGE)
    assert 'as the input failed' in run.log(0)
    assert 'error: shard-00007: cannot be read' in run.log(host)
    told = f'error: host {host} of 2: shard-00007: cannot be read'
    assert told in run.log(1 - host)
  (saved,) = steps_saved(workdir)
  assert saved in (5, 6)
  rows = metrics.read_metrics(workdir)
  logged = [row['step'] for row in rows if row['split'] == 'train']
  assert logged == list(range(1, saved + 1))


@pytest.mark.slow
def test_all_hosts_name_all_that_differs_before_anything_is_written(tmp_path):
  """A setting and a version on host 1; code and flags of XLA on host 2."""
  copy = tmp_path / 'copy'
  shutil.copytree(
    ROOT / 'conadv_jax', copy / 'conadv_jax',
    ignore=shutil.ignore_patterns('__pycache__'),
  )  # fmt: skip
  edited = copy / 'conadv_jax' / 'method' / 'losses.py'
  edited.write_text(edited.read_text() + '\n# edited\n')
  search = os.pathsep.join([str(copy), str(ROOT), str(ROOT / 'tests')])
  with multihost.Hosts(
    tmp_path / 'logs',
    3,
    arguments(tmp_path / 'run'),
    of_host={1: ['--config.seed=7']},
    environment_of_host={
      1: {'FAKE_VERSION': 'optax=9.9'},
      2: {
        'PYTHONPATH': search,
        'XLA_FLAGS': '--xla_backend_optimization_level=1',
      },
    },
  ) as run:
    run.ends_with(2)
    for host in range(3):
      log = run.log(host)
      assert f'host {host} of 3: error: the hosts differ' in log
      assert 'config seed: 0 on host 0, 7 on host 1\n' in log
      assert 'version optax: "' in log and '"9.9" on host 1\n' in log
      assert 'code conadv_jax/method/losses.py: "' in log
      assert 'code conadv_jax/hosts/' not in log
      assert 'level=1" on host 2\n' in log
  assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_a_work_directory_that_is_not_shared_is_refused(tmp_path):
  with multihost.Hosts(
    tmp_path / 'logs',
    2,
    arguments(tmp_path / 'run'),
    of_host={1: [f'--workdir={tmp_path / "elsewhere"}']},
  ) as run:
    run.ends_with(2)
    for host in (0, 1):
      assert 'is not seen by host 1; use a directory' in run.log(host)
  assert not list((tmp_path / 'run').iterdir())
  assert not (tmp_path / 'elsewhere').exists()


@pytest.mark.slow
def test_a_nonfinite_run_names_the_examples_of_all_hosts(tmp_path):
  more = (
    '--config.optimizer.name=sgd', '--config.optimizer.learning_rate=1e30',
    '--config.schedule.warmup_epochs=0.0', '--config.max_nonfinite_steps=2',
    '--config.max_steps=50', '--config.bn_group_size=16',
  )  # fmt: skip
  workdir = tmp_path / 'run'
  with multihost.Hosts(tmp_path / 'logs', 2, arguments(workdir, *more)) as run:
    run.ends_with(4)
  files = list(workdir.glob('bad_steps/*.json'))
  assert len(files) == 2
  for file in files:
    content = json.loads(file.read_text())
    for name, batch in (('example_ids', -1), ('next_example_ids', 0)):
      expected, _ = sampler.example_ids(0, content['step'] + batch, 32, 1437)
      assert content[name] == expected.tolist()
  bad = min(int(file.stem) for file in files)
  replay = [multihost.TINY, 'train', f'--workdir={workdir}', f'--replay={bad}']
  with multihost.Hosts(tmp_path / 'replay', 2, replay) as run:
    run.ends_with(0)
    assert f'step {bad}: reproduced bit for bit' in run.log(0)
    assert 'reproduced' not in run.log(1)
  assert (workdir / 'bad_steps' / f'{bad}.png').exists()


@pytest.mark.slow
def test_evaluation_on_two_hosts_equals_that_on_one(tmp_path):
  workdir = tmp_path / 'run'
  tables = {}
  with multihost.Hosts(
    tmp_path / 'train', 1, arguments(workdir), devices_per_host=2
  ) as run:
    run.ends_with(0)
  for count in (1, 2):
    command = [multihost.TINY, 'evaluate', f'--workdir={workdir}',
               '--config.eval.attack_steps=2']  # fmt: skip
    with multihost.Hosts(
      tmp_path / f'evaluate{count}', count, command,
      devices_per_host=2 // count,
    ) as run:  # fmt: skip
      run.ends_with(0)
      assert '360 examples' in run.log(0)
      for host in range(1, count):
        assert '360 examples' not in run.log(host)
    summary = json.loads((workdir / 'summary.json').read_text())
    tables[count] = summary['evaluations']
  assert [row['attack'] for row in tables[2]] == ['none', 'fgsm', 'pgd']
  for one, two in zip(tables[1], tables[2], strict=True):
    assert one['top1'] == two['top1']
    assert one['loss'] == pytest.approx(two['loss'], rel=1e-5)
