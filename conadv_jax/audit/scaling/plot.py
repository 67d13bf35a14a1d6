"""The plot of a scaling study."""

from __future__ import annotations

from collections.abc import Sequence

from etils import epath

from conadv_jax.audit.scaling.predict import Row, Scaling
from conadv_jax.audit.scaling.study import Study

# Of the roofline and the two calibrations; the last can lie on the first.
_STYLES = (('#1f77b4', '-'), ('#d62728', '-'), ('#ff7f0e', '--'))
_COLLECTIVES_COLOR = '#2ca02c'


def plot(study: Study, title: str, path: epath.PathLike) -> None:
  """Step time and efficiency over devices, weak and strong, as PNG.

  Bands run from perfect overlap (better) to none.
  """
  # pyplot keeps global state and may look for a display.
  from matplotlib.figure import Figure

  figure = Figure(figsize=(10, 7.5), layout='constrained')
  axes = figure.subplots(2, 2, squeeze=False)
  figure.suptitle(title)
  names = ('weak: same examples per device', 'strong: same batch')
  scalings = (study.weak, study.strong)
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
    axis.plot(
      devices, none, color=color, ls=line, label=label, lw=1.3, marker='o',
      markersize=3,
    )  # fmt: skip
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
