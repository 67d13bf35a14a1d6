"""Optimizers by name: optax chains with masks chosen by parameter path."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from conadv_jax.base.errors import unknown
from conadv_jax.config import Optimizer

Params = Any


def path_name(path: tuple[Any, ...]) -> str:
  """Key path of a leaf -> 'stage1_block1/conv1/kernel'."""
  return '/'.join(str(getattr(key, 'key', key)) for key in path)


def is_kernel(path: str) -> bool:
  """True for kernels and embeddings: decayed, and layer-wise adapted.

  Those are the leaves whose last name is `kernel` or `embedding`, or ends in
  `_kernel` or `_embedding`: a table of positions, too. Everything else is left
  as it is: `scale` and `bias` (of batch norm a matrix, one row per route) and
  any other name. So a network that calls a matrix of weights something else
  excludes it from decay. The rule goes by name because `shard_optimizer` makes
  vectors of large leaves.
  """
  leaf = path.rsplit('/', 1)[-1]
  return leaf.rsplit('_', 1)[-1] in ('kernel', 'embedding')


def kernel_mask(params: Params) -> Params:
  """Tree of bools: True on kernels and embeddings."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: is_kernel(path_name(path)), params
  )


def make_optimizer(
  config: Optimizer, schedule: optax.Schedule
) -> optax.GradientTransformation:
  """Returns the optimizer `config.name` of OPTIMIZERS.

  Raises:
    ConfigError: if there is none of that name.
  """
  if config.name not in OPTIMIZERS:
    raise unknown('optimizer', config.name, OPTIMIZERS)
  return OPTIMIZERS[config.name](config, schedule)


def lars(
  config: Optimizer, schedule: optax.Schedule
) -> optax.GradientTransformation:
  """LARS: layer-wise trust ratio (You et al. 2017, arXiv:1708.03888).

  For each kernel, with eta = trust_coefficient and wd = weight_decay,

    norm_of_sum   ratio = eta * |w| / (|g + wd * w| + eps)      optax.lars
    sum_of_norms  ratio = eta * |w| / (|g| + wd * |w| + eps)    paper, MLPerf
    m <- momentum * m - rate * ratio * (g + wd * w);  w <- w + m

  and ratio 1 where |w| or the denominator's gradient norm is 0. Scales and
  biases take the plain rate, with neither ratio nor decay.
  """
  if config.lars_denominator == 'norm_of_sum':
    return optax.lars(
      schedule,
      weight_decay=config.weight_decay,
      weight_decay_mask=kernel_mask,
      trust_coefficient=config.trust_coefficient,
      eps=config.eps,
      trust_ratio_mask=kernel_mask,
      momentum=config.momentum,
      nesterov=config.nesterov,
    )

  def update(grads, state, params):
    def scale(g, w, kernel):
      if not kernel:
        return g
      return trust_ratio(config, g, w) * (g + config.weight_decay * w)

    return jax.tree.map(scale, grads, params, kernel_mask(params)), state

  return optax.chain(
    optax.GradientTransformation(lambda _: optax.EmptyState(), update),
    optax.scale_by_learning_rate(schedule),
    optax.trace(config.momentum, config.nesterov),
  )


def sgd(
  config: Optimizer, schedule: optax.Schedule
) -> optax.GradientTransformation:
  """SGD: (Nesterov) momentum of g + wd * w, times the learning rate."""
  return optax.chain(
    _decay(config),
    optax.sgd(schedule, config.momentum or None, config.nesterov),
  )


def lamb(
  config: Optimizer, schedule: optax.Schedule
) -> optax.GradientTransformation:
  """LAMB: u = Adam's direction + wd * w, times |w| / |u|.

  You et al. 2019 (arXiv:1904.00962). The trust ratio is on kernels only;
  optax.lamb scales every leaf.
  """
  return optax.chain(
    optax.scale_by_adam(config.beta1, config.beta2, config.eps),
    _decay(config),
    optax.masked(optax.scale_by_trust_ratio(), kernel_mask),
    optax.scale_by_learning_rate(schedule),
  )


def rmsprop(
  config: Optimizer, schedule: optax.Schedule
) -> optax.GradientTransformation:
  """RMSProp as TensorFlow has it.

  eps is inside the root, the mean square starts at 1, momentum comes after the
  learning rate, and the gradient is g + wd * w.
  """
  return optax.chain(
    _decay(config),
    optax.rmsprop(
      schedule,
      decay=config.decay,
      eps=config.eps,
      initial_scale=1.0,
      momentum=config.momentum or None,
      nesterov=config.nesterov,
    ),
  )


# An optimizer of your own: a function here, a line in this table, and its eps
# in `config.OPTIMIZER_EPS`, the names that a config accepts.
OPTIMIZERS = {'lars': lars, 'sgd': sgd, 'lamb': lamb, 'rmsprop': rmsprop}


def _decay(config: Optimizer) -> optax.GradientTransformation:
  return optax.add_decayed_weights(config.weight_decay, kernel_mask)


def trust_ratio(config: Optimizer, g: jax.Array, w: jax.Array) -> jax.Array:
  """LARS trust ratio of one kernel, as `lars` defines it: a scalar."""
  w_norm = jnp.linalg.norm(w)
  if config.lars_denominator == 'norm_of_sum':
    g_norm = jnp.linalg.norm(g + config.weight_decay * w)
    denominator = g_norm + config.eps
  else:
    g_norm = jnp.linalg.norm(g)
    denominator = g_norm + config.weight_decay * w_norm + config.eps
  zero = (w_norm == 0) | (g_norm == 0)
  ratio = config.trust_coefficient * w_norm / jnp.where(zero, 1, denominator)
  return jnp.where(zero, 1.0, ratio)


def kernel_names(params: Params) -> list[str]:
  """Paths of the kernels, in the order of `kernel_trust_ratios`."""
  leaves = jax.tree_util.tree_leaves_with_path(params)
  names = [path_name(path) for path, _ in leaves]
  return [name for name in names if is_kernel(name)]


def kernel_trust_ratios(
  config: Optimizer, grads: Params, params: Params
) -> jax.Array:
  """LARS trust ratios of all kernels: [L]."""
  leaves = zip(
    *(jax.tree.leaves(tree) for tree in (grads, params, kernel_mask(params))),
    strict=True,
  )
  return jnp.stack(
    [trust_ratio(config, g, w) for g, w, kernel in leaves if kernel]
  )


# Of the states of these optimizers: the momentum, and the sign with which it
# moves the weights.
_MOMENTA = {
  'lars': ('trace', 1),
  'sgd': ('trace', -1),
  'rmsprop': ('trace', 1),
  'lamb': ('mu', -1),
}


def momentum_moves(config: Optimizer, state: optax.OptState) -> Params:
  """Returns where the momentum in `state` moves the weights, packed as it is.

  Raises:
    ConfigError: if it is not known what of `state` is the momentum.
  """
  if config.name not in _MOMENTA:
    raise unknown('optimizer with a momentum', config.name, _MOMENTA)
  name, sign = _MOMENTA[config.name]
  return jax.tree.map(lambda x: sign * x, optax.tree.get(state, name))
