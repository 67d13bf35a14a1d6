"""A small state, and what a checkpoint of it gives back."""

import time

import helpers
import jax
import jax.numpy as jnp
import pytest

from conadv_jax.checkpoints.checkpoint import Checkpoints
from conadv_jax.method.state import Snapshot, TrainState

# Where an array cannot be read, orbax drops the coroutines of the others.
DROPS_COROUTINES = pytest.mark.filterwarnings(
  'ignore::pytest.PytestUnraisableExceptionWarning'
)


def make_state(value=1.0):
  """A state of two leaves of some size, and counters."""
  zero = jnp.zeros((), jnp.int32)
  weights = {
    'kernel': jnp.arange(5000.0) * value,
    'bias': jnp.full((7,), value, jnp.bfloat16),
  }
  return TrainState(
    step=zero + jnp.int32(value),
    params=weights,
    batch_stats={},
    opt_state=(jnp.ones(3) * value,),
    snapshots=(Snapshot(weights, {}),),
    ema=None,
    perturbation=jnp.ones(4),
    nonfinite_steps=zero,
    nonfinite_streak=zero,
  )


def abstract(state):
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
  )


def save(checkpoints, step, facts=None):
  checkpoints.save(step, make_state(step), facts)
  checkpoints.wait(step)


def finish(checkpoints):
  """Polls until the save under way has ended."""
  for _ in range(1000):
    again = checkpoints.poll()
    if again or checkpoints._pending is None:
      return again
    time.sleep(0.01)
  raise AssertionError('the save does not end')


def restored(workdir, like=None, **options):
  checkpoints = Checkpoints(workdir, keep=5, **options)
  try:
    return checkpoints.restore(like or abstract(make_state()))
  finally:
    checkpoints.close()


def assert_is(found, value):
  step, state, _ = found
  assert step == value
  assert state.perturbation is None
  expected = make_state(value).replace(perturbation=None)
  assert helpers.bits(state) == helpers.bits(expected)


def data_files(workdir, step):
  """Files that hold arrays, the largest first."""
  root = workdir / 'checkpoints' / str(step) / 'state'
  files = [p for p in root.rglob('*') if p.is_file() and p.parent.name == 'd']
  return sorted(files, key=lambda p: -p.stat().st_size)
