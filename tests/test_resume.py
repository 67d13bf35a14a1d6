"""Runs that are killed or asked to stop, against the run that is not."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import random
import shutil

import helpers
import jax
import jax.numpy as jnp
import multihost
import numpy as np
import pytest

from conadv_jax import experiment, models
from conadv_jax.checkpoints.checkpoint import Checkpoints
from conadv_jax.config import from_config_dict
from conadv_jax.method.state import Perturbation, Snapshot
from conadv_jax.run import feed, training
from configs import digits

pytestmark = pytest.mark.fault

STEPS = 25  # an epoch ends within step 23
FIELDS = {
  'model': 'tiny',
  'bn_group_size': 8,
  'max_steps': STEPS,
  'log_every_steps': 1,
  'attack_stats_every_steps': 4,
  'attack.preset': 'paper',  # with random starts
  'eval.every_steps': 7,
  'eval.attack': 'fgsm',
  'plots': False,
  'checkpoint.every_steps': 5,
  'checkpoint.keep': 1,
}
TAUS = {
  '0': ('disadv', {'staleness_steps': 0}),
  '1': ('conadv', {'staleness_steps': 1}),
  '3': ('conadv', {'staleness_steps': 3}),
  # Images and weights are perturbed; of weights each device has its own.
  'both': ('conadv_consam', {'staleness_steps': 2, 'sam.group_size': 8}),
  'sampa': ('sampa', {}),
}


@pytest.fixture(scope='module', autouse=True)
def tiny_network():
  """The network of the runs, to read their checkpoints with."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(models.MODELS, 'tiny', models.Entry(helpers.TinyNet, 4))
    yield


def start(directory, tau='1', faults='', cached=True, devices=8, **fields):
  """Starts a run in `directory`, which keeps the ids that it fed.

  Compiling is most of such a run. With `cached`, all runs of the same program
  compile it once.
  """
  method, more = TAUS[tau]
  flags = FIELDS | more | fields
  ids_of(directory).mkdir(exist_ok=True)
  environment = {'CONADV_FAULTS': faults, 'RECORD_IDS': str(ids_of(directory))}
  if cached:
    environment |= multihost.compile_cache(directory.parents[1] / 'cache')
  return multihost.start(
    [
      multihost.TINY,
      'train',
      f'--config=configs/digits.py:batch_size=64,method={method}',
      f'--workdir={directory}',
      *(f'--config.{name}={value}' for name, value in flags.items()),
    ],
    directory.parent / f'{directory.name}.log',
    environment,
    devices,
  )


def run(*args, **options):
  """As `start`: its exit code."""
  process = start(*args, **options)
  process.join()
  return process.exitcode


def ids_of(directory):
  return directory.parent / f'{directory.name}.ids'


def log_of(directory):
  return (directory.parent / f'{directory.name}.log').read_text()


def fed(directory):
  """{batch: example ids} of all processes of a run; they must agree."""
  found = {}
  for record in multihost.rows_of_ids(ids_of(directory)):
    assert found.setdefault(record['batch'], record['ids']) == record['ids']
  return found


@pytest.fixture(scope='module')
def unbroken(tmp_path_factory):
  """What a run without faults gives, by staleness."""
  root = tmp_path_factory.mktemp('unbroken')
  made = {}

  def of(tau):
    if tau not in made:
      directory = root / f'tau{tau}'
      code = run(directory, tau, cached=False)
      assert code == 0, log_of(directory)
      made[tau] = (
        multihost.hashes(directory), multihost.rows(directory), fed(directory)
      )  # fmt: skip
    return made[tau]

  return of


def assert_as_unbroken(directory, tau, unbroken):
  expected_hashes, expected_rows, expected_ids = unbroken(tau)
  assert multihost.rows(directory) == expected_rows
  ids = fed(directory)
  assert {batch: ids[batch] for batch in expected_ids} == expected_ids
  assert multihost.hashes(directory) == expected_hashes
  assert len(expected_hashes) > 20


# Each is the next in the same directory, so that a resume that is not exact
# spoils all that follows. The step after the colon is where it happens.
KILLS = (
  'kill@train/step:4',  # before anything is saved
  'kill@checkpoint/mid_write:5',
  'kill@checkpoint/before_commit:5',
  'kill@checkpoint/after_commit:5',
  'kill@train/step:6',  # just after a save
  'kill@train/evaluate:7',
  'kill@train/step:10',  # just before the next
  'kill@checkpoint/mid_removal:10',
  'kill@train/input:17',  # while the snapshots move
  'kill@train/step:23',  # at the end of an epoch
  'kill@train/last_evaluation:25',
)


# Everywhere with the most to lose, 3 snapshots; else where it may differ.
@pytest.mark.parametrize(
  ('tau', 'kills'),
  [
    ('0', KILLS[1::3]),
    ('1', KILLS[2::3]),
    ('3', KILLS),
    ('both', KILLS[::3]),
    ('sampa', KILLS[2::3]),
  ],
)
def test_a_run_that_is_killed_anywhere_equals_the_unbroken_one(
  tau, kills, unbroken, tmp_path
):
  directory = tmp_path / 'run'
  for kill in kills:
    assert run(directory, tau, kill) == -9, (kill, log_of(directory))
  assert run(directory, tau) == 0, log_of(directory)
  assert_as_unbroken(directory, tau, unbroken)


# Where a signal comes, and whether the run has a step to save.
SIGNALS = (
  'term@train/compile',
  'int@train/step:1',
  'term@train/restore',  # before the first step of a resumed run
  'term@train/compile',
  'term@train/step:3,term@train/step:3',  # twice in a row
  'term@checkpoint/mid_write:5',
  'term@train/evaluate:7',
  'int@train/input:16',
  'term@checkpoint/before_commit:20',
  'term@train/last_evaluation:25',
)


@pytest.mark.parametrize(
  ('tau', 'signals'), [('1', SIGNALS[1::2]), ('3', SIGNALS)]
)
def test_a_signal_anywhere_ends_with_42_and_nothing_is_lost(
  tau, signals, unbroken, tmp_path
):
  directory = tmp_path / 'run'
  before = -1
  for fault in signals:
    assert run(directory, tau, fault) == 42, (fault, log_of(directory))
    saved = [int(p.name) for p in directory.glob('checkpoints/[0-9]*')]
    step = max(saved, default=-1)
    # Of a signal within a step, that step or the one before is saved.
    _, _, at = fault.split(',')[0].partition(':')
    assert step >= (int(at) - 1 if at else before), (fault, log_of(directory))
    before = step
  assert run(directory, tau) == 0, log_of(directory)
  assert_as_unbroken(directory, tau, unbroken)


def test_a_run_that_is_killed_at_random_equals_the_unbroken_one(
  unbroken, tmp_path
):
  """$RANDOM_KILLS=20 for a night; $RANDOM_KILLS_SEED repeats one."""
  count = int(os.environ.get('RANDOM_KILLS', 4))
  seed = int(os.environ.get('RANDOM_KILLS_SEED', random.randrange(10**6)))
  draw = random.Random(seed)
  points = [f'train/step:{s}' for s in range(1, STEPS + 1)]
  points += [f'train/input:{s}' for s in range(1, STEPS + 1)]
  points += [f'train/evaluate:{s}' for s in (7, 14, 21)]
  points += [
    f'checkpoint/{where}:{step}'
    for where in ('mid_write', 'before_commit', 'after_commit', 'mid_removal')
    for step in (5, 10, 15, 20, 25)
  ]
  directory = tmp_path / 'run'
  done = []
  for _ in range(count):
    # A place that is behind the run is not come to, and the run ends well.
    done.append(draw.choice(points))
    code = run(directory, '1', f'kill@{done[-1]}')
    assert code in (-9, 0), (seed, done, log_of(directory))
  assert run(directory) == 0, (seed, done, log_of(directory))
  assert_as_unbroken(directory, '1', unbroken)


# ---- The test of the tests ---------------------------------------------------

# What a resume could forget: each must show.
FORGETS = {
  'nothing': lambda state: state,
  'snapshots': lambda state: state.replace(
    snapshots=(Snapshot(state.params, state.batch_stats),)
    * len(state.snapshots)
  ),
  'adversarial statistics': lambda state: state.replace(
    batch_stats=jax.tree.map(lambda x: x.at[1].set(x[0]), state.batch_stats)
  ),
  'momentum': lambda state: state.replace(
    opt_state=jax.tree.map(jnp.zeros_like, state.opt_state)
  ),
  'step': lambda state: state.replace(step=state.step + 1),
  'averages': lambda state: state.replace(
    ema=Snapshot(state.params, state.batch_stats)
  ),
}


@pytest.fixture(scope='module')
def half(tmp_path_factory):
  """A run of 5 steps, its continuation, and the settings of that."""
  values = digits.get_config('batch_size=64')
  values.update_from_flattened_dict(
    FIELDS | {'staleness_steps': 3, 'max_steps': 12, 'ema.decay': 0.9}
  )
  settings = from_config_dict(values)
  root = tmp_path_factory.mktemp('half')
  training.train(dataclasses.replace(settings, max_steps=5), str(root / 'half'))
  shutil.copytree(root / 'half', root / 'whole')
  training.train(settings, str(root / 'whole'))
  return root, settings


def losses_and_state(directory, settings):
  checkpoints = Checkpoints(directory, read_only=True)
  like = experiment.build(settings).abstract_state()
  _, state, _ = checkpoints.restore(like)
  checkpoints.close()
  return multihost.rows(directory), [
    np.asarray(x).tobytes() for x in jax.tree.leaves(state)
  ]


@pytest.mark.parametrize(
  'forgotten', [*FORGETS, 'perturbation', 'data position']
)
def test_a_resume_that_forgets_something_does_not_equal_the_unbroken_run(
  forgotten, half, tmp_path, monkeypatch
):
  root, settings = half
  shutil.copytree(root / 'half', tmp_path / 'run')
  restored, batches = training._restored, feed.batches

  def forgetful(*args):
    step, state, weights = restored(*args)
    forget = FORGETS.get(forgotten, FORGETS['nothing'])
    changed = jax.tree.map(
      lambda new, old: jax.device_put(new, old.sharding), forget(state), state
    )
    # A step donates its state.
    return step, jax.tree.map(jnp.copy, changed), weights

  monkeypatch.setattr(training, '_restored', forgetful)
  if forgotten == 'perturbation':

    def without(settings, step_fn, state, batch):
      image = batch['clean']
      return state.replace(
        perturbation=Perturbation(
          jnp.zeros(image.shape, settings.dtype, device=image.sharding)
        )
      )

    monkeypatch.setattr(training, 'pending_perturbation', without)
  if forgotten == 'data position':

    def shifted(run, source, quarantine, ids, start, count):
      return batches(run, source, quarantine, ids, start + 1, count)

    monkeypatch.setattr(feed, 'batches', shifted)
  training.train(settings, str(tmp_path / 'run'))
  got = losses_and_state(tmp_path / 'run', settings)
  expected = losses_and_state(root / 'whole', settings)
  assert (got == expected) == (forgotten == 'nothing')


# ---- Other devices, and memory ----------------------------------------------


def test_other_devices_go_on_with_the_same_examples(unbroken, tmp_path):
  """8 -> 4 -> 1 -> 8 devices; each restore compares checksums of every leaf."""
  directory = tmp_path / 'run'
  stops = {6: 4, 13: 1, 19: 8}
  assert run(directory, max_steps=6) == 0, log_of(directory)
  for start, devices in stops.items():
    stop = next((s for s in stops if s > start), STEPS)
    code = run(directory, devices=devices, max_steps=stop)
    assert code == 0, log_of(directory)
    assert f'resumed at step {start}' in log_of(directory)
  _, expected_rows, expected_ids = unbroken('1')
  ids = fed(directory)
  assert {batch: ids[batch] for batch in expected_ids} == expected_ids
  expected = [r['loss'] for r in expected_rows if r['split'] == 'train']
  got = [r['loss'] for r in multihost.rows(directory) if r['split'] == 'train']
  np.testing.assert_allclose(got, expected, rtol=1e-3)


def test_300_steps_leave_the_memory_flat(tmp_path):
  """Resident memory of a run, sampled ten times a second."""
  directory = tmp_path / 'run'
  process = start(
    directory,
    **{
      'max_steps': 300,
      'epochs': 20.0,
      'attack_stats_every_steps': 50,
      'eval.every_steps': 50,
      'checkpoint.every_steps': 20,
    },
  )
  samples = []  # (batches that were fed, bytes)
  memory = pathlib.Path(f'/proc/{process.pid}/statm')
  ids = ids_of(directory) / 'ids0.jsonl'
  while process.is_alive():
    with contextlib.suppress(OSError, IndexError):  # not yet, or no more
      size = int(memory.read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE')
      samples.append((len(ids.read_bytes().splitlines()), size))
    process.join(0.1)
  assert process.exitcode == 0, log_of(directory)
  # The first half has compilers and first saves in it; plots come at the end.
  half = np.array([(n, size / 2**20) for n, size in samples if 150 < n < 300])
  assert len(half) > 10, len(samples)
  growth = 150 * np.polyfit(*half.T, 1)[0]
  assert growth < 15, f'{growth:.0f} MiB in 150 steps, of {half[-1, 1]:.0f}'
