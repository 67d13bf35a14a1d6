"""The audit: what it counts, what it advises, and the programs it sees.

The tests marked tpu_aot compile for TPUs; the golden collectives are those of
every ImageNet recipe, at a size at which a compile takes a minute. Change them
with care: `python tests/audit/test_audit.py` prints what the file should hold.
"""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import helpers
import jax
import pytest

from conadv_jax import cli, experiment, models
from conadv_jax.audit import cache, command, compile, libtpu, sweep
from conadv_jax.audit.compile import Compiled
from conadv_jax.audit.scaling import forecast
from conadv_jax.base.errors import ConfigError
from conadv_jax.config import from_config_dict
from conadv_jax.devices import topology

ROOT = pathlib.Path(__file__).resolve().parents[2]
GOLDEN = ROOT / 'tests' / 'references' / 'collectives.json'
GIB = 2**30


@pytest.fixture
def tiny_model(monkeypatch):
  monkeypatch.setitem(models.MODELS, 'tiny', models.Entry(helpers.TinyNet, 8))


def build(devices=8, **fields):
  config = helpers.make_config(
    {'model': 'tiny', 'batch_size': 32, 'bn_group_size': 2} | fields
  )
  return experiment.build(config, devices=jax.devices()[:devices])


# ---- FLOPs -----------------------------------------------------------------


def test_flops_of_a_step_by_hand(tiny_model):
  """8x8x1 images, 3x3 convolutions to 3 and 4 channels, 10 classes."""
  first, second, head = 64 * 9 * 1 * 3, 64 * 9 * 3 * 4, 4 * 10
  f, s = 2 * (first + second + head), 2 * first
  examples = 32 / 8
  expected = {
    'baseline': 3 * f - s,
    'autoaugment': 3 * f - s,
    'disadv': 2 * (3 * f - s) + 2 * f,
    'conadv': 2 * (3 * f - s) + 2 * f,
  }
  for method, flops in expected.items():
    if method == 'autoaugment':
      continue  # needs colour images
    assert build(method=method).flops_per_device() == examples * flops
  pgd = build(method='conadv', **{'attack.preset': 'pgd'})
  assert pgd.config.attack.steps == 5
  assert pgd.flops_per_device() == examples * (2 * (3 * f - s) + 5 * 2 * f)
  noise = build(method='conadv', **{'attack.preset': 'random_signs'})
  assert noise.flops_per_device() == examples * 2 * (3 * f - s)
  fast = build(1, method='fast_advprop', batch_size=40)
  each = 0.8 * (3 * f - s) + 0.2 * (3 * f + 3 * f - s)
  assert fast.flops_per_device() == pytest.approx(40 * each)


def test_remat_costs_a_forward_pass_of_every_view_and_attack():
  plain = helpers.make_config({'model': 'resnet18', 'dataset.name': 'cifar10'})
  runs = [
    experiment.build(dataclasses.replace(plain, remat=remat), jax.devices()[:1])
    for remat in ('none', 'blocks')
  ]
  one, again = (run.flops_per_device() for run in runs)
  # conadv: 2 views of 3 F and an attack of 2 F; with 3 more F.
  assert 1.37 < again / one < 1.40


@pytest.mark.usefixtures('tiny_model')
def test_xla_counts_what_we_count():
  run = build(method='conadv')
  compiled = compile.compile_step(run, compile.lower_step(run))
  assert compiled.costs['flops'] > 0.8 * run.flops_per_device()


# ---- Memory ----------------------------------------------------------------


@pytest.mark.usefixtures('tiny_model')
def test_bytes_of_the_state_by_hand():
  run = build(method='conadv', staleness_steps=2, **{'ema.decay': 0.9})
  # Kernels 27, 108, 40; a bias of 10; scale and bias, mean and variance of two
  # routes and 3 + 4 channels.
  params, stats = 27 + 108 + 40 + 10 + 2 * 2 * 7, 2 * 2 * 7
  images, labels = 4 * 64, 4 * 4  # of 32 / 8 examples
  assert compile.state_bytes(run) == {
    'parameters': 4 * (params + stats),
    'optimizer': 4 * params + 4,  # momentum, and a counter
    'snapshots': 2 * 4 * (params + stats),
    'average': 4 * (params + stats),
    'images': 2 * (images + labels),
    'perturbation': 4 * images,
  }
  assert compile.state_bytes(build(method='baseline'))['perturbation'] == 0


def test_parts_of_memory_add_up_to_the_peak():
  memory = {
    'peak_memory_in_bytes': 1000,
    'argument_size_in_bytes': 350,
    'generated_code_size_in_bytes': 50,
  }
  parts = compile.hbm_parts({'parameters': 100, 'images': 200}, memory)
  assert parts == {
    'parameters': 100,
    'images': 200,
    'padding': 50,
    'code': 50,
    'activations': 600,
  }


def remedies(activations, limit, devices=2, **fields):
  run = build(devices, **fields)
  parts = compile.state_bytes(run) | {'activations': activations}
  return {r['option']: r for r in compile.remedies(run, parts, limit)}


@pytest.mark.usefixtures('tiny_model')
def test_the_remedy_is_the_least_accumulation_that_fits():
  # 16 groups on 2 devices: 2, 4 or 8 parts.
  found = remedies(100_000, 40_000)
  assert list(found)[0] == 'microbatches=4'
  assert found['microbatches=4']['saves_bytes'] == 75_000
  assert not found['microbatches=2']['fits']
  assert 'microbatches=8' not in found
  assert not found['shard_optimizer=True']['fits']


@pytest.mark.usefixtures('tiny_model')
def test_options_in_use_are_no_remedies():
  found = remedies(
    100_000,
    1,
    microbatches=8,
    shard_optimizer=True,
    dtype='bfloat16',
  )
  assert list(found) == ['twice the devices']


@pytest.mark.usefixtures('tiny_model')
def test_a_step_too_large_is_reported_with_its_size_and_remedies():
  run, where = build(1), topology.parse('v3:2x2')
  error = (
    'RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required '
    'for HLO temporaries (48.25G) exceeds available HBM (15.48G).\nmore'
  )
  found = compile.report(run, where, Compiled(1.0, 2.0, error=error))
  assert not found['fits']
  state = sum(compile.state_bytes(run).values())
  assert found['hbm']['prefetched'] == 2 * 32 * (64 + 4)
  assert found['peak_hbm_bytes'] == 48.25 * GIB + state + 2 * 32 * (64 + 4)
  assert found['hbm_limit_bytes'] == round(15.48 * GIB)
  assert found['error'] == error.splitlines()[0]
  assert found['remedies'][0]['fits']
  assert 'flops_per_device' not in found


@pytest.mark.usefixtures('tiny_model')
def test_other_errors_of_the_compiler_are_not_taken_for_a_lack_of_memory():
  run = build(1)

  class Step:
    def compile(self, compiler_options):
      raise jax.errors.JaxRuntimeError('INVALID_ARGUMENT: No such option')

  with pytest.raises(jax.errors.JaxRuntimeError, match='No such option'):
    compile.compile_step(run, compile.Lowered(Step(), 0.0))


# ---- Programs are compiled once --------------------------------------------


@pytest.fixture
def compiled_programs(monkeypatch):
  """Compiles for the devices of this process; the list of what was compiled."""
  done = []

  def counted(run, lowered):
    done.append(run.config.microbatches)
    return Compiled(0.1, 0.2, error='RESOURCE_EXHAUSTED: required (1.0G)')

  monkeypatch.setattr(cache, 'compile_step', counted)
  monkeypatch.setattr(cache, 'load_devices', lambda _: jax.devices())
  return done


@pytest.mark.usefixtures('tiny_model')
def test_a_rerun_compiles_only_what_is_new(tmp_path, compiled_programs, capsys):
  where = topology.parse('v3:2x2')
  fields = {'model': 'tiny', 'batch_size': 32, 'bn_group_size': 2}
  config = helpers.make_config(fields)
  first = cache.Auditor(tmp_path)(config, where)
  assert compiled_programs == [1]
  again = cache.Auditor(tmp_path)(config, where)
  assert compiled_programs == [1] and again == first
  assert 'compiled before' in capsys.readouterr().out
  # What does not change the program is no reason to compile.
  cache.Auditor(tmp_path)(dataclasses.replace(config, log_every_steps=7), where)
  assert compiled_programs == [1]
  cache.Auditor(tmp_path)(dataclasses.replace(config, microbatches=2), where)
  assert compiled_programs == [1, 2]
  cache.Auditor(None)(config, where)
  assert compiled_programs == [1, 2, 1]


# ---- Tables of several -----------------------------------------------------


def audit_of(needed=1):
  """A stand-in for compiling: fits with `needed` microbatches or more.

  Each trial says that twice as many will do.
  """

  def audit(config, where):
    if config.batch_size % where.devices:
      raise ConfigError('batch_size: does not divide')
    fits = config.microbatches >= needed
    more = [f'microbatches={2 * config.microbatches}', 'remat=blocks']
    return {
      'topology': where.label,
      'alias': where.alias,
      'method': config.method,
      'microbatches': config.microbatches,
      'fits': fits,
      'flops_per_device': 10.0 * len(config.views),
    } | ({} if fits else {'remedies': [{'option': o} for o in more]})

  return audit


def test_a_sweep_stops_at_the_first_that_fits():
  config = helpers.make_config({'batch_size': 64, 'bn_group_size': 2})
  slices = [topology.parse(t) for t in ('v3:2x2', 'v5e:2x2')]
  rows = sweep.sweep(config, slices, [64, 128], audit_of(needed=4))
  assert [(r['topology'], r['microbatches'], r['fits']) for r in rows] == 2 * [
    (name, count, count == 4)
    for name in ('v3:2x2', 'v5e:2x2')
    for count in (1, 2, 4)
  ]


def test_a_sweep_gives_up():
  config = helpers.make_config({'batch_size': 640, 'bn_group_size': 2})
  rows = sweep.sweep(
    config, [topology.parse('v5e:2x2')], [640], audit_of(needed=10**6)
  )
  assert [r['microbatches'] for r in rows] == [1, 2, 4, 8, 16]


def test_a_sweep_names_what_does_not_divide_and_goes_on():
  config = helpers.make_config({'batch_size': 4, 'bn_group_size': 2})
  rows = sweep.sweep(
    config,
    [topology.parse('v3:2x2'), topology.parse('v5e:2x2')],
    [4],
    audit_of(),
  )
  assert rows[0]['error'] == 'batch_size: does not divide'
  assert rows[1]['fits']


def test_a_comparison_is_with_the_baseline_and_has_every_option():
  config = helpers.make_config(
    {'batch_size': 64, 'bn_group_size': 2, 'eval.route': 'adv'}
  )
  where = topology.parse('v3:2x2')
  rows = sweep.compare(config, where, audit_of())
  ratios = {r['name']: r['flops_per_device_ratio'] for r in rows}
  assert ratios == {
    'baseline': 1,
    'disadv: clean + adv, tau 0': 2,
    'conadv: clean + adv, tau 1': 2,
    'conadv, tau 2': 2,
    'conadv_aa: clean + aa + adv, tau 1': 3,
    'conadv, microbatches 2': 2,
    'conadv, remat blocks': 2,
    'conadv, sharded optimizer': 2,
  }
  perturbs = sweep.with_method(config, 'consam')
  rows = sweep.compare(perturbs, where, audit_of())
  assert {row['name'] for row in rows} == {*ratios, 'consam, tau 1'}


# ---- Files -----------------------------------------------------------------


@pytest.fixture
def command_in(monkeypatch, tmp_path):
  """Runs the command with --output, without a compiler; returns the report."""
  monkeypatch.setattr(libtpu, 'require_libtpu', lambda: None)
  monkeypatch.setattr(libtpu, 'prepare_process', lambda: None)
  monkeypatch.setattr(command, 'Auditor', lambda *_: audit_of())

  def run(*args):
    return command.audit(
      [
        'audit',
        f'--config={ROOT}/configs/digits.py:batch_size=320',
        f'--output={tmp_path}/out',
        *args,
      ]
    )

  return run


SWEEP = ('--sweep', '--topology=v3:2x2', '--batch_sizes=320,640')


@pytest.mark.parametrize(
  'first, second, message',
  [
    (
      SWEEP,
      (*SWEEP, '--config.bn_group_size=16'),
      'report of bn_group_size=64',
    ),
    (SWEEP, (*SWEEP[:2], '--batch_sizes=640'), 'report of batch_sizes=320'),
    (SWEEP, (*SWEEP, '--topology=v5e:2x2'), 'report of topology=v3:2x2'),
    (
      ['--topology=v3:2x2'],
      ['--topology=v3:2x2', '--config.dtype=bfloat16'],
      "report of dtype='float32'",
    ),
  ],
)
def test_a_report_of_something_else_is_not_overwritten(
  first, second, message, command_in, tmp_path
):
  command_in(*first)
  files = {path: path.read_bytes() for path in (tmp_path / 'out').iterdir()}
  assert len(files) == 3
  with pytest.raises(ConfigError, match=message) as info:
    command_in(*second)
  assert 'use another directory' in str(info.value)
  assert all(path.read_bytes() == old for path, old in files.items())


@pytest.mark.parametrize(
  'more', [(), ['--batch_sizes=320,640,1280'], ['--topology=v3:2x2,v5e:2x2']]
)
def test_the_same_sweep_can_run_again_and_grow(more, command_in):
  before = command_in(*SWEEP)['sweep']
  after = command_in(*SWEEP, *more)['sweep']
  assert all(row in after for row in before)
  assert len(after) > len(before) if more else after == before


def test_a_file_that_is_no_report_is_not_overwritten(command_in, tmp_path):
  (tmp_path / 'out').mkdir()
  (tmp_path / 'out/sweep.md').write_text('my notes')
  with pytest.raises(ConfigError, match='sweep.md there, which does not say'):
    command_in(*SWEEP)


# ---- Committed results -----------------------------------------------------


@pytest.mark.parametrize(
  'path',
  sorted((ROOT / 'results' / 'audit').glob('*_v*.json')),
  ids=lambda path: path.stem,
)
def test_committed_audits_keep_what_is_promised(path):
  """Fits, FLOPs within 5 % of the count by hand, and no images exchanged."""
  found = json.loads(path.read_text())
  assert found['fits']
  assert found['peak_hbm_bytes'] <= found['hbm_limit_bytes']
  assert abs(found['flops_ratio'] - 1) < 0.05
  sums = {c['kind'] for c in found['collectives']} <= {'all-reduce'}
  assert sums or found['shard_optimizer']
  groups_are_local = found['mesh']['bn'] == 1
  if groups_are_local:
    assert {c['group_size'] for c in found['collectives']} == {found['devices']}


# ---- Scaling ---------------------------------------------------------------


@pytest.mark.usefixtures('tiny_model')
def test_what_batch_norm_over_devices_exchanges_by_hand():
  run = build(method='conadv')
  cost = forecast.batch_norm_cost(run.config, run.abstract_state().batch_stats)
  # Layers of 3 and 4 channels, 2 views and 1 step of the attack; forward and
  # backward, 2 numbers of 4 bytes per channel.
  assert cost.group_size == 2
  assert cost.all_reduces == 2 * 2 * 2
  assert cost.bytes == (2 + 1) * (3 + 4) * 2 * 2 * 4
  # The ascent of the weights has one view, and a pass of its own.
  run = build(method='conadv_consam')
  cost = forecast.batch_norm_cost(run.config, run.abstract_state().batch_stats)
  assert cost.all_reduces == 2 * 2 * 3
  assert cost.bytes == (2 + 1 + 1) * (3 + 4) * 2 * 2 * 4


@pytest.mark.usefixtures('tiny_model')
def test_the_forecast_is_a_line_through_two_programs(monkeypatch):
  monkeypatch.setattr(forecast.libtpu, 'load_devices', lambda _: jax.devices())
  asked = []

  def audit(config, where):
    each = config.batch_size // where.devices
    group = config.sam.group_size
    asked.append((each, config.bn_group_size, config.microbatches, group))
    return {
      'flops_per_device': 10.0 * each,
      'hbm_bytes_per_device': 7.0 * each + 100,
    }

  # 6 groups, which do not divide over the slice: only the trials have to.
  fields = {'batch_size': 24, 'microbatches': 2, 'bn_group_size': 4}
  config = helpers.make_config({'model': 'tiny'} | fields)
  cost = forecast.step_cost(config, topology.parse('v3:2x2'), 32, audit)
  assert asked == [(8, 8, 1, 0), (32, 32, 1, 0)]
  assert cost.flops_per_example == 10 and cost.fixed_flops == 0
  assert cost.bytes_per_example == pytest.approx(7)
  assert cost.fixed_bytes == pytest.approx(100)
  assert cost.gradient_bytes == 4 * (27 + 108 + 40 + 10 + 2 * 2 * 7)
  # Groups with an ascent of their own are parts of a batch, whatever its size.
  fields |= {'method': 'consam', 'sam.group_size': 12}
  config = helpers.make_config({'model': 'tiny'} | fields)
  cost = forecast.step_cost(config, topology.parse('v3:2x2'), 32, audit)
  assert asked[2:] == [(8, 8, 1, 8), (32, 32, 1, 32)]
  assert cost.gradient_bytes == 4 * (27 + 108 + 40 + 10 + 2 * 7)


# ---- For TPUs --------------------------------------------------------------


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
