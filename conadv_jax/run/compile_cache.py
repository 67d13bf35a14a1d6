"""Keeps compiled programs on disk, so that a later start loads them."""

from __future__ import annotations

import os
import pathlib

import jax
from etils import epath
from jax.experimental.compilation_cache import compilation_cache

from conadv_jax import hosts
from conadv_jax.base import storage
from conadv_jax.config import Config


def use(config: Config) -> None:
  """Points JAX's cache of programs at `config.compile_cache`.

  A directory that cannot be written is a warning, and nothing is kept. JAX
  itself warns of a damaged program, and compiles it again; so it does with one
  that another process has not finished.
  """
  if config.compile_cache == 'auto' and jax.config.jax_compilation_cache_dir:
    return  # as $JAX_COMPILATION_CACHE_DIR or the caller says
  directory = None
  if config.compile_cache:
    try:
      directory = _directory(config.compile_cache)
      _check_writable(directory)
    except (OSError, RuntimeError) as error:
      hosts.say(
        f'warning: compile_cache={config.compile_cache!r}: {error}; programs '
        'are compiled at every start. Name a directory that can be written, '
        "or '' for none"
      )
      directory = None
  jax.config.update(
    'jax_compilation_cache_dir', str(directory) if directory else None
  )
  # Small programs are many: a start on digits compiles seventy.
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
  compilation_cache.reset_cache()  # else what has been used once stays


def _directory(name: str) -> epath.Path:
  if name != 'auto':
    return storage.expand(name)
  home = os.environ.get('XDG_CACHE_HOME')
  home = pathlib.Path(home) if home else pathlib.Path.home() / '.cache'
  return epath.Path(home) / 'conadv_jax' / 'programs'


def _check_writable(directory: epath.Path) -> None:
  # Who can write here can run code as this user.
  directory.mkdir(parents=True, exist_ok=True, mode=0o700)
  probe = directory / f'.probe_{os.getpid()}'
  probe.write_text('')
  probe.unlink()
