"""Slices that are made, used, taken away and deleted, on a cloud of folders."""

import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time

import fake_cloud
import helpers
import multihost
import pytest

from conadv_jax.base import errors
from conadv_jax.cloud import command, jobs, supervise
from conadv_jax.cloud.shell import Result, Shell
from conadv_jax.devices.generations import GENERATIONS

PROGRAMS = ('gcloud', 'ssh', 'scp')
SLICE = ['--name=run1', '--zone=us-east5-a']
NEW = [*SLICE, '--type=v5litepod-8']
# Ends with the next of the codes in a file of its own; 'x' of none: it stays.
TASK = ['sh', '-c', """
code=$(head -n 1 "$0")
sed -i 1d "$0"
echo "attempt of $0"
[ "$code" != x ] || sleep 1000
exit "$code"
"""]  # fmt: skip
# Stands for pip and uv on a worker; what they install is what is here.
PYTHON = f"""#!/bin/sh
echo "$*" >> "$HOME/installed"
case $* in *' venv '*)
  mkdir -p .venv/bin
  printf '#!/bin/sh\\nexec {sys.executable} "$@"\\n' > .venv/bin/python
  chmod +x .venv/bin/python
esac
"""


class Fake:
  """The cloud's folder, what a test wants of it, and what it was asked."""

  def __init__(self, root):
    self.root, self.sleeps, self.pause = root, [], 0.01
    self.interrupt_at, self.on_sleep = None, lambda: None
    (root / 'remote').mkdir()
    self.write(root / 'remote/python3', PYTHON)
    self.plan({})
    state = {'queued': {}, 'nodes': {}, 'calls': []}
    counts = dict.fromkeys(('created', 'stuck', 'busy', 'interrupted'), 0)
    (root / 'state.json').write_text(json.dumps(state | counts))

  @staticmethod
  def write(path, text):
    path.write_text(text)
    path.chmod(0o755)

  def plan(self, *creations, **whole):
    plan = {'creations': list(creations) or [{}]} | whole
    (self.root / 'plan.json').write_text(json.dumps(plan))

  @property
  def state(self):
    return json.loads((self.root / 'state.json').read_text())

  def calls(self, text):
    return [c for c in self.state['calls'] if text in ' '.join(c)]

  def sleep(self, seconds):
    self.sleeps.append(seconds)
    assert len(self.sleeps) < 300, 'it waits for ever'
    at = self.interrupt_at
    if at == len(self.sleeps) or (at == 'work' and self.is_at_work()):
      self.interrupt_at = None
      raise KeyboardInterrupt
    self.on_sleep()
    time.sleep(self.pause)

  def __call__(self, *arguments):
    return command.main(arguments, sleep=self.sleep)

  def task(self, *codes, worker=0):
    """TASK, which ends with `codes`, one after the other, on `worker`."""
    (self.root / f'codes{worker}').write_text('\n'.join(map(str, codes)) + '\n')
    return ['--', *TASK, str(self.root / 'codes{index}')]

  def supervise(self, *codes, flags=()):
    return self('supervise', *NEW, *flags, *self.task(*codes))

  def is_at_work(self):
    return 'x' not in (self.root / 'codes0').read_text()

  def is_empty(self):
    state = self.state
    homes = [p for p in self.root.rglob('jobs') if p.is_dir()]
    return not (state['queued'] or state['nodes'] or homes)


@pytest.fixture(scope='module')
def checkout(tmp_path_factory):
  """A repository with what a worker needs to install it."""
  root = tmp_path_factory.mktemp('checkout')
  (root / 'requirements.lock').write_text('jax==0.10.2\nuv==0.5.0\n')
  identity = ['-c', 'user.name=a', '-c', 'user.email=a@b']
  for arguments in (
    ['init', '-q'],
    ['add', '.'],
    [*identity, 'commit', '-q', '-m', 'a'],
  ):
    subprocess.run(['git', '-C', root, *arguments], check=True)
  return root


@pytest.fixture
def cloud(tmp_path, monkeypatch, checkout):
  """A cloud in the process of the test."""
  fake = Fake(tmp_path)
  real = Shell.run_all

  def interrupt():
    raise KeyboardInterrupt

  def run_all(self, commands, dry=b''):
    if self.dry_run or commands[0][0] not in PROGRAMS:
      return real(self, commands, dry)
    return [
      Result(*fake_cloud.call(tmp_path, program, arguments, interrupt))
      for program, *arguments in commands
    ]

  monkeypatch.setattr(Shell, 'run_all', run_all)
  monkeypatch.setattr(jobs, '_root', lambda: checkout)
  monkeypatch.chdir(tmp_path)
  yield fake
  for file in tmp_path.rglob('pid'):
    try:
      os.killpg(int(file.read_text()), signal.SIGKILL)
    except ProcessLookupError:
      pass


@pytest.fixture
def programs(cloud, monkeypatch):
  """The same cloud behind programs on the PATH."""
  folder = cloud.root / 'bin'
  folder.mkdir()
  source = pathlib.Path(fake_cloud.__file__).read_text(encoding='utf-8')
  for name in PROGRAMS:
    cloud.write(folder / name, f'#!{sys.executable} -IS\n{source}')
  monkeypatch.undo()
  monkeypatch.setenv('PATH', f'{folder}:{os.environ["PATH"]}')
  monkeypatch.setenv('FAKE_CLOUD', str(cloud.root))
  monkeypatch.chdir(cloud.root)
  return cloud


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


# ---- Supervised --------------------------------------------------------------


def test_a_run_that_ends_well_leaves_nothing_behind(cloud):
  assert cloud.supervise(0) == 0
  assert cloud.is_empty() and cloud.state['created'] == 1
  log = cloud.root / 'runs/cloud/run1/train/run1-worker-0.log'
  assert log.read_text().count('attempt') == 1


def test_after_a_preemption_the_slice_is_made_again(capsys, cloud):
  cloud.plan({'preempt': 'attempt'}, {'states': ['ACCEPTED', 'FAILED']}, {})
  assert cloud.supervise('x', 0) == 0
  out = capsys.readouterr().out
  assert 'is SUSPENDING' in out and 'is FAILED' in out
  assert 'is SUSPENDED; deleting it' in out
  assert cloud.state['created'] == 3 and len(cloud.calls('install')) == 2
  assert cloud.is_empty()


def test_a_preempted_node_without_a_queue_is_made_again(capsys, cloud):
  cloud.plan({'preempt': 'attempt'}, {})
  assert cloud.supervise('x', 0, flags=['--simple']) == 0
  assert 'is PREEMPTED; deleting it' in capsys.readouterr().out
  assert cloud.state['created'] == 2 and cloud.is_empty()


@pytest.mark.parametrize(
  'kind, state',
  [
    ('states', 'SUSPENDING'),
    ('states', 'SUSPENDED'),
    ('nodes', 'PREEMPTED'),
    ('nodes', 'TERMINATED'),
    ('nodes', 'REPAIRING'),
  ],
)
def test_a_slice_that_will_not_be_ready_is_made_again(
  kind, state, capsys, cloud
):
  cloud.plan({kind: ['CREATING', state]}, {})
  assert cloud.supervise(0) == 0
  assert f'run1: is {state}' in capsys.readouterr().out
  assert cloud.state['created'] == 2 and cloud.is_empty()


def test_a_run_that_can_go_on_does_so_on_the_slice_that_is_there(cloud):
  assert cloud.supervise(42, 8, 6, 137, 0) == 0
  assert cloud.state['created'] == 1 and len(cloud.calls(' start ')) == 5
  assert [s for s in cloud.sleeps if s >= 30] == [30, 60, 120, 240]


def test_a_job_that_is_lost_without_a_code_is_started_again(capsys, cloud):
  def lose():
    if cloud.is_at_work():
      (file,) = cloud.root.rglob('jobs/train/pid')
      os.killpg(int(file.read_text()), signal.SIGKILL)
      cloud.on_sleep = lambda: None

  cloud.on_sleep = lose
  assert cloud.supervise('x', 0) == 0
  assert 'is gone without an exit code' in capsys.readouterr().out
  assert cloud.state['created'] == 1 and cloud.is_empty()


def test_a_run_goes_on_while_its_worker_is_not_reached(capsys, cloud):
  flag = cloud.root / 'flag'
  wait = f'while [ ! -e {flag} ]; do sleep 0.01; done; exit 3'

  def lose():
    if cloud.calls(' poll '):
      cloud.plan(silent=['run1/0'])
    if cloud.sleeps[-1] == 30:
      cloud.plan()
      cloud.on_sleep = flag.touch

  cloud.on_sleep = lose
  assert cloud('supervise', *NEW, '--', 'sh', '-c', wait) == 3
  assert 'cannot be reached by ssh' in capsys.readouterr().out
  assert len(cloud.calls(' start ')) == 1 and cloud.is_empty()


@pytest.mark.parametrize('code', [1, 2, 4, 130])
def test_a_failure_ends_it_and_the_slice(code, cloud):
  assert cloud.supervise(code, 0) == code
  assert cloud.is_empty() and len(cloud.calls(' start ')) == 1


def test_it_gives_up_after_some_tries(capsys, cloud):
  assert cloud.supervise(*[42] * 9, flags=['--tries=2']) == 42
  assert 'gives up after 2 tries' in capsys.readouterr().out
  assert cloud.is_empty() and len(cloud.calls(' start ')) == 2


def test_a_run_that_lasts_is_never_given_up(cloud, monkeypatch):
  monkeypatch.setattr(supervise, '_PROGRESS_SECONDS', -1)
  assert cloud.supervise(*[42] * 6, 0) == 0
  assert cloud.sleeps.count(30) == 6


def test_a_quota_that_is_used_up_is_tried_again_some_times(cloud):
  cloud.plan({'error': 'Quota exceeded'}, {'error': 'Quota exceeded'}, {})
  assert cloud.supervise(0) == 0
  cloud.plan({'error': 'PERMISSION_DENIED: tpu.nodes.create'})
  assert cloud.supervise(0) == errors.CLOUD  # at once
  assert cloud.state['created'] == 4 and cloud.is_empty()


def test_one_worker_that_fails_ends_the_others(cloud):
  cloud.plan({'workers': 2})
  cloud.task('x', worker=1)
  assert cloud.supervise(5) == 5
  assert cloud.calls(' stop ') and cloud.is_empty()
  assert sum(s for s in cloud.sleeps if s == 15) >= 300


def test_a_worker_that_is_not_reached_is_a_try(capsys, cloud):
  cloud.plan({'workers': 2}, silent=['run1/1'])
  assert cloud.supervise(0, flags=['--tries=1']) == errors.CLOUD
  assert 'run1-worker-1: ' in capsys.readouterr().out
  assert cloud.is_empty()


def test_a_slice_of_someone_else_is_left_alone(capsys, cloud):
  assert cloud('create', *NEW) == 0
  assert cloud.supervise(0) == errors.USAGE
  assert '--adopt' in capsys.readouterr().err
  assert cloud.state['nodes']
  assert cloud.supervise(0, flags=['--adopt']) == 0
  assert cloud.is_empty() and cloud.state['created'] == 1


def test_a_run_whose_supervisor_was_killed_is_taken_over(cloud):
  cloud('create', *NEW)
  cloud('setup', *SLICE)
  flag = cloud.root / 'flag'
  wait = f'while [ ! -e {flag} ]; do sleep 0.01; done; exit 3'
  assert cloud('run', *SLICE, '--detach', '--', 'sh', '-c', wait) == 0
  cloud.on_sleep = flag.touch
  assert cloud.supervise(0, flags=['--adopt']) == 3
  assert len(cloud.calls(' start ')) == 1 and cloud.is_empty()


def test_machines_that_exist_are_supervised_and_stay(cloud):
  task = cloud.task(42, 0)
  assert cloud('supervise', '--hosts=a', '--device=cpu', *task) == 0
  assert len(cloud.calls(' start ')) == 2 and not cloud.calls('gcloud')
  assert (cloud.root / 'a/0/conadv/jobs/train/log').exists()


def test_what_is_kept_is_named(capsys, cloud):
  assert cloud.supervise(0, flags=['--keep']) == 0
  out = capsys.readouterr().out
  assert 'run1 is kept' in out
  assert '--zone=us-east5-a --force --quiet' in out
  assert cloud.state['nodes']


@pytest.mark.parametrize(
  'call',
  [
    'create run1',
    'queued-resources describe',  # at first, and while it is ACCEPTED
    'tpu-vm describe',
    '--command=true',
    'scp',
    ' install ',
    ' start ',
    ' poll ',
  ],
)
def test_a_ctrl_c_in_any_state_leaves_nothing_behind(call, cloud, capsys):
  cloud.plan(interrupt=call)
  assert cloud.supervise('x') == errors.INTERRUPTED
  assert cloud.is_empty()
  if cloud.state['created']:
    assert 'run1 is gone' in capsys.readouterr().out


def test_a_ctrl_c_lets_a_run_save_before_the_slice_goes(cloud):
  cloud.interrupt_at = 'work'
  assert cloud.supervise('x') == errors.INTERRUPTED
  verbs = [
    c
    for c in cloud.state['calls']
    if {'stop', 'delete'} & set(' '.join(c).split())
  ]
  assert ' stop ' in ' '.join(verbs[0]) and 'delete' in verbs[1]
  assert cloud.is_empty()


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_like_a_ctrl_c(number, cloud):
  def send():
    if cloud.is_at_work():
      cloud.on_sleep = lambda: None
      os.kill(os.getpid(), number)

  cloud.on_sleep = send
  assert cloud.supervise('x') == errors.INTERRUPTED
  assert cloud.calls(' stop ') and cloud.is_empty()


def test_nohup_lets_it_go_on(cloud):
  before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
  cloud.on_sleep = lambda: os.kill(os.getpid(), signal.SIGHUP)
  try:
    assert cloud.supervise(0) == 0
  finally:
    signal.signal(signal.SIGHUP, before)


def test_a_ctrl_c_between_two_runs_leaves_nothing_behind(cloud):
  def interrupt():
    if cloud.sleeps[-1] == 30:
      raise KeyboardInterrupt

  cloud.on_sleep = interrupt
  assert cloud.supervise(42, 'x') == errors.INTERRUPTED
  assert cloud.is_empty() and len(cloud.calls(' start ')) == 1
  cloud.plan({'preempt': 'attempt'}, interrupt=' delete ')
  cloud.on_sleep = lambda: None
  assert cloud.supervise('x') == errors.INTERRUPTED
  assert cloud.is_empty() and cloud.state['created'] == 2


def test_a_ctrl_c_in_the_queue_leaves_nothing_behind(cloud):
  cloud.plan({'states': ['ACCEPTED']})
  cloud.interrupt_at = 3
  assert cloud.supervise('x') == errors.INTERRUPTED
  assert cloud.is_empty() and len(cloud.sleeps) == 3


def test_a_second_ctrl_c_names_what_may_be_left(capsys, cloud):
  cloud.plan({'states': ['ACCEPTED']}, interrupt=' delete ')
  cloud.interrupt_at = 1
  assert cloud.supervise('x') == errors.INTERRUPTED
  assert 'run1 may be left' in (out := capsys.readouterr().out)
  assert 'gcloud compute tpus queued-resources delete run1' in out


@pytest.mark.parametrize(
  'codes, expected',
  [([0, 0], 0), ([42, 42, 0], 42), ([8, 5, 42], 5), ([8, 134], 134)],
)
def test_of_several_codes_the_cause_counts(codes, expected):
  assert supervise.worst(codes) == expected


# ---- Supervised training -----------------------------------------------------

# Trains with the next of the faults in a file of its own. The work directory,
# which stands for a bucket, is in the text: a path of the machines is refused.
TRAIN = """
CONADV_FAULTS=$(head -n 1 "$0")
export CONADV_FAULTS
sed -i 1d "$0"
exec python "$@" --workdir="""
FAULTS = [
  ['', 'kill@checkpoint/mid_write:8', '', ''],
  ['kill@train/step:6', '', 'hang@train/step:14', ''],
]


def left_of(root):
  """Processes of the workers of the cloud in `root` that still run."""
  found = []
  for process in pathlib.Path('/proc').glob('[0-9]*'):
    try:
      if f'HOME={root}/'.encode() in (process / 'environ').read_bytes():
        found.append((process / 'cmdline').read_text())
    except OSError:  # of another user, or gone
      pass
  return found


@pytest.mark.fault
def test_training_that_is_killed_three_times_equals_the_unbroken_run(
  programs, monkeypatch, checkout, tmp_path
):
  """A worker in a step, the one that saves in a save, then all at once."""
  arguments = [
    multihost.TINY, 'train', '--config=digits:batch_size=32,method=conadv',
    '--config.model=tiny', '--config.bn_group_size=8', '--config.max_steps=18',
    '--config.log_every_steps=1', '--config.eval.every_steps=5',
    '--config.checkpoint.every_steps=4', '--config.plots=False',
    '--peer_timeout_seconds=5',
  ]  # fmt: skip
  for name, value in multihost.variables(devices=1).items():
    monkeypatch.setenv(name, value)
  with multihost.Hosts(
    tmp_path / 'logs', 2, [*arguments, f'--workdir={tmp_path}/unbroken']
  ) as run:
    run.ends_with(0)
  monkeypatch.setattr(jobs, '_root', lambda: checkout)
  programs.pause = 1
  programs.plan({'workers': 2, 'preempt': 'step 11/'}, {'workers': 2})
  for worker, faults in enumerate(FAULTS):
    (tmp_path / f'faults{worker}').write_text('\n'.join(faults) + '\n')
  assert 0 == programs(
    'supervise', *NEW, '--',
    'sh', '-c', f'{TRAIN}{tmp_path}/run', f'{tmp_path}/faults{{index}}',
    *arguments, f'--coordinator=127.0.0.1:{multihost.free_port()}',
    '--num_hosts={hosts}', '--host_index={index}',
  )  # fmt: skip
  assert programs.state['created'] == 2 and programs.is_empty()
  assert not left_of(tmp_path)
  assert not any(f.read_text() for f in tmp_path.glob('faults*'))
  log = tmp_path / 'runs/cloud/run1/train/run1-worker-0.log'
  assert log.read_text().count('resumed at step') == 3
  with helpers.tiny_network():
    expected, got = (
      (multihost.rows(tmp_path / name), multihost.hashes(tmp_path / name))
      for name in ('unbroken', 'run')
    )
  assert got == expected
  assert len(got[0]) > 20 and len(got[1]) > 20
