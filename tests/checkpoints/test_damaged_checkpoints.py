"""Checkpoints that are damaged, cut short, or lying."""

import json
import os
import pathlib
import pickle
import shutil

import jax.numpy as jnp
import pytest
import tensorstore
from etils import epath
from saved import (
  DROPS_COROUTINES,
  abstract,
  assert_is,
  data_files,
  make_state,
  restored,
  save,
)

from conadv_jax.base import faults
from conadv_jax.base.errors import CheckpointError
from conadv_jax.checkpoints import files as checkpoint_files
from conadv_jax.checkpoints import manifest
from conadv_jax.checkpoints.checkpoint import Checkpoints

pytestmark = DROPS_COROUTINES

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
