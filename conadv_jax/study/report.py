"""Writes what a study found: report.md, report.html and plots."""

from __future__ import annotations

import collections
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import markdown

from conadv_jax.base import storage
from conadv_jax.base.page import page
from conadv_jax.study import plots, statistics
from conadv_jax.study.design import FINAL, SEARCH, Arm, Study
from conadv_jax.study.record import DONE, Record, Row
from conadv_jax.study.statistics import Interval, Values

# Columns of the table of arms: title, and name in a row.
_BUDGET = ('arm', 'seeds', 'steps', 'epochs', 'PFLOP', 's')
_MEASURED = (
  ('train, %', 'train_top1'),
  ('test, %', 'top1'),
  ('train - test', 'gap'),
  ('FGSM, %', 'top1_fgsm'),
  ('PGD, %', 'top1_pgd'),
)
# What analyses find, by the beginning of the name.
_ANALYSED = ('lambda_max', 'trace', 'sharpness', 'weight_norm')


def write(study: Study, record: Record) -> str:
  """Writes the report of what has been run so far; returns its text."""
  arms = values_by_arm(record.rows(FINAL))
  top1 = {name: arms[name]['top1'] for name in study.arms}
  parts = [
    f'# Study `{record.name}`\n\n{_measured_on(study, record)}',
    *_gap(study, top1),
    *_equivalence(study, top1),
    *_accuracies(study, arms),
    *_minima(study, arms),
    *_tuning(study, record),
    *_commands(study),
    *_without_result(record),
  ]
  drawn = plots.draw(study, record.rows(FINAL), record.path)
  parts[1:1] = [f'![{name}]({file})' for name, file in drawn.items()]
  text = '\n\n'.join(parts) + '\n'
  storage.write_text(record.path / 'report.md', text)
  body = markdown.markdown(text, extensions=['tables'])
  storage.write_text(record.path / 'report.html', page(record.name, body))
  return text


def values_by_arm(rows: Sequence[Row]) -> dict[str, dict[str, dict[int, Any]]]:
  """{arm: {measure: {seed: value}}} of the runs that ended well."""
  found = collections.defaultdict(lambda: collections.defaultdict(dict))
  for row in rows:
    if row['status'] == DONE:
      for name, value in row.items():
        if isinstance(value, int | float):
          found[row['arm']][name][int(row['seed'])] = value
  return found


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
  """A table of Markdown."""
  lines = [columns, ['---'] * len(columns), *rows]
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def shown(found: Interval, digits: int = 2) -> str:
  """'88.19 ± 0.12' where the interval is even, '1.73 (0.9 to 3.1)' else."""
  if math.isnan(found.value):
    return ''
  value = f'{found.value:.{digits}f}'
  if math.isnan(found.low):
    return value
  below, above = found.value - found.low, found.high - found.value
  if math.isclose(below, above, rel_tol=1e-6, abs_tol=1e-9):
    return f'{value} ± {above:.{digits}f}'
  return f'{value} ({found.low:.{digits}f} to {found.high:.{digits}f})'


def _measured_on(study: Study, record: Record) -> str:
  """What all numbers of the report were measured on."""
  rows = record.rows()
  commits = sorted({row['git_commit'] for row in rows if 'git_commit' in row})
  devices = sorted({row['device'] for row in rows if 'device' in row})
  fields = ', '.join(f'`{k}={v}`' for k, v in study.fields.items())
  total = sum(arm.seeds for arm in study.arms.values())
  done = sum(row['status'] == DONE for row in record.rows(FINAL))
  return (
    f'Recipe `{study.config}`{" with " + fields if fields else ""}. Choices '
    f'were made on `{study.validation}`, arms are measured on `{study.test}`: '
    f'{done} of {total} runs. Intervals are 95 %, of the mean over seeds '
    '(Student), and of differences over pairs of the same seed.\n\n'
    f'Devices: {", ".join(devices) or "none yet"}. Commits: '
    f'{", ".join(commit[:15] for commit in commits) or "none yet"}.'
  )


def _gap(study: Study, top1: Mapping[str, Values]) -> Iterator[str]:
  """What the large batch loses, and which arms give it back."""
  if not study.small:
    return
  small, large = top1[study.small], top1[study.large]
  gap = statistics.difference(small, large)
  text = (
    f'The gap G = {study.small} - {study.large} is {shown(gap)} points '
    f'({gap.count} pairs).'
  )
  if not math.isnan(gap.low) and not gap.low > 0:
    text += ' **It may be 0, so the test of recovery is void.**'
  yield f'## The gap, and what gives it back\n\n{text}'
  rows = []
  for name, values in top1.items():
    if name not in (study.small, study.large) and values:
      gain = statistics.difference(values, large)
      share = statistics.recovery(values, large, small)
      asked = 'yes' if name in study.recover else ''
      rows.append([name, str(gain.count), shown(gain), shown(share), asked])
  gain = f'- {study.large}, points'
  yield table(('arm', 'pairs', gain, 'recovery R', 'asked beforehand'), rows)


def _equivalence(study: Study, top1: Mapping[str, Values]) -> Iterator[str]:
  """Which arms are equal, within the margins that were stated."""
  rows = []
  for a, b, margin in study.equivalent:
    found = statistics.equivalence(top1[a], top1[b], margin)
    points, pairs = shown(found.difference), str(found.difference.count)
    verdict = 'equivalent' if found.holds else 'not shown'
    rows.append(
      [f'{a} - {b}', pairs, points, f'{margin:g}', f'{found.p:.3f}', verdict]
    )
  if rows:
    yield '## Equivalence\n\nTwo one-sided tests at 5 %; intervals are 90 %.'
    yield table(
      ('difference', 'pairs', 'points', 'margin', 'p', 'verdict'), rows
    )


def _accuracies(study: Study, arms: Mapping[str, Any]) -> Iterator[str]:
  """What every arm cost, and how accurate it is."""
  yield f'## Arms{_unfit(study, arms)}'
  present = [m for m in _MEASURED if any(m[1] in arm for arm in arms.values())]
  yield table(
    (*_BUDGET, *(head for head, _ in present)),
    (
      [name, *_budget(study.arms[name], arms[name])]
      + [shown(statistics.mean(arms[name][key])) for _, key in present]
      for name in study.arms
      if arms[name]['top1']
    ),
  )


def _minima(study: Study, arms: Mapping[str, Any]) -> Iterator[str]:
  """What analyses of the weights found, and whether it tells the accuracy."""
  found = sorted({name for arm in arms.values() for name in arm})
  names = [n for n in found if n.startswith(_ANALYSED) and 'stderr' not in n]
  if not names:
    return
  rows = [
    [arm, *(shown(statistics.mean(arms[arm][name]), 3) for name in names)]
    for arm in study.arms
    if any(arms[arm][name] for name in names)
  ]
  ranks = ['*correlation*']
  for name in names:
    pairs = [
      (value, arm['top1'][seed])
      for arm in arms.values()
      for seed, value in arm[name].items()
    ]
    ranks.append(f'*{statistics.rank_correlation(pairs):.2f}*')
  yield (
    '## Minima\n\nOf the final weights, on training examples. The last line is '
    "Spearman's rank correlation with the test accuracy over all runs. With "
    'batch norm, only adaptive measures are comparable between networks.'
  )
  yield table(('arm', *(n.replace('_', ' ') for n in names)), [*rows, ranks])


def _unfit(study: Study, arms: Mapping[str, Any]) -> str:
  """Names the arms that are too short to be compared."""
  means = {
    name: statistics.mean(arms[name]['train_top1']).value for name in study.arms
  }
  unfit = [name for name, mean in means.items() if mean < study.min_train_top1]
  if not unfit:
    return ''
  return (
    f'\n\n**Fit less than {study.min_train_top1:g} % of the training examples, '
    f'so their length binds as well: {", ".join(unfit)}.**'
  )


def _budget(arm: Arm, found: Mapping[str, Mapping[int, float]]) -> list[str]:
  """Seeds, steps, epochs, PFLOP and seconds of a run, as text."""
  done = f'{len(found["top1"])}'
  means = {
    name: statistics.mean(found[name]).value
    for name in ('steps', 'epochs', 'flops', 'seconds')
  }
  return [
    done if len(found['top1']) == arm.seeds else f'{done} of {arm.seeds}',
    f'{means["steps"]:.0f}',
    f'{means["epochs"]:.1f}',
    f'{means["flops"] / 1e15:.3g}',
    f'{means["seconds"]:.0f}',
  ]


def _tuning(study: Study, record: Record) -> Iterator[str]:
  """Every run of the searches, with what was chosen."""
  if not study.searches:
    return
  yield (
    '## Tuning\n\nOne run each, of a seed that no arm has; validation and '
    'train accuracy in percent. A field is searched with the best values of '
    'those before it.'
  )
  choices = record.choices() or {}
  rows = []
  for row in record.rows(SEARCH):
    field, _, value = row['cell'].rpartition('/')[2].partition('=')
    chosen = choices.get(row['arm'], {}).get(field)
    best = chosen is not None and f'{chosen:g}' == value
    found = f'{row["top1"]:.2f}' if row['status'] == DONE else row['status']
    train = f'{row["train_top1"]:.2f}' if 'train_top1' in row else ''
    rows.append(
      [row['arm'], field, value, train, f'**{found}**' if best else found]
    )
  rows.sort(key=lambda row: (row[0], row[1], float(row[2])))
  yield table(('search', 'field', 'value', 'train', 'validation'), rows)


def _commands(study: Study) -> Iterator[str]:
  """How to run one run of each arm by hand."""
  lines = [
    f'- {name}: ' + ', '.join(f'`{k}={v}`' for k, v in arm.fields.items())
    + (f', and the choices of search {arm.search}' if arm.search else '')
    for name, arm in study.arms.items()
  ]  # fmt: skip
  yield '## Settings of the arms\n\n' + '\n'.join(lines)


def _without_result(record: Record) -> Iterator[str]:
  rows = [row for row in record.rows() if row['status'] != DONE]
  if rows:
    lines = [f'- {row["cell"]}: {row["status"]}' for row in rows]
    yield '## Runs without a result\n\n' + '\n'.join(lines)
