"""Pictures of a run: training curves, and what the attack does to images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

_COLORS = {'clean': '#1f77b4', 'adv': '#d62728', 'aa': '#2ca02c'}


def training_curves(
  rows: Sequence[Mapping[str, Any]], title: str, path: epath.Path
) -> None:
  """Loss, accuracy, gradient norm and age of the attack over steps, as PNG.

  Args:
    rows: of `metrics.jsonl`.
    title: of the figure.
    path: file to write.
  """
  train = [r for r in rows if r['split'] == 'train']
  test = [r for r in rows if r['split'] == 'test']
  stale = [r for r in rows if r['split'] == 'attack']
  figure, axes = subplots(2, 2, (10, 6.5))
  figure.suptitle(title)
  for view, color in _COLORS.items():
    for axis, name in ((axes[0, 0], 'loss'), (axes[0, 1], 'top1')):
      _line(axis, train, f'{name}_{view}', f'{view} view', color)
  _line(axes[0, 1], test, 'top1', 'test, clean', 'black', marker='o')
  _line(axes[1, 0], train, 'grad_norm', 'gradient norm', '#1f77b4')
  _line(axes[1, 0], train, 'trust_ratio_max', 'largest trust ratio', '#9467bd')
  _line(axes[1, 0], train, 'trust_ratio_min', 'smallest trust ratio', '#c5b0d5')
  axes[1, 0].set_yscale('log')
  _line(axes[1, 1], stale, 'delta_agreement', 'stale = fresh sign', '#ff7f0e')
  labels = ('loss', 'top-1 (%)', 'norms and ratios', 'pixels that agree (%)')
  for axis, label in zip(axes.flat, labels, strict=True):
    axis.set(xlabel='step', ylabel=label)
    axis.grid(alpha=0.3)
    if axis.lines:
      axis.legend(frameon=False, fontsize=8)
    else:
      axis.set_visible(False)
  save(figure, path)


def adversarial_grid(
  clean: np.ndarray,
  delta: np.ndarray,
  predicted_clean: Sequence[str],
  predicted_adversarial: Sequence[str],
  labels: Sequence[str],
  title: str,
  path: epath.Path,
) -> None:
  """Rows of clean image, perturbation and adversarial image, as PNG.

  Args:
    clean: uint8 [N, H, W, C].
    delta: grey levels [N, H, W, C]; drawn scaled to its largest size.
    predicted_clean: N names; drawn red where it is not the label.
    predicted_adversarial: N names, likewise.
    labels: N names.
    title: of the figure.
    path: file to write.
  """
  count = len(clean)
  figure, axes = subplots(3, count, (_width(count), 4.6))
  figure.suptitle(title, wrap=True)
  largest = max(float(np.abs(delta).max()), 1e-9)
  images = (
    clean / 255,
    0.5 + delta / (2 * largest),
    np.clip(clean + delta, 0, 255) / 255,
  )
  texts = (predicted_clean, None, predicted_adversarial)
  names = ('clean', f'perturbation\n(±{largest:.0f} of 255)', 'adversarial')
  for row, (image, text, name) in enumerate(
    zip(images, texts, names, strict=True)
  ):
    for column in range(count):
      axis = axes[row, column]
      gray = image.shape[-1] == 1
      shown = image[column, ..., 0] if gray else image[column]
      axis.imshow(shown, cmap='gray' if gray else None, vmin=0, vmax=1)
      axis.set(xticks=[], yticks=[])
      if text is not None:
        right = text[column] == labels[column]
        axis.set_title(
          text[column], fontsize=9, color='black' if right else '#d62728'
        )
    axes[row, 0].set_ylabel(name, fontsize=9)
  save(figure, path)


def robustness_curve(
  points: Sequence[Mapping[str, float]],
  title: str,
  label: str,
  path: epath.Path,
) -> None:
  """Top-1 over the radius of an attack, with its interval as a band, as PNG.

  Args:
    points: `epsilon`, `top1`, `top1_low` and `top1_high`, by radius.
    title: of the figure.
    label: of the radius.
    path: file to write.
  """
  epsilon, top1, low, high = (
    [point[name] for point in points]
    for name in ('epsilon', 'top1', 'top1_low', 'top1_high')
  )
  figure, axes = subplots(1, 1, (8, 4.6))
  figure.suptitle(title, wrap=True)
  axis = axes[0, 0]
  axis.fill_between(epsilon, low, high, color='#d62728', alpha=0.2, lw=0)
  axis.plot(epsilon, top1, color='#d62728', lw=1.3, marker='o', markersize=4)
  axis.set(xlabel=label, ylabel='top-1 (%), 95 % interval', ylim=(0, 102))
  axis.grid(alpha=0.3)
  save(figure, path)


def images_by_row(
  rows: Mapping[str, np.ndarray],
  captions: Sequence[str],
  title: str,
  path: epath.Path,
) -> None:
  """A row of images under each name, as PNG.

  Args:
    rows: grey levels in [0, 255], [N, H, W, C] each; pixels that are not finite
      are drawn black.
    captions: N texts above the columns.
    title: of the figure.
    path: file to write.
  """
  count = len(captions)
  figure, axes = subplots(
    len(rows), count, (_width(count), 1.3 * len(rows) + 1.2)
  )
  figure.suptitle(title, wrap=True)
  for row, (name, images) in enumerate(rows.items()):
    shown = np.clip(np.nan_to_num(images, posinf=0, neginf=0) / 255, 0, 1)
    for axis, image in zip(axes[row], shown, strict=True):
      gray = image.shape[-1] == 1
      axis.imshow(image[..., 0] if gray else image, cmap='gray', vmin=0, vmax=1)
      axis.set(xticks=[], yticks=[])
    axes[row, 0].set_ylabel(name, fontsize=9)
  for axis, caption in zip(axes[0], captions, strict=True):
    axis.set_title(caption, fontsize=8)
  save(figure, path)


def _width(images: int) -> float:
  """Of a row of images in inches; the title needs some, too."""
  return max(1.15 * images + 1, 8)


def subplots(rows: int, columns: int, size: tuple[float, float]):
  """Makes a figure of `size` in inches, and its axes [rows, columns]."""
  # matplotlib's pyplot keeps global state and may look for a display.
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure(figsize=size, layout='constrained')
  FigureCanvasAgg(figure)
  return figure, figure.subplots(rows, columns, squeeze=False)


def _line(axis, rows, name, label, color, marker='') -> None:
  """The curve of one key, with a gap where a number was not finite."""
  points = [(r['step'], r[name]) for r in rows if name in r]
  steps, values = np.array(points, float).reshape(-1, 2).T  # None is nan
  there = np.isfinite(values)
  if not there.any():
    return
  # A point without a neighbour has no line to be seen by.
  padded = np.pad(there, 1)
  alone = np.flatnonzero(there & ~padded[:-2] & ~padded[2:]).tolist()
  marks = {'marker': 'o', 'markersize': 3, 'markevery': alone}
  style = {'marker': marker} if marker else marks
  axis.plot(steps, values, label=label, color=color, lw=1.3, **style)


def save(figure, path: epath.Path) -> None:
  """Writes a figure as PNG."""
  path = epath.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open('wb') as file:
    figure.savefig(file, dpi=120, format='png')
