"""Reading compiled programs: what runs, and what it costs."""

import pathlib

import jax
import jax.numpy as jnp
import pytest

from conadv_jax.audit.hlo.cost import (
  SCOPES,
  Rates,
  cost_by_scope,
  cost_of,
  scope_of_name,
  total_cost,
)
from conadv_jax.audit.hlo.flops import flops_of
from conadv_jax.audit.hlo.program import (
  Shape,
  bits,
  executed,
  parse,
  parse_shapes,
  trip_count,
)
from conadv_jax.base.errors import ConfigError

# Programs of XLA:TPU for a step that updates one kernel of 3x3x512x512 and, in
# the scope 'adversarial', takes the gradient of other images; abridged.
REFERENCES = pathlib.Path(__file__).parents[1] / 'references'
RATES = Rates(flops_per_sec=1e12, hbm_bytes_per_sec=1e11)
KERNEL_BYTES = 4 * 3 * 3 * 512 * 512


def read(name):
  return parse((REFERENCES / f'hlo_{name}.txt').read_text())


def program(*lines, before=''):
  body = '\n  '.join(lines)
  return parse(
    'HloModule m, is_scheduled=true, num_partitions=8\n\n'
    f'{before}ENTRY %main (x: f32[]) -> f32[] {{\n  {body}\n}}\n'
  )


def instruction(line):
  return next(iter(program(line).entry.instructions.values()))


def cost_by_name(found, name):
  entry = found.entry
  return cost_of(found, entry, entry.instructions[name], RATES)


# ---- The text --------------------------------------------------------------


LOOP = """HloModule m, is_scheduled=true

%condition (p: (s32[], f32[8])) -> pred[] {
  %bound = s32[] constant(5)
  %p = (s32[], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %less = pred[] compare(%i, %bound), direction=DIRECTION
}

%body (q: (s32[], f32[8])) -> (s32[], f32[8]) {
  ROOT %q = (s32[], f32[8]) parameter(0)
}

ENTRY %main (x: (s32[], f32[8])) -> (s32[], f32[8]) {
  %x = (s32[], f32[8]) parameter(0)
  ROOT %loop = (s32[], f32[8]) while(%x), condition=%condition, body=%body
}
"""


KNOWN = ', backend_config={"known_trip_count":{"n":"7"}}'


@pytest.mark.parametrize(
  ('direction', 'noted', 'trips'),
  (('LT', '', 5), ('NE', '', 1), ('NE', KNOWN, 7)),
)
def test_trips_of_a_loop(direction, noted, trips):
  text = LOOP.replace('DIRECTION', direction)
  program = parse(text.replace('body=%body', 'body=%body' + noted))
  loop = program.entry.instructions['loop']
  assert trip_count(program, loop) == trips

  def times(**kwargs):
    return {i.name: t for _, i, t in executed(program, **kwargs)}

  assert times()['q'] == trips and times()['loop'] == 1
  assert times(loops_once=True)['q'] == 1


def test_an_instruction_is_taken_apart():
  found = instruction(
    'ROOT %a.1 = (bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, /*index=1*/pred[]) '
    'fusion(%p.0, %q), kind=kLoop, calls=%c.2, '
    'metadata={op_name="jit(f)/g[\\\'(w)\\\']/update" stack_frame_id=3}, '
    'backend_config={"known_trip_count":{"n":"7"},"s":"}"}'
  )
  assert found.name == 'a.1' and found.is_root and found.opcode == 'fusion'
  assert found.operands == ('p.0', 'q') and found.called == ('c.2',)
  assert found.op_name == "jit(f)/g['(w)']/update"
  assert found.attribute('kind') == 'kLoop'
  array, flag = found.shapes
  assert array == Shape('bf16', (8, 128), (1, 0), (8, 128), 1)
  assert (array.bytes, flag.bytes) == (2048, 1)


@pytest.mark.parametrize(
  ('text', 'padded_bytes'),
  (
    ('f32[3,5]', 60),
    ('f32[3,5]{1,0:T(8,128)}', 4 * 8 * 128),
    ('f32[3,5]{0,1:T(4,128)}', 4 * 8 * 128),  # 5 rows, 3 columns
    ('bf16[2,9,130]{2,1,0:T(8,128)(2,1)}', 2 * 2 * 16 * 256),
    ('f32[]{:T(256)}', 1024),
    ('s4[3]{0}', 2),
    ('token[]', 0),
  ),
)
def test_layouts_are_padded_to_whole_tiles(text, padded_bytes):
  (shape,) = parse_shapes(text)
  assert shape.padded_bytes == padded_bytes


@pytest.mark.parametrize(
  ('text', 'message'),
  (('x = 1', 'no HLO module'), ('HloModule m, a={}', 'no ENTRY')),
)
def test_other_texts_are_refused(text, message):
  with pytest.raises(ConfigError, match=message):
    parse(text)


def test_an_unknown_element_type_is_refused():
  with pytest.raises(ConfigError, match='not an element type'):
    bits('tuple')


# ---- FLOPs and bytes -------------------------------------------------------

CONVOLUTIONS = {
  # lhs, rhs, window strides, padding, feature groups, batch groups
  'plain': ((2, 9, 9, 4), (3, 3, 4, 8), 1, 'SAME', 1, 1),
  'stride': ((2, 9, 9, 4), (3, 3, 4, 8), 2, 'SAME', 1, 1),
  'pointwise': ((2, 9, 9, 4), (1, 1, 4, 8), 1, 'VALID', 1, 1),
  'depthwise': ((2, 9, 9, 4), (3, 3, 1, 4), 1, 'SAME', 4, 1),
  'batch groups': ((4, 9, 9, 3), (3, 3, 3, 8), 1, 'SAME', 1, 2),
}


def convolve(lhs, rhs, stride, padding, groups, batch_groups):
  return jax.lax.conv_general_dilated(
    lhs,
    rhs,
    (stride, stride),
    padding,
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    feature_group_count=groups,
    batch_group_count=batch_groups,
  )


# XLA writes the gradients of batch groups as other operations.
@pytest.mark.parametrize(
  ('case', 'gradient'),
  [(case, None) for case in CONVOLUTIONS]
  + [
    (case, i) for case in CONVOLUTIONS if case != 'batch groups' for i in (0, 1)
  ],
)
def test_flops_of_convolutions_are_those_of_xla(case, gradient):
  """And so in both gradients, with dilations and windows as large as images."""
  lhs, rhs, *rest = CONVOLUTIONS[case]

  def forward(x, w):
    return convolve(x, w, *rest)

  def fn(x, w):
    if gradient is None:
      return forward(x, w)
    y, pull = jax.vjp(forward, x, w)
    return pull(y)[gradient]

  lowered = jax.jit(fn).lower(*(jnp.zeros(s) for s in (lhs, rhs)))
  found = parse(lowered.compiler_ir('hlo').get_hlo_module().to_string())
  ours = sum(
    flops_of(found, found.entry, i) for i in found.entry.instructions.values()
  )
  # Of a gradient, the forward pass is in the text too, and in the count.
  assert ours == lowered.cost_analysis()['flops'] > 0


def test_flops_of_a_product():
  found = program(
    '%a = f32[5,4,3] parameter(0)',
    '%b = f32[5,3,7] parameter(1)',
    'ROOT %d = f32[5,4,7] dot(%a, %b), lhs_batch_dims={0}, '
    'lhs_contracting_dims={2}, rhs_batch_dims={0}, rhs_contracting_dims={1}',
  )
  assert cost_by_name(found, 'd').flops == 2 * 5 * 4 * 7 * 3


def test_seconds_are_those_of_what_binds():
  found = program(
    '%a = f32[1000,1000] parameter(0)',
    '%d = f32[1000,1000] dot(%a, %a), lhs_contracting_dims={1}',
    'ROOT %c = f32[1000,1000] copy(%d)',
  )
  product, copy = (cost_by_name(found, name) for name in 'dc')
  assert product.flops == 2e9 and product.seconds == 2e9 / 1e12
  assert copy.hbm_bytes == 8e6 and copy.seconds == 8e6 / 1e11


FUSED_SLICE = """%f (p: f32[64,8], i: s32[]) -> f32[1,8] {
  %p = f32[64,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %b = f32[64,8]{1,0} bitcast(%p)
  %z = s32[] constant(0)
  %s = f32[1,8]{1,0} dynamic-slice(%b, %i, %z), dynamic_slice_sizes={1,8}
  ROOT %n = f32[1,8]{1,0} negate(%s)
}

"""
FUSED_UPDATE = """%f (p: f32[64,8], u: f32[1,8]) -> f32[64,8] {
  %p = f32[64,8]{1,0} parameter(0)
  %u = f32[1,8]{1,0} parameter(1)
  %z = s32[] constant(0)
  %d = f32[64,8]{1,0} dynamic-update-slice(%p, %u, %z, %z)
  ROOT %b = f32[64,8]{1,0} bitcast(%d)
}

"""


@pytest.mark.parametrize(
  ('lines', 'before', 'hbm_bytes'),
  (
    # Only what a fusion slices, and the index.
    (('%y = f32[1,8]{1,0} fusion(%a, %i), calls=%f',), FUSED_SLICE, 68),
    # The part, read twice (the old one and the new) and written once.
    (('%y = f32[64,8]{1,0} fusion(%a, %u), calls=%f',), FUSED_UPDATE, 96),
    (('%y = f32[64,8]{1,0} dynamic-update-slice(%a, %u, %i)',), '', 64),
    (('%y = f32[1,8]{1,0} slice(%a), slice={[0:1], [0:8]}',), '', 64),
    (('%y = f32[64,8]{1,0} bitcast(%a)',), '', 0),
    # Into on-chip memory: read from HBM once, whoever reads it then.
    (
      (
        '%s = (f32[64,8]{1,0:S(1)}, f32[64,8]{1,0}, u32[]) copy-start(%a)',
        '%y = f32[64,8]{1,0:S(1)} copy-done(%s)',
        '%w = f32[64,8]{1,0:S(1)} negate(%y)',
      ),
      '',
      2048,
    ),
    (
      (
        '%s = ((f32[64,8]{1,0}), f32[1,8]{1,0:S(1)}, s32[]) slice-start(%a)',
        '%y = f32[1,8]{1,0:S(1)} slice-done(%s)',
      ),
      '',
      32,
    ),
  ),
)
def test_hbm_bytes(lines, before, hbm_bytes):
  found = program(
    '%a = f32[64,8]{1,0} parameter(0)',
    '%u = f32[1,8]{1,0} parameter(1)',
    '%i = s32[] parameter(2)',
    *lines,
    before=before,
  )
  assert total_cost(found, RATES).hbm_bytes == hbm_bytes


def test_costs_of_a_whole_program_are_near_those_of_xla():
  def fn(x, w):
    return jax.grad(lambda w: jnp.tanh(convolve(x, w, 2, 'SAME', 1, 1)).sum())(
      w
    )

  args = [
    jax.ShapeDtypeStruct(s, jnp.float32) for s in CONVOLUTIONS['plain'][:2]
  ]
  compiled = jax.jit(fn).lower(*args).compile()
  ours = total_cost(parse(compiled.as_text()), RATES)
  xla = compiled.cost_analysis()
  assert ours.accessed_bytes == pytest.approx(xla['bytes accessed'], rel=0.02)
  assert 0.9 < ours.flops / xla['flops'] <= 1


def test_loops_count_as_often_as_they_run():
  def fn(x):
    return jax.lax.scan(lambda c, _: (jnp.sin(c @ x), None), x, length=5)[0]

  text = jax.jit(fn).lower(jnp.zeros((16, 16))).compile().as_text()
  assert total_cost(parse(text), RATES).flops == 5 * 2 * 16**3


# ---- Scopes ----------------------------------------------------------------


@pytest.mark.parametrize(
  ('op_name', 'scope'),
  (
    ('jit(train_step)/shard_map/update/jvp(Net)/conv', 'update'),
    ('jit(f)/transpose(jvp(update))/mul', 'update'),
    ('jit(f)/while/body/adversarial/transpose(jvp())/add', 'adversarial'),
    ('jit(f)/optimizer/update/add', 'optimizer'),
    ('jit(update_step)/updates/add', 'other'),
    ('', 'other'),
  ),
)
def test_scope_of_a_name(op_name, scope):
  assert scope_of_name(op_name) == scope


def test_a_copy_belongs_to_what_reads_it():
  meta = 'metadata={op_name="jit(f)/adversarial/neg"}'
  found = program(
    '%a = f32[8]{0} parameter(0)',
    '%s = (f32[8]{0:S(1)}, f32[8]{0}, u32[]) copy-start(%a)',
    '%d = f32[8]{0:S(1)} copy-done(%s)',
    f'%n = f32[8]{{0:S(1)}} negate(%d), {meta}',
    'ROOT %c = f32[8]{0} copy(%n)',
  )
  scopes = cost_by_scope(found, RATES)
  assert scopes['adversarial']['bytes'] == 32
  assert scopes['other']['bytes'] == 32


@pytest.mark.parametrize(
  'name', ('v3_synchronous', 'v5e_continuation_fusion', 'v5p_sparse_core')
)
def test_scopes_of_a_step(name):
  """One convolution more in the update: the gradient of the kernel."""
  scopes = cost_by_scope(read(name), RATES)
  assert tuple(scopes) == (*SCOPES, 'other')
  assert sum(s['share'] for s in scopes.values()) == pytest.approx(1)
  flops = {scope: spent['flops'] for scope, spent in scopes.items()}
  assert flops['update'] == flops['adversarial'] > 0
  assert flops['optimizer'] == flops['gradient_sum'] == flops['other'] == 0
  assert scopes['gradient_sum']['bytes'] == 2 * KERNEL_BYTES
