"""How much the loss can rise near the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from conadv_jax.analysis.results import Found
from conadv_jax.analysis.subject import Subject
from conadv_jax.method.optim import kernel_mask

# Where the ascent starts, in radii: at a minimum there is no gradient.
_START = 1e-3


def asked(subject: Subject) -> dict[str, Any]:
  """What is measured, on what."""
  return subject.asked('rho', 'rho_adaptive', 'ascent_steps')


def measure(subject: Subject) -> Found:
  """Computes the worst case at each radius, and the norm of the kernels."""
  options = subject.options
  surface = subject.surface('sharpness', 4 * options.ascent_steps)
  w = surface.weights
  loss, top1 = surface.loss(w)
  values, curves = {}, {}
  for kind, scale, radii in (
    ('sharpness_adaptive', jnp.abs(w), options.radii('rho_adaptive')),
    ('sharpness', 1.0, options.radii('rho')),
  ):
    for rho in radii:
      losses = worst_case(
        surface.gradient, w, scale, rho, options.ascent_steps, options.seed
      )
      rises = curves[f'{kind}_{rho:g}'] = np.array(losses) - loss
      values[f'{kind}_{rho:g}'] = rises.max(initial=0)
  mask = kernel_mask(surface.params)
  kernels = jax.tree.map(jnp.multiply, surface.params, mask)
  norm = float(optax.tree.norm(kernels))
  values |= {'weight_norm': norm, 'loss': loss, 'top1': top1}
  return Found(values, curves)


def worst_case(
  gradient: Callable[[jax.Array], tuple[float, jax.Array]],
  weights: jax.Array,
  scale: jax.Array | float,
  rho: float,
  steps: int,
  seed: int,
) -> list[float]:
  """Computes losses on the way up to the largest one near the weights.

    max L(w + T e)  over  |e|_2 <= rho

  by normalised, projected gradient ascent: with g = T grad L(w + T e),

    e <- project(e + 2 rho * (1 - i / steps) * g / |g|_2)

  to the ball, in step i of 0 .. steps - 1. With T = 1 the first step is SAM's
  (arXiv:2010.01412), with T = |w| ASAM's (arXiv:2102.11600), but for the bias
  that ASAM adds to T. With T = |w| factors of weights that leave the function
  as it is leave the functions of all w + T e as they are, so the maximum is a
  measure of the function (arXiv:2302.07011). Losses are lower bounds of it.

  Args:
    gradient: w -> L(w) and its gradient, [P].
    weights: w, [P].
    scale: T, [P] or a number.
    rho: radius.
    steps: gradients to take.
    seed: of the direction in which the ascent leaves w.

  Returns:
    The loss at each of `steps` points, the start among them.
  """
  noise = np.random.default_rng(seed).standard_normal(weights.shape)
  e = (_START * rho * noise / np.linalg.norm(noise)).astype(weights.dtype)
  losses = []
  for i in range(steps):
    loss, g = gradient(weights + scale * e)
    losses.append(loss)
    e = e + 2 * rho * (1 - i / steps) * _unit(scale * g)
    e = e * jnp.minimum(1, rho / jnp.linalg.norm(e))
  return losses


def _unit(x: jax.Array) -> jax.Array:
  """x / |x|_2; 0 for 0. The square of a small gradient would be 0."""
  x = x / jnp.maximum(jnp.abs(x).max(), jnp.finfo(x.dtype).tiny)
  return x / jnp.maximum(jnp.linalg.norm(x), 1)
