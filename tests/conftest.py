"""JAX on eight CPU devices, and the import paths of the tests."""

import os
import pathlib
import sys

# LLVM's optimizer would take most of the time of the tests, for programs that
# run once on tiny arrays. Set the flag yourself to test what users run.
_FLAGS = os.environ.get('XLA_FLAGS', '')
if 'xla_backend_optimization_level' not in _FLAGS:
  os.environ['XLA_FLAGS'] = f'{_FLAGS} --xla_backend_optimization_level=0'

import jax  # noqa: E402
import pytest  # noqa: E402

# Before anything asks JAX for its devices: their number is fixed from then on.
jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 8)

# `configs` and `helpers` are imported by name, wherever pytest is started.
_TESTS = pathlib.Path(__file__).resolve().parent
for _path in (_TESTS, _TESTS.parent):
  if str(_path) not in sys.path:
    sys.path.insert(0, str(_path))


@pytest.fixture
def x64():
  """64-bit types during a test; what it compiles runs with this on only."""
  with jax.enable_x64(True):
    yield
