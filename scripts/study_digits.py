r"""Digits accuracy by method, batch size and seed: a CSV, a table, a plot.

Run:  python scripts/study_digits.py --output=results/digits_batch_size

Writes OUTPUT.csv (a row per run), OUTPUT.md (mean and standard deviation over
seeds) and OUTPUT.png. Runs go to --runs and are kept: a rerun does only what is
missing. Two of these at once, with different --seeds and the same --runs, share
the work.
"""

import argparse
import csv
import os
import pathlib
import sys
import time

import numpy as np
from etils import epath

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from conadv_jax import cli, train
from conadv_jax.base.usage import answered
from conadv_jax.config import from_config_dict
from conadv_jax.run import evaluations
from configs import digits

COLUMNS = (
  'method', 'batch_size', 'seed', 'steps', 'epochs', 'top1', 'top1_fgsm',
  'top1_pgd', 'epsilon',
)  # fmt: skip


def main(argv: list[str]) -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--output', type=os.path.expanduser, required=True)
  parser.add_argument(
    '--runs', type=os.path.expanduser, default='runs/study_digits'
  )
  parser.add_argument('--methods', default='baseline,disadv,conadv')
  parser.add_argument('--batch_sizes', default='32,128,320,640')
  parser.add_argument('--seeds', default='0,1,2,3,4')
  args = parser.parse_args(argv[1:])

  runs = pathlib.Path(args.runs)
  jobs = [
    (method, int(batch_size), int(seed))
    for seed in args.seeds.split(',')
    for batch_size in sorted(args.batch_sizes.split(','), key=int, reverse=True)
    for method in args.methods.split(',')
  ]
  start, done = time.monotonic(), 0
  for index, (method, batch_size, seed) in enumerate(jobs):
    workdir = runs / f'{method}_batch{batch_size}_seed{seed}'
    if summary_of(workdir):
      continue
    left = ''
    if done:
      seconds = (time.monotonic() - start) / done * (len(jobs) - index)
      left = f', about {seconds / 60:.0f} min left'
    print(f'\n==== run {index + 1} of {len(jobs)}{left}: {workdir.name}')
    values = digits.get_config(
      f'method={method},batch_size={batch_size},seed={seed}'
    )
    values.eval.attack = 'all'
    values.eval.every_steps = 0
    values.attack_stats_every_steps = 0
    values.log_every_steps = 100
    values.checkpoint.every_steps = 0
    train.train(from_config_dict(values), str(workdir))
    done += 1
  rows = read_rows(runs)
  output = pathlib.Path(args.output)
  output.parent.mkdir(parents=True, exist_ok=True)
  write_csv(rows, output.with_suffix('.csv'))
  table = make_table(rows)
  output.with_suffix('.md').write_text(table)
  plot(rows, output.with_suffix('.png'))
  print(f'\n{table}\nwritten: {output}.csv, {output}.md, {output}.png')


def summary_of(workdir: pathlib.Path) -> dict:
  """That of a finished run; {} of any other."""
  return evaluations.read(epath.Path(workdir) / 'summary.json')


def read_rows(runs: pathlib.Path) -> list[dict]:
  """One row per finished run, sorted by method, batch size and seed."""
  rows = []
  for path in runs.glob('*/summary.json'):
    s = summary_of(path.parent)
    robust = s['robust_top1_by_attack']
    rows.append(
      {
        **{name: s[name] for name in COLUMNS if name in s},
        'top1_fgsm': robust['fgsm'],
        'top1_pgd': robust['pgd'],
        'epsilon': s['robust_epsilon'],
      }
    )
  order = {'baseline': 0, 'disadv': 1, 'conadv': 2}
  return sorted(
    rows, key=lambda r: (order[r['method']], r['batch_size'], r['seed'])
  )


def write_csv(rows: list[dict], path: pathlib.Path) -> None:
  with path.open('w', newline='') as file:
    writer = csv.DictWriter(file, COLUMNS, lineterminator='\n')
    writer.writeheader()
    for row in rows:
      writer.writerow(
        {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
      )


def groups_of(rows: list[dict]) -> dict[tuple[str, int], list[dict]]:
  groups: dict[tuple[str, int], list[dict]] = {}
  for row in rows:
    groups.setdefault((row['method'], row['batch_size']), []).append(row)
  return groups


def make_table(rows: list[dict]) -> str:
  """Markdown: a line per method, mean and standard deviation over seeds."""
  groups = groups_of(rows)
  sizes = sorted({size for _, size in groups})
  methods = list(dict.fromkeys(method for method, _ in groups))
  lines = []
  for name, title in (
    ('top1', 'clean'),
    ('top1_fgsm', 'FGSM'),
    ('top1_pgd', 'PGD-10'),
  ):
    header = ' | '.join(f'batch {size}' for size in sizes)
    lines += [f'| {title} top-1 (%) | {header} |']
    lines += ['|---|' + '---|' * len(sizes)]
    for method in methods:
      cells = []
      for size in sizes:
        values = [row[name] for row in groups.get((method, size), [])]
        spread = np.std(values, ddof=1) if len(values) > 1 else 0.0
        cells.append(f'{np.mean(values):.2f} ± {spread:.2f}' if values else '-')
      lines.append(f'| {method} | ' + ' | '.join(cells) + ' |')
    lines.append('')
  return '\n'.join(lines)


def plot(rows: list[dict], path: pathlib.Path) -> None:
  from matplotlib.figure import Figure

  figure = Figure(figsize=(11, 3.8), layout='constrained')
  axes = figure.subplots(1, 3)
  groups = groups_of(rows)
  colors = {'baseline': '#1f77b4', 'disadv': '#ff7f0e', 'conadv': '#d62728'}
  for axis, (name, title) in zip(
    axes,
    (('top1', 'clean'), ('top1_fgsm', 'FGSM'), ('top1_pgd', 'PGD-10')),
    strict=True,
  ):
    for method, color in colors.items():
      sizes = sorted(s for m, s in groups if m == method)
      values = [[r[name] for r in groups[method, s]] for s in sizes]
      mean = np.array([np.mean(v) for v in values])
      spread = np.array(
        [np.std(v, ddof=1) if len(v) > 1 else 0 for v in values]
      )
      axis.errorbar(
        sizes, mean, spread, label=method, color=color, marker='o', capsize=3
      )
    ticks = sorted({s for _, s in groups})
    axis.set(xscale='log', xlabel='batch size', title=f'{title} top-1 (%)')
    axis.set_xticks(ticks, [str(t) for t in ticks])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
  axes[0].legend(frameon=False)
  figure.savefig(path, dpi=120)


if __name__ == '__main__':
  if not answered(__doc__):
    cli.run(main)
