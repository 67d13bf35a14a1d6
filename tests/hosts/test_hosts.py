"""Several hosts: their start, what they compare, and what they tell."""

import hashlib
import json
import signal
import socket
import time

import multihost
import pytest

from conadv_jax import cli, hosts
from conadv_jax.base import errors
from conadv_jax.base.errors import ConfigError
from conadv_jax.config import from_config_dict
from conadv_jax.hosts import join, private
from conadv_jax.run import equal_hosts
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
