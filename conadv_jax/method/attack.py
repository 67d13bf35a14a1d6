"""Adversarial perturbations of images: FGSM, PGD, and rules of your own.

Everything is in grey levels of 255. A rule sees the network only as a gradient,
so that any weights, of any age, can be attacked. To add one: write a function
of the form `Rule`, name it in RULES, and add a preset to `methods.ATTACKS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from conadv_jax.config import Attack
from conadv_jax.devices.loops import repeat
from conadv_jax.devices.mesh import Places
from conadv_jax.method import losses
from conadv_jax.method.pixels import Batch, normalize, wide_dtype
from conadv_jax.method.setup import Setup
from conadv_jax.method.state import Snapshot, Stream, stream_key

# image [G, b, H, W, C] in [0, 255], labels [G, b] -> (summed loss, auxiliary)
LossFn = Callable[[jax.Array, jax.Array], tuple[jax.Array, Any]]
# delta [G, b, H, W, C] -> (gradient of the loss at image + delta with respect
# to the pixels, its sign turned if the attack is targeted; auxiliary)
Ascent = Callable[[jax.Array], tuple[jax.Array, Any]]
# (attack, ascent, image, delta to start from, auxiliary of no gradient)
#   -> (delta, auxiliary of the last gradient)
Rule = Callable[
  [Attack, Ascent, jax.Array, jax.Array, Any], tuple[jax.Array, Any]
]


class Start(NamedTuple):
  """What an attack draws at random: everything else is deterministic.

  Attributes:
    delta: perturbation to start from, [G, b, H, W, C].
    labels: classes to move away from, or towards if targeted, [G, b].
  """

  delta: jax.Array
  labels: jax.Array


def attack_batch(
  setup: Setup,
  weights: Snapshot,
  batch: Batch,
  index: jax.Array,
  places: Places | None = None,
) -> tuple[jax.Array, Any]:
  """Computes the perturbation of a batch with `weights`, of whatever age.

  The random start is addressed by the index of the batch in the run and by the
  places of its examples, so a batch is attacked alike whenever, with whatever
  weights, and in whatever parts, that is done. No gradient of a parameter is
  computed.

  Args:
    setup: what the step is made of.
    weights: of the attacker; their batch statistics are read in evaluation
      mode only.
    batch: uint8 images [G, b, H, W, C] and labels [G, b].
    index: t of batch_t.
    places: where the examples are in their batch; None counts them from 0.

  Returns:
    delta [G, b, H, W, C] in the type of activations, and the batch statistics
    after the last gradient; None unless `attack.update_batch_stats`.
  """
  config, spec = setup.config, setup.spec
  image = batch[config.attacked].astype(wide_dtype(config))
  key = stream_key(config.seed, Stream.ATTACK, index)
  start = sample_start(
    config.attack, key, image, batch['label'], spec.num_classes, places
  )
  route = (config.route_of('adv'),)
  variables = {'params': weights.params, 'batch_stats': weights.batch_stats}
  moves_stats = config.attack.update_batch_stats

  def loss_fn(pixels, labels):
    x = normalize(spec, pixels)[:, None]
    logits, stats = setup.apply_fn(
      variables, x, route, config.attack.train_mode
    )
    loss = losses.cross_entropy(logits[:, 0], labels).sum()
    return loss, stats if moves_stats else None

  aux = weights.batch_stats if moves_stats else None
  delta, stats = perturb(config.attack, loss_fn, image, start, aux)
  return delta.astype(config.dtype), stats


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
  start is uniform in the epsilon-ball or, for random_start='extreme', in its
  extreme points: epsilon times random signs (L-infinity) or a random direction
  (L2). Else it is the clean image. A target is uniform over the other classes.
  (The paper's code draws the former once per core, whose images are its
  batch-norm group, and the latter alike.)

  Every draw is addressed by `places`, where these groups and examples are in
  the batch, so that it does not depend on how the batch is divided; None counts
  them from 0.
  """
  use_key, noise_key, scale_key, target_key = jax.random.split(key, 4)
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

  noise = _noise(attack, image, per_example, noise_key, scale_key)

  def uses_noise(group: jax.Array) -> jax.Array:
    key = jax.random.fold_in(use_key, group)
    return jax.random.bernoulli(key, attack.random_start_prob)

  use = jax.vmap(uses_noise)(places.group)[:, None, None, None, None]
  return Start(jnp.where(use, attack.epsilon * noise, 0), labels)


def _noise(
  attack: Attack,
  image: jax.Array,
  per_example: Callable[..., jax.Array],
  key: jax.Array,
  radius_key: jax.Array,
) -> jax.Array:
  """Draws points of the ball of radius 1, or its extreme points, as `image`."""
  shape, dtype = image.shape[2:], image.dtype
  extreme = attack.random_start == 'extreme'
  if attack.norm == 'linf' and extreme:
    return per_example(
      lambda key: jax.random.rademacher(key, shape, dtype), key
    )
  if attack.norm == 'linf':
    return per_example(
      lambda key: jax.random.uniform(key, shape, dtype, -1, 1), key
    )
  gauss = per_example(lambda key: jax.random.normal(key, shape, dtype), key)
  on_sphere = gauss / _l2_norm(gauss)
  if extreme:
    return on_sphere
  share = per_example(
    lambda key: jax.random.uniform(key, (), dtype), radius_key
  )
  return on_sphere * (share ** (1 / math.prod(shape)))[..., None, None, None]


def perturb(
  attack: Attack,
  loss_fn: LossFn,
  image: jax.Array,
  start: Start,
  aux: Any = None,
) -> tuple[jax.Array, Any]:
  """Computes the perturbation of `attack` by its rule, from a projected start.

  The paper's code leaves the start outside the box.

  Args:
    attack: its settings; `rule` is a name in RULES.
    loss_fn: summed loss and auxiliary output of perturbed images.
    image: clean pixels in [0, 255], float [G, b, H, W, C].
    start: from `sample_start`.
    aux: auxiliary output before the first gradient, with loss_fn's structure.

  Returns:
    delta with the shape of `image`, without gradient, and the auxiliary output
    of the last gradient.
  """
  gradient = jax.grad(loss_fn, has_aux=True)

  def ascent(delta):
    g, aux = gradient(image + delta, start.labels)
    return -g if attack.targeted else g, aux

  delta = project(attack, start.delta, image)
  return jax.lax.stop_gradient(
    RULES[attack.rule](attack, ascent, image, delta, aux)
  )


def gradient_steps(
  attack: Attack, ascent: Ascent, image: jax.Array, delta: jax.Array, aux: Any
) -> tuple[jax.Array, Any]:
  """Computes `attack.steps` projected gradient steps.

    g       = ascent(delta)
    delta  <- project(delta + step_size * direction(g))

  where direction is g's sign (L-infinity) or g / |g|_2 per example (L2). One
  step from a clean start with step_size = epsilon is FGSM (Goodfellow et al.
  2015, arXiv:1412.6572), more are PGD (Madry et al. 2018, arXiv:1706.06083),
  and none, which asks for no gradient, leave the start as it is.

  Args:
    attack: norm, epsilon, step_size and steps.
    ascent: direction of higher loss at image + delta.
    image: pixels in [0, 255], float [G, b, H, W, C].
    delta: where to start, of the same shape.
    aux: auxiliary output before the first gradient.

  Returns:
    delta, and the auxiliary output of the last gradient.
  """

  def one_step(carry):
    delta, _ = carry
    g, aux = ascent(delta)
    step = attack.step_size * direction(attack, g)
    return project(attack, delta + step, image), aux

  return repeat(attack.steps, one_step, (delta, aux))


RULES: dict[str, Rule] = {'gradient': gradient_steps}


def direction(attack: Attack, g: jax.Array) -> jax.Array:
  """Computes the step of norm 1 along g: its sign, or g / |g|_2 per example."""
  return jnp.sign(g) if attack.norm == 'linf' else g / _l2_norm(g)


def project(attack: Attack, delta: jax.Array, image: jax.Array) -> jax.Array:
  """Projects delta to the epsilon-ball, then image + delta to [0, 255].

  The second projection shrinks every component, so the ball still holds.
  """
  if attack.norm == 'linf':
    delta = jnp.clip(delta, -attack.epsilon, attack.epsilon)
  else:
    delta = delta * jnp.minimum(1, attack.epsilon / _l2_norm(delta))
  return jnp.clip(delta, -image, 255 - image)


def _l2_norm(x: jax.Array) -> jax.Array:
  """Computes the norm per example, [G, b, 1, 1, 1]; never 0.

  Scaled by the largest element first: the square of a gradient of 1e-20, usual
  for a confident network, is 0 in float32.
  """
  axes = (-3, -2, -1)
  largest = jnp.abs(x).max(axes, keepdims=True)
  scale = jnp.where(largest > 0, largest, 1)
  norm = scale * jnp.sqrt(jnp.square(x / scale).sum(axes, keepdims=True))
  return jnp.maximum(norm, jnp.finfo(x.dtype).tiny)
