"""What is saved is what comes back, and what is kept of it."""

import os
import pathlib

import jax
import multihost
import numpy as np
import pytest
from etils import epath
from saved import abstract, assert_is, finish, make_state, restored, save

from conadv_jax import experiment
from conadv_jax.base.errors import CheckpointError
from conadv_jax.checkpoints import files as checkpoint_files
from conadv_jax.checkpoints.checkpoint import Checkpoints
from conadv_jax.config import from_config_dict
from conadv_jax.devices import mesh
from conadv_jax.method.state import Snapshot, copied
from configs import imagenet_resnet50

# ---- What is saved is what comes back ---------------------------------------


def test_the_newest_state_comes_back_with_its_facts(two):
  found = restored(two)
  assert_is(found, 2)
  assert found[2] == {'answer': 42}


@pytest.mark.parametrize('bucket', ['gs://bucket', 's3://bucket/a'])
def test_checkpoints_of_a_bucket_are_in_the_bucket(bucket):
  directory = checkpoint_files.directory_of(epath.Path(bucket) / 'run')
  assert os.fspath(directory) == f'{bucket}/run/checkpoints'


def test_a_directory_without_checkpoints_restores_nothing(tmp_path):
  assert restored(tmp_path) is None


def test_a_step_that_is_there_is_kept(two):
  checkpoints = Checkpoints(two, keep=5)
  checkpoints.save(2, make_state(99.0))
  checkpoints.close()
  assert_is(restored(two), 2)


def test_a_step_before_the_last_one_is_refused(two):
  checkpoints = Checkpoints(two, keep=5)
  with pytest.raises(CheckpointError, match='has a later step, 2'):
    checkpoints.save(0, make_state(3.0))
  checkpoints.close()


def test_a_donated_state_was_saved_as_it_was(tmp_path):
  checkpoints = Checkpoints(tmp_path)
  state = copied(make_state(2))
  checkpoints.save(2, state)
  burn = jax.jit(
    lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0
  )
  for _ in range(5):
    state = burn(state)
  checkpoints.wait(2)
  checkpoints.close()
  assert_is(restored(tmp_path), 2)


def test_restored_arrays_are_equal_on_8_4_1_and_8_devices(tmp_path):
  x = np.random.default_rng(0).standard_normal(8192 * 8).astype(np.float32)
  for step, count in enumerate((8, 4, 1, 8)):
    devices = mesh.make_mesh(64, 8, jax.devices()[:count])
    split = mesh.example_sharding(devices)
    state = make_state().replace(opt_state=(jax.device_put(x, split),))
    if step:
      like = abstract(state).replace(perturbation=None)
      checkpoints = Checkpoints(tmp_path, keep=9)
      _, state, _ = checkpoints.restore(like)
      checkpoints.close()
      (found,) = state.opt_state
      assert len(found.sharding.device_set) == count
      np.testing.assert_array_equal(found, x)
    checkpoints = Checkpoints(tmp_path, keep=9)
    checkpoints.save(step, state)
    checkpoints.wait(step)
    checkpoints.close()


def test_it_is_at_most_2_plus_tau_times_the_weights_and_the_optimizer():
  """No delta: in bytes of arrays, of the network that ImageNet is for."""
  for tau in (0, 1, 3):
    values = imagenet_resnet50.get_config(
      'batch_size=64,method=' + ('conadv' if tau else 'disadv')
    )
    values.staleness_steps = tau
    values.bn_group_size = 8
    run = experiment.build(from_config_dict(values))
    state = run.abstract_state().replace(perturbation=None)

    def size(tree):
      return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))

    weights = size(state.params) + size(state.batch_stats)
    assert size(state) <= (2 + tau) * weights + size(state.opt_state)


# ---- Strays, and what is kept -----------------------------------------------


def test_strays_are_not_taken_for_checkpoints_and_said(two, capsys):
  root = two / 'checkpoints'
  (root / '7').mkdir()
  (root / '8').mkdir()
  (root / '8' / 'manifest').mkdir()
  (root / '9').write_text('')
  (root / '10.orbax-checkpoint-tmp').mkdir()
  (root / '2' / 'commit_success.txt').unlink()
  (root / '11').symlink_to(two)
  assert_is(restored(two, read_only=True), 1)
  said = capsys.readouterr().out
  strays = '10.orbax-checkpoint-tmp, 11, 2, 7, 8, 9'
  assert f'not complete, removed: none; ignored: {strays}' in said
  # The way is free for those steps.
  checkpoints = Checkpoints(two, keep=5)
  said = capsys.readouterr().out
  strays = '10.orbax-checkpoint-tmp, 2, 7, 8'
  assert f'not complete, removed: {strays}; ignored: 11, 9' in said
  assert {path.name for path in root.iterdir()} == {'1', '9', '11'}
  assert checkpoints.steps() == [1]
  save(checkpoints, 2)
  save(checkpoints, 7)
  checkpoints.close()
  assert_is(restored(two), 7)


def test_the_newest_are_kept_and_older_removed(tmp_path):
  checkpoints = Checkpoints(tmp_path, keep=2)
  for step in (1, 2, 3):
    checkpoints.save(step, make_state(step))
    assert not finish(checkpoints)
  assert checkpoints.steps() == [2, 3]
  checkpoints.close()


def test_the_last_known_good_one_stays_outside_the_window(tmp_path):
  checkpoints = Checkpoints(tmp_path, keep=1)
  for step, streak in ((1, 0), (2, 0), (3, 1), (4, 2)):
    save(checkpoints, step, {'nonfinite_streak': streak})
  assert checkpoints.steps() == [2, 4]
  save(checkpoints, 5, {'nonfinite_streak': 0})
  assert checkpoints.steps() == [5]
  checkpoints.close()


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_never_saved(value, two):
  checkpoints = Checkpoints(two, keep=1)
  state = make_state(3)
  state = state.replace(
    snapshots=(
      Snapshot({'kernel': state.params['kernel'].at[4].set(value)}, {}),
    )
  )
  with pytest.raises(CheckpointError, match=r'snapshots\[0\].*kernel'):
    checkpoints.save(3, state)
  assert checkpoints.steps() == [1, 2]
  checkpoints.close()
  assert_is(restored(two), 2)


# ---- Several hosts ----------------------------------------------------------

HOSTS = """
import sys
sys.path[:0] = [{tests!r}, {tests!r} + '/checkpoints']
import jax
from etils import epath
from conadv_jax import cli, hosts
from conadv_jax.devices import mesh

def main(argv):
  cli.start_hosts(argv)
  import saved as t
  everywhere = mesh.replicated(mesh.make_mesh(2, 1))
  made = lambda step: jax.jit(t.make_state, out_shardings=everywhere)(step)
  checkpoints = t.Checkpoints(epath.Path({workdir!r}), keep=5)
  for step in (1, 2, 2, 3):
    checkpoints.save(step, made(step), {{'step': step}})
  checkpoints.wait(3)
  step, state, facts = checkpoints.restore(t.abstract(made(1)))
  print('restored', step, facts, checkpoints.steps(), flush=True)
  checkpoints.save(4, state)
  checkpoints.wait(4)
  checkpoints.close()
  print('saved', checkpoints.steps(), flush=True)

cli.run(main)
"""


@pytest.mark.fault
def test_hosts_pass_over_what_one_of_them_cannot_read(tmp_path):
  tests = str(pathlib.Path(__file__).parents[1])
  code = HOSTS.format(tests=tests, workdir=str(tmp_path / 'run'))
  faults_of_host = {1: {'CONADV_FAULTS': 'oserror@checkpoint/read:3'}}
  with multihost.Hosts(
    tmp_path, 2, ['-c', code], environment_of_host=faults_of_host
  ) as run:
    run.ends_with(0, 60)
    for host in range(2):
      assert "restored 2 {'step': 2} [1, 2]" in run.log(host)
      assert 'saved [1, 2, 4]' in run.log(host)
    assert 'damaged, skipped' in run.log(0)
