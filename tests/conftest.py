"""JAX on eight CPU devices, and the import paths of the tests."""

import gc
import os
import pathlib
import signal
import socket
import sys

# Nothing that an import makes is garbage, and a collection that looks through
# all of it takes long.
gc.disable()

# What a shell starts in the background ignores Ctrl-C, and hands that on: tests
# that send it would wait forever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
  signal.signal(signal.SIGINT, signal.default_int_handler)

# Compiling would take most of the time of the tests, for programs that run once
# on tiny arrays. Set the first flag yourself to test what users run.
_FLAGS = os.environ.get('XLA_FLAGS', '')
if 'xla_backend_optimization_level' not in _FLAGS:
  os.environ['XLA_FLAGS'] = (
    f'{_FLAGS} --xla_backend_optimization_level=0'
    ' --xla_cpu_use_fusion_emitters=false'
    ' --xla_cpu_parallel_codegen_split_count=1'
  )

import jax  # noqa: E402
import pytest  # noqa: E402
from jax.experimental.compilation_cache import compilation_cache  # noqa: E402

# Before anything asks JAX for its devices: their number is fixed from then on.
jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 8)
# Tests compile many programs that another one has compiled. The processes that
# they start, which may be killed while they write, have a cache of their own.
_CACHES = pathlib.Path(__file__).resolve().parents[1] / '.pytest_cache'
jax.config.update('jax_compilation_cache_dir', str(_CACHES / 'jax'))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)

# `configs` and `helpers` are imported by name, wherever pytest is started.
_TESTS = pathlib.Path(__file__).resolve().parent
for _path in (_TESTS, _TESTS.parent):
  if str(_path) not in sys.path:
    sys.path.insert(0, str(_path))

import multihost  # noqa: E402

os.environ |= multihost.compile_cache(_CACHES / 'started')


def pytest_collection_finish():
  """Garbage is collected from here on, among what the tests make."""
  gc.freeze()
  gc.enable()


@pytest.fixture
def jax_cache():
  """Brings JAX's cache of compiled programs back after a test."""
  names = (
    'jax_compilation_cache_dir', 'jax_persistent_cache_min_compile_time_secs'
  )  # fmt: skip
  before = {name: getattr(jax.config, name) for name in names}
  yield
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


@pytest.fixture
def no_network(monkeypatch):
  """Opening a socket fails a test."""

  def refuse(*args, **kwargs):
    raise AssertionError('opened a socket')

  monkeypatch.setattr(socket, 'socket', refuse)
  monkeypatch.setattr(socket, 'create_connection', refuse)
  monkeypatch.setattr(socket, 'getaddrinfo', refuse)


@pytest.fixture
def x64():
  """64-bit types during a test; what it compiles runs with this on only."""
  with jax.enable_x64(True):
    yield
