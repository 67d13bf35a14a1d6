"""The audit: what it counts, what it advises, and what it compares."""

import dataclasses
import json
import pathlib

import helpers
import jax
import pytest

from conadv_jax import experiment, models
from conadv_jax.audit import cache, command, compile, libtpu, sweep
from conadv_jax.audit.compile import Compiled
from conadv_jax.audit.scaling import forecast
from conadv_jax.base.errors import ConfigError
from conadv_jax.devices import topology

ROOT = pathlib.Path(__file__).resolve().parents[2]
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
