"""Commands for rented machines, and what they leave behind."""

import pathlib
import re
import shlex
import signal
import subprocess
import time

import pytest
from clouds import NEW, SLICE

from conadv_jax.base import errors
from conadv_jax.cloud import jobs
from conadv_jax.cloud.shell import Shell
from conadv_jax.devices.generations import GENERATIONS

# ---- Names -------------------------------------------------------------------

RUN = ['run', *SLICE, '--', 'true']


@pytest.mark.parametrize(
  'field',
  ['name', 'zone', 'project', 'type', 'runtime_version', 'hosts', 'job',
   'commit', 'bucket'],
)  # fmt: skip
def test_what_is_no_name_is_refused_with_its_field(field, capsys, cloud):
  for bad in ('a b', 'a;b', '$(b)', '`b`', '-oProxy=b', 'a\nb', ' '):
    if field == 'bucket':
      arguments = [*RUN, f'--workdir=gs://{bad}']
    elif field == 'hosts':
      arguments = ['run', f'--hosts=a,{bad}', '--', 'true']
    else:
      arguments = ['run', *SLICE, f'--{field}={bad}', '--', 'true']
    assert cloud(*arguments) == errors.USAGE
    error = capsys.readouterr().err
    assert f'{field}=' in error and 'must be' in error
  assert not cloud.state['calls']


@pytest.mark.parametrize(
  'arguments, message',
  [
    (['create', '--zone=us-east5-a'], 'missing --name'),
    (['create', *SLICE], 'missing --type'),
    (['create', *SLICE, '--type=v5litepod-7'], 'no slice has 7 chips'),
    (['create', *SLICE, '--type=v4:4x4x16'], 'no type of Cloud TPU has that'),
    (['create', *SLICE, '--type=tpu7x-128'], 'Cloud TPU API does not have it'),
    (['create', *NEW, '--slices=2', '--simple'], '--simple'),
    (['create', *NEW, '--tire=spot'], '--tire=spot'),
    (['create', '--hosts=a'], 'machines that exist'),
    (['status', *SLICE, '--hosts=a'], 'give one of them'),
    (['status', *SLICE, '--', 'true'], 'unexpected command'),
    (['run', *SLICE], 'missing command'),
    (['run', *SLICE, '--slices=0', '--', 'true'], 'no number from 1'),
    (['setup', *SLICE, '--commit=none'], "commit='none'"),
    (['supervise', *NEW, '--', 'x', '--workdir=/tmp/x'], 'gs://'),
  ],
)
def test_wrong_usage_is_refused_before_anything_is_run(
  arguments, message, capsys, cloud
):
  assert cloud(*arguments) == errors.USAGE
  assert message in capsys.readouterr().err
  assert not cloud.state['calls']


# ---- Commands ----------------------------------------------------------------


@pytest.mark.parametrize(
  'flags, expected',
  [
    (
      '--type=v5e-256 --tier=spot --project=my-project',
      """queued-resources create run1 --project=my-project --zone=us-east5-a
      --accelerator-type=v5litepod-256 --runtime-version=v2-alpha-tpuv5-lite
      --node-id=run1 --spot --async --quiet""",
    ),
    (
      '--type=v4-128 --tier=reserved',
      """queued-resources create run1 --zone=us-east5-a
      --accelerator-type=v4-128 --runtime-version=tpu-ubuntu2204-base
      --node-id=run1 --reserved --async --quiet""",
    ),
    (
      '--type=v3-32 --tier=reserved --simple',
      """tpu-vm create run1 --zone=us-east5-a --accelerator-type=v3-32
      --version=tpu-ubuntu2204-base --reserved --async --quiet""",
    ),
    (
      '--type=v6e-256 --slices=2 --runtime_version=other',
      """queued-resources create run1 --zone=us-east5-a
      --accelerator-type=v6e-256 --runtime-version=other --node-count=2
      --node-prefix=run1 --async --quiet""",
    ),
  ],
)
def test_the_request_is_what_gcloud_documents(flags, expected, capsys, cloud):
  assert cloud('create', *SLICE, *flags.split(), '--dry_run') == 0
  line = ' '.join(expected.split())
  assert f'gcloud compute tpus {line}\n' in capsys.readouterr().out
  assert not cloud.state['calls']


def test_a_dry_run_prints_every_command_quoted_and_runs_none(capsys, cloud):
  odd = "a 'b' $(touch x); c"
  arguments = ['--dry_run', '--', 'echo', odd]
  assert cloud('supervise', *SLICE, '--type=v4-32', *arguments) == 0
  lines = capsys.readouterr().out.splitlines()
  verbs = [shlex.split(x)[4] for x in lines if x.startswith('gcloud ')]
  wanted = ['create', 'describe', 'ssh', 'scp', 'ssh', 'delete', 'describe']
  left = iter(verbs)
  assert all(verb in left for verb in wanted), verbs
  (start,) = [shlex.split(x) for x in lines if ' start ' in x]
  remote = start[-1].removeprefix('--command=')
  assert shlex.split(remote)[-2:] == ['echo', odd]
  for part in ('mkdir -p', ' scp ', ' install ', ' start ', ' poll '):
    last = max(i for i, line in enumerate(lines) if part in line)
    assert lines[last + 1] == '# the same for 3 other workers', part
  assert not cloud.state['calls'] and not (cloud.root / 'x').exists()


PAGE = pathlib.Path(__file__).parents[2] / 'docs/cloud.md'


def test_the_commands_of_the_page_are_right(cloud, capsys):
  page = PAGE.read_text(encoding='utf-8').replace('\\\n', ' ')
  lines = re.findall('^conadv-cloud (.*)$', page, re.MULTILINE)
  assert len(lines) == 10
  for line in lines:
    verb, *flags = shlex.split(line)
    assert cloud(verb, '--dry_run', *flags) == 0, line
  assert (
    'gcloud compute tpus queued-resources create' in capsys.readouterr().out
  )
  assert not cloud.state['calls']


def test_the_page_has_the_table_of_generations():
  rows = re.findall(r'^\| `(\w+)-N`(.*)\|$', PAGE.read_text('utf-8'), re.M)
  known = {g.accelerator_type: g for g in GENERATIONS.values()}
  assert [name for name, _ in rows] == list(known)
  for name, row in rows:
    generation = known[name]
    for value in (generation.runtime_version, generation.gke_machine_type):
      assert f'`{value}`' in row or not value
    assert f'| {generation.chips_per_host}' in row


def test_a_slice_from_creation_to_deletion(capsys, cloud, checkout):
  cloud.plan({'workers': 2})
  assert cloud('create', *NEW) == 0
  out = capsys.readouterr().out
  for state in ('WAITING_FOR_RESOURCES', 'PROVISIONING', 'CREATING', 'READY'):
    assert f'run1: {state}' in out
  assert cloud('setup', *SLICE) == 0
  home = cloud.root / 'run1/1'
  installed = (home / 'installed').read_text()
  assert 'uv==0.5.0' in installed and '-r requirements-tpu.lock' in installed
  code = home / 'conadv/current'
  head = ['git', '-C', checkout, 'rev-parse', 'HEAD']
  commit = subprocess.check_output(head, text=True).strip()
  assert code.resolve().name == commit and (code / '.git').exists()
  assert cloud('setup', *SLICE) == 0  # which has nothing to do
  assert (home / 'installed').read_text() == installed

  cloud.task(0, 0, worker=1)
  assert cloud('run', *SLICE, *cloud.task(0, 5)) == 0
  assert 'attempt of' in capsys.readouterr().out
  logs = cloud.root / 'runs/cloud/run1/train'
  assert (logs / 'run1-worker-1.log').read_text().endswith('codes1\n')
  capsys.readouterr()
  # Worker 0 fails now; what a log has is never lost.
  task = cloud.task(5)
  assert cloud('run', *SLICE, *task) == 5
  assert 'run1-worker-0: exit code 5' in capsys.readouterr().out
  assert (home / 'conadv/jobs/train/log').read_text().count('attempt') == 2
  assert (logs / 'run1-worker-1.log').read_text().count('attempt') == 2

  assert cloud('status', *SLICE) == 0
  assert 'run1-worker-1: job train: ended 0' in capsys.readouterr().out
  assert cloud('logs', *SLICE) == 0
  assert '==> run1-worker-1 <==\nattempt' in capsys.readouterr().out
  assert cloud('delete', *SLICE) == 0
  assert cloud.is_empty()
  assert cloud('status', *SLICE) == 0
  assert 'run1: NOT_FOUND' in capsys.readouterr().out


def test_a_job_outlives_its_caller_and_is_stopped_by_name(capsys, cloud):
  cloud.plan(interrupt=' poll ')
  assert cloud('create', *NEW, '--simple') == 0
  flags = [*SLICE, '--simple']
  assert cloud('setup', *flags) == 0
  assert cloud('run', *flags, *cloud.task('x')) == errors.INTERRUPTED
  assert 'job train goes on' in capsys.readouterr().out
  assert cloud('status', *flags) == 0
  assert 'running' in capsys.readouterr().out
  assert cloud('run', *flags, *cloud.task('x')) == errors.CLOUD
  assert 'runs already' in capsys.readouterr().err
  assert cloud('stop', *flags) == 0
  assert cloud('logs', *flags, '--follow') == 128 + signal.SIGTERM


def test_a_job_that_cannot_start_on_all_workers_runs_on_none(capsys, cloud):
  cloud.plan({'workers': 2})
  assert cloud('create', *NEW) == cloud('setup', *SLICE) == 0
  cloud.plan({'workers': 2}, silent=['run1/1'])
  assert cloud('run', *SLICE, *cloud.task('x')) == errors.CLOUD
  assert 'run1-worker-1: ERROR: ' in capsys.readouterr().err
  (stop,) = cloud.calls(' stop ')
  assert '--worker=0' in stop


def test_machines_that_exist_are_reached_by_ssh(capsys, cloud):
  hosts = '--hosts=me@a.example,b'
  assert cloud('setup', hosts, '--device=cpu') == 0
  words = ['{index}', '{hosts}', '{host0}']
  assert cloud('run', hosts, '--', 'echo', *words) == 0
  assert '0 2 a.example' in capsys.readouterr().out
  log = cloud.root / 'runs/cloud/hosts/train/b.log'
  assert log.read_text() == '1 2 a.example\n'
  assert not cloud.calls('gcloud')


def test_without_gcloud_the_error_says_what_to_install(
  capsys, programs, monkeypatch
):
  monkeypatch.setenv('PATH', '/none')
  assert programs('status', *SLICE) == errors.CLOUD
  assert 'Google Cloud CLI' in capsys.readouterr().err


def test_quota_and_failed_requests_are_explained(capsys, cloud):
  cloud.plan({'error': "Quota 'TPUV5sLitepodPerProject' exceeded. Limit: 8"})
  assert cloud('create', *NEW) == errors.CLOUD
  printed = capsys.readouterr()
  assert 'Limit: 8' in printed.err and 'ask for more' in printed.err
  assert 'left' not in printed.out
  cloud.plan({'states': ['ACCEPTED', 'FAILED']})
  assert cloud('create', *NEW) == errors.CLOUD
  assert 'is FAILED: no such capacity' in capsys.readouterr().err


@pytest.mark.parametrize('call', ['create run1', 'tpu-vm describe', 'queue'])
def test_a_creation_that_is_cut_short_says_what_is_left(call, capsys, cloud):
  cloud.plan({'states': ['ACCEPTED', 'ACTIVE']}, interrupt=call)
  if call == 'queue':
    cloud.interrupt_at = 1
  assert cloud('create', *NEW) == errors.INTERRUPTED
  out = capsys.readouterr().out
  assert 'run1 may be left, and costs money' in out
  assert 'gcloud compute tpus queued-resources delete run1' in out
  assert cloud.state['queued']


def test_a_service_that_is_busy_is_asked_again(capsys, cloud):
  cloud.plan(busy=5)
  assert cloud('status', *SLICE) == 0
  cloud.plan(busy=100)
  assert cloud('status', *SLICE) == errors.CLOUD
  assert 'cannot be asked for its state' in capsys.readouterr().err


def test_a_deletion_that_does_not_work_says_what_is_left(capsys, cloud):
  cloud.plan(stuck=3)
  assert cloud('create', *NEW) == 0
  assert cloud('delete', *SLICE) == 0
  cloud.plan(stuck=100)
  assert cloud('create', *NEW) == 0
  capsys.readouterr()
  assert cloud('delete', *SLICE) == errors.CLOUD
  error = capsys.readouterr().err
  assert 'run1: is left' in error
  assert 'gcloud compute tpus queued-resources delete run1' in error


@pytest.mark.slow
def test_programs_on_the_path_do_the_same(programs, monkeypatch, checkout):
  monkeypatch.setattr(jobs, '_root', lambda: checkout)
  programs.plan({'workers': 3})
  for worker in (1, 2):
    programs.task(42, 0, worker=worker)
  assert programs.supervise(42, 0) == 0
  assert programs.is_empty() and programs.state['created'] == 1
  # A signal, as a terminal sends it, while gcloud creates.
  programs.plan(interrupt='--node-id')
  assert programs.supervise(0) == errors.INTERRUPTED
  assert programs.is_empty() and programs.state['created'] == 2


def test_programs_run_side_by_side_and_keep_their_order():
  commands = [['sh', '-c', f'sleep {s}; echo {s}; exit 3'] for s in (0.2, 0)]
  results = Shell().run_all(commands)
  assert [(r.code, r.out) for r in results] == [(3, b'0.2\n'), (3, b'0\n')]
  assert results[0].reason == '0.2'


def test_a_ctrl_c_ends_the_programs_that_run(tmp_path):
  # With what they started: gcloud is a shell script that starts Python.
  start = f'(sleep 1000 & echo $! > {tmp_path}/pid; wait); true'
  stop = f'while [ ! -s {tmp_path}/pid ]; do sleep 0.01; done; kill -INT $PPID'
  with pytest.raises(KeyboardInterrupt):
    Shell().run_all([['sh', '-c', start], ['sh', '-c', stop]])
  pid = (tmp_path / 'pid').read_text().strip()
  for _ in range(500):
    status = pathlib.Path(f'/proc/{pid}/stat')
    if not status.exists() or ' Z ' in status.read_text():
      return
    time.sleep(0.01)
  pytest.fail('it goes on')
