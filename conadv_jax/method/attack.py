"""Adversarial perturbations of images: FGSM and PGD, L-infinity and L2.

Everything is in grey levels of 255. The network enters only as `loss_fn`, so
that any weights, of any age, can be attacked.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from conadv_jax.config import Attack
from conadv_jax.devices.mesh import Places

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
  places: Places | None = None,
) -> Start:
  """Draws the start of the attack on `image` [G, b, H, W, C].

  With probability `random_start_prob`, drawn once per batch-norm group, the
  start is uniform in the epsilon-ball, else it is the clean image. A target is
  uniform over the other classes. (The paper's code draws the former once per
  core, whose images are its batch-norm group, and the latter alike.)

  Every draw is addressed by `places`, where these groups and examples are in
  the batch, so that it does not depend on how the batch is divided; None counts
  them from 0.
  """
  use_key, noise_key, scale_key, target_key = jax.random.split(key, 4)
  dtype = image.dtype
  places = places or Places.of(*image.shape[:2])

  def per_example(draw: Callable[[jax.Array], jax.Array], key: jax.Array):
    each = jax.vmap(jax.vmap(lambda i: draw(jax.random.fold_in(key, i))))
    return each(places.example)

  if attack.targeted:
    offset = per_example(
      lambda key: jax.random.randint(key, (), 1, num_classes), target_key
    )
    labels = (labels + offset) % num_classes
  if not attack.random_start_prob:
    return Start(jnp.zeros_like(image), labels)

  shape = image.shape[2:]
  if attack.norm == 'linf':
    noise = per_example(
      lambda key: jax.random.uniform(key, shape, dtype, -1, 1), noise_key
    )
  else:
    gauss = per_example(
      lambda key: jax.random.normal(key, shape, dtype), noise_key
    )
    share = per_example(
      lambda key: jax.random.uniform(key, (), dtype), scale_key
    )
    radius = share ** (1 / math.prod(shape))
    noise = gauss / _l2_norm(gauss) * radius[..., None, None, None]

  def uses_noise(group: jax.Array) -> jax.Array:
    key = jax.random.fold_in(use_key, group)
    return jax.random.bernoulli(key, attack.random_start_prob)

  use = jax.vmap(uses_noise)(places.group)[:, None, None, None, None]
  return Start(jnp.where(use, attack.epsilon * noise, 0), labels)


def perturb(
  attack: Attack,
  loss_fn: LossFn,
  image: jax.Array,
  start: Start,
  aux: Any = None,
) -> tuple[jax.Array, Any]:
  """The perturbation after `attack.steps` projected gradient steps.

    g       = d loss_fn(image + delta, labels) / d image
    delta  <- project(delta + sign * step_size * direction(g))

  where sign is +1, or -1 if targeted; direction is g's sign (L-infinity) or
  g / |g|_2 per example (L2); `project` goes to the epsilon-ball of that norm,
  then to [0, 255]. One step from a clean start with step_size = epsilon
  is FGSM (Goodfellow et al. 2015, arXiv:1412.6572), more are PGD (Madry et al.
  2018, arXiv:1706.06083). The start is projected as well; the paper's code
  leaves it outside the box.

  Args:
    attack: the kind of attack; see `conadv_jax.methods.Attack`.
    loss_fn: summed loss and auxiliary output of perturbed images.
    image: clean pixels in [0, 255], float [G, b, H, W, C].
    start: from `sample_start`.
    aux: auxiliary output before the first step, with loss_fn's structure.

  Returns:
    delta with the shape of `image`, without gradient, and the last step's
    auxiliary output.
  """
  gradient = jax.grad(loss_fn, has_aux=True)
  size = -attack.step_size if attack.targeted else attack.step_size

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
    delta = jnp.clip(delta, -attack.epsilon, attack.epsilon)
  else:
    delta = delta * jnp.minimum(1, attack.epsilon / _l2_norm(delta))
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
