"""What each device does in a step: attack, forward, backward, and one sum.

A device takes its own examples, `microbatches` times a part of them, and only
at the end do devices exchange anything, but for batch-norm groups that span
several. So memory does not grow with the batch, except for images and
perturbations, and a step costs one sum of gradients however it is divided.

Everything here but `normalize` and `wide_dtype` runs under
`mesh.per_device`. G, V, b: batch-norm groups, views, examples of a group, all
of them those of one device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from conadv_jax.config import Config
from conadv_jax.data.datasets import DatasetSpec
from conadv_jax.devices import mesh as mesh_lib
from conadv_jax.devices.mesh import Places
from conadv_jax.method import attack as attack_lib
from conadv_jax.method import losses, optim
from conadv_jax.method.state import Snapshot, Stream, stream_key
from conadv_jax.models import ApplyFn

Batch = Mapping[str, jax.Array]


@flax.struct.dataclass
class Means:
  """What a pass over a batch yields: means over its examples.

  Attributes:
    grads: of the parameters, of the optimizer's shapes (`optim.pack`).
    batch_stats: after the update.
    attack_stats: after the attack, or None.
    loss_V: of each view.
    top1_V: percentage, of each view.
  """

  grads: Any
  batch_stats: Any
  attack_stats: Any
  loss_V: jax.Array
  top1_V: jax.Array


def normalize(spec: DatasetSpec, pixels: jax.Array) -> jax.Array:
  """(pixels - mean) / std per channel; pixels in grey levels of 255."""
  mean = jnp.array(spec.mean, pixels.dtype)
  return (pixels - mean) / jnp.array(spec.std, pixels.dtype)


def wide_dtype(config: Config) -> Any:
  """Type of pixels, loss and parameters: float32, or float64 if so set."""
  return jnp.promote_types(config.dtype, jnp.float32)


def make_passes(
  config: Config, spec: DatasetSpec, apply_fn: ApplyFn, mesh: mesh_lib.Mesh
):
  """(step, weights, attacker, batch, delta, next batch) -> (Means, delta).

  A program over global arrays: Means are the same on all devices, but for the
  gradients of a sharded optimizer. For tau >= 1 delta is that of `batch`, and
  the one returned is that of the next batch, made with `attacker`; it takes the
  buffer of the old one, part by part. For tau = 0 it is made and used at once,
  and none is returned.
  """
  one_microbatch = _make_microbatch(config, spec, apply_fn)

  def passes(step, weights, attacker, batch, delta, next_batch):
    means, pending = over_microbatches(
      config.microbatches,
      functools.partial(one_microbatch, step, weights, attacker),
      (batch, next_batch, batch_places(config, mesh)),
      delta,
      _no_means(config, weights),
    )
    with jax.named_scope('gradient_sum'):
      means = _summed(config, means)
    return means, pending

  def over_devices(step, weights, *args):
    grads = optim.packed_specs(config, weights.params)
    fn = mesh_lib.per_device(
      mesh,
      passes,
      in_specs=(mesh_lib.REPLICATED,) * 3 + (mesh_lib.BATCH,) * 3,
      out_specs=(Means(grads, *(mesh_lib.REPLICATED,) * 4), mesh_lib.BATCH),
    )
    return fn(step, weights, *args)

  return over_devices


def weighted_loss(config: Config, loss_V: jax.Array) -> jax.Array:
  """Mean over views, with the weights of the configuration."""
  weights = config.loss.weights_of(tuple(view for view, _ in config.views))
  return jnp.dot(jnp.array(weights, loss_V.dtype), loss_V)


def make_attack_fn(config: Config, spec: DatasetSpec, apply_fn: ApplyFn):
  """(weights, batch, batch index, places) -> (delta, batch statistics).

  The random start is addressed by the index of the batch in the run and by the
  places of its examples, so a batch is attacked alike whenever, with whatever
  weights, and in whatever parts, that is done. The statistics are those after
  the last gradient of the attack, or None unless `attack.update_batch_stats`
  asks for them.
  """
  route = (config.routes.index('adv'),)
  moves_stats = config.attack.update_batch_stats

  def attack_fn(
    weights: Snapshot,
    batch: Batch,
    index: jax.Array,
    places: Places | None = None,
  ):
    image = batch['clean'].astype(wide_dtype(config))
    key = stream_key(config.seed, Stream.ATTACK, index)
    start = attack_lib.sample_start(
      config.attack, key, image, batch['label'], spec.num_classes, places
    )
    variables = {'params': weights.params, 'batch_stats': weights.batch_stats}

    def loss_fn(pixels, labels):
      x = normalize(spec, pixels)[:, None]
      logits, stats = apply_fn(variables, x, route, config.attack.train_mode)
      loss = losses.cross_entropy(logits[:, 0], labels).sum()
      return loss, stats if moves_stats else None

    delta, stats = attack_lib.perturb(
      config.attack,
      loss_fn,
      image,
      start,
      weights.batch_stats if moves_stats else None,
    )
    return delta.astype(config.dtype), stats

  return attack_fn


def batch_places(config: Config, mesh: mesh_lib.Mesh) -> Places:
  """Where a device's examples are in a training batch."""
  groups = config.batch_size // config.bn_group_size
  return mesh_lib.local_places(mesh, groups, config.bn_group_size)


def over_microbatches(
  count: int,
  fn: Callable[[Any, Any], tuple[Any, Any]],
  batch: Any,
  delta: Any,
  zero: Any,
) -> tuple[Any, Any]:
  """Mean of the first result of `fn(part, delta part)` over `count` parts.

  Args:
    count: number of parts.
    fn: returns what is averaged and a new delta part, or None where there is no
      delta to begin with.
    batch: arrays [G, ...] to be divided along G.
    delta: array [G, ...] or None; its parts are replaced in place.
    zero: of the type and shapes of what is averaged.

  Returns:
    the mean, and delta with all its parts replaced.
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

  carry = zero, jax.tree.map(split, delta)
  parts = jnp.arange(count), jax.tree.map(split, batch)
  (total, deltas), _ = jax.lax.scan(add, carry, parts)
  mean = jax.tree.map(lambda x: x / count, total)
  return mean, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), deltas)


def _make_microbatch(config: Config, spec: DatasetSpec, apply_fn: ApplyFn):
  """The two sub-steps on a part of this device's examples."""
  tau = config.staleness_steps
  attack_fn = (
    make_attack_fn(config, spec, apply_fn) if config.is_adversarial else None
  )
  gradient = jax.value_and_grad(
    _make_loss_fn(config, spec, apply_fn), has_aux=True
  )

  def one_microbatch(step, weights, attacker, part, delta):
    batch, next_batch, places = part
    pending = attack_stats = None
    if attack_fn is not None:
      with jax.named_scope('adversarial'):
        if tau:
          pending, attack_stats = attack_fn(
            attacker, next_batch, step + 1, places
          )
        else:
          delta, attack_stats = attack_fn(attacker, batch, step, places)
    with jax.named_scope('update'):
      (_, (loss_V, top1_V, stats)), grads = gradient(
        weights.params,
        weights.batch_stats,
        _trained_views(config, batch, delta),
        batch['label'],
        stream_key(config.seed, Stream.DROPOUT, step),
        places.example,
      )
    return Means(grads, stats, attack_stats, loss_V, top1_V), pending

  return one_microbatch


def _trained_views(config: Config, batch: Batch, delta: jax.Array | None):
  """Images by view, in grey levels: adv = clip(clean + delta, 0, 255)."""
  wide = wide_dtype(config)
  images = {v: batch[v].astype(wide) for v, _ in config.views if v != 'adv'}
  if delta is not None:
    images['adv'] = jnp.clip(images['clean'] + delta.astype(wide), 0, 255)
  return images


def _make_loss_fn(config: Config, spec: DatasetSpec, apply_fn: ApplyFn):
  """(params, batch_stats, images by view, labels, key, examples) -> loss.

  The mean is over examples and, weighted, over views. With it: loss and top-1
  (%) of each view [V], and the moved statistics. `key` and the places of
  examples are for dropout and stochastic depth.
  """
  views = tuple(view for view, _ in config.views)
  routes = tuple(config.routes.index(route) for _, route in config.views)
  smoothing = config.loss.label_smoothing

  def loss_fn(params, batch_stats, images, labels, key, examples):
    variables = {'params': params, 'batch_stats': batch_stats}
    x_GVbHWC = jnp.stack([normalize(spec, images[v]) for v in views], 1)
    logits, stats = apply_fn(variables, x_GVbHWC, routes, True, key, examples)
    labels_GVb = jnp.broadcast_to(labels[:, None], logits.shape[:-1])
    loss_V = losses.cross_entropy(logits, labels_GVb, smoothing).mean((0, 2))
    top1_V = 100 * losses.top1(logits, labels_GVb).mean((0, 2))
    return weighted_loss(config, loss_V), (loss_V, top1_V, stats)

  return loss_fn


def _no_means(config: Config, weights: Snapshot) -> Means:
  """Means of nothing: zeros."""
  moves_stats = config.is_adversarial and config.attack.update_batch_stats
  per_view = jnp.zeros(len(config.views), wide_dtype(config))
  zeros = jax.tree.map(jnp.zeros_like, weights)
  return Means(
    grads=zeros.params,
    batch_stats=zeros.batch_stats,
    attack_stats=zeros.batch_stats if moves_stats else None,
    loss_V=per_view,
    top1_V=per_view,
  )


def _summed(config: Config, means: Means) -> Means:
  """Means over devices, gradients of the optimizer's shapes.

  Gradients are summed in float32 whatever the type of activations, unless the
  configuration says bfloat16: the partitioner of a global program would take
  the latter for every kernel that is cast to it. Everything else shares their
  vectors, if there are any: a compiler would join what it finds beside them,
  and cannot put that behind other work.
  """
  wide = wide_dtype(config)
  dtype = jnp.bfloat16 if config.grad_allreduce_dtype == 'bfloat16' else wide
  grads = jax.tree.map(lambda g: g.astype(dtype), means.grads)
  grads = optim.pack(config, grads)
  specs = optim.packed_specs(config, grads)
  others = means.replace(grads=())
  if config.grad_buckets:
    specs = specs, jax.tree.map(lambda _: mesh_lib.REPLICATED, others)
    grads, others = mesh_lib.means_by_spec(
      (grads, others), specs, config.grad_buckets
    )
  else:
    grads = mesh_lib.means_by_spec(grads, specs)
    others = mesh_lib.mean_over_devices(others)
  return others.replace(grads=jax.tree.map(lambda g: g.astype(wide), grads))
