"""The example in one file against the library, step by step, in float64."""

import importlib.util
import pathlib
import re
import subprocess
import sys

import flax
import helpers
import jax
import numpy as np
import pytest

from conadv_jax import experiment

PATH = pathlib.Path(__file__).parents[1] / 'examples' / 'conadv_minimal.py'
STEPS = 4  # one of them in the warm-up
EPSILON = 16.0
TOLERANCE = 1e-12  # of the largest value of each array


@pytest.fixture(scope='module')
def example():
  spec = importlib.util.spec_from_file_location(PATH.stem, PATH)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def library_run(tau):
  """The `Run` of digits: groups of four, 1 step of warm-up, 64 of decay.

  Schedules compute in float32, in which rates are exact for a power of two of
  steps, however they are written.
  """
  config = helpers.make_config(
    {
      'method': 'conadv' if tau else 'disadv',
      'staleness_steps': tau,
      'dtype': 'float64',
      'batch_size': 8,
      'bn_group_size': 4,
      'epochs': 65 / 180,
      'schedule.warmup_epochs': 1 / 180,
      'attack.epsilon': EPSILON,
      'optimizer.learning_rate': 2.0,
      'optimizer.trust_coefficient': 0.001,
    }
  )
  return experiment.build(config, jax.devices()[:1])


def random_state(run):
  """The library's state before step 0, with random weights and statistics.

  Scales of zero, as at the start of training, would hide half of the network.
  """
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    noise = rng.normal(size=leaf.shape)
    if path[-1].key == 'kernel':
      return noise / np.sqrt(np.prod(leaf.shape[:-1]))
    return np.exp(0.2 * noise) if path[-1].key in ('scale', 'var') else noise

  zeros = jax.tree.map(
    lambda x: np.zeros(x.shape, x.dtype), run.abstract_state()
  )
  params, stats = (
    jax.tree_util.tree_map_with_path(draw, tree)
    for tree in (zeros.params, zeros.batch_stats)
  )
  snapshots = tuple(
    old.replace(params=params, batch_stats=stats) for old in zeros.snapshots
  )
  return zeros.replace(params=params, batch_stats=stats, snapshots=snapshots)


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
@pytest.mark.parametrize('tau', [0, 1, 2])
@pytest.mark.slow
def test_the_example_equals_the_library(example, tau):
  run = library_run(tau)
  data = helpers.random_batches(run.config, STEPS + 1, spec=run.spec)
  pairs = [(b['clean'].astype(np.float64), b['label']) for b in data]
  step_fn = jax.jit(run.step_fn)
  theirs = random_state(run)
  if tau:  # delta_0: a step attacks its next batch with the initial weights
    warm, _ = step_fn(theirs, data[0], data[0])
    theirs = theirs.replace(perturbation=warm.perturbation)

  params, stats = map(example_names, (theirs.params, theirs.batch_stats))
  steps = run.steps
  optimizer = example.make_optimizer(params, 2.0, steps.warmup, steps.total)
  fixed = {'optimizer': optimizer, 'tau': tau, 'epsilon': EPSILON}
  start_fn, example_step_fn = (
    jax.jit(fn, static_argnames=tuple(fixed))
    for fn in (example.initial_state, example.train_step)
  )
  ours = start_fn(params, stats, pairs[0], **fixed)

  for t in range(STEPS):
    if tau:
      helpers.assert_close(ours.delta, theirs.perturbation.images, TOLERANCE)
    ours, losses = example_step_fn(ours, pairs[t], pairs[t + 1], **fixed)
    theirs, metrics = step_fn(theirs, data[t], data[t + 1])
    expected = np.array([metrics['loss_clean'], metrics['loss_adv']])
    helpers.assert_close(losses, expected, TOLERANCE)
    weights = example_names(theirs.params), example_names(theirs.batch_stats)
    helpers.assert_close((ours.params, ours.stats), weights, TOLERANCE)


def test_the_example_is_short_and_needs_little():
  source = PATH.read_text()
  assert len(source.splitlines()) <= 200
  imports = re.findall('^(?:import|from) ([a-z_]+)', source, re.MULTILINE)
  assert not set(imports) - {
    'argparse',
    'jax',
    'numpy',
    'optax',
    'sklearn',
    'time',
    'typing',
  }


@pytest.mark.slow
def test_the_example_runs():
  flags = ['--epochs=1', '--tau=2']
  process = subprocess.run(
    [sys.executable, str(PATH), *flags],
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
  assert process.returncode == 0, process.stderr
  assert 'step 4/4: loss clean ' in process.stdout
