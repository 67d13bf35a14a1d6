"""Checkpoints that are damaged, cut short, lying, or in the way."""

import errno
import gc
import json
import os
import pathlib
import pickle
import shutil
import subprocess
import sys
import time

import helpers
import jax
import jax.numpy as jnp
import multihost
import numpy as np
import pytest
import tensorstore
from etils import epath

from conadv_jax import experiment
from conadv_jax.base import faults, storage
from conadv_jax.base.errors import CheckpointError, StorageError
from conadv_jax.checkpoints import checkpoint, manifest
from conadv_jax.checkpoints import files as checkpoint_files
from conadv_jax.checkpoints.checkpoint import Checkpoints
from conadv_jax.config import from_config_dict
from conadv_jax.devices import mesh
from conadv_jax.method.state import Snapshot, TrainState, copied
from configs import imagenet_resnet50

# Where an array cannot be read, orbax drops the coroutines of the others.
pytestmark = pytest.mark.filterwarnings(
  'ignore::pytest.PytestUnraisableExceptionWarning'
)


@pytest.fixture(autouse=True)
def dropped_coroutines():
  """They end in the test that left them, not in a later one."""
  yield
  gc.collect()


@pytest.fixture(autouse=True)
def waits(monkeypatch):
  """Seconds that were waited for before another attempt: none really are."""
  seconds = []
  monkeypatch.setattr(checkpoint, '_sleep', seconds.append)
  monkeypatch.setattr(storage, '_sleep', seconds.append)
  return seconds


def make_state(value=1.0):
  """A state of two leaves of some size, and counters."""
  zero = jnp.zeros((), jnp.int32)
  weights = {
    'kernel': jnp.arange(5000.0) * value,
    'bias': jnp.full((7,), value, jnp.bfloat16),
  }
  return TrainState(
    step=zero + jnp.int32(value),
    params=weights,
    batch_stats={},
    opt_state=(jnp.ones(3) * value,),
    snapshots=(Snapshot(weights, {}),),
    ema=None,
    perturbation=jnp.ones(4),
    nonfinite_steps=zero,
    nonfinite_streak=zero,
  )


def abstract(state):
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
  )


def save(checkpoints, step, facts=None):
  checkpoints.save(step, make_state(step), facts)
  checkpoints.wait(step)


def finish(checkpoints):
  """Polls until the save under way has ended."""
  for _ in range(1000):
    again = checkpoints.poll()
    if again or checkpoints._pending is None:
      return again
    time.sleep(0.01)
  raise AssertionError('the save does not end')


@pytest.fixture
def two(tmp_path):
  """A directory with checkpoints of steps 1 and 2."""
  checkpoints = Checkpoints(tmp_path, keep=5)
  save(checkpoints, 1)
  save(checkpoints, 2, {'answer': 42})
  checkpoints.close()
  return tmp_path


def restored(workdir, like=None, **options):
  checkpoints = Checkpoints(workdir, keep=5, **options)
  try:
    return checkpoints.restore(like or abstract(make_state()))
  finally:
    checkpoints.close()


def assert_is(found, value):
  step, state, _ = found
  assert step == value
  assert state.perturbation is None
  expected = make_state(value).replace(perturbation=None)
  assert helpers.bits(state) == helpers.bits(expected)


def data_files(workdir, step):
  """Files that hold arrays, the largest first."""
  root = workdir / 'checkpoints' / str(step) / 'state'
  files = [p for p in root.rglob('*') if p.is_file() and p.parent.name == 'd']
  return sorted(files, key=lambda p: -p.stat().st_size)


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


# ---- Damage -----------------------------------------------------------------


@pytest.mark.parametrize('where', [0.1, 0.5, 0.9])
def test_a_flipped_bit_is_found_and_the_step_before_taken(where, two, capsys):
  file = data_files(two, 2)[0]
  content = bytearray(file.read_bytes())
  content[int(where * len(content))] ^= 16
  file.write_bytes(content)
  with pytest.raises(CheckpointError, match='checkpoints/2'):
    restored(two, strict=True)
  assert_is(restored(two), 1)
  said = capsys.readouterr().out
  assert 'damaged, skipped' in said and 'checkpoints/2' in said


def test_a_changed_number_is_found_by_its_checksum(two, capsys):
  """Files of another state that are as readable as ours."""
  other = two / 'other'
  checkpoints = Checkpoints(other, keep=5)
  checkpoints.save(2, make_state(2).replace(opt_state=(jnp.ones(3) * 2.5,)))
  checkpoints.wait(2)
  checkpoints.close()
  ours = two / 'checkpoints' / '2' / 'state'
  ours.rename(two / 'away')
  (other / 'checkpoints' / '2' / 'state').rename(ours)
  assert_is(restored(two), 1)
  assert '1 of 8 leaves are not as they were saved: .opt_state[0]' in (
    capsys.readouterr().out
  )


class Trap:
  """Says so in a file if someone unpickles it."""

  def __init__(self, path):
    self._path = path

  def __reduce__(self):
    return pathlib.Path.touch, (self._path,)


@pytest.mark.parametrize('how', ['cut', 'empty', 'gone', 'pickle'])
@pytest.mark.parametrize(
  'which', ['array', 'state/manifest.ocdbt', 'state/_METADATA', 'manifest']
)
def test_a_file_that_is_cut_or_gone_is_found(which, how, two):
  root = two / 'checkpoints' / '2'
  file = {
    'array': data_files(two, 2)[0],
    'manifest': root / 'manifest' / 'metadata',
  }.get(which, root / which)
  if how == 'gone':
    file.unlink()
  elif how == 'pickle':
    file.write_bytes(pickle.dumps(Trap(two / 'executed')))
  else:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2 if how == 'cut' else 0])
  assert_is(restored(two), 1)
  assert not (two / 'executed').exists()


@pytest.mark.parametrize(
  'edit',
  [
    lambda m: m.update(step=7),
    lambda m: m['facts'].update(answer=43),
    lambda m: m['leaves'].popitem(),
    lambda m: m.pop('digest'),
    lambda m: m['leaves']['.step'].update(sum='0' * 16),
  ],
)
def test_an_edited_manifest_is_found(edit, two):
  file = two / 'checkpoints' / '2' / 'manifest' / 'metadata'
  content = json.loads(file.read_text())
  edit(content)
  file.write_text(json.dumps(content))
  assert_is(restored(two), 1)


def test_a_checkpoint_under_the_name_of_another_step_is_refused(two):
  root = two / 'checkpoints'
  (root / '2').rename(root / '7')
  with pytest.raises(CheckpointError, match='step 2; expected 1 and 7'):
    restored(two, strict=True)
  assert_is(restored(two), 1)


def test_nothing_good_is_an_error_and_not_a_new_run(two):
  for step in (1, 2):
    data_files(two, step)[0].write_bytes(b'')
  with pytest.raises(CheckpointError, match='no checkpoint in .* is good'):
    restored(two)


def test_a_run_of_other_shapes_or_types_is_refused(two):
  state = make_state()
  half = {**state.params, 'kernel': jnp.ones(5000, jnp.bfloat16)}
  wide = {**state.params, 'kernel': jnp.ones(5001)}
  more = {**state.params, 'extra': jnp.ones(1)}
  for params in (half, wide, more):
    with pytest.raises(CheckpointError, match='no checkpoint'):
      restored(two, abstract(state.replace(params=params)))
    with pytest.raises(CheckpointError, match='this run needs'):
      restored(two, abstract(state.replace(params=params)), strict=True)


def test_a_run_goes_on_from_the_step_before_a_damaged_one(two, capsys):
  data_files(two, 2)[0].write_bytes(b'')
  checkpoints = Checkpoints(two, keep=5)
  assert_is(checkpoints.restore(abstract(make_state())), 1)
  assert 'checkpoints/2: now 2.damaged' in capsys.readouterr().out
  save(checkpoints, 2)
  save(checkpoints, 3)
  checkpoints.close()
  assert (two / 'checkpoints' / '2.damaged').is_dir()
  for step in (3, 2):
    data_files(two, step)[0].write_bytes(b'')
  assert_is(restored(two), 1)
  names = {path.name for path in (two / 'checkpoints').iterdir()}
  assert names == {'1', '2.damaged', '2.damaged1', '3.damaged'}


def test_reading_only_renames_nothing(two):
  data_files(two, 2)[0].write_bytes(b'')
  assert_is(restored(two, read_only=True), 1)
  assert (two / 'checkpoints' / '2').is_dir()


def test_an_older_one_that_is_damaged_does_not_stop_a_save(two):
  (two / 'checkpoints' / '2' / 'manifest' / 'metadata').write_text('{')
  checkpoints = Checkpoints(two, keep=1)
  save(checkpoints, 3, {'nonfinite_streak': 1})
  assert checkpoints.steps() == [1, 3]
  checkpoints.close()


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


# ---- Storage that fails -----------------------------------------------------


@pytest.fixture
def fault(monkeypatch):
  return lambda text: monkeypatch.setattr(
    faults, '_faults', faults._parse(text)
  )


def test_a_failed_save_shows_at_once_and_the_next_state_is_saved(fault, two):
  fault('oserror@checkpoint/before_commit:3')
  checkpoints = Checkpoints(two, keep=1)
  checkpoints.save(3, make_state(3))
  assert finish(checkpoints)
  assert checkpoints.steps() == [1, 2]  # nothing was removed for it
  checkpoints.save(4, make_state(4))
  assert not finish(checkpoints)
  assert checkpoints.steps() == [4]
  checkpoints.close()
  assert_is(restored(two), 4)


def test_the_same_step_is_saved_again_after_a_failure(fault, two, waits):
  fault('oserror*2@checkpoint/before_commit')
  checkpoints = Checkpoints(two, keep=1)
  for _ in range(2):
    checkpoints.save(3, make_state(3))
    assert finish(checkpoints)
  checkpoints.save(3, make_state(3))
  assert not finish(checkpoints)
  assert checkpoints.steps() == [3]
  assert waits == [1, 4]
  checkpoints.close()
  assert_is(restored(two), 3)


def test_a_save_that_could_not_be_restored_costs_no_earlier_one(
  two, monkeypatch
):
  """As if orbax had lost a file on the way: the checks are a restore's."""
  finalize = checkpoint._TemporaryPath.finalize

  async def losing(self):
    if self.get_final().name in ('3', '4'):
      (self.get() / 'state' / 'manifest.ocdbt').unlink()
    await finalize(self)

  checkpoints = Checkpoints(two, keep=1)
  monkeypatch.setattr(checkpoint._TemporaryPath, 'finalize', losing)
  checkpoints.save(3, make_state(3))
  with pytest.raises(StorageError, match=r'step 3 .*manifest.ocdbt is missing'):
    checkpoints.wait(3)
  assert checkpoints.steps() == [1, 2]
  with pytest.raises(StorageError, match='manifest.ocdbt is missing'):
    checkpoints.save_now(4, make_state(4))  # tries again, and does not give in
  assert checkpoints.steps() == [1, 2]
  checkpoints.close()
  assert_is(restored(two), 2)


def test_the_last_state_of_a_run_is_saved_in_spite_of_a_failure(fault, two):
  fault('oserror*2@checkpoint/before_commit')
  checkpoints = Checkpoints(two, keep=1)
  checkpoints.save_now(3, make_state(3))
  assert checkpoints.steps() == [3]
  checkpoints.close()
  assert_is(restored(two), 3)


def test_a_save_waits_for_the_one_before(two):
  checkpoints = Checkpoints(two, keep=2)
  for step in (3, 4, 5):
    checkpoints.save(step, make_state(step))
  checkpoints.wait(5)
  assert checkpoints.steps() == [4, 5]
  checkpoints.close()


def test_a_failed_save_does_not_spoil_the_next_one(fault, two, capsys):
  fault('oserror@checkpoint/before_commit:3')
  checkpoints = Checkpoints(two, keep=1)
  checkpoints.save(3, make_state(3))
  checkpoints.save(4, make_state(4))
  assert not finish(checkpoints)
  assert checkpoints.steps() == [4]
  assert 'step 3 could not be saved' in capsys.readouterr().out
  checkpoints.close()


def test_the_end_does_not_hide_that_a_save_failed(fault, two):
  fault('oserror@checkpoint/before_commit:3')
  checkpoints = Checkpoints(two, keep=1)
  checkpoints.save(3, make_state(3))
  with pytest.raises(StorageError, match='step 3 could not be saved'):
    checkpoints.close()


def test_one_that_cannot_be_removed_is_no_failed_save(fault, two, capsys):
  fault('oserror*9@checkpoint/mid_removal:1')
  checkpoints = Checkpoints(two, keep=1)
  checkpoints.save(3, make_state(3))
  assert not finish(checkpoints)
  assert checkpoints.steps() == [3]
  assert 'checkpoints/1: cannot be written' in capsys.readouterr().out
  checkpoints.close()
  assert_is(restored(two), 3)
  assert not (two / 'checkpoints' / '1').exists()


def test_files_that_cannot_be_read_are_not_taken_for_damaged(
  monkeypatch, two, waits
):
  check, blips = checkpoint_files._check_files, []

  def flaky(*arguments):
    if blips:
      raise blips.pop()
    check(*arguments)

  monkeypatch.setattr(checkpoint_files, '_check_files', flaky)
  checkpoints = Checkpoints(two, keep=5)
  blips += [OSError(errno.EIO, os.strerror(errno.EIO))] * 4
  assert_is(checkpoints.restore(abstract(make_state())), 2)
  assert len(waits) == 4
  for lasting in ([OSError(errno.EIO, 'x')] * 9, [PermissionError(13, 'x')]):
    blips[:] = lasting
    with pytest.raises(StorageError, match='cannot be read'):
      checkpoints.restore(abstract(make_state()))
  assert checkpoints.steps() == [1, 2]
  checkpoints.close()


def test_storage_that_fails_for_good_ends_the_run(fault, two):
  fault('oserror*9@checkpoint/before_commit')
  checkpoints = Checkpoints(two, keep=1)
  for step in (3, 4):
    checkpoints.save(step, make_state(step))
    assert finish(checkpoints)
  checkpoints.save(5, make_state(5))
  with pytest.raises(StorageError, match='step 5 could not be saved'):
    finish(checkpoints)
  assert checkpoints.steps() == [1, 2]


def test_a_full_disk_is_an_error_with_path_and_free_bytes(fault, two):
  fault('nospace@checkpoint/before_commit:3')
  checkpoints = Checkpoints(two, keep=1)
  checkpoints.save(3, make_state(3))
  with pytest.raises(StorageError, match='checkpoints: .* bytes free'):
    finish(checkpoints)
  assert_is(restored(two), 2)


def test_a_lost_last_save_is_an_error(fault, two):
  fault('oserror@checkpoint/before_commit:3')
  checkpoints = Checkpoints(two, keep=1)
  checkpoints.save(3, make_state(3))
  with pytest.raises(StorageError, match='step 3 could not be saved'):
    checkpoints.wait(3)


FULL = """
import resource, signal, sys
sys.path[:0] = [{tests!r}, {tests!r} + '/checkpoints']
import jax
jax.config.update('jax_platforms', 'cpu')
import test_checkpoint as t
from pathlib import Path
workdir = Path(sys.argv[1])
checkpoints = t.Checkpoints(workdir, keep=1)
t.save(checkpoints, 1)
{fill}
checkpoints.save(2, t.make_state(2))
try:
  t.finish(checkpoints)
except t.StorageError as error:
  print('StorageError:', error)
print(checkpoints.steps(), flush=True)
"""


def steps_after_a_full_disk(workdir, fill):
  code = FULL.format(tests=str(pathlib.Path(__file__).parents[1]), fill=fill)
  root = str(pathlib.Path(__file__).resolve().parents[2])
  ended = subprocess.run(
    [sys.executable, '-c', code, str(workdir)],
    capture_output=True,
    text=True,
    env=os.environ | {'PYTHONPATH': root},
  )
  assert 'StorageError: step 2 could not be saved' in ended.stdout, (
    ended.stdout + ended.stderr
  )
  assert 'bytes free' in ended.stdout
  return ended.stdout.splitlines()[-1]


@pytest.mark.fault
def test_files_that_cannot_grow_cost_no_earlier_checkpoint(tmp_path):
  fill = (
    'signal.signal(signal.SIGXFSZ, signal.SIG_IGN); '
    'resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))'
  )
  assert steps_after_a_full_disk(tmp_path, fill) == '[1]'


@pytest.mark.fault
def test_a_full_file_system_costs_no_earlier_checkpoint(tmp_path):
  mount = ['mount', '-t', 'tmpfs', '-o', 'size=2m', 'tmpfs', str(tmp_path)]
  if subprocess.run(mount, capture_output=True).returncode:
    pytest.skip('mounting a small file system needs root')
  try:
    fill = (
      'file = open(workdir / "fill", "wb", buffering=0)\n'
      'try:\n  [file.write(bytes(4096)) for _ in range(9**9)]\n'
      'except OSError:\n  pass'
    )
    assert steps_after_a_full_disk(tmp_path, fill) == '[1]'
  finally:
    subprocess.run(['umount', '-l', str(tmp_path)], check=True)


# ---- Checkpoints of strangers -----------------------------------------------


@pytest.mark.parametrize('kind', ['file', 'directory', 'step'])
def test_a_link_out_of_the_checkpoint_is_refused(kind, two, tmp_path_factory):
  away = tmp_path_factory.mktemp('away')
  target = {
    'file': data_files(two, 2)[0],
    'directory': two / 'checkpoints' / '2' / 'state',
    'step': two / 'checkpoints' / '2',
  }[kind]
  target.rename(away / 'secret')
  target.symlink_to(away / 'secret')
  with pytest.raises(CheckpointError, match='symbolic link'):
    restored(two, strict=True)
  assert_is(restored(two), 1)


def test_a_file_that_is_no_file_is_refused(two):
  os.mkfifo(two / 'checkpoints' / '2' / 'state' / 'd' / 'pipe')
  with pytest.raises(CheckpointError, match='neither a file nor a directory'):
    restored(two, strict=True)


def arrays_of(workdir, step):
  """The database of keys and values that holds the arrays."""
  root = workdir / 'checkpoints' / str(step) / 'state'
  base = f'file://{root}/'
  return tensorstore.KvStore.open({'driver': 'ocdbt', 'base': base}).result()


# Reading the second would end the process: it allocates a chunk as declared.
@pytest.mark.parametrize(
  ('field', 'value'),
  [('shape', [2**40]), ('chunks', [2**40]), ('dtype', '<f8')],
)
def test_sizes_that_files_declare_are_refused_before_arrays_are_read(
  field, value, two, monkeypatch
):
  arrays, key = arrays_of(two, 2), b'params.kernel/.zarray'
  arrays[key] = json.dumps(json.loads(arrays[key]) | {field: value}).encode()
  read = []
  monkeypatch.setattr(faults, 'point', lambda name, _=None: read.append(name))
  with pytest.raises(CheckpointError, match=r"params\['kernel'\] (is|has)"):
    restored(two, strict=True)
  assert 'checkpoint/read' not in read


@pytest.mark.parametrize('prefix', ['../../../../away/', 'd/../../../../away/'])
def test_values_outside_of_the_checkpoint_are_not_read(prefix, two):
  """A database whose manifest names files elsewhere, and those are there."""
  root = two / 'checkpoints' / '2' / 'state'
  away = (root / prefix).resolve()
  assert away != root and root not in away.parents
  entries = arrays_of(two, 2)
  context = tensorstore.Context()
  doctored = tensorstore.KvStore.open(
    {
      'driver': 'ocdbt',
      'base': 'memory://',
      'value_data_prefix': prefix,
      'config': {'max_inline_value_bytes': 0},
    },
    context=context,
  ).result()
  for key in entries.list().result():
    doctored[key] = entries[key]
  shutil.rmtree(root / 'ocdbt.process_0')
  away.mkdir()
  files = tensorstore.KvStore.open('memory://', context=context).result()
  for key in files.list().result():
    name = key.decode()
    inside = not name.startswith(prefix)
    place = root / name if inside else away / name.removeprefix(prefix)
    place.write_bytes(files[key])
  assert len(list(away.iterdir())) > 0
  with pytest.raises(CheckpointError, match='Invalid key: .*/away/'):
    restored(two, strict=True)


def test_arrays_in_another_format_are_refused(two):
  """There, keys are paths."""
  root = two / 'checkpoints' / '2' / 'state'
  (root / 'manifest.ocdbt').unlink()
  with pytest.raises(CheckpointError, match=r'manifest\.ocdbt is missing'):
    restored(two, strict=True)


def test_a_shape_in_the_manifest_that_is_not_ours_is_refused(two):
  file = two / 'checkpoints' / '2' / 'manifest' / 'metadata'
  content = json.loads(file.read_text())
  content.pop('digest')
  content['leaves']['.opt_state[0]']['shape'] = [2**40]
  content['digest'] = manifest.digest(content)
  file.write_text(json.dumps(content))
  with pytest.raises(CheckpointError, match='1099511627776'):
    restored(two, strict=True)


def test_more_bytes_than_the_state_can_need_are_refused(two, monkeypatch):
  monkeypatch.setattr(checkpoint_files, '_SLACK_BYTES', 2**20)
  bomb = two / 'checkpoints' / '2' / 'state' / 'd' / 'bomb'
  with bomb.open('wb') as file:
    file.truncate(2**24)
  with pytest.raises(CheckpointError, match='bytes of files for a state of'):
    restored(two, strict=True)


def test_reading_leaves_the_directory_alone(two):
  (two / 'checkpoints' / '7').mkdir()
  checkpoints = Checkpoints(epath.Path(two), read_only=True)
  assert_is(checkpoints.restore(abstract(make_state())), 2)
  checkpoints.close()
  assert (two / 'checkpoints' / '7').exists()


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
  import test_checkpoint as t
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
