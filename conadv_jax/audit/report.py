"""Turns the audit's JSON into sections, and these into text and Markdown.

A section needs only what it shows: the report of a step that does not fit has
no collectives, and the report of a sweep has only its rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

Report = Mapping[str, Any]

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Section:
  """A title, some sentences, bars and a table; all but the title optional.

  Attributes:
    title: what it shows.
    notes: sentences.
    columns: of the table; empty for names and values.
    rows: of the table, as printed.
    bars: of a bar chart: name, length in any unit, and the value as printed.
    lines: shown as they are, such as instructions.
  """

  title: str
  notes: Sequence[str] = ()
  columns: Sequence[str] = ()
  rows: Sequence[Sequence[str]] = ()
  bars: Sequence[tuple[str, float, str]] = ()
  lines: Sequence[str] = ()


# ---- Pages -------------------------------------------------------------------


def text(report: Report) -> str:
  """Renders the report for a terminal."""
  parts = [title(report)]
  for section in sections(report):
    lines = [section.title, *('  ' + note for note in section.notes)]
    table = [list(row) for row in section.rows]
    if section.columns:
      table.insert(0, list(section.columns))
    lines += _aligned(table)
    lines += ['    ' + line for line in section.lines]
    parts.append('\n'.join(lines))
  return '\n\n'.join(parts)


def markdown(report: Report) -> str:
  """Renders the report as a Markdown page."""
  parts = ['# ' + _escaped(title(report))]
  for section in sections(report):
    parts.append('## ' + _escaped(section.title))
    parts += [_escaped(note) for note in section.notes]
    if section.rows:
      columns = section.columns or ('', '')
      table = [columns, ['---'] * len(columns), *section.rows]
      parts.append(
        '\n'.join('| ' + ' | '.join(map(_escaped, row)) + ' |' for row in table)
      )
    if section.lines:
      # An indented block: nothing within is read as Markdown.
      parts.append('\n'.join('    ' + line for line in section.lines))
  return '\n\n'.join(parts) + '\n'


def title(report: Report) -> str:
  """Returns a line that says what was audited."""
  if 'model' not in report:
    return 'Audit of training steps'
  where = report.get('alias') or report.get('topology')
  size = f' at {report["batch_size"]:,}' if 'batch_size' in report else ''
  return f'{report["model"]}, {report.get("method", "")}{size}, on {where}'


def verdict(report: Report) -> str:
  """Says whether the step fits, and what would help if it does not."""
  peak, limit = report.get('peak_hbm_bytes'), report.get('hbm_limit_bytes')
  sizes = f'{bytes_text(peak)} of {bytes_text(limit)} per device'
  if report.get('fits', True):
    return f'fits: {sizes}'
  helps = [r['option'] for r in report.get('remedies', ()) if r.get('fits')]
  if helps:
    remedy = f'; would fit with {" or ".join(helps)} (estimated)'
  else:
    tried = [r['option'] for r in report.get('remedies', ())]
    remedy = f'; no one option is enough: combine {", ".join(tried)}'
    remedy = remedy if tried else '; use more devices'
  return f'does not fit: needs {sizes}{remedy}'


def sections(report: Report) -> list[Section]:
  """Lists everything that the report has to say, in order."""
  return [section for make in _SECTIONS for section in make(report)]


# ---- Sections ----------------------------------------------------------------


def _step(report: Report) -> Iterator[Section]:
  keys = (
    'config_name', 'topology', 'alias', 'devices', 'hosts', 'mesh',
    'batch_size', 'examples_per_device', 'image_size_px', 'bn_group_size',
    'staleness_steps', 'microbatches', 'remat', 'shard_optimizer',
    'grad_allreduce_dtype', 'xla_flags', 'compiler_options', 'overrides',
    'lower_seconds', 'compile_seconds',
  )  # fmt: skip
  rows = [(_label(k), value_text(k, report[k])) for k in keys if k in report]
  if rows:
    yield Section('The step', rows=rows)


def _memory(report: Report) -> Iterator[Section]:
  if 'hbm' not in report:
    return
  limit = report.get('hbm_limit_bytes')
  parts = [(k.replace('_', ' '), v) for k, v in report['hbm'].items() if v]
  total = report.get('peak_hbm_bytes', sum(v for _, v in parts))
  rows = [
    (name, bytes_text(v), _percent(v / limit) if limit else '-')
    for name, v in [*parts, ('total', total)]
  ]
  notes = [verdict(report)] if 'fits' in report else []
  if report.get('error'):
    notes.append(f'The compiler: {report["error"]}')
  bars = [*parts, ('total', total), *([('limit', limit)] if limit else [])]
  yield Section(
    'HBM of one device, at the peak',
    notes,
    ('part', 'size', 'of the limit'),
    rows,
    [(name, value, bytes_text(value)) for name, value in bars],
  )


def _remedies(report: Report) -> Iterator[Section]:
  rows = [
    (
      r['option'],
      bytes_text(r.get('saves_bytes')),
      bytes_text(r.get('peak_hbm_bytes')),
      value_text('fits', r.get('fits')),
      str(r.get('cost', '-')),
    )
    for r in report.get('remedies', ())
  ]
  columns = ('option', 'saves', 'peak', 'fits', 'costs')
  notes = (
    'Estimates for one option at a time; run the audit with it to be sure.',
  )
  if rows:
    yield Section('What lowers it', notes, columns, rows)


def _costs(report: Report) -> Iterator[Section]:
  keys = (
    'flops_per_device', 'flops_of_products', 'flops_analytic', 'flops_ratio',
    'bytes_accessed_per_device', 'hbm_bytes_per_device', 'roofline_seconds',
    'images_per_sec_bound',
    'images_per_sec_per_host', 'host_cores',
  )  # fmt: skip
  rows = [(_label(k), value_text(k, report[k])) for k in keys if k in report]
  if {'images_per_sec_per_host', 'host_cores'} <= report.keys():
    rate = report['images_per_sec_per_host'] / report['host_cores']
    rows.append(('images per sec per host core', number(rate)))
  note = (
    'The bound runs every instruction at its roofline, one after the other, '
    'and counts collectives as memory traffic: a real step takes longer.'
  )
  if rows:
    yield Section('Work of one device', (note,), rows=rows)


def _scopes(report: Report) -> Iterator[Section]:
  scopes = report.get('by_scope')
  if not scopes:
    return
  rows = [
    (
      name.replace('_', ' '),
      _percent(spent['share']),
      *(value_text(k, spent[k]) for k in ('seconds', 'flops', 'bytes')),
    )
    for name, spent in scopes.items()
  ]
  shares = [
    (name.replace('_', ' '), spent['share'], _percent(spent['share']))
    for name, spent in scopes.items()
  ]
  yield Section(
    'Sub-steps, at the roofline',
    (),
    ('sub-step', 'share', 'time', 'FLOPs', 'HBM traffic'),
    rows,
    shares,
  )


def _collectives(report: Report) -> Iterator[Section]:
  if 'collectives' not in report:
    return
  found = report['collectives']
  rows = [
    (
      c['kind'],
      str(c.get('dtype', '-')),
      bytes_text(c['bytes']),
      f'{c["group_size"]:,}',
      f'{c["count"]:,}',
    )
    for c in found
  ]
  overlap = report.get('overlap') or {}
  notes = [] if found else ['None: nothing is exchanged.']
  if 'verdict' in overlap:
    notes.append(f'Sum of gradients: {overlap["verdict"]}.')
  totals = [c['count'] * c['bytes'] for c in found]
  sizes = [
    (f'{c["count"]} {c["kind"]}', total, bytes_text(total))
    for c, total in zip(found, totals, strict=True)
  ]
  yield Section(
    'Collectives of a step',
    notes,
    ('kind', 'type', 'payload of a device', 'group', 'times'),
    rows,
    sizes,
    overlap.get('evidence', ()),
  )


def _comparison(report: Report) -> Iterator[Section]:
  columns = (
    'name', 'fits', 'peak_hbm_bytes', 'flops_per_device_ratio',
    'bytes_accessed_per_device_ratio', 'roofline_seconds',
    'roofline_seconds_ratio', 'compile_seconds_ratio', 'error',
  )  # fmt: skip
  notes = ('Ratios are to the first row.',)
  yield from _of_rows('What it costs', notes, columns, report.get('comparison'))


def _sweep(report: Report) -> Iterator[Section]:
  columns = (
    'topology', 'alias', 'devices', 'method', 'batch_size',
    'examples_per_device', 'bn_group_size', 'mesh', 'microbatches', 'remat',
    'fits', 'peak_hbm_bytes', 'hbm_limit_bytes', 'roofline_seconds',
    'images_per_sec_bound', 'images_per_sec_per_host', 'error',
  )  # fmt: skip
  yield from _of_rows('What fits where', (), columns, report.get('sweep'))


def _scaling(report: Report) -> Iterator[Section]:
  scaling = report.get('scaling') or {}
  rows = [
    {'mode': mode, 'calibration': s['calibration'].get('name', '')} | row
    for mode in ('weak', 'strong')
    for s in scaling.get(mode, ())
    for row in s['rows']
  ]
  columns = (
    'mode', 'calibration', 'topology', 'slices', 'devices', 'batch_size',
    'examples_per_device', 'microbatches', 'compute_seconds',
    'collective_seconds', 'step_seconds', 'overlapped_step_seconds',
    'efficiency', 'overlapped_efficiency', 'steps', 'train_seconds',
  )  # fmt: skip
  note = (
    'Weak: the same examples on each device. Strong: the same batch on all of '
    'them. Overlapped: the sum of gradients runs beside computing throughout.'
  )
  yield from _of_rows('Scaling, predicted', (note,), columns, rows)
  if scaling.get('anchor'):
    yield _anchor(scaling['anchor'])
  yield from _of_rows(
    'Assumptions of the scaling',
    (),
    ('name', 'value', 'unit', 'source'),
    scaling.get('assumptions'),
  )


def _anchor(found: Report) -> Section:
  measured = found['measured_step_seconds']
  low, high = (found[k] for k in ('overlapped_ratio', 'ratio'))
  shares = {
    name: _percent(found[f'{name}_share'])
    for name in ('compute', 'bandwidth', 'latency', 'unexplained')
  }
  text = f"""\
{found['name']}; {found['source']}.
Measured {_duration(measured)}; predicted at the roofline \
{_duration(low * measured)} to {_duration(high * measured)}, {low:.2f} to \
{high:.2f} of it.
Of the measured step: computing {shares['compute']}, bandwidth of collectives \
{shares['bandwidth']}, their latency {shares['latency']}, unexplained \
{shares['unexplained']}.
If computing is slower than the roofline in proportion, it runs at \
{_percent(found['efficiency'])} of it; if every step loses the same time, that \
is {_duration(found['overhead_seconds'])}.
One measurement cannot tell these two apart, and they differ most where a \
device has many examples. It tests neither how time grows with examples, \
devices or slices nor another generation or method. With \
{found['examples_per_device']} examples per device it weighs most what matters \
least for many: launches, latency and small tensors."""
  return Section('The only public step time', text.splitlines())


def _versions(report: Report) -> Iterator[Section]:
  rows = [(k, str(v)) for k, v in report.get('versions', {}).items()]
  if rows:
    yield Section('Versions', rows=rows)


_SECTIONS = (
  _step, _memory, _remedies, _costs, _scopes, _collectives, _comparison, _sweep,
  _scaling, _versions,
)  # fmt: skip


def _of_rows(
  name: str,
  notes: Sequence[str],
  columns: Sequence[str],
  rows: Iterable[Report] | None,
) -> Iterator[Section]:
  """A table with those of `columns` that any row has; none without a row."""
  rows = list(rows or ())
  columns = [c for c in columns if any(c in row for row in rows)]
  cells = [
    [value_text(c, row[c]) if c in row else '-' for c in columns]
    for row in rows
  ]
  if columns:
    yield Section(name, notes, [_label(c) for c in columns], cells)


# ---- Numbers -----------------------------------------------------------------


def value_text(key: str, value: Any) -> str:
  """Formats a value with the unit that its key ends in."""
  if value is None:
    return '-'
  if isinstance(value, bool):
    return 'yes' if value else 'no'
  if isinstance(value, Mapping):
    return ', '.join(f'{k}={v}' for k, v in value.items()) or 'none'
  if isinstance(value, str):
    return value or '-'
  if isinstance(value, Sequence):
    return ', '.join(map(str, value)) or 'none'
  if 'ratio' in key:
    return f'{value:.3f}'
  if key == 'value':
    return f'{value:.4g}'
  if key.endswith(('share', 'efficiency')):
    return _percent(value)
  if 'bytes' in key:
    return bytes_text(value)
  if 'flops' in key:
    return _flops(value)
  if 'seconds' in key:
    return _duration(value)
  return number(value)


def number(value: float) -> str:
  """Formats a number: whole if it is whole or large, else three digits."""
  if value == int(value) or abs(value) >= 1000:
    return f'{value:,.0f}'
  return f'{value:.3g}'


def bytes_text(value: float | None) -> str:
  """Formats bytes in B, KiB, MiB or GiB."""
  if value is None:
    return '-'
  for unit, size in (('GiB', _GIB), ('MiB', 2**20), ('KiB', 2**10)):
    if value >= size:
      return f'{value / size:.2f} {unit}'
  return f'{value:.0f} B'


def _duration(seconds: float) -> str:
  if seconds >= 3600:
    return f'{seconds / 3600:.2f} h'
  if seconds >= 120:
    return f'{seconds / 60:.1f} min'
  if seconds >= 1:
    return f'{seconds:.2f} s'
  if seconds >= 1e-3 or not seconds:
    return f'{1e3 * seconds:.3g} ms'
  return f'{1e6 * seconds:.3g} µs'


def _flops(value: float) -> str:
  for unit, size in (('TFLOP', 1e12), ('GFLOP', 1e9), ('MFLOP', 1e6)):
    if value >= size:
      return f'{value / size:.4g} {unit}'
  return f'{value:.0f} FLOP'


def _percent(share: float) -> str:
  return f'{100 * share:.1f} %'


def _label(key: str) -> str:
  """The name of a key, without the unit that its value carries."""
  for unit in ('_bytes', '_seconds'):
    key = key.removesuffix(unit).replace(unit + '_', '_')
  return key.replace('_px', '').replace('_', ' ').replace('flops', 'FLOPs')


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
  """Columns as wide as their cells; the first left-aligned, others right."""
  widths = [max(map(len, column)) for column in zip(*table, strict=True)]
  lines = []
  for row in table:
    cells = [
      cell.ljust(w) if i == 0 or len(row) == 2 else cell.rjust(w)
      for i, (cell, w) in enumerate(zip(row, widths, strict=True))
    ]
    lines.append(('  ' + '  '.join(cells)).rstrip())
  return lines


def _escaped(cell: str) -> str:
  """Escapes what Markdown reads as a column, emphasis or HTML."""
  for mark in '\\`*_|[]':
    cell = cell.replace(mark, '\\' + mark)
  return cell.replace('&', '&amp;').replace('<', '&lt;').replace('\n', ' ')
