"""With libtpu, but without a TPU, JAX is told to take the CPU."""

import glob
import importlib.util
import os
import subprocess
import sys
import types

import pytest

from conadv_jax import cli
from conadv_jax.base import jax_platform
from conadv_jax.models import __main__ as models

LIBTPU = importlib.util.find_spec('jax')  # any module that is there


@pytest.fixture
def machine(monkeypatch, tmp_path):
  """A machine with libtpu and no device; its jax.config, and its /dev."""
  config = types.SimpleNamespace(jax_platforms=None)
  config.update = lambda name, value: setattr(config, name, value)
  monkeypatch.setattr(jax_platform, 'jax', types.SimpleNamespace(config=config))
  monkeypatch.setattr(importlib.util, 'find_spec', {'libtpu': LIBTPU}.get)
  monkeypatch.delenv('TPU_LIBRARY_PATH', raising=False)
  files = [f'{tmp_path}{path}' for path in jax_platform.DEVICE_FILES]
  monkeypatch.setattr(jax_platform, 'DEVICE_FILES', files)
  return types.SimpleNamespace(config=config, root=tmp_path)


def chosen(machine, *devices):
  for device in devices:
    path = machine.root / device
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
  jax_platform.choose()
  return machine.config.jax_platforms


def test_without_a_device_it_is_the_cpu(machine):
  assert chosen(machine, 'dev/vfio/vfio', 'dev/null') == 'cpu'


@pytest.mark.parametrize(
  'device',
  ['accel0', 'vfio/0', 'vfio/12', 'nvidia0', 'nvidiactl', 'kfd', 'dxg'],
)
def test_with_a_device_jax_chooses(machine, device):
  assert chosen(machine, f'dev/{device}') is None


@pytest.mark.parametrize('asked', ['', 'tpu', 'tpu,cpu', 'cuda'])
def test_a_choice_stands(machine, asked):
  machine.config.jax_platforms = asked
  assert chosen(machine) == asked


def test_without_libtpu_jax_chooses(machine, monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', {}.get)
  assert chosen(machine) is None
  monkeypatch.setenv('TPU_LIBRARY_PATH', '/lib/libtpu.so')
  assert chosen(machine) == 'cpu'


def test_commands_choose_first(monkeypatch):
  calls = []
  monkeypatch.setattr(jax_platform, 'choose', lambda: calls.append('choose'))
  cli.run(lambda _: calls.append('command'))
  # The one command of JAX that `cli.run` does not start.
  monkeypatch.setattr(models, 'lines', lambda: calls.append('lines') or ())
  monkeypatch.setattr(sys, 'argv', ['models'])
  models.console()
  assert calls == ['choose', 'command', 'choose', 'lines']


# ---- With libtpu -----------------------------------------------------------


def quiet(module, *arguments):
  """Runs a command as a user does who sets nothing; returns what it says."""
  unset = {'JAX_PLATFORMS', 'TPU_SKIP_MDS_QUERY', 'ALLOW_MULTIPLE_LIBTPU_LOAD'}
  environment = {k: v for k, v in os.environ.items() if k not in unset}
  done = subprocess.run(
    [sys.executable, '-m', f'conadv_jax.{module}', *arguments],
    env=environment | {'PYTHONPATH': os.pathsep.join(sys.path)},
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  for word in 'TPU_', 'InitGoogle', 'Unable to initialize', 'learning/':
    assert word not in done.stderr
  return done.stdout


@pytest.mark.tpu_aot
def test_no_command_complains_of_a_missing_tpu(tmp_path):
  devices = [d for p in jax_platform.DEVICE_FILES for d in glob.glob(p)]
  if devices:
    pytest.skip(f'this machine has devices: {devices}')
  assert importlib.util.find_spec('libtpu')
  run = f'--workdir={tmp_path}/run'
  small = ['--config=digits:batch_size=64', '--config.max_steps=1']
  assert '1 x cpu' in quiet('train', *small, run)
  quiet('evaluate', run)
  quiet('export', run, f'--output={tmp_path}/weights.safetensors')
  quiet('audit', *small[:1], '--config.bn_group_size=8', '--topology=v3-8')
