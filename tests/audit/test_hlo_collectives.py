"""Reading compiled programs: what devices exchange, and what runs beside."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_hlo import KERNEL_BYTES, RATES, cost_by_name, program, read

from conadv_jax.audit.hlo.cost import cost_by_scope
from conadv_jax.audit.hlo.flops import flops_of
from conadv_jax.audit.hlo.program import parse
from conadv_jax.audit.hlo.schedule import collectives, inventory, overlap
from conadv_jax.devices import sums
from conadv_jax.devices.mesh import BATCH, make_mesh, own_copy, per_device


@pytest.mark.parametrize(
  ('attributes', 'group_size', 'num_groups'),
  (
    ('replica_groups={{0,1},{2,3},{4,5},{6,7}}', 2, 4),
    ('replica_groups=[2,4]<=[8]', 4, 2),
    ('replica_groups=[4,2]<=[2,4]T(1,0)', 2, 4),
    ('replica_groups={}', 8, 1),
  ),
)
def test_groups(attributes, group_size, num_groups):
  found = program(
    '%a = f32[3]{0:T(128)} parameter(0)',
    f'ROOT %r = f32[3]{{0:T(128)}} all-reduce(%a), {attributes}, to_apply=%s',
  )
  (each,) = collectives(found, RATES)
  assert (each.group_size, each.num_groups) == (group_size, num_groups)
  assert each.bytes == 12  # without padding


def test_kinds_and_payloads():
  found = program(
    '%a = f32[8]{0} parameter(0)',
    '%b = bf16[64]{0} parameter(1)',
    '%g = f32[64]{0} all-gather(%a), replica_groups={}, dimensions={0}',
    '%s = bf16[8]{0} reduce-scatter(%b), replica_groups={}, to_apply=%sum',
    '%p = f32[8]{0} collective-permute(%a), source_target_pairs={{0,1},{1,0}}',
    'ROOT %r = (f32[8], bf16[64]) all-reduce(%a, %b), replica_groups={}',
  )
  rows = inventory(collectives(found, RATES))
  assert [tuple(row.values()) for row in rows] == [
    ('all-gather', 'f32', 256, 8, 1),
    ('all-reduce', 'bf16+f32', 160, 8, 1),
    ('collective-permute', 'f32', 32, 2, 1),
    ('reduce-scatter', 'bf16', 128, 8, 1),
  ]
  assert list(rows[0]) == ['kind', 'dtype', 'bytes', 'group_size', 'count']


def test_collectives_of_a_compiled_loop_are_counted():
  devices = jax.devices()
  mesh = make_mesh(8, 1)

  def three_sums(x):
    def body(total, _):
      return own_copy(sums.mean_over_devices(jnp.sin(total))), None

    return jax.lax.scan(body, x, length=3)[0]

  fn = per_device(mesh, three_sums, BATCH, BATCH)
  compiled = jax.jit(fn).lower(np.zeros((8, 1, 5), np.float32)).compile()
  found = collectives(parse(compiled.as_text()), RATES)
  each = 4 * 5 * 8 // len(devices)
  assert inventory(found) == [
    {
      'kind': 'all-reduce',
      'dtype': 'f32',
      'bytes': each,
      'group_size': len(devices),
      'count': 3,
    }
  ]


def test_a_start_and_its_done_are_one_collective():
  meta = 'metadata={op_name="jit(f)/adversarial/neg"}'
  found = program(
    '%a = f32[8]{0} parameter(0)',
    '%s = f32[8]{0} all-reduce-start(%a), replica_groups={}, to_apply=%sum, '
    'metadata={op_name="gradient_sum/psum"}',
    f'%n = f32[8]{{0}} negate(%a), {meta}',
    '%o = f32[8]{0} negate(%a), metadata={op_name="jit(f)/optimizer/neg"}',
    '%d = f32[8]{0} all-reduce-done(%s)',
    f'ROOT %m = f32[8]{{0}} negate(%n), {meta}',
  )
  (each,) = collectives(found, RATES)
  seconds = 64 / 1e11
  assert each.is_async and each.beside == (
    ('n', 'adversarial', seconds),
    ('o', 'optimizer', seconds),
  )
  result = overlap(found, RATES)
  assert result['hidden_seconds'] == seconds
  assert result['adversarial_seconds'] == 2 * seconds


def test_a_sum_between_slices():
  """It loses its name; the hosts do a part of it while the attack runs."""

  def transfer(key):
    return (
      'is_host_transfer=true, frontend_attributes={'
      f'_xla_host_transfer_rendezvous="{key}",'
      '_xla_megascale_target="{0,1}x{0:3}",'
      '_xla_megascale_transfer_type="ALL_REDUCE"}'
    )

  def named(scope):
    return f'metadata={{op_name="jit(f)/{scope}/neg"}}'

  found = program(
    '%a = f32[8]{0} parameter(0)',
    '%b = f32[4]{0} parameter(1)',
    '%t = token[] after-all()',
    f'%r = (f32[8]{{0}}, u32[], token[]) recv(%t), {transfer("one")}',
    f'%q = (f32[4]{{0}}, u32[], token[]) recv(%t), {transfer("two")}',
    '%s = f32[8]{0} all-reduce(%a), replica_groups={{0,1,2,3},{4,5,6,7}}, '
    'to_apply=%sum',
    f'%send.1 = (f32[8]{{0}}, u32[], token[]) send(%s, %t), {transfer("one")}',
    f'%send.2 = (f32[4]{{0}}, u32[], token[]) send(%b, %t), {transfer("two")}',
    '%d.1 = token[] send-done(%send.1), is_host_transfer=true',
    '%w.2 = (f32[4]{0}, token[]) recv-done(%q), is_host_transfer=true',
    f'%n = f32[8]{{0}} negate(%a), {named("adversarial")}',
    '%w.1 = (f32[8]{0}, token[]) recv-done(%r), is_host_transfer=true',
    f'ROOT %m = f32[8]{{0}} negate(%a), {named("optimizer")}',
  )
  within, first, second = collectives(found, RATES)
  assert (within.kind, within.bytes, within.group_size) == ('all-reduce', 32, 4)
  assert not within.is_async
  assert (first.kind, first.bytes, first.dtype) == ('dcn-all-reduce', 32, 'f32')
  assert (first.group_size, first.num_groups) == (2, 4)
  assert [name for name, _, _ in first.beside] == ['n']
  assert second.bytes == 16 and not second.is_async
  assert {c.scope for c in (within, first, second)} == {'gradient_sum'}
  result = overlap(found, RATES)
  assert result['asynchronous_bytes'] == 32
  assert result['hidden_seconds'] == result['adversarial_seconds'] > 0
  assert '(0.0 of 0.0 MB between slices)' in result['verdict']
  scopes = cost_by_scope(found, RATES)
  assert scopes['other']['seconds'] == 0


def test_a_sum_without_a_name_in_one_slice_is_of_no_scope():
  found = program(
    '%a = f32[8]{0} parameter(0)',
    'ROOT %s = f32[8]{0} all-reduce(%a), replica_groups={}, to_apply=%sum',
  )
  (each,) = collectives(found, RATES)
  assert each.scope == 'other'


def test_a_synchronous_sum():
  (each,) = collectives(read('v3_synchronous'), RATES)
  assert each.bytes == KERNEL_BYTES and each.group_size == 8
  assert not each.is_async and each.beside == ()
  result = overlap(read('v3_synchronous'), RATES)
  assert not result['asynchronous'] and result['hidden_seconds'] == 0
  assert result['verdict'].startswith('synchronous: position 6 of 7')
  assert 'all-reduce(...)' in result['evidence'][0]


@pytest.mark.parametrize(
  ('name', 'group_size', 'start', 'all_hidden'),
  (
    # Continuation fusion: only the convolutions that carry it count.
    ('v5e_continuation_fusion', 4, 'async-collective-start', False),
    ('v5p_sparse_core', 4, 'call-start', True),
  ),
)
def test_an_asynchronous_sum(name, group_size, start, all_hidden):
  found = read(name)
  (each,) = collectives(found, RATES)
  assert (each.kind, each.dtype, each.count) == ('all-reduce', 'f32', 1)
  assert each.bytes == KERNEL_BYTES and each.group_size == group_size
  assert each.is_async and each.scope == 'gradient_sum'
  # Both convolutions of the attack run beside it.
  entry = found.entry.instructions
  flops = [
    flops_of(found, found.entry, entry[name])
    for name, scope, _ in each.beside
    if scope == 'adversarial'
  ]
  scopes = cost_by_scope(found, RATES)
  assert sum(flops) == scopes['adversarial']['flops'] > 0
  result = overlap(found, RATES)
  assert result['asynchronous_bytes'] == result['bytes'] == KERNEL_BYTES
  assert 0 < result['hidden_seconds'] <= result['adversarial_seconds']
  assert start in result['evidence'][0]
  assert result['verdict'].startswith('asynchronous: 9.4 of 9.4 MB')
  carriers = {name for name, _, _ in each.beside}
  assert all_hidden or all(
    'async_collective' in entry[n].called[0] for n in carriers
  )


def test_what_a_fusion_carries_is_not_its_own_traffic():
  found = read('v5e_continuation_fusion')
  (each,) = collectives(found, RATES)
  for name, _, _ in each.beside:
    # It reads the weights; the gradient passes through.
    spent = cost_by_name(found, name)
    assert KERNEL_BYTES < spent.accessed_bytes < 2 * KERNEL_BYTES


def test_a_sum_that_the_compiler_joined_again_says_so():
  found = program(
    '%a = f32[8]{0} parameter(0)',
    'ROOT %r = f32[8]{0} all-reduce(%a), replica_groups={}, to_apply=%sum, '
    'frontend_attributes={async_collective_name="all-reduce-start"}, '
    'metadata={op_name="jit(f)/gradient_sum/psum"}',
  )
  assert 'joined them again' in overlap(found, RATES)['verdict']


def test_no_sum_at_all():
  found = program('ROOT %a = f32[8]{0} parameter(0)')
  assert overlap(found, RATES)['verdict'].startswith('no sum')
