"""JAX's cache of compiled programs: damaged or shared, it changes no number."""

from __future__ import annotations

import contextlib

import jax
import multihost
import pytest

from conadv_jax.config import from_config_dict
from conadv_jax.run import compile_cache, metrics


@contextlib.contextmanager
def started(directory, cache, logs):
  """A run of two steps that keeps every program that it compiles in `cache`."""
  arguments = [
    multihost.TINY, 'train', '--config=configs/digits.py:batch_size=32',
    f'--workdir={directory}', '--config.model=tiny', '--config.bn_group_size=8',
    '--config.max_steps=2', '--config.log_every_steps=1',
    '--config.eval.attack=none', '--config.plots=False',
  ]  # fmt: skip
  variables = multihost.compile_cache(cache)
  with multihost.Hosts(logs, 1, arguments, environment=variables) as run:
    yield run
    run.ends_with(0)


def rows(directory):
  return [
    {name: value for name, value in row.items() if name not in metrics.TIMINGS}
    for row in metrics.read_metrics(directory)
  ]


def damage(data, how):
  if how == 'cut':
    return data[: len(data) // 2]
  if how == 'empty':
    return b''
  flipped = bytearray(data)
  flipped[len(data) // 3] ^= 4
  return bytes(flipped)


@pytest.fixture
def no_cache(jax_cache):
  """JAX without a cache; its own afterwards."""
  jax.config.update('jax_compilation_cache_dir', None)


def use(**fields):
  compile_cache.use(from_config_dict(fields))
  jax.clear_caches()
  jax.jit(lambda x: x * 3 + 1)(2.0)
  return jax.config.jax_compilation_cache_dir


@pytest.mark.slow
def test_programs_are_kept_in_the_cache_of_the_user(
  no_cache, tmp_path, monkeypatch
):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  directory = tmp_path / 'cache/conadv_jax/programs'
  assert use() == str(directory)
  assert list(directory.glob('jit__lambda*-cache'))
  assert directory.stat().st_mode & 0o77 == 0
  monkeypatch.delenv('XDG_CACHE_HOME')
  monkeypatch.setenv('HOME', str(tmp_path))
  jax.config.update('jax_compilation_cache_dir', None)
  assert use() == str(tmp_path / '.cache/conadv_jax/programs')


@pytest.mark.slow
def test_a_directory_of_ones_own_or_none(no_cache, tmp_path):
  assert use(compile_cache=str(tmp_path / 'own')) == str(tmp_path / 'own')
  assert list((tmp_path / 'own').glob('*-cache'))
  assert use(compile_cache='') is None
  jax.config.update('jax_compilation_cache_dir', str(tmp_path / 'jax'))
  assert use() == str(tmp_path / 'jax')  # as JAX_COMPILATION_CACHE_DIR


def test_a_directory_that_cannot_be_written_is_a_warning(
  no_cache, tmp_path, capsys
):
  (tmp_path / 'file').write_text('')
  directory = str(tmp_path / 'file' / 'cache')
  assert use(compile_cache=directory) is None
  said = capsys.readouterr().out
  assert f"warning: compile_cache='{directory}': " in said
  assert 'Name a directory that can be written' in said


@pytest.mark.fault
def test_a_damaged_compile_cache_changes_no_number(tmp_path):
  """Test 29: entries that are cut, flipped or empty, and two writers."""
  cache = tmp_path / 'cache'
  # Two runs that fill it at the same time.
  with (
    started(tmp_path / 'one', cache, tmp_path / 'logs1'),
    started(tmp_path / 'two', cache, tmp_path / 'logs2'),
  ):
    pass
  expected = rows(tmp_path / 'one')
  assert len(expected) >= 3 and rows(tmp_path / 'two') == expected
  entries = sorted(cache.glob('*-cache'))
  assert len(entries) > 10
  for i, entry in enumerate(entries):
    how = ('cut', 'flipped', 'empty')[i % 3]
    entry.write_bytes(damage(entry.read_bytes(), how))
  with started(tmp_path / 'three', cache, tmp_path / 'logs3') as run:
    run.ends_with(0)
    assert 'Error reading persistent compilation cache' in run.log(0)
  assert rows(tmp_path / 'three') == expected
