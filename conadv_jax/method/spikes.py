"""Judges losses: which updates are not applied, as not finite or as spikes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from conadv_jax.config import Config
from conadv_jax.method.pixels import wide_dtype
from conadv_jax.method.state import Spikes

# The deviation of losses counts as at least so much of their mean, or of 1 nat:
# where a loss hardly moves, rounding is no spike.
_MIN_DEVIATION = 1e-3


def no_spikes(config: Config) -> Spikes | None:
  """Makes `TrainState.spikes` of step 0; None with spike.sigmas = 0."""
  if not config.spike.sigmas:
    return None
  losses_W = jnp.zeros(config.spike.window_steps, wide_dtype(config))
  zero = jnp.zeros((), jnp.int32)
  return Spikes(losses=losses_W, count=zero, steps=zero, streak=zero)


def is_finite(loss: jax.Array, grad_norm: jax.Array, stats: Any) -> jax.Array:
  """Tells whether the numbers of an update are finite: bool scalar.

  A variance can overflow where neither loss nor gradient does, as a batch norm
  then multiplies by 0. New weights need no look: a gradient of finite norm is
  below 2e19, and so a step overflows only for rates or weights of that size.

  Args:
    loss: scalar.
    grad_norm: scalar.
    stats: batch statistics of the update alone, a tree of arrays: the update
      must not wait for an attack.
  """
  finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
  for leaf in jax.tree.leaves(stats):
    finite &= jnp.isfinite(leaf).all()
  return finite


def judge_loss(
  config: Config, old: Spikes | None, loss: jax.Array, finite: jax.Array
) -> tuple[jax.Array, Spikes | None, dict[str, jax.Array]]:
  """Decides whether an update is applied.

  A spike is a loss above the mean plus `sigmas` standard deviations of the
  losses of the last `window_steps` applied updates, once there are so many.
  After `max_in_a_row` of them the loss has moved for good: the next update is
  applied whatever its loss, and the window starts anew with it. Steps that are
  not finite neither end such a row nor belong to it.

  Args:
    config: `spike.*`.
    old: losses so far; None where spikes are not looked for.
    loss: of this step, scalar.
    finite: from `is_finite`, bool scalar.

  Returns:
    Whether the update is applied, bool scalar; the new `Spikes`; metrics.
  """
  if old is None:
    return finite, None, {}
  settings, window = config.spike, config.spike.window_steps
  mean = old.losses.mean()
  deviation = jnp.maximum(
    jnp.sqrt(jnp.square(old.losses - mean).mean()),
    _MIN_DEVIATION * jnp.maximum(jnp.abs(mean), 1),
  )
  limit = mean + settings.sigmas * deviation
  limit = jnp.where(old.count >= window, limit, jnp.inf)
  high = finite & (loss > limit)
  has_moved = high & (old.streak >= settings.max_in_a_row)
  spike = high & ~has_moved
  applied = finite & ~spike
  # Counts are kept below 2 W: only their rest and whether W is reached matter.
  place = jnp.where(has_moved, 0, old.count)
  wrapped = jnp.where(place + 1 < 2 * window, place + 1, window)
  new = Spikes(
    losses=old.losses.at[place % window].set(
      jnp.where(applied, loss, old.losses[place % window])
    ),
    count=jnp.where(applied, wrapped, old.count),
    steps=old.steps + spike.astype(jnp.int32),
    streak=jnp.where(applied, 0, old.streak + spike.astype(jnp.int32)),
  )
  return (
    applied,
    new,
    {
      'spike_limit': limit,
      'spike_steps': new.steps,
      'spike_streak': new.streak,
    },
  )
