"""Writes the tables of pages of docs/ from results/.

  python scripts/update_tables.py [--check]

A table stands between `<!-- NAME -->` and `<!-- end -->`; NAME is one of TABLES
below. --check changes nothing and exits with 1 if a page is out of date.
"""

import argparse
import json
import pathlib
import re
import sys
from collections.abc import Iterator

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from conadv_jax.data import datasets
from conadv_jax.methods import METHODS
from scripts.bench import files, scaling_report, step_report

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = [
  ROOT / 'docs' / name
  for name in ('tpu.md', 'performance.md', 'small_machines.md')
]
RESULTS = ROOT / 'results'
AUDITS = RESULTS / 'audit'
GIB = 2**30


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--check', action='store_true')
  args = parser.parse_args()
  old = 0
  for path in PAGES:
    page = path.read_text()
    if (new := updated(page)) == page:
      continue
    old += 1
    if args.check:
      print(f'{path} is out of date')
    else:
      path.write_text(new)
  return int(bool(old) and args.check)


def updated(page: str) -> str:
  """`page` with every table made again."""

  def table(match: re.Match) -> str:
    name = match[1]
    return f'<!-- {name} -->\n{TABLES[name]()}<!-- end -->'

  return re.sub(r'<!-- (\w+) -->\n.*?<!-- end -->', table, page, flags=re.S)


def slices() -> str:
  """What fits where: one row per slice, of its first program that fits."""
  rows = []
  for row in _read('slices')['sweep']:
    if not row.get('fits'):
      continue
    groups = row['batch_size'] // row['bn_group_size']
    per_device = groups / row['devices']
    rows.append(
      (
        row['alias'],
        f'{row["devices"]:,}',
        f'{row["hosts"]:,}',
        f'{row["examples_per_device"]:,}',
        f'{per_device:g}',
        str(row['microbatches']),
        _of_limit(row),
        f'{1e3 * row["roofline_seconds"]:.0f}',
        f'{row["images_per_sec_bound"]:,.0f}',
        f'{row["images_per_sec_per_host"]:,.0f}',
      )
    )
  return _table(
    (
      'slice',
      'devices',
      'hosts',
      'images per device',
      'BN groups per device',
      'microbatches',
      'HBM peak, GiB',
      'step ≥, ms',
      'images/s ≤',
      'per host ≤',
    ),  # fmt: skip
    rows,
  )


def steps() -> str:
  """The audits of single programs, one row each."""
  rows = []
  for path in sorted(AUDITS.glob('*.json')):
    found = json.loads(path.read_text())
    if 'peak_hbm_bytes' not in found:
      continue
    mask = found['config'].get('sam.mask', 'all')
    names = found['model'], found['method'], *([mask] if mask != 'all' else [])
    rows.append(
      (
        f'[{", ".join(names)}]({path.stem}.json)',
        f'{found["batch_size"]:,}',
        found['alias'],
        found['xla_flags'],
        str(found['microbatches']),
        _of_limit(found),
        f'{found["flops_ratio"]:.3f}',
        f'{found["bytes_accessed_per_device"] / 1e9:.1f}',
        f'{1e3 * found["roofline_seconds"]:.0f}',
        f'{100 * found["by_scope"]["adversarial"]["share"]:.0f}',
        ', '.join(
          f'{c["count"]} {c["kind"]}' for c in _by_kind(found['collectives'])
        ),
        f'{found["compile_seconds"]:.0f}',
      )
    )
  columns = (
    'step', 'batch', 'slice', 'flags', 'microbatches', 'HBM peak, GiB',
    'FLOPs / analytic', 'GB accessed', 'step ≥, ms', 'perturbation, %',
    'collectives', 'compile, s',
  )  # fmt: skip
  text = _table(columns, rows)
  return text.replace('](', '](../results/audit/')


def _by_kind(collectives: list[dict]) -> list[dict]:
  counts = {}
  for c in collectives:
    counts[c['kind']] = counts.get(c['kind'], 0) + c['count']
  return [{'kind': k, 'count': n} for k, n in sorted(counts.items())]


def _of_limit(row: dict) -> str:
  peak, limit = row['peak_hbm_bytes'] / GIB, row['hbm_limit_bytes'] / GIB
  return f'{peak:.2f} of {limit:.2f}'


def _read(name: str) -> dict:
  return json.loads((AUDITS / f'{name}.json').read_text())


def _table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
  lines = [columns, ('---',) * len(columns), *rows]
  return ''.join('| ' + ' | '.join(line) + ' |\n' for line in lines)


# ---- Small machines ---------------------------------------------------------


def small_tpu() -> str:
  """Whole runs on one small slice, by the roofline of their audits."""
  rows = []
  for path in sorted((AUDITS / 'small').glob('*.json')):
    found = json.loads(path.read_text())
    asked = found['asked']['config']
    examples = datasets.get_spec(asked['dataset.name']).num_train
    steps = round(asked['epochs'] * examples / found['batch_size'])
    report = f'../results/audit/small/{path.name}'
    rows.append(
      (
        f'[{found["model"]}, {found["method"]}]({report})',
        f'{found["batch_size"]:,}',
        found['alias'],
        str(found['microbatches']),
        found['remat'],
        _of_limit(found),
        f'{steps:,}',
        f'{1e3 * found["roofline_seconds"]:,.1f}',
        f'{found["images_per_sec_bound"]:,.0f}',
        _duration(steps * found['roofline_seconds']),
      )
    )
  columns = (
    'network, method', 'batch', 'slice', 'microbatches', 'remat',
    'HBM peak, GiB', 'steps', 'step ≥, ms', 'images/s ≤', 'run ≥',
  )  # fmt: skip
  return _table(columns, rows)


def small_gpu() -> str:
  """Whole runs on one GPU, if every part takes as long as the measured step."""
  report = json.loads((RESULTS / 'bench_step_h200.json').read_text())
  examples = datasets.get_spec('imagenet2012').num_train
  rows = [
    (
      f'{report["settings"]["model"]}, {row["variant"]}',
      f'{row["batch_size"]}',
      f'{row["value"]:.1f}',
      f'{row["images_per_sec"]:,.0f}',
      f'{row["peak_bytes"] / GIB:.1f}',
      *(_duration(n * examples / row['images_per_sec']) for n in (91, 99.83)),
    )
    for row in report['rows']
    if row['batch_size'] == 128 and row['variant'] in METHODS
  ]
  columns = (
    'network, method', 'images per part', 'part, ms', 'images/s',
    'peak, GiB', '91 epochs', '99.83 epochs',
  )  # fmt: skip
  return _table(columns, rows)


def _duration(seconds: float) -> str:
  if seconds < 100:
    return f'{seconds:.0f} s'
  return f'{seconds / 3600:.1f} h'


# ---- Benchmarks -------------------------------------------------------------


def step_times() -> str:
  """All tables of `bench_step.py`."""
  return ''.join(
    f'{head}\n\n{step_report.table(report["rows"])}\n'
    for head, report in _reports('bench_step')
  )


def scaling() -> str:
  """The lines of `bench_scaling.py`, and its plots."""
  found = ''
  for head, report in _reports('bench_scaling'):
    tolerance = report['settings']['tolerance']
    fits = scaling_report.make_fits(report['rows'], tolerance)
    held = dict.fromkeys(f'{r["axis"]}: {r["held"]}' for r in report['rows'])
    found += (
      f'{head} Held along each axis: {"; ".join(held)}.\n\n'
      f'{scaling_report.fit_table(fits, tolerance)}\n'
    )
  return found or 'No run of `scripts/bench_scaling.py` is kept here yet.\n'


def _reports(name: str) -> Iterator[tuple[str, dict]]:
  """(what was measured on what, report) of every file of a benchmark."""
  for path in sorted(RESULTS.glob(f'{name}_*.json')):
    report = json.loads(path.read_text())
    machine = report['machine']
    stem = f'../results/{path.stem}'
    tunables = machine.get('glibc_tunables')
    pages = f', {tunables}' if tunables else ''
    head = (
      f'**{files.title(report)}** ({machine["cpu"]}, {machine["cores"]} cores, '
      f'jax {machine["jax"]}{pages}): [JSON]({stem}.json), [CSV]({stem}.csv), '
      f'[all rows]({stem}.md), [plot]({stem}.png).'
    )
    yield head, report


TABLES = {
  'slices': slices,
  'steps': steps,
  'small_tpu': small_tpu,
  'small_gpu': small_gpu,
  'step_times': step_times,
  'scaling': scaling,
}

if __name__ == '__main__':
  sys.exit(main())
