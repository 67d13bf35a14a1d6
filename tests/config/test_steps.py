"""How many steps a run has, and how many of them warm up."""

import dataclasses

import helpers
import pytest

from conadv_jax.config import Steps


def steps_of(num_examples=1_281_167, **fields):
  config = helpers.make_config(
    {'batch_size': 98_304, 'bn_group_size': 96, 'epochs': 90.0}
    | {name.replace('__', '.'): value for name, value in fields.items()}
  )
  return Steps.of(config, num_examples)


def test_imagenet_at_96k_over_90_epochs_is_1173_steps():
  # 1,281,167 * 90 / 98,304 = 1172.94; 41 epochs are 534.34, 2.4 are 31.28.
  steps = steps_of(schedule__warmup_epochs=41.0)
  assert steps == Steps(
    total=1173,
    stop=1173,
    warmup=534,
    decay=31,
    per_epoch=pytest.approx(13.03271),
  )


@pytest.mark.parametrize(
  'max_steps, stop',
  [(0, 1173), (1, 1), (1172, 1172), (1173, 1173), (5000, 1173)],
)
def test_max_steps_stops_early_and_leaves_the_schedule(max_steps, stop):
  steps = steps_of(max_steps=max_steps, schedule__warmup_epochs=41.0)
  assert steps.stop == stop
  assert dataclasses.replace(steps, stop=1173) == steps_of(
    schedule__warmup_epochs=41.0
  )


def test_short_runs_have_at_least_one_step():
  # 10 examples at a batch of 96 are a tenth of a step.
  steps = steps_of(10, batch_size=96, epochs=1.0, schedule__warmup_epochs=0.9)
  assert (steps.total, steps.stop, steps.warmup) == (1, 1, 0)
  assert steps.decay == 1


def test_warmup_is_never_longer_than_the_run():
  steps = steps_of(
    1000, batch_size=96, epochs=2.0, schedule__warmup_epochs=1.99
  )
  assert steps.warmup == steps.total == 21
