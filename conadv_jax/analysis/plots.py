"""Pictures of analyses, from the curves of their results."""

from __future__ import annotations

from typing import Any

import numpy as np
from etils import epath

from conadv_jax.run.plots import save, subplots

Curves = dict[str, Any]


def curvature(curves: Curves, title: str, path: epath.Path) -> None:
  """Draws the eigenvalues, and the estimate of the trace over probes."""
  figure, left, right = _two_axes(title)
  top = np.array(curves['eigenvalues'], float)
  left.bar(np.arange(1, len(top) + 1), top)
  left.set(xlabel='rank', ylabel='eigenvalue of the Hessian')
  forms = np.array(curves['quadratic_forms'], float)
  counts = np.arange(2, len(forms) + 1)
  mean = np.array([forms[:n].mean() for n in counts])
  error = np.array([forms[:n].std(ddof=1) / n**0.5 for n in counts])
  right.plot(counts, mean)
  right.fill_between(counts, mean - error, mean + error, alpha=0.3)
  right.set(xlabel='probes', ylabel='trace ± standard error')
  save(figure, path)


def sharpness(curves: Curves, title: str, path: epath.Path) -> None:
  """Draws the highest rise of the loss so far over the steps of the ascents."""
  figure, *axes = _two_axes(title)
  for axis, kind in zip(axes, ('sharpness_adaptive', 'sharpness'), strict=True):
    for name, rises in curves.items():
      stem, _, rho = name.rpartition('_')
      if stem == kind:
        best = np.maximum.accumulate(np.array(rises, float))
        axis.plot(np.arange(1, len(best) + 1), best, label=f'radius {rho}')
    axis.set(xlabel='gradients', ylabel='largest rise of the loss')
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_title(kind.replace('_', ', '), fontsize=10)
    axis.legend(frameon=False, fontsize=8)
  save(figure, path)


def landscape(curves: Curves, title: str, path: epath.Path) -> None:
  """Draws loss and accuracy on the line, and the loss on the plane."""
  figure, left, right = _two_axes(title)
  left.plot(curves['line'], curves['loss'], color='#1f77b4')
  left.set(xlabel='along direction 1', yscale='log')
  left.set_ylabel('loss', color='#1f77b4')
  other = left.twinx()
  other.plot(curves['line'], curves['top1'], color='#d62728')
  other.set_ylabel('top-1 (%)', color='#d62728')
  other.set_ylim(0, 102)
  log_loss = np.log10(np.array(curves['plane_loss'], float))
  levels = right.contourf(curves['axis'], curves['axis'], log_loss, 20)
  figure.colorbar(levels, ax=right, label='log10 of the loss')
  right.plot(0, 0, '+', color='white')
  right.set(xlabel='along direction 1', ylabel='along direction 2')
  right.set(aspect='equal', xticks=right.get_yticks()[::2])
  save(figure, path)


def staleness(curves: Curves, title: str, path: epath.Path) -> None:
  """Draws what perturbations of each age do, a line for each step."""
  figure, axes = subplots(2, 2, (10, 7))
  figure.suptitle(title)
  labels = {
    'error': 'error of the network (%)',
    'loss': 'loss of the network (nats)',
    'cosine': 'cosine with the fresh perturbation',
    'agreement': 'pixels of the fresh sign (%)',
  }
  rows = curves['rows']
  taus = sorted({row['tau'] for row in rows})
  steps = sorted({row['step'] for row in rows})
  for axis, (name, label) in zip(axes.flat, labels.items(), strict=True):
    for i, step in enumerate(steps, start=1):
      line = [row[name] for row in rows if row['step'] == step]
      style = {'color': 'C0', 'alpha': i / len(steps), 'marker': 'o', 'ms': 3}
      axis.plot(line, label=f'step {step}', **style)
    axis.set_xticks(range(len(taus)), taus)
    axis.set(xlabel='staleness τ (steps)', ylabel=label)
    axis.grid(alpha=0.3)
  axes[0, 0].legend(frameon=False, fontsize=8)
  save(figure, path)


def noise(curves: Curves, title: str, path: epath.Path) -> None:
  """Draws the noise scale along the run, and what it is the ratio of."""
  figure, left, right = _two_axes(title)
  steps, square, trace = (np.array(x, float) for x in curves.values())
  left.plot(steps, trace / square, marker='o', ms=3)
  left.set(xlabel='step', ylabel='noise scale (examples)')
  right.plot(steps, trace, marker='o', ms=3, label='tr(Σ)')
  right.plot(steps, square, marker='o', ms=3, label='|G|²')
  right.set(xlabel='step')
  right.legend(frameon=False, fontsize=8)
  for axis in (left, right):  # an estimate of |G|² may be negative
    axis.set_yscale('log', nonpositive='mask')
  save(figure, path)


def _two_axes(title: str):
  figure, ((left, right),) = subplots(1, 2, (10, 4.2))
  figure.suptitle(title)
  for axis in (left, right):
    axis.grid(alpha=0.3)
  return figure, left, right
