"""The audit as a command, and programs that it compiles for TPUs.

The golden collectives are those of every ImageNet recipe, at a size at which a
compile takes a minute. Change them with care:
`python tests/audit/test_audit_tpu.py` prints what the file should hold.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from conadv_jax import cli
from conadv_jax.audit import cache, command, libtpu
from conadv_jax.base.errors import ConfigError
from conadv_jax.config import from_config_dict
from conadv_jax.devices import topology

ROOT = pathlib.Path(__file__).resolve().parents[2]
GOLDEN = ROOT / 'tests' / 'references' / 'collectives.json'


def run_audit(*args):
  env = os.environ | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)}
  # What only the audit's own process may set.
  for name in libtpu.AOT_ENVIRONMENT:
    env.pop(name, None)
  path = [env['PYTHONPATH'], *filter(None, [os.environ.get('PYTHONPATH')])]
  env['PYTHONPATH'] = os.pathsep.join(path)
  return subprocess.run(
    [sys.executable, '-m', 'conadv_jax.audit', *args],
    capture_output=True,
    text=True,
    cwd=ROOT,
    env=env,
    timeout=900,
  )


@pytest.mark.parametrize(
  ('args', 'words'),
  (
    (('--topology=v9:2x2',), "unknown TPU generation 'v9'"),
    (('--topology=v3:3x3',), 'v3:3x3'),
    (('--topology=v3:2x2,v3:4x4',), 'several need --sweep'),
    (('--topology=v3:2x2', '--config.batch_sise=3'), 'batch_sise'),
    (('--topology=v3:2x2', '--sweep', '--batch_sizes=many'), "'many'"),
  ),
)
def test_wrong_settings_exit_with_2_and_name_the_field(
  args, words, monkeypatch, capsys
):
  monkeypatch.setattr(libtpu, 'prepare_process', lambda: None)
  config = f'--config={ROOT}/configs/digits.py'
  monkeypatch.setattr(sys, 'argv', ['audit', config, *args])
  with pytest.raises(SystemExit) as end:
    cli.run(command.audit)
  assert end.value.code == 2
  said = capsys.readouterr().err
  assert words in said and 'Traceback' not in said


def test_the_command_ends_in_the_same_way():
  done = run_audit('--config=configs/digits.py', '--topology=v3:3x3')
  assert done.returncode == 2, done.stderr
  assert 'v3:3x3' in done.stderr and 'Traceback' not in done.stderr


def test_a_sweep_without_libtpu_ends_at_once(monkeypatch, tmp_path):
  monkeypatch.delenv('TPU_LIBRARY_PATH', raising=False)
  find_spec = libtpu.importlib.util.find_spec
  monkeypatch.setattr(
    libtpu.importlib.util,
    'find_spec',
    lambda name, *args: None if name == 'libtpu' else find_spec(name, *args),
  )
  monkeypatch.setattr(libtpu, 'prepare_process', lambda: None)
  argv = [
    'audit',
    f'--config={ROOT}/configs/digits.py',
    '--topology=v3-8,v3-32',
    '--sweep',
    f'--json={tmp_path}/sweep.json',
  ]
  with pytest.raises(ConfigError, match=r"pip install -e '\.\[tpu"):
    command.audit(argv)
  assert not list(tmp_path.iterdir())


@pytest.mark.tpu_aot
def test_the_command_reports_and_writes_and_a_rerun_goes_on(tmp_path):
  args = (
    '--config=configs/digits.py:batch_size=256',
    '--config.bn_group_size=32',
    '--topology=v3-8',
    f'--json={tmp_path}/a.json',
    f'--output={tmp_path}/out',
  )
  done = run_audit(*args)
  assert done.returncode == 0, done.stderr
  found = json.loads((tmp_path / 'a.json').read_text())
  assert found['fits']
  assert found['topology'] == 'v3:2x2' and found['devices'] == 8
  assert 0 < found['peak_hbm_bytes'] < found['hbm_limit_bytes']
  assert found['compile_seconds'] > 0
  for collective in found['collectives']:
    assert collective['kind'] == 'all-reduce'
    assert collective['group_size'] == 8 and collective['count'] == 1
  # Gradients and statistics, and loss and accuracy of two views; biases of the
  # two norms that a block with a shortcut adds have one gradient.
  summed = sum(collective['bytes'] for collective in found['collectives'])
  shared = 2 * (32 + 64) * 4
  assert summed == found['hbm']['parameters'] + 2 * 2 * 4 - shared
  assert abs(sum(found['hbm'].values()) - found['peak_hbm_bytes']) < 1e6
  assert 0 <= found['by_scope']['adversarial']['share'] < 1
  for kind in ('json', 'md', 'html'):
    path = tmp_path / 'out' / f'resnet8_conadv_256_v3-8.{kind}'
    assert path.stat().st_size > 500
  assert 'fits: ' in done.stdout
  again = run_audit(*args)
  assert 'compiled before' in again.stdout


@pytest.mark.tpu_aot
def test_a_step_too_large_exits_with_3_and_a_remedy():
  done = run_audit(
    '--config=configs/cifar10.py',
    '--topology=v3-8',
    '--config.batch_size=524288',
    '--config.bn_group_size=64',
    '--config.dtype=bfloat16',
  )
  assert done.returncode == 3, done.stderr
  assert 'does not fit' in done.stderr
  assert 'microbatches=' in done.stderr
  assert 'What lowers it' in done.stdout


@pytest.mark.tpu_aot
@pytest.mark.parametrize(('method', 'runs'), (('conadv', 1), ('disadv', 0)))
def test_the_attack_runs_beside_the_sum_between_slices(method, runs, tmp_path):
  """If it is stale; else it has to wait for the update."""
  done = run_audit(
    f'--config=configs/digits.py:batch_size=256,method={method}',
    '--config.bn_group_size=32',
    '--config.xla_flags=multislice',
    '--topology=v5e:2x2',
    '--slices=2',
    f'--output={tmp_path}',
  )
  assert done.returncode == 0, done.stderr
  path = tmp_path / f'resnet8_{method}_256_2xv5e-4_multislice.json'
  found = json.loads(path.read_text())
  (between,) = (
    c for c in found['collectives'] if c['kind'] == 'dcn-all-reduce'
  )
  assert (between['group_size'], between['count']) == (2, 1)
  # A quarter each, in tiles of 4 KiB.
  assert 0 <= 4 * between['bytes'] - found['hbm']['parameters'] < 2**15
  hidden = found['overlap']['hidden_seconds']
  assert found['overlap']['asynchronous'] == bool(runs)
  assert (hidden > 0) == bool(runs)
  attack = found['overlap']['adversarial_seconds']
  assert hidden >= 0.9 * runs * attack


# ---- Golden collectives ----------------------------------------------------

RECIPES = (
  'imagenet_resnet50:method=conadv',
  'imagenet_resnet50:method=conadv_aa',
  'imagenet_efficientnet:batch_size=64k',
)


def collectives_of(recipe):
  """Of a recipe on v3:4x4, with 64-pixel images and its groups' size."""
  name, _, arg = recipe.partition(':')
  module = __import__(f'configs.{name}', fromlist=['get_config'])
  values = module.get_config(arg)
  where = topology.parse('v3:4x4')
  per_device = max(1, values.batch_size // 1024)
  values.update_from_flattened_dict(
    {
      'batch_size': per_device * where.devices,
      'bn_group_size': min(values.bn_group_size, 512),
      'dataset.image_size_px': 64,
    }
  )
  config = from_config_dict(values)
  return cache.Auditor(None)(config, where)['collectives']


@pytest.mark.tpu_aot
@pytest.mark.parametrize('recipe', RECIPES)
def test_collectives_of_the_recipes_are_as_committed(recipe, monkeypatch):
  for name, value in libtpu.AOT_ENVIRONMENT.items():
    monkeypatch.setenv(name, value)
  expected = json.loads(GOLDEN.read_text())[recipe]
  assert collectives_of(recipe) == expected


if __name__ == '__main__':
  libtpu.prepare_process()
  print(json.dumps({r: collectives_of(r) for r in RECIPES}, indent=2))
