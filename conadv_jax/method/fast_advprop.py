"""Fast AdvProp: a share of the batch is attacked, and every gradient trains.

A rival of ConAdv (Mei et al. 2022, arXiv:2204.09838). Of any n batch-norm
groups, n = `adv_every`, the last is adversarial and has no clean view:

  x'     = image + start, which is uniform in the ball
  d, g   = gradients of L_adv(x') for its pixels and the weights, in one pass
  delta  = project(start + step_size * direction(d))
  grads  = (1 - 1 / n) grad L_clean(image)
           + 1 / n (g + grad L_adv(image + delta)) / 2

A row of batch norm, which only one view uses, takes the mean over that view's
examples: the weight 1. With F as in `Run.flops_per_device`, an image costs 3 F
+ 3 F / n, 1.2 times that of the baseline for n = 5: for equal cost, train for
1 / 1.2 of its epochs.

Where ours differs from the released code: whole batch-norm groups are attacked,
so that a step does not depend on the devices; they stay on the device that
attacks them; and all passes have the label smoothing and dropout of training.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from conadv_jax.config import Config
from conadv_jax.devices.mesh import Places
from conadv_jax.method.attack import direction, project, sample_start
from conadv_jax.method.gradients import Means, loss_gradient, training_loss
from conadv_jax.method.pixels import Batch, perturbed, wide_dtype
from conadv_jax.method.setup import Setup
from conadv_jax.method.state import Snapshot, Stream, stream_key
from conadv_jax.models.norm import norms_of


def sub_steps(
  setup: Setup,
  step: jax.Array,
  now: Snapshot,
  attacker: Snapshot,
  batch: Batch,
  next_batch: Batch,
  delta: None,
  places: Places,
) -> tuple[Means, None]:
  """Computes the three passes of a step on a microbatch of one device.

  Takes and returns what `step.sub_steps` does for tau = 0.
  """
  del attacker, next_batch, delta
  config, attack = setup.config, setup.config.attack
  wide = wide_dtype(config)
  (clean, clean_places), (adv, adv_places) = split(
    config.adv_every, (batch, places)
  )
  image, label = adv['clean'].astype(wide), adv['label']
  with jax.named_scope('adversarial'):
    key = stream_key(config.seed, Stream.ATTACK, step)
    start, _ = sample_start(
      attack, key, image, label, setup.spec.num_classes, adv_places
    )
    start = project(attack, start, image)
    (reused, slope), (_, _, stats) = jax.grad(
      training_loss, (1, 3), has_aux=True
    )(
      setup,
      now.params,
      now.batch_stats,
      {'adv': image + start},
      label,
      step,
      adv_places,
    )
    delta = start + attack.step_size * direction(attack, slope['adv'])
    images = {'adv': perturbed(image, project(attack, delta, image))}
  with jax.named_scope('update'):
    of_adv = loss_gradient(
      setup, now.replace(batch_stats=stats), images, label, step, adv_places
    )
    of_clean = loss_gradient(
      setup,
      now.replace(batch_stats=of_adv.batch_stats),
      {'clean': clean['clean'].astype(wide)},
      clean['label'],
      step,
      clean_places,
    )
  adv_grads = jax.tree.map(lambda x, y: (x + y) / 2, reused, of_adv.grads)
  return Means(
    grads=averaged(config, now.batch_stats, of_clean.grads, adv_grads),
    batch_stats=of_clean.batch_stats,
    attack_stats=None,
    loss_V=jnp.concatenate([of_clean.loss_V, of_adv.loss_V]),
    top1_V=jnp.concatenate([of_clean.top1_V, of_adv.top1_V]),
  ), None


def split(every: int, tree: Any) -> tuple[Any, Any]:
  """Divides arrays [G, ...] into the groups to be clean, and to be attacked.

  Returns:
    [G - G / every, ...], and [G / every, ...]: the last of any `every` groups.
  """

  def turns(x):
    return x.reshape(-1, every, *x.shape[1:])

  clean = jax.tree.map(
    lambda x: turns(x)[:, :-1].reshape(-1, *x.shape[1:]), tree
  )
  return clean, jax.tree.map(lambda x: turns(x)[:, -1], tree)


def averaged(config: Config, batch_stats: Any, clean: Any, adv: Any) -> Any:
  """Computes the mean gradient over the examples that touch a parameter.

  Args:
    config: has the weights of both views.
    batch_stats: tells the layers of batch norm.
    clean: gradient of the mean loss of the clean view; 0 in the rows of the
      other, as the view does not use them.
    adv: likewise.
  """
  a, b = config.loss.weights_of(config.shares)
  layers = norms_of(batch_stats)

  def mean(path, x, y):
    layer = tuple(key.key for key in path[:-1])
    return x + y if layer in layers else a * x + b * y

  return jax.tree_util.tree_map_with_path(mean, clean, adv)
