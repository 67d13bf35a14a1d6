"""Loss and accuracy around the weights, along random directions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.flatten_util import ravel_pytree

from conadv_jax.analysis.results import Found
from conadv_jax.analysis.subject import Subject
from conadv_jax.method.optim import is_kernel, path_name


def asked(subject: Subject) -> dict[str, Any]:
  """What is measured, on what."""
  return subject.asked('span', 'points', 'grid')


def measure(subject: Subject) -> Found:
  """Computes loss and top-1 on a line, and on a plane that contains it."""
  options = subject.options
  surface = subject.surface('landscape', options.points + options.grid**2)
  w = np.asarray(surface.weights)
  loss, top1 = surface.loss(w)
  directions = np.stack(
    [filter_normalized(surface.params, options.seed + i) for i in range(2)]
  )
  line = np.linspace(-options.span, options.span, options.points)
  axis = np.linspace(-options.span, options.span, options.grid)
  plane = np.stack(np.meshgrid(axis, axis), -1)
  on_line = along(surface.loss, w, directions[:1], line[:, None])
  on_plane = along(surface.loss, w, directions, plane)
  values = {
    'line_rise': on_line[:, 0].mean() - loss,
    'plane_rise': on_plane[..., 0].mean() - loss,
    'loss': loss,
    'top1': top1,
  }
  curves = {
    'line': line, 'loss': on_line[:, 0], 'top1': on_line[:, 1],
    'axis': axis, 'plane_loss': on_plane[..., 0],
    'plane_top1': on_plane[..., 1],
  }  # fmt: skip
  return Found(values, curves)


def filter_normalized(params: Any, seed: int) -> np.ndarray:
  """Draws a direction whose filters are as long as those of the weights.

    d_f = |w_f| * z_f / |z_f|,  z standard normal

  for each filter f, the weights of one output: what a kernel has at one index
  of its last axis (Li et al. 2018, arXiv:1712.09913, section 4). Scales, biases
  and the rest of batch norm do not move.

  Args:
    params: of the network.
    seed: of the draw.

  Returns:
    [P], in the order of `ravel_pytree`.
  """
  rng = np.random.default_rng(seed)

  def draw(path, w):
    if not is_kernel(path_name(path)):
      return np.zeros(w.shape)
    z = rng.standard_normal(w.shape)
    return z * (_filter_norms(w) / _filter_norms(z))

  directions = jax.tree_util.tree_map_with_path(draw, params)
  return np.asarray(ravel_pytree(directions)[0])


def _filter_norms(w: np.ndarray) -> np.ndarray:
  return np.sqrt(np.square(w).sum(tuple(range(w.ndim - 1)), keepdims=True))


def along(
  loss: Callable[[np.ndarray], tuple[float, float]],
  weights: np.ndarray,
  directions: np.ndarray,
  places: np.ndarray,
) -> np.ndarray:
  """Computes loss and top-1 at w + sum_i place_i d_i.

  Args:
    loss: w -> (loss, top-1 in percent).
    weights: w, [P].
    directions: d, [D, P].
    places: [..., D].

  Returns:
    [..., 2].
  """
  flat = places.reshape(-1, len(directions))
  found = [loss(weights + place @ directions) for place in flat]
  return np.array(found).reshape(*places.shape[:-1], 2)
