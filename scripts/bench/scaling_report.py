"""Axes, rows, fits, tables, plot and files of `scripts/bench_scaling.py`."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from etils import epath

from conadv_jax.base import storage
from scripts.bench import files, lines
from scripts.bench.files import cell
from scripts.bench.step_report import median_ratio, timings
from scripts.bench.turns import Contender


class Form(NamedTuple):
  """What a quantity is a line in: `text` and the function of x."""

  text: str
  of: Callable[[float], float]


X = Form('x', lambda x: x)
SQUARE = Form('x^2', lambda x: x * x)
INVERSE = Form('1/x', lambda x: 1 / x)
CONSTANT = Form('1', lambda x: 1.0)


class Axis(NamedTuple):
  """What grows.

  Attributes:
    label: of x, with its unit.
    floor: the least that the time grows in, in arithmetic.
    time: what the time is fitted by.
    memory: field of the memory that is shown beside the time, and fitted too.
    memory_form: what that is fitted by.
    log: whether x is spread over powers of two.
  """

  label: str
  floor: Form
  time: Form
  memory: str = 'peak_bytes'
  memory_form: Form = X
  log: bool = False


AXES = {
  'batch': Axis('images per device', X, X, log=True),
  'resolution': Axis(
    'side of the images, px', SQUARE, SQUARE, memory_form=SQUARE, log=True
  ),
  'views': Axis('arithmetic, in clean views', X, X),
  'staleness': Axis('staleness, steps', CONSTANT, X, 'state_bytes'),
  'microbatches': Axis('microbatches', CONSTANT, X, memory_form=INVERSE),
  'devices': Axis('devices', CONSTANT, X, memory_form=INVERSE),
}
COLUMNS = (
  'axis', 'series', 'x', 'variant', 'held', 'value', 'min', 'max',
  'images_per_sec', 'ratio_to', 'ratio', 'floor', 'to_floor', 'peak_bytes',
  'state_bytes', 'compile_seconds', 'note',
)  # fmt: skip
HEADER = (
  'ms | min..max | images/s | ratio | floor | to floor | memory, MiB '
  '| state, MiB | compile, s'
)
MIB = 2**20
UNITS = {'ms': 'ms', 'peak_bytes': 'MiB', 'state_bytes': 'MiB'}


class Point(NamedTuple):
  """A place on an axis, and the step there.

  Attributes:
    axis: a key of AXES.
    series: of the points that one line is fitted to.
    x: place.
    variant: METHOD or METHOD@TAU.
    batch_size: images of the whole batch.
    held: what does not change along the series.
    state_bytes: of one device, images included.
    step: with its times.
  """

  axis: str
  series: str
  x: float
  variant: str
  batch_size: int
  held: str
  state_bytes: int
  step: Contender

  @property
  def name(self) -> str:
    return f'{self.axis} {self.series} {self.x:.3g}'


# ---- Rows and fits ----------------------------------------------------------


def make_rows(points: list[Point]) -> list[dict[str, Any]]:
  """One row for each point; the ratio is to the first of its series."""
  firsts, rows = {}, []
  for point in points:
    first = firsts.setdefault(point.series, point)
    floor, step = AXES[point.axis].floor, point.step
    ratio = median_ratio(step, first.step)
    row = dict.fromkeys(('name', *COLUMNS)) | point._asdict()
    del row['step']
    row |= {
      'name': point.name,
      'unit': 'ms',
      'ratio_to': first.name,
      'ratio': ratio,
      'floor': (least := floor.of(point.x) / floor.of(first.x)),
      'to_floor': ratio and ratio / least,
      'rounds': [1e3 * s for s in step.seconds],
      'note': step.note,
    }
    rows.append(row | timings(step, point.batch_size))
  return rows


def series_of(
  rows: list[dict[str, Any]],
) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
  """(axis, series, its rows that have times), in the order of the rows."""
  for axis, series in dict.fromkeys((r['axis'], r['series']) for r in rows):
    found = [r for r in rows if (r['axis'], r['series']) == (axis, series)]
    yield axis, series, [row for row in found if row['rounds']]


def make_fits(
  rows: list[dict[str, Any]], tolerance: float
) -> list[dict[str, Any]]:
  """The line of each series, in time and in memory, and where it is left.

  Lines need two points; of two, none can be off.
  """
  found = []
  for axis, series, own in series_of(rows):
    shown = AXES[axis]
    memory = [[r[shown.memory] / MIB] for r in own if r[shown.memory]]
    for quantity, form, ys in (
      ('ms', shown.time, [row['rounds'] for row in own]),
      (shown.memory, shown.memory_form, memory),
    ):
      if not len(ys) == len(own) > 1:
        continue
      xs = [form.of(row['x']) for row in own]
      line = lines.fit(xs, [statistics.median(y) for y in ys])
      off = lines.bend(xs, ys, tolerance)
      found.append(
        {
          'axis': axis,
          'series': series,
          'quantity': quantity,
          'unit': UNITS[quantity],
          'form': form.text,
          **line._asdict(),
          'leaves_at': off and own[xs.index(off[0])]['x'],
          'departure': off and off[1],
        }
      )
  return found


# ---- Tables -----------------------------------------------------------------


def axis_table(rows: list[dict[str, Any]]) -> str:
  """Markdown, a table for each axis."""
  text = []
  for axis in dict.fromkeys(row['axis'] for row in rows):
    text += [f'| {AXES[axis].label} | method | {HEADER} |', '|---' * 11 + '|']
    for row in (r for r in rows if r['axis'] == axis):
      peak, state = (
        row[name] and row[name] / MIB for name in ('peak_bytes', 'state_bytes')
      )
      spread = row['value'] and f'{cell(row["min"])}..{cell(row["max"])}'
      cells = [
        f'{row["x"]:.3g}', row['variant'], cell(row['value']) or row['note'],
        spread or '', cell(row['images_per_sec'], 0), cell(row['ratio']),
        cell(row['floor']), cell(row['to_floor']), cell(peak, 1),
        cell(state, 1), cell(row['compile_seconds'], 1),
      ]  # fmt: skip
      text.append('| ' + ' | '.join(cells) + ' |')
    text.append('')
  return '\n'.join(text)


def fit_table(fits: list[dict[str, Any]], tolerance: float) -> str:
  """Markdown, a row for each line."""
  text = [
    f'| axis | series | a | b | R² | off by more than {100 * tolerance:g} % |',
    '|---' * 6 + '|',
  ]
  for one in fits:
    unit, form = one['unit'], one['form']
    end = 'nowhere'
    if one['leaves_at'] is not None:
      end = f'at {one["leaves_at"]:.3g}: {100 * one["departure"]:+.0f} %'
    name = one['quantity'].removesuffix('_bytes').replace('ms', 'time')
    cells = [
      one['axis'], f'{one["series"]}, {name}', f'{one["a"]:.4g} {unit}',
      f'{one["b"]:.4g} {unit} * {form}', cell(one['r2'], 3), end,
    ]  # fmt: skip
    text.append('| ' + ' | '.join(cells) + ' |')
  return '\n'.join(text) + '\n'


# ---- Plot and files ---------------------------------------------------------


def plot(report: dict[str, Any], path: epath.Path) -> None:
  """A panel for each axis: times and their lines, memory on the right."""
  rows, fits = report['rows'], report['fits']
  names = list(dict.fromkeys(row['axis'] for row in rows))
  across, down = min(3, len(names)), -(-len(names) // 3)
  figure = files.new_figure(path, (5 * across + 1, 4.25 * down))
  if figure is None:
    return
  panels = list(figure.subplots(down, across, squeeze=False).flat)
  for name, panel in zip(names, panels, strict=False):
    panel_of(name, panel, rows, fits)
  for panel in panels[len(names) :]:
    panel.axis('off')
  figure.suptitle(files.title(report))
  files.save_figure(figure, path)


def panel_of(name: str, panel: Any, rows: list[dict], fits: list[dict]) -> None:
  """Fills in the panel of one axis."""
  axis = AXES[name]
  right = panel.twinx()
  ticks = sorted({row['x'] for row in rows if row['axis'] == name})
  for i, (_, series, own) in enumerate(
    s for s in series_of(rows) if s[0] == name
  ):
    xs = [row['x'] for row in own]
    for where, quantity, ys, style in (
      (panel, 'ms', [row['value'] for row in own], 'o'),
      (right, axis.memory, [(r[axis.memory] or 0) / MIB for r in own], 's'),
    ):
      is_time = quantity == 'ms'
      color = f'C{i}' if is_time else f'C{i + 3}'
      label = f'{series}, {"time" if is_time else "memory"}'
      where.plot(xs, ys, style, color=color, label=label, markersize=5)
      form = axis.time if is_time else axis.memory_form
      for line in fits:
        if (line['axis'], line['series'], line['quantity']) == (
          name,
          series,
          quantity,
        ):
          dense = dense_between(xs)
          fitted = [line['a'] + line['b'] * form.of(x) for x in dense]
          where.plot(dense, fitted, '-' if is_time else ':', color=color)
  unit = 'state' if axis.memory == 'state_bytes' else 'peak memory'
  panel.set(xlabel=axis.label, ylabel='ms per step (line: fit)', title=name)
  right.set_ylabel(f'{unit} of a device, MiB (dotted: fit)')
  for each in (panel, right):
    if axis.log:
      each.set_xscale('log')
      each.set_yscale('log', subs=(2, 5))
      each.yaxis.set_major_formatter('{x:g}')
      each.yaxis.set_minor_formatter('{x:g}')
    else:
      each.set_ylim(0, 1.25 * each.get_ylim()[1])  # the legend is above
  panel.set_xticks(ticks, [f'{tick:.3g}' for tick in ticks])
  panel.set_xticks([], minor=True)
  panel.grid(alpha=0.3)
  handles = [*panel.get_legend_handles_labels()[0]]
  handles += right.get_legend_handles_labels()[0]
  panel.legend(handles=handles, loc='upper left', fontsize='small')


def dense_between(xs: list[float], count: int = 50) -> list[float]:
  low, high = min(xs), max(xs)
  return [low + (high - low) * i / count for i in range(count + 1)]


def write(report: dict[str, Any], path: epath.Path) -> None:
  """Writes all four files, the fits made again from all rows."""
  tolerance = report['settings']['tolerance']
  report['fits'] = make_fits(report['rows'], tolerance)
  files.write(report, COLUMNS, path)
  tables = axis_table(report['rows']), fit_table(report['fits'], tolerance)
  storage.write_text(path.with_suffix('.md'), '\n'.join(tables))
  plot(report, path.with_suffix('.png'))
