"""Optimizers: optax chains with masks chosen by parameter path."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from conadv_jax.config import Optimizer

Params = Any


def path_name(path: tuple[Any, ...]) -> str:
  """Key path of a leaf -> 'stage1_block1/conv1/kernel'."""
  return '/'.join(str(getattr(key, 'key', key)) for key in path)


def is_kernel(path: str) -> bool:
  """True for kernels (decayed, layer-wise adapted), False for scale and bias.

  Raises:
    ValueError: for a leaf of any other name, so that none is left out.
  """
  leaf = path.rsplit('/', 1)[-1]
  if leaf not in ('kernel', 'scale', 'bias'):
    raise ValueError(f'parameter {path!r}: no rule says whether it decays')
  return leaf == 'kernel'


def kernel_mask(params: Params) -> Params:
  """Tree of bools: True on kernels."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: is_kernel(path_name(path)), params
  )


def make_optimizer(
  config: Optimizer, schedule: optax.Schedule
) -> optax.GradientTransformation:
  """The optimizer `config.name`; decay and trust ratios on kernels only.

  lars     see `lars`
  sgd      (Nesterov) momentum of g + wd * w, times the learning rate
  lamb     Adam direction + wd * w, scaled by |w| / |update| (arXiv:1904.00962);
           trust ratio on kernels only, where optax.lamb scales every leaf
  rmsprop  TensorFlow's: eps inside the root, mean square starts at 1, momentum
           after the learning rate, L2 decay in the gradient

  """
  decay = optax.add_decayed_weights(config.weight_decay, kernel_mask)
  if config.name == 'lars':
    return lars(config, schedule)
  if config.name == 'sgd':
    return optax.chain(
      decay, optax.sgd(schedule, config.momentum or None, config.nesterov)
    )
  if config.name == 'lamb':
    return optax.chain(
      optax.scale_by_adam(config.beta1, config.beta2, config.eps),
      decay,
      optax.masked(optax.scale_by_trust_ratio(), kernel_mask),
      optax.scale_by_learning_rate(schedule),
    )
  assert config.name == 'rmsprop', config.name
  return optax.chain(
    decay,
    optax.rmsprop(
      schedule,
      decay=config.decay,
      eps=config.eps,
      initial_scale=1.0,
      momentum=config.momentum or None,
      nesterov=config.nesterov,
    ),
  )


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
