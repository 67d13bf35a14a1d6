"""Adversarial perturbations of images: FGSM and PGD, L-infinity and L2.

Everything is in grey levels of 255. The network enters only as `loss_fn`, so
that any weights, of any age, can be attacked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from conadv_jax.config import Attack

# image [G, b, H, W, C] in [0, 255], labels [G, b] -> (summed loss, auxiliary)
LossFn = Callable[[jax.Array, jax.Array], tuple[jax.Array, Any]]


class Start(NamedTuple):
  """What an attack draws at random: everything else is deterministic.

  Attributes:
    delta: perturbation to start from, [G, b, H, W, C].
    labels: classes to move away from, or towards if targeted, [G, b].
  """

  delta: jax.Array
  labels: jax.Array


def sample_start(
  attack: Attack,
  key: jax.Array,
  image: jax.Array,
  labels: jax.Array,
  num_classes: int,
) -> Start:
  """Draws the start of the attack on `image` [G, b, H, W, C].

  With probability `random_start_prob`, drawn once per batch-norm group, the
  start is uniform in the epsilon-ball, else it is the clean image. A target is
  uniform over the other classes. (The paper's code draws the former once per
  core, whose images are its batch-norm group, and the latter alike.)
  """
  use_key, noise_key, scale_key, target_key = jax.random.split(key, 4)
  if attack.targeted:
    offset = jax.random.randint(target_key, labels.shape, 1, num_classes)
    labels = (labels + offset) % num_classes
  if not attack.random_start_prob:
    return Start(jnp.zeros_like(image), labels)

  shape, dtype = image.shape, image.dtype
  if attack.norm == 'linf':
    noise = jax.random.uniform(noise_key, shape, dtype, -1, 1)
  else:
    gauss = jax.random.normal(noise_key, shape, dtype)
    pixels = image[0, 0].size
    radius = jax.random.uniform(scale_key, labels.shape, dtype) ** (1 / pixels)
    noise = gauss / _l2_norm(gauss) * radius[..., None, None, None]
  use = jax.random.bernoulli(
    use_key, attack.random_start_prob, (image.shape[0], 1, 1, 1, 1)
  )
  return Start(jnp.where(use, attack.epsilon_px * noise, 0), labels)


def perturb(
  attack: Attack,
  loss_fn: LossFn,
  image: jax.Array,
  start: Start,
  aux: Any = None,
) -> tuple[jax.Array, Any]:
  """The perturbation after `attack.steps` projected gradient steps.

    g       = d loss_fn(image + delta, labels) / d image
    delta  <- project(delta + sign * step_size_px * direction(g))

  where sign is +1, or -1 if targeted; direction is g's sign (L-infinity) or
  g / |g|_2 per example (L2); `project` goes to the epsilon-ball of that norm,
  then to [0, 255]. One step from a clean start with step_size_px = epsilon_px
  is FGSM (Goodfellow et al. 2015, arXiv:1412.6572), more are PGD (Madry et al.
  2018, arXiv:1706.06083). The start is projected as well; the paper's code
  leaves it outside the box.

  Args:
    attack: the kind of attack; see `configs/common.py`.
    loss_fn: summed loss and auxiliary output of perturbed images.
    image: clean pixels in [0, 255], float [G, b, H, W, C].
    start: from `sample_start`.
    aux: auxiliary output before the first step, with loss_fn's structure.

  Returns:
    delta with the shape of `image`, without gradient, and the last step's
    auxiliary output.
  """
  gradient = jax.grad(loss_fn, has_aux=True)
  size = -attack.step_size_px if attack.targeted else attack.step_size_px

  def one_step(_, carry):
    delta, _ = carry
    g, aux = gradient(image + delta, start.labels)
    direction = jnp.sign(g) if attack.norm == 'linf' else g / _l2_norm(g)
    return project(attack, delta + size * direction, image), aux

  carry = (project(attack, start.delta, image), aux)
  if attack.steps == 1:
    carry = one_step(0, carry)
  else:
    carry = jax.lax.fori_loop(0, attack.steps, one_step, carry)
  return jax.lax.stop_gradient(carry)


def project(attack: Attack, delta: jax.Array, image: jax.Array) -> jax.Array:
  """Nearest delta in the epsilon-ball, then with image + delta in [0, 255].

  The second projection shrinks every component, so the ball still holds.
  """
  if attack.norm == 'linf':
    delta = jnp.clip(delta, -attack.epsilon_px, attack.epsilon_px)
  else:
    delta = delta * jnp.minimum(1, attack.epsilon_px / _l2_norm(delta))
  return jnp.clip(delta, -image, 255 - image)


def _l2_norm(x: jax.Array) -> jax.Array:
  """Norm per example, [G, b, 1, 1, 1]; never 0, so that 0 / norm is 0.

  Scaled by the largest element first: the square of a gradient of 1e-20, usual
  for a confident network, is 0 in float32.
  """
  axes = (-3, -2, -1)
  largest = jnp.abs(x).max(axes, keepdims=True)
  scale = jnp.where(largest > 0, largest, 1)
  norm = scale * jnp.sqrt(jnp.square(x / scale).sum(axes, keepdims=True))
  return jnp.maximum(norm, jnp.finfo(x.dtype).tiny)
