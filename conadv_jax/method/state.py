"""The one thing that changes in a run, and the keys that do not."""

from __future__ import annotations

import enum
from typing import Any

import flax
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Snapshot:
  """Weights of an earlier step."""

  params: Any
  batch_stats: Any


@flax.struct.dataclass
class Spikes:
  """What tells a loss that jumps: the losses of the updates applied last.

  Attributes:
    losses: ring of W = spike.window_steps of them, [W].
    count: losses put into the ring since it was last emptied, int32.
    steps: steps that were not applied as spikes, int32.
    streak: how many of them since the last update that was applied, int32.
  """

  losses: jax.Array
  count: jax.Array
  steps: jax.Array
  streak: jax.Array


@flax.struct.dataclass
class Perturbation:
  """What a step makes for the next one.

  Attributes:
    images: delta_t, [G, b, H, W, C] grey levels, or None.
    weights: d_t, whose direction the weights are moved along: a tree as of
      `sam.chosen`, or None. With `sam.group_size` arrays [K, ...], of the K
      groups of the batch, and a second axis of the devices that share one.
  """

  images: jax.Array | None = None
  weights: Any = None


@flax.struct.dataclass
class TrainState:
  """State before step t.

  Attributes:
    step: t, int32 scalar: batches seen so far.
    params: theta_t; batch-norm leaves have one row per route.
    batch_stats: running statistics, one row per route.
    opt_state: of optax.
    snapshots: theta_{t - tau}, ..., theta_{t - 1}, length tau; theta_0 where
      the index is negative. The first is what made the pending perturbation.
      Of `sampa` y_t and y_{t + 1}; see `sam.lookahead`.
    ema: averaged params and statistics as a Snapshot, or None.
    perturbation: of batch_t and theta_t, or None where tau = 0. Not saved:
      `staleness.pending_perturbation` makes it again.
    nonfinite_steps: steps that were not applied as not finite, int32.
    nonfinite_streak: how many of them are the last ones in a row, int32.
    spikes: what finds losses that jump, or None where spike.sigmas = 0.
  """

  step: jax.Array
  params: Any
  batch_stats: Any
  opt_state: Any
  snapshots: tuple[Snapshot, ...]
  ema: Snapshot | None
  perturbation: Perturbation | None
  nonfinite_steps: jax.Array
  nonfinite_streak: jax.Array
  spikes: Spikes | None = None


def copied(tree: Any) -> Any:
  """Copies every array, so that a step may be donated `tree` or the copy."""
  # On a busy machine, copies of what a step still computes take the threads
  # of XLA:CPU that its collectives wait for: the process hangs, and aborts.
  return jax.tree.map(jnp.copy, jax.block_until_ready(tree))


class Stream(enum.IntEnum):
  """What a random key is for. Numbers are part of a run: never reuse one."""

  INIT = 0
  ATTACK = 1
  EVAL_ATTACK = 2
  DROPOUT = 3
  ASCENT = 4


def stream_key(seed: int, stream: Stream, step: jax.Array | int) -> jax.Array:
  """fold_in(fold_in(key(seed), stream), step): addressed, never carried."""
  key = jax.random.fold_in(jax.random.key(seed), stream)
  return jax.random.fold_in(key, step)
