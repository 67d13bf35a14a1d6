"""Writes what a study found: report.md, report.html and plots.

A table begins with what it is of; where there is nothing to tell yet, a
sentence says what is not there.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import markdown
from etils import epath

from conadv_jax.base import storage
from conadv_jax.base.page import page
from conadv_jax.run.metrics import clock
from conadv_jax.study import plots, progress, statistics
from conadv_jax.study.design import FINAL, SEARCH, Arm, Study
from conadv_jax.study.record import (
  DONE,
  SECONDS,
  Record,
  Row,
  by_device,
  times,
)
from conadv_jax.study.statistics import Interval, Values

# Columns of the table of arms: title, and name in a row.
_BUDGET = ('arm', 'seeds', 'steps', 'epochs', 'PFLOP')
_MEASURED = (
  ('train, %', 'train_top1'),
  ('train loss', 'train_loss'),
  ('test, %', 'top1'),
  ('train - test', 'gap'),
  ('FGSM, %', 'top1_fgsm'),
  ('PGD, %', 'top1_pgd'),
)
# What analyses find, by the beginning of the name; first what is comparable.
_ANALYSED = (
  'sharpness_adaptive', 'lambda_max', 'trace', 'sharpness', 'weight_norm',
)  # fmt: skip
_WIDTH_REM = 106  # of the page: the widest table has thirteen columns


def write(study: Study, record: Record) -> str:
  """Writes the report of what has been run so far; returns its text."""
  rows = [by_device(row) for row in record.rows(FINAL)]
  arms = values_by_arm(rows)
  top1 = {name: arms[name]['top1'] for name in study.arms}
  drawn = plots.draw(study, rows, record.path)
  parts = [
    f'# Study `{record.name}`\n\n{_measured_on(study, record)}',
    *_progress(study, record),
    *_gap(study, arms),
    *_equivalence(study, top1),
    *_figures(drawn),
    *_accuracies(study, arms),
    *_along_batches(study, arms),
    *_minima(study, arms, record.path),
    *_tuning(study, record),
    *_commands(study),
    *_without_result(record),
  ]
  text = '\n\n'.join(parts) + '\n'
  storage.write_text(record.path / 'report.md', text)
  body = markdown.markdown(text, extensions=['tables'])
  body = page(record.name, body, _WIDTH_REM)
  storage.write_text(record.path / 'report.html', body)
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
  # Without the sign of what rounds to 0.
  value = f'{round(found.value, digits) + 0.0:.{digits}f}'
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
  return (
    f'Recipe `{study.config}`{" with " + fields if fields else ""}. Choices '
    f'were made on `{study.validation}`, arms are measured on `{study.test}`. '
    'Intervals are 95 %: of the mean over seeds (Student), and of differences '
    'over pairs of the same seed.\n\n'
    f'Devices: {", ".join(devices) or "none yet"}. Commits: '
    f'{", ".join(commit[:12] for commit in commits) or "none yet"}.'
  )


def _progress(study: Study, record: Record) -> Iterator[str]:
  """What is not there yet."""
  found = progress.left(study, record)
  if not found.searches + found.arms:
    return
  done = {
    phase: sum(row['status'] == DONE for row in record.rows(phase))
    for phase in (SEARCH, FINAL)
  }
  total = sum(arm.seeds for arm in study.arms.values())
  text = '**Not complete: '
  if found.searches:
    text += (
      f'{done[SEARCH]} runs of the searches are done and at least '
      f'{found.searches} are left; '
    )
  text += f'{done[FINAL]} of {total} runs of the arms are done.**'
  if found.seconds:
    hours = (f'{clock(took)} on {on}' for on, took in found.seconds.items())
    text += (
      ' At the pace so far, the rest is this many hours of training in one '
      f'process: {", ".join(hours)}.'
    )
  yield text


def _gap(study: Study, arms: Mapping[str, Any]) -> Iterator[str]:
  """What the large batch loses, and which arms at it give that back."""
  if not study.small:
    return
  small, large = (arms[name]['top1'] for name in (study.small, study.large))
  gap = statistics.difference(small, large)
  name = f'G = {study.small} - {study.large}'
  yield '## The gap, and what gives it back'
  if gap.count < 2:
    yield (
      f'The gap {name} needs two seeds of both arms; pairs so far: {gap.count}.'
    )
    return
  is_void = not gap.low > 0
  text = f'The gap {name} is {shown(gap)} points ({gap.count} pairs).'
  if is_void:
    why = 'It may be 0' if gap.high >= 0 else 'The large batch loses nothing'
    text += f' **{why}, so the test of recovery is void.**'
  else:
    text += (
      f' R = (arm - {study.large}) / G is the share of it that an arm gives '
      'back, over the seeds that the three have, with the interval of Fieller, '
      'which has ends where the gap of these seeds is not 0. The interval of '
      'the bootstrap is too narrow: at 95 % it covers R in about 74 % of '
      'studies of 3 seeds, and in 88 % of 8.'
    )
  yield text
  batch = study.arms[study.large].fields.get('batch_size')
  seconds = _times(arms.values())
  rows = []
  for name, arm in study.arms.items():
    gain = statistics.difference(arms[name]['top1'], large)
    at_large = arm.fields.get('batch_size') == batch and name != study.large
    if gain.count and at_large:
      of = (arms[name]['top1'], large, small)
      shares = statistics.recovery(*of), statistics.bootstrapped_recovery(*of)
      shares = ['void' if is_void else shown(share) for share in shares]
      asked = 'yes' if name in study.recover else ''
      rows.append([name, *_budget(arm, arms[name], seconds), str(gain.count)])
      rows[-1] += [shown(gain), *shares, asked]
  gain = f'arm - {study.large}, points'
  if rows:
    heads = (*_BUDGET, *seconds.values())
    heads = (*heads, 'pairs', gain, 'R', 'R, bootstrap', 'asked beforehand')
    yield table(heads, rows)


def _equivalence(study: Study, top1: Mapping[str, Values]) -> Iterator[str]:
  """Which arms are equal, within the margins that were stated."""
  rows = []
  for a, b, margin in study.equivalent:
    found = statistics.equivalence(top1[a], top1[b], margin)
    points, pairs = shown(found.difference), str(found.difference.count)
    p = f'{found.p:.3f}' if found.p >= 0.001 else '< 0.001'
    p = '' if math.isnan(found.p) else p
    verdict = 'equivalent' if found.holds else 'not shown'
    rows.append(
      [f'{a} - {b}', pairs, points, f'{margin:g}', p, verdict if p else '-']
    )
  if rows:
    yield (
      '## Equivalence\n\nTwo one-sided tests at 5 %; intervals are 90 %. Arms '
      'are equivalent if theirs lies within the margin; otherwise nothing is '
      'shown, not that they differ. It takes two pairs.'
    )
    yield table(
      ('difference', 'pairs', 'points', 'margin', 'p', 'verdict'), rows
    )


def _figures(drawn: Mapping[str, str]) -> Iterator[str]:
  if drawn:
    yield (
      '## Figures\n\nDots are runs, one for each seed; marks are their means, '
      'with 95 % intervals (not of times) where there are two seeds or more.'
    )
    yield from (f'### {name}\n\n![{name}]({f})' for name, f in drawn.items())


def _accuracies(study: Study, arms: Mapping[str, Any]) -> Iterator[str]:
  """What every arm cost, and how accurate it is."""
  present = [m for m in _MEASURED if any(m[1] in arm for arm in arms.values())]
  seconds = _times(arms.values())
  rows = [
    [name, *_budget(arm, arms[name], seconds)]
    + [
      shown(statistics.mean(arms[name][key]), 3 if 'loss' in key else 2)
      for _, key in present
    ]
    for name, arm in study.arms.items()
    if arms[name]['top1']
  ]
  yield '## Arms'
  if not rows:
    yield 'No run of an arm is done.'
    return
  yield (
    'Of a run: seconds of training on its share of the cores, without start-up '
    'and evaluation, which other programs may have slowed. Train accuracy and '
    'loss (nats, no smoothing) are of whole images in evaluation mode.'
    + _attacks(study, present)
  )
  yield from _unfit(study, arms)
  heads = (*_BUDGET, *seconds.values(), *(head for head, _ in present))
  yield table(heads, rows)


def _attacks(study: Study, present: Sequence[tuple[str, str]]) -> str:
  """How an evaluation attacks, if any does."""
  if not any(key.startswith('top1_') for _, key in present):
    return ''
  settings = next(study.final_cells(study.untuned)).config.eval
  return (
    f' Attacks of an evaluation have a radius of {settings.epsilon:g} grey '
    f'levels of 255, PGD in {settings.attack_steps} steps.'
  )


def _along_batches(study: Study, arms: Mapping[str, Any]) -> Iterator[str]:
  """Whether a larger batch loses in fitting or in generalising."""
  lines = collections.defaultdict(dict)
  for figure in study.figures.values():
    for name in figure.arms if figure.axis == 'batch_size' else ():
      if arms[name]['batch_size']:
        size = next(iter(arms[name]['batch_size'].values()))
        lines[study.arms[name].line or name][size] = name
  measures = ('train_top1', 'train_loss', 'top1', 'gap')
  rows = []
  for of_size in lines.values():
    names = [of_size[size] for size in sorted(of_size)]
    for a, b in zip(names, names[1:], strict=False):
      found = {
        key: statistics.difference(arms[b][key], arms[a][key])
        for key in measures
      }
      if pairs := found['top1'].count:
        texts = [shown(x, 3 if 'loss' in k else 2) for k, x in found.items()]
        rows.append([f'{b} - {a}', str(pairs), *texts])
  if rows:
    yield (
      '## Along the batch size\n\nTest accuracy = train accuracy - (train - '
      'test), so what a larger batch loses on the test split it loses in '
      'fitting the training examples, or in generalising from them. Where '
      'train accuracy is near 100 %, the train loss tells more.'
    )
    heads = ('train, points', 'train loss', 'test, points', 'train - test')
    yield table(('difference', 'pairs', *heads), rows)


def _minima(
  study: Study, arms: Mapping[str, Any], folder: epath.Path
) -> Iterator[str]:
  """What analyses of the weights found, and whether it tells the accuracy."""
  known = sorted({name for arm in arms.values() for name in arm})
  names = dict.fromkeys(
    name
    for start in _ANALYSED
    for name in known
    if name.startswith(start) and 'stderr' not in name
  )
  with_any = [a for a in study.arms if any(arms[a][name] for name in names)]
  if not with_any:
    return
  rows = [
    [a, str(max(len(arms[a][name]) for name in names))]
    + [_significant(statistics.mean(arms[a][name])) for name in names]
    for a in with_any
  ]
  runs, means = ['*correlation, runs*'], ['*correlation, arms*']
  of_runs = {
    name: [
      (value, arms[a]['top1'][seed])
      for a in with_any
      for seed, value in arms[a][name].items()
    ]
    for name in names
  }
  of_arms = {
    name: [
      tuple(statistics.mean(arms[a][key]).value for key in (name, 'top1'))
      for a in with_any
      if arms[a][name]
    ]
    for name in names
  }
  for line, of in ((runs, of_runs), (means, of_arms)):
    line.append(f'*{max(map(len, of.values()))}*')
    line += [f'*{statistics.rank_correlation(of[name]):.2f}*' for name in names]
  yield (
    '## Minima\n\nOf the final weights, on training examples. The last lines '
    "are Spearman's rank correlations with the test accuracy, over all runs "
    'and over the means of arms. With batch norm, only `sharpness adaptive` is '
    'comparable between networks.'
  )
  heads = (name.replace('_', ' ') for name in names)
  yield table(('arm', 'seeds', *heads), [*rows, runs, means])
  if drawn := [name for name in names if name.startswith(_ANALYSED[0])]:
    found = {a: arms[a] for a in with_any}
    plots.minima(found, drawn, folder / 'minima.png')
    yield (
      'Small marks are runs, large ones means of arms.\n\n![minima](minima.png)'
    )


def _significant(found: Interval) -> str:
  """`shown` with three digits of the value."""
  size = abs(found.value)
  digits = 2 - math.floor(math.log10(size)) if size > 0 else 2
  return shown(found, min(max(digits, 0), 6))


def _unfit(study: Study, arms: Mapping[str, Any]) -> Iterator[str]:
  """Names the arms that did not fit their training examples."""
  means = {
    name: statistics.mean(arms[name]['train_top1']).value for name in study.arms
  }
  unfit = [
    f'{name} ({mean:.1f} %)'
    for name, mean in means.items()
    if mean < study.min_train_top1
  ]
  if unfit:
    yield (
      f'**These arms did not fit {study.min_train_top1:g} % of their training '
      f'examples: {", ".join(unfit)}.** More epochs might help them, or their '
      'augmentation or attack keeps them from it. So a difference to an arm '
      'that did fit is one in fitting as well, not in generalisation alone.'
    )


def _times(rows: Iterable[Mapping[str, Any]]) -> dict[str, str]:
  """{name of the seconds on a device: head of their column}."""
  return {name: name.replace(SECONDS, 's', 1) for name in times(rows)}


def _budget(
  arm: Arm, found: Mapping[str, Mapping[int, float]], seconds: Iterable[str]
) -> list[str]:
  """Seeds, steps, epochs, PFLOP and seconds of a run, as text."""
  done = f'{len(found["top1"])}'

  def mean(name: str) -> float:
    return statistics.mean(found[name]).value

  return [
    done if len(found['top1']) == arm.seeds else f'{done} of {arm.seeds}',
    f'{mean("steps"):.0f}',
    f'{mean("epochs"):.1f}',
    f'{mean("flops") / 1e15:.3g}',
    *(f'{mean(name):.0f}' if found[name] else '' for name in seconds),
  ]


def _tuning(study: Study, record: Record) -> Iterator[str]:
  """Every run of the searches, with what was chosen."""
  if not study.searches:
    return
  yield (
    '## Tuning\n\nOne run each, of a seed that no arm has; the choice is in '
    'bold once all are made. A field is searched with the best values of those '
    'before it.'
  )
  choices = record.choices() or {}
  found = [by_device(row) for row in record.rows(SEARCH)]
  seconds = _times(found)
  rows = []
  for row in found:
    field, _, value = row['cell'].rpartition('/')[2].partition('=')
    chosen = choices.get(row['arm'], {}).get(field)
    best = chosen is not None and f'{chosen:g}' == value
    top1 = f'{row["top1"]:.2f}' if row['status'] == DONE else row['status']
    cost = [
      f'{row[name] / unit:.{digits}g}' if name in row else ''
      for name, unit, digits in (
        ('steps', 1, 6), ('flops', 1e15, 3), *((name, 1, 4) for name in seconds)
      )
    ]  # fmt: skip
    train = f'{row["train_top1"]:.2f}' if 'train_top1' in row else ''
    rows.append([row['arm'], field, value, *cost, train])
    rows[-1].append(f'**{top1}**' if best else top1)
  rows.sort(key=lambda row: (row[0], row[1], float(row[2])))
  heads = ('steps', 'PFLOP', *seconds.values(), 'train, %', 'validation, %')
  yield table(('search', 'field', 'value', *heads), rows)


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
