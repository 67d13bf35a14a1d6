"""A scaling study of one step: its tables, its rows for JSON, and its plot."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from etils import epath

from conadv_jax.audit.scaling import predict as scaling
from conadv_jax.audit.scaling.anchor import AnchorCheck, check_anchor
from conadv_jax.audit.scaling.predict import Calibration, Row, Scaling
from conadv_jax.audit.topology import Generation

# Of the roofline and the two calibrations; the last can lie on the first.
_STYLES = (('#1f77b4', '-'), ('#d62728', '-'), ('#ff7f0e', '--'))
_COLLECTIVES_COLOR = '#2ca02c'


class Assumption(NamedTuple):
  """A number or a choice that the forecast rests on."""

  name: str
  value: float | str
  unit: str
  source: str


@dataclasses.dataclass(frozen=True)
class Study:
  """Weak and strong scaling of one step on one generation.

  Attributes:
    weak: one `Scaling` per calibration, the roofline first.
    strong: likewise.
    anchor: the check, or None where there was no cost to check with.
    assumptions: everything that the rows rest on.
  """

  weak: tuple[Scaling, ...]
  strong: tuple[Scaling, ...]
  anchor: AnchorCheck | None
  assumptions: tuple[Assumption, ...]


def study(
  cost: scaling.StepCost,
  generation: Generation,
  *,
  examples_per_device: int,
  batch_size: int,
  examples_to_train: int,
  max_examples_per_device: int | None = None,
  anchor_cost: scaling.StepCost | None = None,
) -> Study:
  """Both scalings of `cost`, at the roofline and, with an anchor, calibrated.

  Args:
    cost: of the step in question.
    generation: of the slices.
    examples_per_device: of weak scaling.
    batch_size: of strong scaling.
    examples_to_train: of the whole run: epochs times examples.
    max_examples_per_device: that HBM holds; more are accumulated.
    anchor_cost: of the step of `anchor.MLPERF_65536`, compiled by us for v3.

  Raises:
    ConfigError: for a number out of range; the message names it.
  """
  check = None if anchor_cost is None else check_anchor(anchor_cost)
  calibrations = (scaling.ROOFLINE,)
  if check is not None:
    calibrations += (check.by_efficiency, check.by_overhead)

  def over_devices(function, size: int) -> tuple[Scaling, ...]:
    return tuple(
      function(
        cost,
        generation,
        size,
        examples_to_train,
        calibration,
        max_examples_per_device,
      )
      for calibration in calibrations
    )

  return Study(
    weak=over_devices(scaling.weak_scaling, examples_per_device),
    strong=over_devices(scaling.strong_scaling, batch_size),
    anchor=check,
    assumptions=_assumptions(
      cost, generation, calibrations, max_examples_per_device
    ),
  )


def _assumptions(
  cost: scaling.StepCost,
  generation: Generation,
  calibrations: Sequence[Calibration],
  max_examples_per_device: int | None,
) -> tuple[Assumption, ...]:
  hardware = (
    ('peak_flops_per_sec', 'FLOP/s per device'),
    ('hbm_bytes_per_sec', 'bytes/s per device'),
    ('ici_bytes_per_sec', 'bytes/s out of a device, one direction'),
    ('ici_hop_seconds', 's per hop'),
    ('dcn_bytes_per_sec_per_host', 'bytes/s out of a host, one direction'),
    ('dcn_latency_seconds', 's per exchange between slices'),
  )
  bn = cost.batch_norm
  step = (
    ('flops_per_example', cost.flops_per_example, 'FLOP'),
    ('bytes_per_example', cost.bytes_per_example, 'bytes'),
    ('fixed_flops', cost.fixed_flops, 'FLOP per microbatch'),
    ('fixed_bytes', cost.fixed_bytes, 'bytes per microbatch'),
  )
  given = (
    ('gradient_bytes', cost.gradient_bytes, 'bytes all-reduced per step'),
    ('batch_norm.group_size', bn.group_size, 'examples; 0 = within a device'),
    ('batch_norm.all_reduces', bn.all_reduces, 'per microbatch, over devices'),
    ('batch_norm.bytes', bn.bytes, 'bytes of all of these'),
    ('max_examples_per_device', max_examples_per_device or 'no limit', ''),
  )
  rows = [
    Assumption(name, getattr(generation, name), unit, generation.source(name))
    for name, unit in hardware
  ]
  rows += [Assumption(*values, cost.origin) for values in step]
  for c in calibrations:
    rows += [
      Assumption(
        f'{c.name}: efficiency', c.efficiency, 'of computing', c.source
      ),
      Assumption(
        f'{c.name}: overhead', c.overhead_seconds, 's per microbatch', c.source
      ),
    ]
  rows += [Assumption(*values, 'given by the caller') for values in given]
  choices = (
    ('overlap', 'none, or perfect', 'of the gradients with computing'),
    ('all-reduce', 'reduce-scatter, all-gather', 'all links of a chip busy'),
    ('sum within a chip', 'free', 'where it has two devices'),
    ('closed rings', 'Topology.wrap', 'which dimensions of a slice'),
    ('input, evaluation, checkpoints', 'free', 'no device waits for them'),
    ('stragglers', 'none', 'every device takes the same time'),
    ('examples to train', 'the same', 'for every batch size'),
    ('calibration', 'the same', 'for every method and generation'),
  )
  rows += [Assumption(*row, 'our assumption') for row in choices]
  return tuple(rows)


# ---- JSON --------------------------------------------------------------------


def as_json(result: Study) -> dict[str, Any]:
  """`result` as plain dicts and lists; shares and efficiencies of 1."""
  check = result.anchor
  return {
    'weak': [_scaling_json(s) for s in result.weak],
    'strong': [_scaling_json(s) for s in result.strong],
    'anchor': None if check is None else _anchor_json(check),
    'assumptions': [a._asdict() for a in result.assumptions],
  }


def _scaling_json(result: Scaling) -> dict[str, Any]:
  return {
    'calibration': dataclasses.asdict(result.calibration),
    'rows': [_row_json(row) for row in result.rows],
  }


def _row_json(row: Row) -> dict[str, Any]:
  p = row.prediction
  return {
    'devices': p.topology.devices,
    'topology': p.topology.name,
    'slices': p.topology.slices,
    'hosts': p.topology.hosts,
    'batch_size': p.batch_size,
    'examples_per_device': p.examples_per_device,
    'microbatches': p.microbatches,
    'flop_seconds': p.flop_seconds,
    'byte_seconds': p.byte_seconds,
    'compute_seconds': p.compute_seconds,
    'collective_seconds': p.collective_seconds,
    'collective_latency_seconds': p.latency_seconds,
    'step_seconds': p.step_seconds,
    'overlapped_step_seconds': p.overlapped_step_seconds,
    'examples_per_sec': p.batch_size / p.step_seconds,
    'steps': row.steps,
    'train_seconds': row.train_seconds,
    'efficiency': row.efficiency,
    'overlapped_efficiency': row.overlapped_efficiency,
  }


def _anchor_json(check: AnchorCheck) -> dict[str, Any]:
  p = check.prediction
  return {
    'name': check.anchor.name,
    'source': check.anchor.source,
    'devices': p.topology.devices,
    'examples_per_device': p.examples_per_device,
    'measured_step_seconds': check.anchor.step_seconds,
    'predicted_step_seconds': p.step_seconds,
    'ratio': check.ratio,
    'overlapped_ratio': check.overlapped_ratio,
    'compute_share': check.compute_share,
    'bandwidth_share': check.bandwidth_share,
    'latency_share': check.latency_share,
    'unexplained_share': check.unexplained_share,
    'efficiency': check.by_efficiency.efficiency,
    'overhead_seconds': check.by_overhead.overhead_seconds,
  }


# ---- Text --------------------------------------------------------------------

_HEADER = (
  'devices', 'slices', 'batch', 'each', 'parts', 'compute ms', 'collect. ms',
  'step ms', 'images/s', 'efficiency %', 'steps', 'to train',
)  # fmt: skip


def text(result: Study) -> str:
  """Tables for people; ranges run from perfect overlap to none."""
  parts = []
  titles = {
    'weak': 'Weak scaling: as many examples on each device',
    'strong': 'Strong scaling: the same batch on all devices',
  }
  for scaled in (*result.weak, *result.strong):
    title = f'{titles[scaled.mode]}; {_describe(scaled.calibration)}'
    parts.append(title + '\n' + _table(_HEADER, map(_cells, scaled.rows)))
  if result.anchor is not None:
    parts.append(_anchor_text(result.anchor))
  cells = (
    (a.name, _value(a.value), a.unit, a.source) for a in result.assumptions
  )
  parts.append(
    'Assumptions\n' + _table(('name', 'value', 'unit', 'source'), cells, left=4)
  )
  return '\n\n'.join(parts)


def _describe(c: Calibration) -> str:
  return (
    f'{c.name} (computing at {c.efficiency:.0%} of the roofline, '
    f'{1e3 * c.overhead_seconds:.1f} ms lost per microbatch; {c.source})'
  )


def _cells(row: Row) -> tuple[str, ...]:
  p = row.prediction
  return (
    f'{p.topology.devices}',
    p.topology.label,
    f'{p.batch_size:,}',
    f'{p.examples_per_device:,}',
    f'{p.microbatches}',
    f'{1e3 * p.compute_seconds:,.1f}',
    f'{1e3 * p.collective_seconds:.2f}',
    _range(1e3 * p.overlapped_step_seconds, 1e3 * p.step_seconds),
    f'{p.batch_size / p.step_seconds:,.0f}',
    _range(100 * row.overlapped_efficiency, 100 * row.efficiency),
    f'{row.steps:,}',
    _clock(row.train_seconds),
  )


def _range(first: float, second: float) -> str:
  texts = f'{first:,.1f}', f'{second:,.1f}'
  return texts[0] if texts[0] == texts[1] else f'{texts[0]} - {texts[1]}'


def _clock(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02}:{seconds:02}'


def _value(value: float | str) -> str:
  return value if isinstance(value, str) else f'{value:.4g}'


def _table(
  header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 0
) -> str:
  """Columns two spaces apart; the first `left` start at their left edge."""
  lines = [tuple(header), *map(tuple, rows)]
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  return '\n'.join(
    '  '.join(
      cell.ljust(width) if i < left else cell.rjust(width)
      for i, (cell, width) in enumerate(zip(line, widths, strict=True))
    ).rstrip()
    for line in lines
  )


def _anchor_text(check: AnchorCheck) -> str:
  p, anchor = check.prediction, check.anchor
  predicted = _range(1e3 * p.overlapped_step_seconds, 1e3 * p.step_seconds)
  overhead_ms = 1e3 * check.by_overhead.overhead_seconds
  lines = f"""\
The one public step time: {anchor.name}; {anchor.source}.
- Measured {1e3 * anchor.step_seconds:.1f} ms; predicted at the roofline \
{predicted} ms, {check.overlapped_ratio:.2f} to {check.ratio:.2f} of it.
- Of the measured step: computing {check.compute_share:.1%}, bandwidth of \
collectives {check.bandwidth_share:.1%}, their latency \
{check.latency_share:.1%}, unexplained {check.unexplained_share:.1%}.
- If computing is slower than the roofline in proportion, it runs at \
{check.by_efficiency.efficiency:.1%} of it; if every step loses the same \
time, that is {overhead_ms:.1f} ms.
- One measurement cannot tell these two apart, and they differ most where a \
device has many examples. It tests neither how time grows with examples, \
devices or slices nor another generation or method. With \
{anchor.examples_per_device} examples per device it weighs most what matters \
least for many: launches, latency and small tensors."""
  return '\n'.join(
    textwrap.fill(line, 79, subsequent_indent='  ' if line[0] == '-' else '')
    for line in lines.splitlines()
  )


# ---- Plot --------------------------------------------------------------------


def plot(result: Study, title: str, path: epath.PathLike) -> None:
  """Step time and efficiency over devices, weak and strong, as PNG.

  Bands run from perfect overlap (better) to none.
  """
  # pyplot keeps global state and may look for a display.
  from matplotlib.figure import Figure

  figure = Figure(figsize=(10, 7.5), layout='constrained')
  axes = figure.subplots(2, 2, squeeze=False)
  figure.suptitle(title)
  names = ('weak: same examples per device', 'strong: same batch')
  scalings = (result.weak, result.strong)
  for (left, right), name, scaled in zip(axes, names, scalings, strict=True):
    _plot_times(left, scaled)
    _plot_efficiency(right, scaled)
    left.set_title(name, fontsize=10)
    right.set_title(name, fontsize=10)
    for axis in (left, right):
      _mark_slices(axis, scaled[0].rows)
      axis.grid(alpha=0.3)
      axis.legend(frameon=False, fontsize=8)
  path = epath.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open('wb') as file:
    figure.savefig(file, dpi=120, format='png')


def _devices(rows: Sequence[Row]) -> list[int]:
  return [row.prediction.topology.devices for row in rows]


def _plot_times(axis, scalings: Sequence[Scaling]) -> None:
  for scaled, (color, line) in zip(scalings, _STYLES, strict=False):
    ms = [1e3 * row.prediction.compute_seconds for row in scaled.rows]
    label = f'computing, {scaled.calibration.name}'
    axis.plot(
      _devices(scaled.rows), ms, color=color, ls=line, label=label, lw=1.3,
      marker='o', markersize=3,
    )  # fmt: skip
  rows = scalings[0].rows
  ms = [1e3 * row.prediction.collective_seconds for row in rows]
  axis.plot(
    _devices(rows), ms, color=_COLLECTIVES_COLOR, label='collectives', lw=1.3,
    marker='s', markersize=3,
  )  # fmt: skip
  axis.set(ylabel='ms per step', yscale='log')
  axis.yaxis.set_major_formatter('{x:,g}')


def _plot_efficiency(axis, scalings: Sequence[Scaling]) -> None:
  for scaled, (color, line) in zip(scalings, _STYLES, strict=False):
    devices = _devices(scaled.rows)
    none = [100 * row.efficiency for row in scaled.rows]
    perfect = [100 * row.overlapped_efficiency for row in scaled.rows]
    label = scaled.calibration.name
    axis.plot(devices, none, color=color, ls=line, label=label, lw=1.3)
    axis.fill_between(devices, none, perfect, color=color, alpha=0.15, lw=0)
  axis.set(ylabel='efficiency (%)', ylim=(0, 115))


def _mark_slices(axis, rows: Sequence[Row]) -> None:
  """Devices in powers of two, and where several slices begin."""
  devices = _devices(rows)
  axis.set_xscale('log', base=2)
  axis.set_xticks(devices, [f'{n:,}' for n in devices], fontsize=8, rotation=30)
  axis.set_xlabel('devices')
  several = [
    row.prediction.topology.devices
    for row in rows
    if row.prediction.topology.slices > 1
  ]
  if several:
    axis.axvline(
      several[0] / 2**0.5, color='0.5', ls=':', lw=1, label='several slices'
    )
