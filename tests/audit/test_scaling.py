"""Predicted step times: by hand, at their limits, and beside a measurement."""

import dataclasses
import json
import math

import pytest

from conadv_jax.audit import report
from conadv_jax.audit.scaling.anchor import MLPERF_65536, check_anchor
from conadv_jax.audit.scaling.collective_time import (
  all_reduce,
  group_all_reduce,
  ring_all_reduce,
)
from conadv_jax.audit.scaling.plot import plot
from conadv_jax.audit.scaling.predict import (
  ROOFLINE,
  BatchNormCost,
  Calibration,
  Compiled,
  StepCost,
  predict,
  scale,
  slices_of,
)
from conadv_jax.audit.scaling.study import as_json, make_study
from conadv_jax.base.errors import ConfigError
from conadv_jax.devices.generations import GENERATIONS
from conadv_jax.devices.topology import Topology, parse

# Round numbers to calculate with: a link of 1 GB/s, 1 us per hop, 5 GB/s per
# host, 100 us between slices, 10 TFLOP/s and 1 TB/s.
TOY = dataclasses.replace(
  GENERATIONS['v5e'],
  name='toy',
  peak_flops_per_sec=1e13,
  hbm_bytes_per_sec=1e12,
  ici_bytes_per_sec=4e9,
  dcn_bytes_per_sec_per_host=5e9,
)
COST = StepCost(
  flops_per_example=5e10,
  bytes_per_example=1e9,
  fixed_flops=0.0,
  fixed_bytes=2e9,
  gradient_bytes=1e8,
  origin='by hand',
)
# Of the baseline step at 96 images of 224 px in bfloat16 on v3.
RESNET50 = StepCost(
  flops_per_example=2.94 * 2 * 4.089e9,
  bytes_per_example=(27.6e9 - 0.7e9) / 96,
  fixed_flops=0.0,
  fixed_bytes=0.7e9,
  gradient_bytes=102e6,
  origin='by hand',
  batch_norm=BatchNormCost(group_size=64, all_reduces=106, bytes=4e5),
)


def toy(*shape, slices=1):
  return Topology(TOY, shape, slices)


# ---- Collectives -------------------------------------------------------------


@pytest.mark.parametrize(
  'shape, wrap, latency_us, bandwidth_ms',
  [
    # One chip has nobody to sum with.
    ((1, 1), (False, False), 0, 0),
    # Two chips: half of 100 MB there, half back, over one link; twice a hop.
    ((2, 1), (False, False), 2, 100),
    # A line of 4: 2 * 3/4 * 100 MB over one link; 3 hops there, 3 back.
    ((4, 1), (False, False), 6, 150),
    # A ring of 4 sends both ways: two links, and 2 hops to the farthest.
    ((4, 1), (True, False), 4, 75),
    # A mesh of 2x2: 2 * 3/4 over two links.
    ((2, 2), (False, False), 4, 75),
    # A torus of 4x4: 2 * 15/16 over four links; 2 + 2 hops.
    ((4, 4), (True, True), 8, 46.875),
    # Rings of 16 across open lines of 8: 1 + 2 links; 7 + 8 hops.
    ((8, 16), (False, True), 30, 2 * 127 / 128 * 100 / 3),
    # A torus of 4x4x4: 2 * 63/64 over six links; 2 + 2 + 2 hops.
    ((4, 4, 4), (True, True, True), 12, 2 * 63 / 64 * 100 / 6),
  ],
)
def test_all_reduce_by_hand(shape, wrap, latency_us, bandwidth_ms):
  time = ring_all_reduce(1e8, shape, wrap, 1e9, 1e-6)
  assert time.latency_seconds == pytest.approx(1e-6 * latency_us)
  assert time.bandwidth_seconds == pytest.approx(1e-3 * bandwidth_ms)
  assert time.seconds == time.latency_seconds + time.bandwidth_seconds


def test_an_all_gather_as_the_scaling_book_has_it():
  """Half an all-reduce: 34 MB over a line of 4 at 45 GB/s, "560 us" there."""
  time = ring_all_reduce(
    2048 * 8192 * 2, (4,), (False,), 4.5e10, hop_seconds=0.0
  )
  assert time.seconds / 2 == pytest.approx(560e-6, rel=2e-3)


def test_latency_and_bandwidth_alone():
  shape, wrap = (16, 16), (True, True)
  empty = ring_all_reduce(0.0, shape, wrap, 1e9, 1e-6)
  assert empty == (2 * 16 * 1e-6, 0.0)
  full = ring_all_reduce(1e8, shape, wrap, 1e9, 0.0)
  assert full.latency_seconds == 0
  # The more chips, the nearer to two passes over the array.
  assert 0.99 < full.seconds / (2 * 1e8 / 4e9) < 1


@pytest.mark.parametrize(
  'text, links', [('v3:4x4', 2), ('v3:32x32', 4), ('tpu7x:4x4x4', 6)]
)
def test_the_devices_of_a_chip_share_its_links(text, links):
  """A chip of two devices sends what one device would, at the chip's rate."""
  topology = parse(text)
  generation, chips = topology.generation, topology.chips
  all_links = 2 * generation.rank
  rate = 2 * generation.ici_bytes_per_sec * links / all_links
  time = all_reduce(1e8, topology)
  expected = 2 * (chips - 1) / chips * 1e8 / rate
  assert time.bandwidth_seconds == pytest.approx(expected)


def test_one_device_has_no_collective():
  assert all_reduce(1e8, toy(1, 1)).seconds == 0


def test_slices_by_hand():
  """Four slices of 4x4: hosts of 4 chips, 4 per slice, 25 MB for each.

  Between slices 2 * 3/4 * 25 MB at 5 GB/s = 7.5 ms, and twice 100 us.
  """
  one = all_reduce(1e8, toy(4, 4))
  four = all_reduce(1e8, toy(4, 4, slices=4))
  assert four.bandwidth_seconds - one.bandwidth_seconds == pytest.approx(7.5e-3)
  assert four.latency_seconds - one.latency_seconds == pytest.approx(2e-4)


@pytest.mark.parametrize('name', sorted(GENERATIONS))
def test_two_slices_are_slower_than_one_of_the_same_size(name):
  generation = GENERATIONS[name]
  small, large = (slices_of(generation, devices) for devices in (128, 256))
  two = dataclasses.replace(small, slices=2)
  assert two.devices == large.devices
  for num_bytes in (0, 1e8):
    slow = all_reduce(num_bytes, two).seconds
    assert slow > all_reduce(num_bytes, small).seconds
    assert slow > all_reduce(num_bytes, large).seconds


def test_a_group_is_a_block_of_neighbours():
  """8 devices of v3 are 4 chips, an open 2x2 of any larger slice."""
  pod, block = parse('v3:32x32'), parse('v3:2x2')
  expected = all_reduce(1e6, block)
  assert group_all_reduce(1e6, pod, 8) == expected
  assert group_all_reduce(1e6, pod, 2).seconds == 0
  assert group_all_reduce(1e6, pod, 1).seconds == 0
  twelve = group_all_reduce(1e6, toy(16, 16), 12)
  assert twelve.latency_seconds == pytest.approx(2 * (2 + 3) * 1e-6)


def test_a_group_larger_than_a_slice_is_everything():
  two = toy(4, 4, slices=2)
  assert group_all_reduce(1e6, two, 32) == all_reduce(1e6, two)
  assert group_all_reduce(1e6, two, 16).latency_seconds < 1e-4


# ---- Cost of a step ----------------------------------------------------------


def test_two_programs_tell_fixed_from_growing_cost():
  def program(examples):
    return Compiled(examples, 10 + 3 * examples, 100 + 7 * examples)

  for pair in ((4, 16), (16, 4)):
    cost = StepCost.from_compiled(*map(program, pair), gradient_bytes=5.0)
    assert cost.flops_per_example == pytest.approx(3)
    assert cost.bytes_per_example == pytest.approx(7)
    assert cost.fixed_flops == pytest.approx(10)
    assert cost.fixed_bytes == pytest.approx(100)
    assert cost.gradient_bytes == 5
    assert '4 and 16' in cost.origin


def test_no_part_is_below_zero_and_the_larger_program_is_met():
  cost = StepCost.from_compiled(
    Compiled(4, 10.0, 30.0), Compiled(16, 100.0, 160.0), gradient_bytes=0.0
  )
  assert cost.fixed_flops == cost.fixed_bytes == 0
  assert cost.flops_per_example * 16 == 100
  assert cost.bytes_per_example * 16 == 160


NONE = Compiled(0, 1.0, 1.0)
ONE = Compiled(8, 1e12, 1e9)
TWO = Compiled(16, 2e12, 2e9)


@pytest.mark.parametrize(
  'make, field',
  [
    (lambda: StepCost.from_compiled(NONE, ONE, 1.0), 'examples_per'),
    (lambda: StepCost.from_compiled(ONE, TWO, -1.0), 'gradient_bytes=-1'),
    (lambda: StepCost.from_compiled(ONE, TWO, math.nan), 'gradient_bytes=nan'),
    (lambda: StepCost.from_compiled(ONE, ONE, 1.0), 'examples_per_device=8'),
    (lambda: BatchNormCost(group_size=-1), 'group_size=-1'),
    (lambda: Calibration('x', efficiency=0.0), 'efficiency=0.0'),
    (lambda: Calibration('x', overhead_seconds=-1.0), 'overhead_seconds=-1.0'),
    (lambda: predict(COST, toy(2, 2), 0), 'examples_per_device=0'),
    (
      lambda: predict(COST, toy(2, 2), 4, max_examples_per_device=0),
      'max_examples_per_device=0',
    ),
    (lambda: scale('strong', COST, TOY, 100, 1), 'batch_size=100'),
    (lambda: scale('strong', COST, TOY, 0, 1), 'batch_size=0'),
    (lambda: scale('weak', COST, TOY, 8, 0), 'examples_to_train=0'),
    (
      lambda: check_anchor(dataclasses.replace(RESNET50, gradient_bytes=1e13)),
      'gradient_bytes=1e',
    ),
  ],
)
def test_a_wrong_number_is_named(make, field):
  with pytest.raises(ConfigError, match=field):
    make()


# ---- One step ----------------------------------------------------------------


def test_a_step_by_hand():
  """10 examples: 0.5 TFLOP at 10 TFLOP/s, 10 + 2 GB at 1 TB/s: bound by bytes.

  On 2x2 chips the gradients take 75 ms and 4 us.
  """
  p = predict(COST, toy(2, 2), 10)
  assert p.batch_size == 40
  assert p.microbatches == 1
  assert p.flop_seconds == pytest.approx(0.050)
  assert p.byte_seconds == pytest.approx(0.012)
  assert p.compute_seconds == pytest.approx(0.050)
  assert p.collective_seconds == pytest.approx(0.075004)
  assert p.latency_seconds == pytest.approx(4e-6)
  assert p.step_seconds == pytest.approx(0.125004)
  assert p.overlapped_step_seconds == pytest.approx(0.075004)


def test_the_slower_of_flops_and_bytes_binds():
  cost = dataclasses.replace(COST, bytes_per_example=1e10)
  p = predict(cost, toy(2, 2), 10)
  assert p.compute_seconds == p.byte_seconds == pytest.approx(0.102)


def test_a_calibration_by_hand():
  half = Calibration('half', efficiency=0.5, overhead_seconds=0.003)
  p = predict(COST, toy(2, 2), 10, half)
  assert p.compute_seconds == pytest.approx(0.103)
  assert p.flop_seconds == pytest.approx(0.050)


@pytest.mark.parametrize(
  'examples, most, expected',
  [(12, None, 1), (12, 12, 1), (12, 11, 2), (12, 4, 3), (12, 5, 3), (7, 6, 7)],
)
def test_the_fewest_equal_microbatches_that_fit(examples, most, expected):
  slow = Calibration('slow', overhead_seconds=1.0)
  p = predict(COST, toy(2, 2), examples, slow, most)
  assert p.microbatches == expected
  moved_bytes = 1e9 * examples + 2e9 * expected
  assert p.byte_seconds == pytest.approx(moved_bytes / 1e12)
  fast = max(p.flop_seconds, p.byte_seconds)
  assert p.compute_seconds == pytest.approx(fast + expected)
  # The gradients are summed once.
  assert p.gradients == all_reduce(1e8, toy(2, 2))


def test_batch_norm_costs_only_where_a_group_spans_devices():
  """Groups of 32: 10 all-reduces of 1 MB over 4 devices at 8 examples each."""
  bn = BatchNormCost(group_size=32, all_reduces=10, bytes=1e7)
  cost = dataclasses.replace(COST, batch_norm=bn)
  assert predict(cost, toy(4, 4), 32).batch_norm.seconds == 0
  p = predict(cost, toy(4, 4), 8)
  assert p.batch_norm.latency_seconds == pytest.approx(10 * 4e-6)
  assert p.batch_norm.bandwidth_seconds == pytest.approx(10 * 0.75e-3)
  # Layers wait for it; the next ones cannot start.
  assert p.overlapped_step_seconds == pytest.approx(
    max(p.compute_seconds, p.gradients.seconds) + p.batch_norm.seconds
  )
  twice = predict(cost, toy(4, 4), 16, max_examples_per_device=8)
  assert twice.batch_norm.seconds == pytest.approx(2 * p.batch_norm.seconds)


# ---- Many devices ------------------------------------------------------------


@pytest.mark.parametrize(
  'name, devices, label',
  [
    ('v3', 8, 'v3:2x2'),
    ('v3', 16, None),
    ('v3', 1024, 'v3:16x32'),
    ('v3', 4096, '2 x v3:32x32'),
    ('v3', 7, None),
    ('v4', 8, 'v4:2x2x2'),
    ('v4', 1024, 'v4:8x8x16'),
    ('v5e', 8, 'v5e:2x4'),
    ('v5e', 4096, '16 x v5e:16x16'),
    ('v5e', 384, None),
    ('v5e', 257, None),
    ('v5p', 8192, '2 x v5p:16x16x16'),
    ('tpu7x', 8, 'tpu7x:2x2x1'),
    ('tpu7x', 4096, 'tpu7x:8x16x16'),
  ],
)
def test_devices_become_slices(name, devices, label):
  topology = slices_of(GENERATIONS[name], devices)
  assert (topology and topology.label) == label
  if topology:
    assert topology.devices == devices


EXAMPLES = 90 * 1_281_167


def scalings(generation, calibration=ROOFLINE):
  return (
    scale('weak', COST, generation, 96, EXAMPLES, calibration),
    scale('strong', COST, generation, 98_304, EXAMPLES, calibration),
  )


@pytest.mark.parametrize(
  'generation', GENERATIONS.values(), ids=lambda g: g.name
)
def test_rows_of_weak_and_strong_scaling(generation):
  for result in scalings(generation):
    first, *others = result.rows
    assert first.efficiency == first.overlapped_efficiency == 1
    base = first.prediction
    assert base.topology.devices == 8
    assert result.rows[-1].prediction.topology.devices == 4096
    for row in others:
      p = row.prediction
      rate = p.examples_per_device / p.step_seconds
      base_rate = base.examples_per_device / base.step_seconds
      assert row.efficiency == pytest.approx(rate / base_rate)
      assert row.steps == round(EXAMPLES / p.batch_size)
      assert row.train_seconds == row.steps * p.step_seconds
      assert p.overlapped_step_seconds <= p.step_seconds
  weak, strong = scalings(generation)
  assert {r.prediction.examples_per_device for r in weak.rows} == {96}
  assert {r.prediction.batch_size for r in strong.rows} == {98_304}
  assert {r.steps for r in strong.rows} == {1173}


@pytest.mark.parametrize(
  'generation', GENERATIONS.values(), ids=lambda g: g.name
)
def test_more_devices_for_one_batch_are_faster_and_less_efficient(generation):
  """Where collectives grow: with the number of devices, as hops do."""
  cost = dataclasses.replace(COST, gradient_bytes=0.0)
  result = scale('strong', cost, generation, 98_304, EXAMPLES)
  rows = result.rows
  for fewer, more in zip(rows, rows[1:], strict=False):
    assert more.train_seconds < fewer.train_seconds
    assert more.efficiency < fewer.efficiency


def test_overhead_hurts_strong_scaling_more_than_inefficiency():
  slow, late = (
    scalings(TOY, calibration)[1].rows[-1]
    for calibration in (
      Calibration('slow', efficiency=0.5),
      Calibration('late', overhead_seconds=0.05),
    )
  )
  assert late.efficiency < slow.efficiency


# ---- The one public measurement ----------------------------------------------


def test_the_anchor_is_8192_devices_whose_rings_close_one_way():
  anchor = MLPERF_65536
  assert anchor.topology.devices == 8192
  assert anchor.topology.wrap == (False, True)
  assert anchor.topology.devices * anchor.examples_per_device == 65_536
  assert anchor.step_seconds == 0.0142


def test_the_anchor_by_hand():
  """Bytes bind: (8 images * 26.9 GB / 96 + 0.7 GB) / 450 GB/s = 6.537 ms.

  102 MB over 1 + 2 links of 83 GB/s, 127 + 16 hops twice; batch norm over 8
  devices, an open 2x2: 106 times 4 hops, and 2 * 3/4 * 0.4 MB over two links.
  """
  check = check_anchor(RESNET50)
  p = check.prediction
  assert p.compute_seconds == pytest.approx(6.537e-3, rel=1e-3)
  assert p.gradients.latency_seconds == pytest.approx(286e-6)
  assert p.gradients.bandwidth_seconds == pytest.approx(0.8191e-3, rel=1e-3)
  assert p.batch_norm.latency_seconds == pytest.approx(424e-6)
  assert p.batch_norm.bandwidth_seconds == pytest.approx(3.61e-6, rel=1e-2)
  assert check.ratio == pytest.approx(p.step_seconds / 0.0142)
  # A bound of the roofline is below what was measured, and within 3x of it.
  assert 1 / 3 < check.overlapped_ratio < check.ratio < 1
  shares = (
    check.compute_share,
    check.bandwidth_share,
    check.latency_share,
    check.unexplained_share,
  )
  assert sum(shares) == pytest.approx(1)
  assert check.latency_share == pytest.approx(710e-6 / 0.0142)


def test_both_calibrations_meet_the_anchor_and_part_elsewhere():
  check = check_anchor(RESNET50)
  anchor = check.anchor
  both = (check.by_efficiency, check.by_overhead)
  for calibration in both:
    p = predict(
      RESNET50, anchor.topology, anchor.examples_per_device, calibration
    )
    assert p.step_seconds == pytest.approx(anchor.step_seconds)
  slow, late = (
    predict(RESNET50, parse('v3-1024'), 96, c).step_seconds for c in both
  )
  assert slow > 1.5 * late


def test_a_prediction_longer_than_the_measurement_is_not_hidden():
  cost = dataclasses.replace(RESNET50, bytes_per_example=1e9)
  check = check_anchor(cost)
  assert check.ratio > 1
  assert check.unexplained_share < 0
  assert check.by_efficiency.efficiency > 1
  assert check.by_overhead.overhead_seconds == 0


# ---- Report ------------------------------------------------------------------


def study(anchor_cost=RESNET50):
  return make_study(
    RESNET50,
    GENERATIONS['v3'],
    examples_per_device=96,
    batch_size=98_304,
    examples_to_train=EXAMPLES,
    max_examples_per_device=192,
    anchor_cost=anchor_cost,
  )


def text_of(study):
  return report.text({'scaling': as_json(study)})


def test_the_text_has_every_row_and_every_assumption_with_its_source():
  text = text_of(study())
  lines = [line.split() for line in text.splitlines()]
  for mode in ('weak', 'strong'):
    rows = [line for line in lines if line[:1] == [mode]]
    assert sum('v3:16x32' in row for row in rows) == 3
    assert sum(row.count('v3:32x32') for row in rows) == 6  # one slice, and two
  row = next(line for line in lines if line[:2] == ['weak', 'roofline'])
  assert row[2:8] == ['v3:2x2', '1', '8', '768', '96', '1']
  for name in (
    'peak_flops_per_sec',
    'ici_bytes_per_sec',
    'dcn_latency_seconds',
    'fixed_bytes',
    'gradient_bytes',
    'overlap',
    'stragglers',
  ):
    (line,) = (x for x in text.splitlines() if x.split()[:1] == [name])
    assert line.split('  ')[-1].strip()
  for word in ('Measured 14.2 ms', 'unexplained', 'cannot tell', '2011.03641'):
    assert word in text


def test_without_an_anchor_there_is_only_the_roofline():
  result = study(anchor_cost=None)
  assert result.anchor is None
  assert [s.calibration for s in result.weak] == [ROOFLINE]
  assert 'Measured' not in text_of(result)
  assert as_json(result)['anchor'] is None


def test_json_is_plain_and_complete():
  result = study()
  values = as_json(result)
  assert json.loads(json.dumps(values, allow_nan=False)) == values
  row = values['strong'][0]['rows'][-1]
  assert row['devices'] == 4096
  assert (row['topology'], row['slices']) == ('v3:32x32', 2)
  assert row['batch_size'] == 98_304
  p = result.strong[0].rows[-1].prediction
  assert row['step_seconds'] == p.step_seconds
  assert row['examples_per_sec'] == 98_304 / p.step_seconds
  assert values['anchor']['ratio'] == result.anchor.ratio


def test_the_plot_is_a_picture(tmp_path):
  path = tmp_path / 'new' / 'scaling.png'
  plot(study(), 'title', path)
  assert path.read_bytes()[:4] == b'\x89PNG'
