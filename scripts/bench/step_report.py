"""Rows, table, plot and files of `scripts/bench_step.py`."""

from __future__ import annotations

import statistics
from typing import Any

from etils import epath

from conadv_jax.base import storage
from scripts.bench import files
from scripts.bench.files import cell
from scripts.bench.turns import Contender

COLUMNS = (
  'variant', 'batch_size', 'value', 'min', 'max', 'images_per_sec', 'ratio_to',
  'ratio', 'floor', 'to_floor', 'peer', 'to_peer', 'share_of_peak',
  'flops', 'xla_flops', 'peak_bytes', 'compile_seconds', 'note',
)  # fmt: skip
HEADER = (
  'ms | min..max | images/s | ratio | floor | to floor | to peer '
  '| share of peak | memory, MiB | compile, s'
)


def median_ratio(one: Contender, other: Contender | None) -> float | None:
  """The median of the ratios within a round."""
  if other is None or not one.seconds or not other.seconds:
    return None
  pairs = zip(one.seconds, other.seconds, strict=True)
  return statistics.median(a / b for a, b in pairs)


def timings(step: Contender, images: int) -> dict[str, Any]:
  """What was measured of a step of so many images; empty if it did not run."""
  if not (step.seconds and step.started):
    return {}
  time_s = statistics.median(step.seconds)
  return {
    'value': 1e3 * time_s,
    'min': 1e3 * min(step.seconds),
    'max': 1e3 * max(step.seconds),
    'images_per_sec': images / time_s,
    'peak_bytes': step.started.peak_bytes,
    'compile_seconds': step.started.compile_seconds,
  }


def make_rows(
  contenders: list[Contender], batch: int, devices: int, peak: float
) -> list[dict[str, Any]]:
  """One row for each contender at `batch` images per device."""
  by_name, rows = {one.name: one for one in contenders}, []
  peers = {one.floor: one for one in contenders if one.is_peer}
  for one in contenders:
    base = by_name.get('torch plain' if one.is_peer else 'baseline')
    other = None if one.is_peer else peers.get(one.floor)
    ratio = median_ratio(one, base)
    row = dict.fromkeys(('name', *COLUMNS))
    row |= {
      'name': f'{one.name} batch {batch}',
      'unit': 'ms',
      'variant': one.name,
      'batch_size': batch,
      'ratio_to': base and f'{base.name} batch {batch}',
      'ratio': ratio,
      'floor': one.floor,
      'to_floor': ratio and ratio / one.floor,
      'peer': other and other.name,
      'to_peer': median_ratio(one, other),
      'flops': one.flops,
      'note': one.note,
    }
    row |= (measured := timings(one, batch * devices))
    if measured:
      row['share_of_peak'] = 1e3 * one.flops / row['value'] / peak
      row['xla_flops'] = one.started.xla_flops
    rows.append(row)
  return rows


def table(rows: list[dict[str, Any]]) -> str:
  """Markdown, with a table for each batch size."""
  lines = []
  for batch in dict.fromkeys(row['batch_size'] for row in rows):
    lines += [f'| {batch} per device | {HEADER} |', '|---' * 11 + '|']
    for row in (r for r in rows if r['batch_size'] == batch):
      mib = row['peak_bytes'] and row['peak_bytes'] / 2**20
      share = row['share_of_peak'] and 100 * row['share_of_peak']
      spread = row['value'] and f'{cell(row["min"])}..{cell(row["max"])}'
      cells = [
        row['variant'], cell(row['value']) or row['note'], spread or '',
        cell(row['images_per_sec'], 0), cell(row['ratio']), cell(row['floor']),
        cell(row['to_floor']), cell(row['to_peer']), cell(share, 1, ' %'),
        cell(mib, 0), cell(row['compile_seconds'], 1),
      ]  # fmt: skip
      lines.append('| ' + ' | '.join(cells) + ' |')
    lines.append('')
  return '\n'.join(lines)


def plot(rows: list[dict[str, Any]], title: str, path: epath.Path) -> None:
  """Step time against batch, a line for each variant."""
  figure = files.new_figure(path, (8, 5))
  if figure is None:
    return
  axis = figure.subplots()
  for name in dict.fromkeys(row['variant'] for row in rows):
    found = [r for r in rows if r['variant'] == name and r['value']]
    points = sorted((r['batch_size'], r['value']) for r in found)
    if points:
      style = '--s' if name.startswith('torch') else '-o'
      axis.plot(*zip(*points, strict=True), style, label=name, markersize=4)
  axis.set(xscale='log', yscale='log', title=title)
  axis.set(xlabel='images per device', ylabel='ms per step')
  ticks = sorted({row['batch_size'] for row in rows})
  axis.set_xticks(ticks, [str(tick) for tick in ticks])
  axis.tick_params(axis='x', which='minor', bottom=False)
  axis.grid(alpha=0.3, which='both')
  axis.legend(frameon=False, fontsize='small')
  files.save_figure(figure, path)


def write(report: dict[str, Any], path: epath.Path) -> None:
  """Writes all four files."""
  files.write(report, COLUMNS, path)
  storage.write_text(path.with_suffix('.md'), table(report['rows']))
  plot(report['rows'], files.title(report), path.with_suffix('.png'))
