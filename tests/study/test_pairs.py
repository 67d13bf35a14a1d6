"""Runs of the same seed are pairs: they start from the same weights.

That they see the same examples in the same order, whatever the batch size, is
tested in tests/data/test_sampler.py.
"""

import dataclasses

import helpers
import jax
import numpy as np

from conadv_jax import experiment
from conadv_jax.study import design

ARMS = (
  'baseline_128', 'baseline_1280', 'conadv_1280', 'conadv_aa_1280',
  'nesterov_1280', 'shared_bn',
)  # fmt: skip


def initial_weights(cell):
  """{name: weights} of a run of `cell`, without batch norm's rows."""
  how = dataclasses.replace(cell.config.eval, train_split='')
  config = dataclasses.replace(cell.config, model='tiny', eval=how)
  run = experiment.build(config, jax.devices()[:1], helpers.SPEC)
  params = jax.device_get(run.init_state().params)
  return {name: params[name]['kernel'] for name in ('conv1', 'conv2', 'head')}


def test_arms_of_a_study_start_from_the_same_weights():
  _, study = design.load('fashion_mnist')
  cells = {cell.name: cell for cell in study.final_cells(study.untuned)}
  with helpers.tiny_network():
    first, *others = (
      initial_weights(cells[f'final/{arm}/seed=0']) for arm in ARMS
    )
    again = initial_weights(cells[f'final/{ARMS[0]}/seed=1'])
  for other in others:
    for name, weights in first.items():
      np.testing.assert_array_equal(other[name], weights)
  assert not np.allclose(first['conv1'], again['conv1'])
