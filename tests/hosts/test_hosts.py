"""Several hosts: their start, what they compare, and runs of 2 and 4."""

import hashlib
import json
import os
import shutil
import signal
import socket
import time

import multihost
import numpy as np
import pytest

from conadv_jax import cli, hosts
from conadv_jax.base import errors
from conadv_jax.base.errors import ConfigError
from conadv_jax.config import from_config_dict
from conadv_jax.data import sampler
from conadv_jax.hosts import join, private
from conadv_jax.run import equal_hosts, metrics
from configs import digits

ROOT = multihost.ROOT


# ---- Flags -----------------------------------------------------------------


@pytest.fixture
def joined(monkeypatch):
  """Collects the places that `join.start` would join."""
  places = []
  monkeypatch.setattr(join, '_join', lambda place, _: places.append(place))
  monkeypatch.setattr(join, '_detected', lambda *_: None)
  monkeypatch.delenv('JAX_COORDINATOR_ADDRESS', raising=False)
  return places


def start(*flags):
  return cli.start_hosts(['prog', *flags])


ALL = ('--coordinator=10.0.0.2:8476', '--num_hosts=4', '--host_index=3')


def test_flags_say_where_the_hosts_are_and_are_taken_out(joined):
  assert start('--workdir=w', *ALL, '--config=c') == [
    'prog', '--workdir=w', '--config=c'
  ]  # fmt: skip
  (place,) = joined
  assert (place.coordinator, place.num_hosts, place.host_index) == (
    '10.0.0.2:8476', 4, 3
  )  # fmt: skip


def test_the_variable_of_jax_stands_for_the_coordinator(joined, monkeypatch):
  monkeypatch.setenv('JAX_COORDINATOR_ADDRESS', '10.0.0.9:1234')
  start(*ALL)
  start(*ALL[1:])
  assert [p.coordinator for p in joined] == ['10.0.0.2:8476', '10.0.0.9:1234']


def test_a_coordinator_alone_is_refused(monkeypatch):
  nothing = ('10.0.0.9:1234', None, None, None)
  with pytest.raises(ConfigError, match='how many hosts.*--num_hosts'):
    detect(monkeypatch, nothing, address='10.0.0.9:1234')


@pytest.mark.parametrize('flags', [(), ('--num_hosts=1',)])
def test_one_host_joins_nobody(flags, joined):
  start(*flags)
  assert not joined


@pytest.mark.parametrize(
  'flags, message',
  [
    (ALL[:2], '--host_index must be given too'),
    (ALL[1:], '--coordinator must be given too'),
    (('--num_hosts=2',), '--coordinator and --host_index must be given'),
    (('--host_index=1',), '--coordinator and --num_hosts must'),
    (('--num_hosts=0',), '--num_hosts=0: must be 1 or more'),
    ((*ALL, '--host_index=4'), 'from 0 to 3'),
    ((*ALL, '--host_index=-1'), 'from 0 to 3'),
    ((*ALL, '--coordinator=10.0.0.2'), 'HOST:PORT'),
    ((*ALL, '--coordinator=:8476'), 'HOST:PORT'),
    ((*ALL, '--coordinator=a:99999'), 'HOST:PORT'),
    ((*ALL, '--start_timeout_seconds=0'), 'must be 1 or more'),
  ],
)
def test_flags_that_do_not_go_together_are_refused(flags, message, joined):
  with pytest.raises(ConfigError, match=message):
    start(*flags)
  assert not joined


def detect(monkeypatch, result, on_tpu_vm=False, address=None):
  def found(*_):
    if isinstance(result, Exception):
      raise result
    return result

  monkeypatch.setattr(private, 'detect', found)
  monkeypatch.setattr(private, 'on_tpu_vm', lambda: on_tpu_vm)
  return join._detected(address, 300)


@pytest.fixture
def any_platform(monkeypatch):
  """As where JAX_PLATFORMS is not set."""
  options = join.jax.config
  before = options.jax_platforms
  options.update('jax_platforms', None)
  yield
  options.update('jax_platforms', before)


def test_hosts_are_found_where_jax_finds_them(monkeypatch):
  place = detect(monkeypatch, ('10.0.0.2:8482', 16, 5, None))
  assert place == join._Place('10.0.0.2:8482', 16, 5, None)
  assert detect(monkeypatch, (None, None, None, None)) is None


def test_a_machine_without_a_cluster_is_alone(monkeypatch):
  """Asks JAX itself."""
  for name in (
    'SLURM_JOB_ID',
    'OMPI_MCA_orte_hnp_uri',
    'KUBERNETES_SERVICE_HOST',
    'JAX_COORDINATOR_ADDRESS',
  ):
    monkeypatch.delenv(name, raising=False)
  assert join._detected(None, 1) is None


def test_a_failed_search_says_how_to_do_without(monkeypatch):
  with pytest.raises(ConfigError, match=r'no metadata.*--num_hosts=1'):
    detect(monkeypatch, OSError('no metadata'))


def test_a_variable_that_hides_the_slice_is_refused(monkeypatch, any_platform):
  monkeypatch.setenv('TPU_SKIP_MDS_QUERY', '1')
  nothing = (None, None, None, None)
  assert detect(monkeypatch, nothing) is None
  with pytest.raises(ConfigError, match='unset it'):
    detect(monkeypatch, nothing, on_tpu_vm=True)


def test_a_run_on_the_cpu_of_a_tpu_machine_is_alone(monkeypatch):
  place = ('10.0.0.2:8482', 16, 5, None)
  assert detect(monkeypatch, place, on_tpu_vm=True) is None


def test_a_port_that_is_taken_is_refused():
  with socket.socket() as other:
    other.bind(('', 0))
    other.listen()
    port = other.getsockname()[1]
    with pytest.raises(ConfigError, match=f'port {port} .*another port'):
      start(f'--coordinator=127.0.0.1:{port}', '--num_hosts=2',
            '--host_index=0')  # fmt: skip


@pytest.mark.parametrize(
  'host, expected',
  [
    ('127.0.0.1', True),
    ('localhost', True),
    ('[::1]', True),
    ('10.0.0.2', False),
    ('tpu-host-0', False),
  ],
)
def test_loopback_addresses_are_known(host, expected):
  assert join._is_loopback(host) == expected


def test_ranges():
  assert hosts.ranges([0, 1, 2, 5, 7, 8]) == '0-2, 5, 7-8'


# ---- What hosts must agree on -----------------------------------------------


def test_differences_name_key_values_and_hosts():
  rows = [{'config seed': 0, 'same': 'x'} for _ in range(5)]
  rows[1]['config seed'] = rows[3]['config seed'] = rows[4]['config seed'] = 7
  rows[2] = {'same': 'x', 'version libtpu': '0.1'}
  assert equal_hosts.differences(rows) == [
    'config seed: 0 on host 0, 7 on hosts 1, 3-4, missing on host 2',
    'version libtpu: missing on host 0, "0.1" on host 2',
  ]
  assert not equal_hosts.differences(rows[:1] * 4)


@pytest.mark.parametrize(
  'rows, message',
  [
    ([[[0, 4]], [[4, 8]]], None),
    ([[[0, 2], [4, 6]], [[2, 4], [6, 8]]], None),  # groups that span hosts
    ([[[0, 4]], [[5, 8]]], 'place 4 .*by no host.* 1 places'),
    ([[[0, 5]], [[4, 8]]], 'place 4 .*by hosts 0-1'),
  ],
)
def test_every_place_of_a_batch_has_one_host(rows, message):
  if message is None:
    equal_hosts.check_cover(rows, 8)
  else:
    with pytest.raises(ConfigError, match=message):
      equal_hosts.check_cover(rows, 8)


def test_an_edited_file_has_another_digest():
  digests = equal_hosts.code_digests()
  assert 'conadv_jax/data/sampler.py' in digests
  source = (ROOT / 'conadv_jax' / 'hosts' / 'join.py').read_bytes()
  digest = hashlib.sha256(source).hexdigest()
  assert digest.startswith(digests['conadv_jax/hosts/join.py'])


def test_only_listed_variables_are_compared(monkeypatch):
  monkeypatch.setenv('A_SECRET', 'hunter2')
  monkeypatch.setenv('LIBTPU_INIT_ARGS', '--xla_x=1')
  settings = from_config_dict(digits.get_config())
  facts = equal_hosts.program(settings)
  assert facts['environment LIBTPU_INIT_ARGS'] == '--xla_x=1'
  assert 'hunter2' not in json.dumps(facts)
  assert facts['config attack.epsilon'] == 16.0


# ---- What hosts tell each other --------------------------------------------

PROGRAM = """
import os, sys, time
import numpy as np
from conadv_jax import cli, hosts
from conadv_jax.config import ConfigError

def main(argv):
  cli.start_hosts(argv)
  {body}

cli.run(main)
"""


def program(logs, body, count=2, **options):
  lines = body.strip().splitlines()
  code = PROGRAM.format(body='\n  '.join(lines))
  return multihost.Hosts(logs, count, ['-c', code], **options)


@pytest.mark.slow
def test_hosts_tell_each_other_in_order(tmp_path):
  body = """
rows = hosts.gather('a', {'host': hosts.index()})
print('rows', rows)
print('word', hosts.on_writer('b', lambda: ['of host', hosts.index()]))
print('sums', hosts.gather_arrays(np.array([1, hosts.index()])).sum(0))
hosts.say('said once')
"""
  with program(tmp_path, body) as run:
    run.ends_with(0, 60)
    first, second = run.log(0), run.log(1)
  assert "rows [{'host': 0}, {'host': 1}]" in first and 'rows None' in second
  for log in (first, second):
    assert "word ['of host', 0]" in log and 'sums [2 1]' in log
  assert 'said once' in first and 'said once' not in second
  assert 'host 1 of 2: 1 of 2 devices, cpu' in second


HOST_0_REFUSES = """
def fail():
  raise ConfigError('seed=7: no')
hosts.on_writer('a', fail)"""
HOST_1_REFUSES = """
if hosts.index() == 1:
  raise ConfigError('seed=7: no')
hosts.gather('a', 0)
hosts.on_writer('b', lambda: 0)
time.sleep(100)"""
HOST_0_BREAKS = """
if hosts.index() == 0:
  raise OSError('disk is full')
hosts.on_writer('a', lambda: 0)"""


@pytest.mark.parametrize(
  'body, code, message',
  [
    (HOST_0_REFUSES, 2, 'seed=7: no'),
    pytest.param(HOST_1_REFUSES, 2, 'seed=7: no', marks=pytest.mark.slow),
    pytest.param(HOST_0_BREAKS, 1, 'disk is full', marks=pytest.mark.slow),
  ],
  ids=['host 0 refuses', 'host 1 refuses', 'host 0 breaks'],
)
def test_a_failure_of_one_host_ends_all(body, code, message, tmp_path):
  with program(tmp_path, body) as run:
    run.ends_with(code, 60)
    for host in (0, 1):
      assert message in run.log(host)
      assert code == 1 or f'host {host} of 2: error:' in run.log(host)


@pytest.mark.slow
def test_sigterm_before_the_run_handles_it_ends_the_process(tmp_path):
  body = """
print('under way', flush=True)
time.sleep(100)"""
  with program(tmp_path, body) as run:
    for host in (0, 1):
      run.wait_for(host, 'under way', 60)
    for host in (0, 1):
      run.send(host, signal.SIGTERM)
    run.ends_with(-signal.SIGTERM, 30)


@pytest.mark.slow
@pytest.mark.parametrize('present', [[0, 2], [2]])
def test_a_missing_host_ends_in_bounded_time_with_what_to_check(
  present, tmp_path
):
  started = time.monotonic()
  flags = ['--start_timeout_seconds=5']
  with program(
    tmp_path, 'pass', count=4, present=present,
    of_host={host: flags for host in present},
  ) as run:  # fmt: skip
    run.ends_with(errors.HOST, 60)
    logs = {host: run.log(host) for host in present}
  assert time.monotonic() - started < 40
  for host, log in logs.items():
    assert f'host {host} of 4: waiting up to 5 s' in log
    _, _, last = log.rpartition(f'host {host} of 4: error: ')
    assert f'not all hosts came to 127.0.0.1:{run.port} in 5 s' in last
    assert f'can they reach port {run.port} of 127.0.0.1' in last


@pytest.mark.slow
def test_jax_aborts_a_host_at_once_when_host_0_is_gone(tmp_path):
  body = """
print('under way', flush=True)
time.sleep(100)"""
  with program(tmp_path, body) as run:
    for host in (0, 1):
      run.wait_for(host, 'under way', 60)
    run.send(0, signal.SIGKILL)
    run.ends_with(-signal.SIGABRT, 30, hosts=[1])
    assert 'leader task was preempted/died' in run.log(1)


# ---- Whole runs ------------------------------------------------------------


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
  """Test 15, in float64, where one process goes on with its four devices."""
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
