"""Runs on rented machines that are supervised until they end."""

import os
import pathlib
import signal

import helpers
import multihost
import pytest
from clouds import NEW, SLICE

from conadv_jax.base import errors
from conadv_jax.cloud import jobs, supervise


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
