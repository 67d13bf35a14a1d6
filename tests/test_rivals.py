"""Rows to compare ConAdv with: what they cost, and that they train."""

import jax
import numpy as np
import pytest

from conadv_jax import experiment
from conadv_jax.base.errors import ConfigError
from conadv_jax.config import from_config_dict, recipes
from conadv_jax.data.quarantine import Quarantine
from conadv_jax.run import evaluator, feed

RECIPE = 'fashion_mnist_14px'


def build(args, **overrides):
  overrides = {name.replace('__', '.'): v for name, v in overrides.items()}
  config = from_config_dict(recipes.load(f'{RECIPE}:{args}', overrides))
  return experiment.build(config, jax.devices()[:1])


def flops(args):
  """Of a whole run."""
  run = build(args)
  return run.steps.total * run.flops_per_device()


def test_the_long_baseline_has_the_flops_of_conadv():
  conadv, baseline = flops('method=conadv'), flops('method=baseline')
  long_baseline = flops('method=baseline,epochs=192')
  # 8/3, but for the gradient of the pixels of trained images, which only an
  # attack needs.
  assert conadv / long_baseline == pytest.approx(1, abs=0.01)
  assert long_baseline / baseline == 192 / 72
  # Nor does the age of the weights that attack cost anything.
  assert flops('method=disadv') == conadv
  # Noise costs its view; each of AdvProp's further steps two thirds of one.
  assert flops('method=noise') == 2 * baseline
  # 1.2 of a clean step: three passes over a fifth of the images.
  fast = flops('method=fast_advprop,epochs=60')
  assert fast / baseline == pytest.approx(1, abs=0.01)
  steps = flops('method=advprop') - conadv
  assert steps / baseline == pytest.approx(4 * 2 / 3, abs=0.05)


@pytest.mark.parametrize('fields', [{}, {'microbatches': '2'}])
def test_fast_advprop_needs_groups_to_choose_from(fields):
  build('method=fast_advprop,batch_size=1280', **fields)
  with pytest.raises(ConfigError, match=r'batch_size=256: .* multiple of \d+'):
    build('method=fast_advprop,batch_size=256', **fields)


def test_rates_are_those_that_the_recipe_says():
  for args, peak in {
    'batch_size=128': 4.0,
    'batch_size=1280': 8.0,
    'batch_size=5120': 16.0,
    'batch_size=1024,optimizer.name=sgd': 0.4,
    'batch_size=1280,optimizer.name=lamb': 0.04,
  }.items():
    config = build(args).config
    found = config.optimizer.peak_learning_rate(config.batch_size)
    assert found == pytest.approx(peak), args
  # However it is set.
  by_argument = build('optimizer.name=sgd').config
  assert build('', optimizer__name='sgd').config == by_argument
  assert by_argument.optimizer.nesterov
  lars = build('').config.optimizer
  assert by_argument.optimizer.weight_decay == lars.weight_decay == 1e-4


def test_noise_is_evaluated_without_a_gradient_too():
  config = build('').config
  attack = evaluator.eval_attack(config, 'random_signs')
  assert (attack.steps, attack.epsilon) == (0, config.eval.epsilon)
  assert evaluator.eval_attack(config, 'rs_fgsm').steps == 1


@pytest.mark.slow
@pytest.mark.parametrize('name', ['lars', 'sgd', 'lamb'])
def test_every_optimizer_trains_from_its_starting_rate(name):
  run = build(
    f'method=baseline,batch_size=128,epochs=12,optimizer.name={name}',
    dataset__name='digits',
    dataset__train_split='',
    dataset__eval_split='',
    dataset__pool='1',
  )
  source = run.spec.open('train', run.config.dataset)
  ids = feed.ExampleIds(0, keep=9)
  state, step = run.init_state(), run.compile_step()
  losses = []
  for batch in feed.batches(run, source, Quarantine(), ids, 0, run.steps.total):
    state, metrics = step(state, batch, batch)
    losses.append(float(metrics['loss']))
  assert np.isfinite(losses).all() and metrics['nonfinite_steps'] == 0
  # Chance on 10 classes is a loss of 2.3.
  assert np.mean(losses[-5:]) < 0.8, losses
