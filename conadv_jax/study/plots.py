"""Draws the arms of a study: points of all seeds, means and intervals."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence

from etils import epath

from conadv_jax.base.fields import flatten
from conadv_jax.config import to_dict
from conadv_jax.run.plots import save, subplots
from conadv_jax.study import statistics
from conadv_jax.study.design import Figure, Study
from conadv_jax.study.record import DONE, SECONDS, Row, times
from conadv_jax.study.statistics import Values

_PANELS = {
  'top1': 'test top-1, %',
  'train_top1': 'train top-1, %',
  'train_loss': 'train loss, nats',
  'gap': 'train - test top-1, points',
  'top1_fgsm': 'top-1 under FGSM, %',
  'top1_pgd': 'top-1 under PGD, %',
}
_AXES = {
  'batch_size': 'batch size, examples',
  'staleness_steps': 'staleness, steps',
  'attack.epsilon': 'epsilon of the attack in training, grey levels of 255',
}
_WIDTH, _HEIGHT = 4.2, 3.4  # of a panel, in inches
_APART = 1.04  # factor between lines on a logarithmic axis


def draw(
  study: Study, rows: Sequence[Row], folder: epath.Path
) -> dict[str, str]:
  """Draws each figure that has results; returns {figure: file in folder}."""
  # What neither an arm nor its search sets is that of its method or recipe.
  cells = {cell.arm: cell for cell in study.final_cells(study.untuned)}
  implied = {arm: flatten(to_dict(cell.config)) for arm, cell in cells.items()}
  done = [
    implied[row['arm']] | row
    for row in rows
    if row['status'] == DONE and row['arm'] in implied
  ]
  drawn = {}
  for name, figure in study.figures.items():
    shown = [
      row
      for row in done
      if row['arm'] in figure.arms
      and (not figure.axis or row[figure.axis] is not None)
    ]
    known = {name for row in shown for name in row}
    panels = [*(name for name in _PANELS if name in known), *times(shown)]
    if panels:
      drawn[name] = f'{name}.png'
      _figure(study, figure, shown, panels, folder / drawn[name])
  return drawn


def minima(
  arms: Mapping[str, Mapping[str, Values]],
  measures: Sequence[str],
  path: epath.Path,
) -> None:
  """Draws test accuracy against measures of the minima: runs, means of arms.

  Args:
    arms: {arm: {measure: {seed: value}}}, with `top1` in percent.
    measures: one panel for each.
    path: file to write.
  """
  canvas, axes = subplots(1, len(measures), (6.5 * len(measures) + 2, 5.5))
  for axis, measure in zip(axes.flat, measures, strict=True):
    for number, (arm, values) in enumerate(arms.items()):
      found = values[measure]
      style = {'color': f'C{number % 10}', 'marker': 'osD^'[number // 10 % 4]}
      top1 = [values['top1'][seed] for seed in found]
      axis.scatter(found.values(), top1, 12, alpha=0.4, lw=0, **style)
      x, y = (statistics.mean(values[key]).value for key in (measure, 'top1'))
      axis.scatter(x, y, 60, edgecolor='black', lw=0.8, label=arm, **style)
    _logarithmic(axis, [x for a in arms.values() for x in a[measure].values()])
    axis.xaxis.set_major_formatter('{x:g}')
    axis.xaxis.set_minor_formatter('{x:g}')
    axis.set(xlabel=measure.replace('_', ' '), ylabel='test top-1, %')
    axis.grid(alpha=0.3)
  handles, labels = canvas.axes[0].get_legend_handles_labels()
  canvas.legend(handles, labels, loc='outside right center', frameon=False)
  save(canvas, path)


def _figure(
  study: Study,
  figure: Figure,
  rows: Sequence[Row],
  panels: Sequence[str],
  path: epath.Path,
) -> None:
  """One panel for each measure, up to four in a row."""
  columns = min(4, len(panels))
  lines = -(-len(panels) // columns)
  size = (_WIDTH * columns, _HEIGHT * lines)
  canvas, axes = subplots(lines, columns, size)
  axes = list(axes.flat)
  for panel, axis in zip(panels, axes, strict=False):
    _panel(study, figure, rows, panel, axis)
    time = panel.replace(SECONDS, 'training time, s', 1)
    axis.set_title(_PANELS.get(panel, time), fontsize=10)
    axis.grid(alpha=0.3)
    if panel.startswith(SECONDS):
      axis.set_ylim(0, 1.05 * axis.get_ylim()[1])
  for axis in axes[len(panels) :]:
    axis.set_axis_off()
  if figure.axis:
    handles, labels = canvas.axes[0].get_legend_handles_labels()
    canvas.legend(
      handles, labels, loc='outside lower center', ncols=4, frameon=False
    )
  save(canvas, path)


def _panel(study, figure: Figure, rows, measure: str, axis) -> None:
  """Points of all seeds, and mean and 95 % interval of each arm.

  Times get no interval: of two seeds it would hide the points.
  """
  values: dict[str, dict[int, float]] = collections.defaultdict(dict)
  places: dict[str, float] = {}
  for row in rows:
    places[row['arm']] = _place(figure, row)
    if measure in row:
      values[row['arm']][int(row['seed'])] = row[measure]
  # Places and colours are the same in all panels.
  lines = collections.defaultdict(list)
  for arm in figure.arms:
    if arm in places:
      own = study.arms[arm].line or arm if figure.axis else arm
      lines[figure.line or own].append(arm)
  ticks = sorted(set(places.values()))
  is_log = bool(figure.axis) and _logarithmic(axis, ticks)
  for number, (line, arms) in enumerate(lines.items()):
    apart = _APART ** (number - (len(lines) - 1) / 2) if is_log else 1
    arms = sorted((arm for arm in arms if arm in values), key=places.get)
    x = [places[arm] * apart for arm in arms]
    color, is_time = f'C{number % 10}', measure.startswith(SECONDS)
    _line(line, x, [values[arm] for arm in arms], color, axis, not is_time)
  if figure.axis:
    axis.set_xticks(ticks, [f'{tick:g}' for tick in ticks])
    axis.minorticks_off()
    axis.set_xlabel(_AXES.get(figure.axis, figure.axis))
  else:
    shown = [arm for arm in figure.arms if arm in places]
    axis.set_xticks(
      [places[arm] for arm in shown], shown, rotation=40, ha='right', fontsize=8
    )


def _line(
  line: str,
  x: Sequence[float],
  values: Sequence[Values],
  color: str,
  axis,
  with_intervals: bool,
) -> None:
  means = [statistics.mean(of_arm) for of_arm in values]
  y = [found.value for found in means]
  half = [found.high - found.value for found in means]  # nan of one seed
  axis.errorbar(
    x, y, half if with_intervals else None, color=color, marker='o', ms=6,
    mfc='white', capsize=3, lw=1.2, label=line,
  )  # fmt: skip
  for place, of_arm in zip(x, values, strict=True):
    points = list(of_arm.values())
    axis.plot(
      [place] * len(points), points, 'o', color=color, alpha=0.6, ms=4, mew=0
    )


def _logarithmic(axis, values: Sequence[float]) -> bool:
  """Gives the x axis a logarithmic scale; returns False if 0 is on it."""
  if min(values) > 0:
    axis.set_xscale('log', subs=(2, 5))
    return True
  # 0 stands as far below the smallest as half of that would.
  smallest = min((value for value in values if value > 0), default=1)
  axis.set_xscale('symlog', linthresh=smallest, linscale=0.3, subs=(2, 5))
  return False


def _place(figure: Figure, row: Row) -> float:
  """Where an arm is on the x axis."""
  if figure.axis:
    return float(row[figure.axis])
  return float(figure.arms.index(row['arm']))
