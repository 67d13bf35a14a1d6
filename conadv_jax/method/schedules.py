"""Learning rate as a function of the optimizer updates done so far."""

import jax.numpy as jnp
import optax

from conadv_jax.config import Schedule, Steps


def make_schedule(
  schedule: Schedule, steps: Steps, peak: float
) -> optax.Schedule:
  """Linear warm-up from 0 to `peak`, then decay over the remaining D steps.

  With k = updates since the end of the warm-up and end = end_learning_rate:

    polynomial   end + (peak - end) * (1 - k / D) ** power
    cosine       end + (peak - end) * (1 + cos(pi * k / D)) / 2
    exponential  peak * decay_rate ** floor(k / decay steps)

  Update 0 runs at rate 0 if there is a warm-up of at least one step.
  """
  decay_steps = max(1, steps.total - steps.warmup)
  if schedule.name == 'polynomial':
    decay = _polynomial(
      peak, schedule.end_learning_rate, schedule.power, decay_steps
    )
  elif schedule.name == 'cosine':
    decay = optax.cosine_decay_schedule(
      peak, decay_steps, alpha=schedule.end_learning_rate / peak
    )
  else:
    decay = optax.exponential_decay(
      peak, steps.decay, schedule.decay_rate, staircase=True
    )
  if not steps.warmup:
    return decay
  warmup = optax.linear_schedule(0.0, peak, steps.warmup)
  return optax.join_schedules([warmup, decay], [steps.warmup])


def _polynomial(
  peak: float, end: float, power: float, decay_steps: int
) -> optax.Schedule:
  """optax.polynomial_schedule, safe at its end.

  optax computes 1 - k / D, which rounds below 0 at k = D for some D once XLA
  multiplies by 1 / D; a fractional power of that is not a number.
  """

  def schedule(count):
    left = jnp.clip(decay_steps - count, 0, decay_steps) / decay_steps
    return end + (peak - end) * left**power

  return schedule
