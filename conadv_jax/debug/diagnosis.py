"""What of one training step is not finite, or largest, and by which example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from conadv_jax.devices.mesh import (
  BATCH,
  REPLICATED,
  batch_sharding,
  own_copy,
  per_device,
  replicated,
)
from conadv_jax.devices.sums import mean_over_devices
from conadv_jax.experiment import Run
from conadv_jax.method import losses
from conadv_jax.method.gradients import batch_places, over_microbatches
from conadv_jax.method.pixels import normalize, trained_views, wide_dtype
from conadv_jax.method.state import Snapshot, Stream, TrainState, stream_key
from conadv_jax.method.step import (
  apply_perturbation,
  make_perturbation,
  of_parts,
  trained_weights,
)


def make_diagnosis_fn(run: Run):
  """(state_t, batch_t) -> (what is found, the perturbation of the batch).

  The forward and backward passes of the step, with a gradient for each view,
  and all examples in all views, also those that the step trains on in one view:

    loss, predicted  of each example and view, [G, b, V]; label [G, b]
    norm             of the gradient of each view's mean loss, [V]
    norms            of its leaves, [V, L]; nonfinite: elements that are not
    statistics       elements not finite of each moved statistic
  """
  config, mesh = run.config, run.mesh
  one_microbatch = _make_microbatch(run)

  def on_device(step, trained, now, batch, delta):
    trained, now = own_copy((trained, now))
    places = batch_places(config, mesh)
    groups, examples = places.example.shape
    wide = wide_dtype(config)
    num_views = len(config.views)
    per_example = (groups, examples, num_views)
    slots = {
      'loss': jnp.zeros(per_example, wide),
      'predicted': jnp.zeros(per_example, jnp.int32),
    }
    if config.is_adversarial:
      shape = (groups, examples, *run.spec.image_shape)
      slots['delta'] = jnp.zeros(shape, config.dtype)
    means, slots = over_microbatches(
      config.microbatches,
      lambda part, _: one_microbatch(step, trained, now, part),
      (batch, delta, places),
      own_copy(slots),
    )
    return mean_over_devices(means), slots

  fn = per_device(
    mesh,
    on_device,
    (REPLICATED,) * 3 + (BATCH,) * 2,
    (REPLICATED, BATCH),
  )

  def diagnose(state: TrainState, batch: Mapping[str, jax.Array]):
    now = Snapshot(state.params, state.batch_stats)
    trained, _ = trained_weights(run.setup, state, batch)
    delta = of_parts(config, state.perturbation)
    (grads, stats), slots = fn(state.step, trained, now, batch, delta)
    found = {
      'loss': slots['loss'],
      'predicted': slots['predicted'],
      'label': batch['label'],
      'statistics': jax.tree.map(count_nonfinite, stats),
    }
    return found | _of_gradients(grads), slots.get('delta')

  shardings = replicated(mesh), batch_sharding(mesh)
  return jax.jit(diagnose, out_shardings=shardings)


def _of_gradients(grads: Sequence[Any]) -> dict[str, jax.Array]:
  """Norms of the gradients of V views, [V], and of their leaves, [V, L]."""
  leaves = [jax.tree.leaves(tree) for tree in grads]

  def of_leaves(fn):
    return jnp.stack([jnp.stack([fn(x) for x in tree]) for tree in leaves])

  return {
    'norm': jnp.stack([optax.tree.norm(tree) for tree in grads]),
    'norms': of_leaves(optax.tree.norm),
    'nonfinite': of_leaves(count_nonfinite),
  }


def _make_microbatch(run: Run):
  """What `make_diagnosis_fn` does with a part of a device's examples."""
  config = run.config
  wide = wide_dtype(config)
  views = [view for view, _ in config.views]
  routes = tuple(config.route_of(view) for view, _ in config.views)

  def one_microbatch(step, trained, now, part):
    batch, delta, places = part
    if delta is None:  # made in the step itself
      delta, _ = make_perturbation(
        run.setup, now, now.batch_stats, batch, step, places
      )
    now, images = apply_perturbation(config, trained, batch, delta)
    x_GVbHWC = jnp.stack([normalize(run.spec, x) for x in images.values()], 1)
    key = stream_key(config.seed, Stream.DROPOUT, step)

    def loss_by_view(params):
      variables = {'params': params, 'batch_stats': now.batch_stats}
      logits, stats = run.apply_fn(
        variables, x_GVbHWC, routes, True, key, places.example
      )
      labels = jnp.broadcast_to(batch['label'][:, None], logits.shape[:-1])
      loss_GVb = losses.cross_entropy(
        logits, labels, config.loss.label_smoothing
      )
      return loss_GVb.mean((0, 2)), (loss_GVb, logits.argmax(-1), stats)

    _, pullback, (loss_GVb, predicted_GVb, stats) = jax.vjp(
      loss_by_view, now.params, has_aux=True
    )
    one_each = own_copy(jnp.eye(len(views), dtype=wide))
    grads = tuple(pullback(row)[0] for row in one_each)
    slots = {
      'loss': jnp.moveaxis(loss_GVb, 1, 2),
      'predicted': jnp.moveaxis(predicted_GVb.astype(jnp.int32), 1, 2),
    }
    if delta.images is not None:
      slots['delta'] = delta.images
    return (grads, stats), slots

  return one_microbatch


def make_images_fn(run: Run):
  """(batch, perturbation or None, places [K]) -> {view: [K, H, W, C]}.

  Images as the network is trained on, in grey levels, of any device.
  """
  config, mesh = run.config, run.mesh

  def on_device(batch, delta, wanted):
    images = trained_views(config, batch, delta)
    places = batch_places(config, mesh).example.reshape(-1)
    is_here = wanted[:, None] == places[None, :]
    at = is_here.argmax(1)

    def pick(image):
      own = image.reshape(-1, *image.shape[2:])[at]
      own = jnp.where(is_here.any(1)[:, None, None, None], own, 0)
      return mean_over_devices(own) * mesh.size

    return jax.tree.map(pick, images)

  return jax.jit(
    per_device(
      mesh,
      on_device,
      (BATCH, BATCH, REPLICATED),
      REPLICATED,
    )
  )


def worst(loss_N: np.ndarray, count: int) -> np.ndarray:
  """Places of the largest losses; before them, of those that are not finite."""
  badness = np.where(np.isfinite(loss_N), loss_N, np.inf)
  return np.argsort(-badness, kind='stable')[:count]


def count_nonfinite(x: jax.Array) -> jax.Array:
  return (~jnp.isfinite(x)).sum()
