"""The example in one file against the library, step by step, in float64."""

import importlib.util
import pathlib

import flax
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conadv_jax import experiment

PATH = pathlib.Path(__file__).parents[1] / 'examples' / 'conadv_minimal.py'
STEPS = 6  # over the end of the warm-up
EPSILON = 16.0
TOLERANCE = 1e-12  # of the largest value of each array


@pytest.fixture(scope='module')
def example():
  spec = importlib.util.spec_from_file_location(PATH.stem, PATH)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def library_run(tau):
  """The `Run` of digits: groups of eight, 2 steps of warm-up, 64 of decay.

  Schedules compute in float32, in which rates are exact for a power of two of
  steps, however they are written.
  """
  config = helpers.make_config(
    {
      'method': 'conadv' if tau else 'disadv',
      'staleness_steps': tau,
      'dtype': 'float64',
      'batch_size': 16,
      'bn_group_size': 8,
      'epochs': 66 / 90,
      'schedule.warmup_epochs': 2 / 90,
      'attack.epsilon': EPSILON,
      'optimizer.learning_rate': 2.0,
      'optimizer.trust_coefficient': 0.001,
    }
  )
  return experiment.build(config, jax.devices()[:1])


def noisy_state(run):
  """The library's first state, with no scale or statistic at its plain value.

  Scales of zero would hide the ends of the blocks.
  """
  state = run.init_state()
  rng = np.random.default_rng(0)

  def noisy(path, leaf):
    noise = rng.normal(size=leaf.shape)
    if path[-1].key == 'kernel':
      return leaf + 0.1 * np.std(leaf) * noise
    if path[-1].key in ('scale', 'var'):
      return jnp.asarray(np.exp(0.2 * noise))
    return jnp.asarray(0.2 * noise)

  params, stats = (
    jax.tree_util.tree_map_with_path(noisy, tree)
    for tree in (state.params, state.batch_stats)
  )
  snapshot = jax.tree.map(lambda x: x, state.snapshots)
  return state.replace(
    params=params,
    batch_stats=stats,
    snapshots=tuple(
      old.replace(params=params, batch_stats=stats) for old in snapshot
    ),
  )


def example_names(tree):
  """The library's tree -> the example's flat dict.

  A convolution and its batch norm have one name there.
  """
  flat = flax.traverse_util.flatten_dict(tree, sep='/')
  return {
    name.replace('stem_norm', 'stem').replace('norm', 'conv'): value
    for name, value in flat.items()
  }


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize('tau', [0, 1, 2, 3])
def test_the_example_equals_the_library(example, tau):
  run = library_run(tau)
  batches = helpers.random_batches(run.config, STEPS + 1, spec=run.spec)
  step_fn = jax.jit(run.step_fn)
  theirs = noisy_state(run)
  if tau:  # delta_0 is what any step makes of batch 0 before weights change
    warm, _ = step_fn(theirs, batches[0], batches[0])
    theirs = theirs.replace(perturbation=warm.perturbation)

  pairs = [(b['clean'].astype(np.float64), b['label']) for b in batches]
  params, stats = map(example_names, (theirs.params, theirs.batch_stats))
  optimizer = example.make_optimizer(
    params, 2.0, run.steps.warmup, run.steps.total
  )
  fixed = {'optimizer': optimizer, 'tau': tau, 'epsilon': EPSILON}
  ours = example.initial_state(params, stats, pairs[0], **fixed)
  our_step_fn = jax.jit(example.train_step, static_argnames=tuple(fixed))

  for t in range(STEPS):
    if tau:
      helpers.assert_close(ours.delta, theirs.perturbation, TOLERANCE)
    ours, losses = our_step_fn(ours, pairs[t], pairs[t + 1], **fixed)
    theirs, metrics = step_fn(theirs, batches[t], batches[t + 1])
    expected = [metrics['loss_clean'], metrics['loss_adv']]
    helpers.assert_close(losses, np.array(expected), TOLERANCE)
    for mine, other in (
      (ours.params, theirs.params),
      (ours.stats, theirs.batch_stats),
    ):
      helpers.assert_close(mine, example_names(other), TOLERANCE)
