"""Computes gradients: on one device, over microbatches, over all devices.

A device takes its own examples, `microbatches` times a part of them, and only
at the end do devices exchange anything, but for batch-norm groups that span
several. So memory does not grow with the batch, except for images and
perturbations, and a step costs one sum of gradients however it is divided.

G, V, b: batch-norm groups, views, examples per group, all of one device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from conadv_jax.config import Config
from conadv_jax.devices import loops, sharded_optimizer, sums
from conadv_jax.devices.mesh import (
  BATCH,
  REPLICATED,
  Mesh,
  Places,
  local_places,
  own_copy,
  per_device,
)
from conadv_jax.method import losses
from conadv_jax.method.pixels import normalize, wide_dtype
from conadv_jax.method.setup import Setup
from conadv_jax.method.state import (
  Perturbation,
  Snapshot,
  Stream,
  stream_key,
)


@flax.struct.dataclass
class Means:
  """What the two sub-steps yield: means over the examples of a batch.

  What a pass does not make is None.

  Attributes:
    grads: of the parameters, in the optimizer's shapes once summed.
    batch_stats: after the update.
    attack_stats: after the attack.
    loss_V: of each view.
    top1_V: percentage, of each view.
    square: squared norm of the gradients of a part.
    ascent: gradient that weights are perturbed with; see `method.sam`.
    ascent_stats: after it.
  """

  grads: Any = None
  batch_stats: Any = None
  attack_stats: Any = None
  loss_V: jax.Array | None = None
  top1_V: jax.Array | None = None
  square: jax.Array | None = None
  ascent: Any = None
  ascent_stats: Any = None


def weighted_loss(
  config: Config, views: Iterable[str], loss_V: jax.Array
) -> jax.Array:
  """Computes the mean over `views` [V], with the weights of the config."""
  weights = config.loss.weights_of({v: config.shares[v] for v in views})
  return jnp.dot(jnp.array(weights, loss_V.dtype), loss_V)


def training_loss(
  setup: Setup,
  params: Any,
  batch_stats: Any,
  images: dict[str, jax.Array],
  label: jax.Array,
  step: jax.Array,
  places: Places,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, Any]]:
  """Computes the training loss of `images`, in one pass over their views.

  Returns:
    The loss, and of each view loss and accuracy [V], and batch statistics; see
    `loss_gradient`.
  """
  config = setup.config
  routes = tuple(config.route_of(view) for view in images)
  key = stream_key(config.seed, Stream.DROPOUT, step)
  x_GVbHWC = jnp.stack(
    [normalize(setup.spec, image) for image in images.values()], 1
  )
  logits, stats = setup.apply_fn(
    {'params': params, 'batch_stats': batch_stats},
    x_GVbHWC,
    routes,
    True,
    key,
    places.example,
  )
  labels_GVb = jnp.broadcast_to(label[:, None], logits.shape[:-1])
  loss_GVb = losses.cross_entropy(
    logits, labels_GVb, config.loss.label_smoothing
  )
  loss_V = loss_GVb.mean((0, 2))
  top1_V = 100 * losses.top1(logits, labels_GVb).mean((0, 2))
  return weighted_loss(config, images, loss_V), (loss_V, top1_V, stats)


def loss_gradient(
  setup: Setup,
  weights: Snapshot,
  images: dict[str, jax.Array],
  label: jax.Array,
  step: jax.Array,
  places: Places,
) -> Means:
  """Computes the gradient of the training loss, in one pass over all views.

    loss = sum_v w_v mean_n cross_entropy(f(x_v,n), y_n, label smoothing)

  Args:
    setup: what the step is made of.
    weights: theta_t, with the batch statistics that the pass moves.
    images: {view: [G, b, H, W, C]} in grey levels, from `trained_views`.
    label: classes, int [G, b].
    step: t, which keys dropout and stochastic depth.
    places: where the examples are in the batch, for the same.

  Returns:
    This device's `Means`; there are no `attack_stats`.
  """
  grads, (loss_V, top1_V, stats) = jax.grad(training_loss, 1, has_aux=True)(
    setup, weights.params, weights.batch_stats, images, label, step, places
  )
  return Means(grads, stats, loss_V=loss_V, top1_V=top1_V)


def over_devices(
  setup: Setup,
  sub_steps: Callable[..., tuple[Means, Perturbation | None]],
  *,
  trains: bool = True,
) -> Callable[..., tuple[Means, Perturbation | None]]:
  """Makes a program over global arrays of what one device does with a part.

  Args:
    setup: what the step is made of.
    sub_steps: (setup, step, weights, attacker, batch, next batch,
      perturbation, places) -> (Means, perturbation), of a microbatch of one
      device.
    trains: whether the Means have gradients for the optimizer.

  Returns:
    (step, weights, attacker, batch, next batch, perturbation) -> (Means,
    perturbation), of whole batches [G, b, ...]. Means are the same on all
    devices, but for the gradients of a sharded optimizer. The perturbation that
    is returned takes the buffers of the other, part by part.
  """
  config, mesh = setup.config, setup.mesh

  def on_device(step, weights, attacker, batch, next_batch, delta):
    weights, attacker = own_copy((weights, attacker))

    def one_microbatch(part, delta):
      batch, next_batch, places = part
      means, delta = sub_steps(
        setup, step, weights, attacker, batch, next_batch, delta, places
      )
      if config.noise_scale:
        square = jnp.square(optax.tree.norm(means.grads))
        means = means.replace(square=square)
      return means, delta

    means, pending = over_microbatches(
      config.microbatches,
      one_microbatch,
      (batch, next_batch, batch_places(config, mesh)),
      delta,
    )
    with jax.named_scope('gradient_sum'):
      return _summed(config, means), pending

  def program(step, weights, *args):
    grads = sharded_optimizer.packed_specs(config, weights.params)
    grads = grads if trains else REPLICATED
    return per_device(
      mesh,
      on_device,
      in_specs=(REPLICATED,) * 3 + (BATCH,) * 3,
      out_specs=(Means(grads, *(REPLICATED,) * 7), BATCH),
    )(step, weights, *args)

  return program


def batch_places(config: Config, mesh: Mesh) -> Places:
  """Returns where a device's examples are in a training batch."""
  groups = config.batch_size // config.bn_group_size
  return local_places(mesh, groups, config.bn_group_size)


def over_microbatches(
  count: int,
  fn: Callable[[Any, Any], tuple[Any, Any]],
  batch: Any,
  delta: Any,
) -> tuple[Any, Any]:
  """Computes the mean of the first result of `fn(part, delta part)` over parts.

  Args:
    count: number of parts.
    fn: returns what is averaged and a new delta part, or None where there is no
      delta to begin with.
    batch: arrays [G, ...] to be divided along G.
    delta: arrays [G, ...] or None; their parts are replaced in place.

  Returns:
    The mean, and delta with all its parts replaced.
  """
  if count == 1:
    return fn(batch, delta)

  def split(x):
    return x.reshape(count, -1, *x.shape[1:])

  def add(carry, part):
    total, deltas = carry
    index, part = part
    delta = jax.tree.map(lambda x: x[index], deltas)
    mean, delta = fn(part, delta)
    deltas = jax.tree.map(lambda x, new: x.at[index].set(new), deltas, delta)
    return (jax.tree.map(jnp.add, total, mean), deltas), None

  batch, deltas = jax.tree.map(split, (batch, delta))
  first = jax.tree.map(lambda x: x[0], (batch, deltas))
  shapes, _ = jax.eval_shape(fn, *first)
  zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  parts = jnp.arange(count), batch
  total, deltas = loops.scan(add, (own_copy(zero), deltas), parts, count)
  mean = jax.tree.map(lambda x: x / count, total)
  return mean, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), deltas)


def _summed(config: Config, means: Means) -> Means:
  """Computes means over devices; gradients take the optimizer's shapes.

  Gradients are summed in float32 whatever the type of activations, unless the
  configuration says bfloat16: the partitioner of a global program would take
  the latter for every kernel that is cast to it. Everything else shares their
  vectors, if there are any: a compiler would join what it finds beside them,
  and cannot put that behind other work. What comes of an ascent has vectors of
  its own, which the update of the weights does not wait for.
  """
  wide = wide_dtype(config)
  dtype = jnp.bfloat16 if config.grad_allreduce_dtype == 'bfloat16' else wide
  grads, ascent = jax.tree.map(
    lambda g: g.astype(dtype), (means.grads, means.ascent)
  )
  ascent = ascent, means.ascent_stats
  ascent, ascent_stats = sums.means_by_spec(
    ascent, jax.tree.map(lambda _: REPLICATED, ascent), config.grad_buckets
  )
  grads = sharded_optimizer.pack(config, grads)
  specs = sharded_optimizer.packed_specs(config, grads)
  others = means.replace(grads=(), ascent=(), ascent_stats=())
  if config.grad_buckets:
    specs = specs, jax.tree.map(lambda _: REPLICATED, others)
    grads, others = sums.means_by_spec(
      (grads, others), specs, config.grad_buckets
    )
  else:
    grads = sums.means_by_spec(grads, specs)
    others = sums.mean_over_devices(others)
  grads, ascent = jax.tree.map(lambda g: g.astype(wide), (grads, ascent))
  return others.replace(grads=grads, ascent=ascent, ascent_stats=ascent_stats)
