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
  try:
    if config.compile_cache:
      directory = _made(config.compile_cache)
  except (OSError, RuntimeError) as error:
    hosts.say(
      f'warning: compile_cache={config.compile_cache!r}: {error}; programs are '
      'compiled at every start. Name a directory that can be written, or '
      "'' for none"
    )
  jax.config.update('jax_compilation_cache_dir', directory)
  # Small programs are many: a start on digits compiles seventy.
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
  compilation_cache.reset_cache()  # else what has been used once stays


def _made(name: str) -> str:
  """The directory that `name` means; raises OSError if it takes no file."""
  if name == 'auto':
    caches = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
    directory = epath.Path(caches) / 'conadv_jax' / 'programs'
  else:
    directory = storage.expand(name)
  # Who can write here can run code as this user.
  directory.mkdir(parents=True, exist_ok=True, mode=0o700)
  probe = directory / f'.probe_{os.getpid()}'
  probe.write_text('')
  probe.unlink()
  return str(directory)
