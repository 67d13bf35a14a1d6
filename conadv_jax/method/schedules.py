"""Learning rate as a function of the optimizer updates done so far."""

import jax.numpy as jnp
import optax

from conadv_jax.base.errors import unknown
from conadv_jax.config import Schedule, Steps


def make_schedule(
  schedule: Schedule, steps: Steps, peak: float
) -> optax.Schedule:
  """Returns a linear warm-up from 0 to `peak`, then a decay of SCHEDULES.

  Update 0 runs at rate 0 if there is a warm-up of at least one step. Decays
  count k, the updates since its end, of D = total - warm-up steps; the paper's
  code has D + 1.

  Raises:
    ConfigError: if there is no decay called `schedule.name`.
  """
  if schedule.name not in SCHEDULES:
    raise unknown('schedule', schedule.name, SCHEDULES)
  decay = SCHEDULES[schedule.name](schedule, steps, peak)
  if not steps.warmup:
    return decay
  warmup = optax.linear_schedule(0.0, peak, steps.warmup)
  return optax.join_schedules([warmup, decay], [steps.warmup])


def polynomial(schedule: Schedule, steps: Steps, peak: float) -> optax.Schedule:
  """Decay end + (peak - end) * (1 - k / D) ** power.

  optax.polynomial_schedule computes 1 - k / D, which rounds below 0 at k = D
  for some D once XLA multiplies by 1 / D; a fractional power of that is not a
  number.
  """
  end, total = schedule.end_learning_rate, _decay_steps(steps)

  def rate(count):
    left = jnp.clip(total - count, 0, total) / total
    return end + (peak - end) * left**schedule.power

  return rate


def cosine(schedule: Schedule, steps: Steps, peak: float) -> optax.Schedule:
  """Decay end + (peak - end) * (1 + cos(pi * k / D)) / 2."""
  return optax.cosine_decay_schedule(
    peak, _decay_steps(steps), alpha=schedule.end_learning_rate / peak
  )


def exponential(
  schedule: Schedule, steps: Steps, peak: float
) -> optax.Schedule:
  """Decay peak * decay_rate ** floor(k / decay steps)."""
  return optax.exponential_decay(
    peak, steps.decay, schedule.decay_rate, staircase=True
  )


# A schedule of your own: a function here, a line in this table, and its name in
# `config.Schedule`.
SCHEDULES = {
  'polynomial': polynomial,
  'cosine': cosine,
  'exponential': exponential,
}


def _decay_steps(steps: Steps) -> int:
  return max(1, steps.total - steps.warmup)
