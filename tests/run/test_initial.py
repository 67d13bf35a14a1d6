"""Runs that start from the weights of a file, or of another run."""

import dataclasses
import functools
import json

import helpers
import jax
import numpy as np
import pytest

from conadv_jax import experiment, models, train
from conadv_jax.base.errors import ConfigError
from conadv_jax.config import from_config_dict
from conadv_jax.models import resnet, weights
from conadv_jax.run import initial, metrics, workdir
from conadv_jax.run.evaluator import weights_of
from conadv_jax.run.reopen import restore_newest
from configs import digits


@pytest.fixture(scope='module', autouse=True)
def networks():
  thin = functools.partial(resnet.resnet18, width=4, blocks=(1, 1))
  entry = models.Entry(thin, 8, timm_module=resnet.timm_module)
  with helpers.tiny_network(), pytest.MonkeyPatch.context() as patch:
    patch.setitem(models.MODELS, 'thin', entry)
    yield


def settings(**fields):
  values = digits.get_config('batch_size=64')
  values.update_from_flattened_dict(
    {
      'model': 'tiny',
      'bn_group_size': 8,
      'max_steps': 4,
      'log_every_steps': 1,
      'attack_stats_every_steps': 0,
      'eval.every_steps': 0,
      'eval.attack': 'none',
      'checkpoint.every_steps': 2,
      'plots': False,
      **{name.replace('__', '.'): value for name, value in fields.items()},
    }
  )
  return from_config_dict(values)


def saved(path, *, timm=False, **fields):
  """Saves random weights, of all rows the first; returns what was saved."""
  config = settings(**{'seed': 1} | fields)
  state = experiment.build(config).init_state()
  params, stats = jax.device_get((state.params, state.batch_stats))
  stats = jax.tree.map(lambda x: x + 1.5, stats)
  if timm:
    arrays = weights.to_state_dict(config.model, params, stats, 0)
  else:
    arrays = weights.to_arrays(params, stats, 0)
  weights.save(str(path), arrays)
  return params, stats


def assert_equal(actual, expected):
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(actual), expected)


@pytest.mark.parametrize('model, timm', [('tiny', False), ('thin', True)])
def test_every_copy_in_the_state_has_the_weights_of_the_file(
  model, timm, tmp_path
):
  path = tmp_path / 'w.safetensors'
  expected = saved(path, timm=timm, model=model)
  config = settings(
    init_from=str(path), model=model, staleness_steps=2, ema__decay=0.5
  )
  state, identity = initial.first_state(experiment.build(config))
  for now in (state, *state.snapshots, state.ema):
    assert_equal((now.params, now.batch_stats), expected)
  assert identity['file'] == str(path) and not identity['new_head']
  buffers = [
    x.unsafe_buffer_pointer()
    for leaf in jax.tree.leaves(dataclasses.replace(state, perturbation=None))
    for x in [leaf.addressable_shards[0].data]
  ]
  assert len(set(buffers)) == len(buffers)  # as the step is donated them


@pytest.mark.parametrize('model, timm', [('tiny', False), ('thin', True)])
def test_other_classes_get_a_new_last_layer(model, timm, tmp_path, capsys):
  path = tmp_path / 'w.safetensors'
  params, _ = saved(path, timm=timm, model=model)
  run = experiment.build(settings(init_from=str(path), model=model))
  spec = dataclasses.replace(run.spec, num_classes=7)
  run = experiment.build(run.config, spec=spec)
  state, identity = initial.first_state(run)
  head = state.params['head']
  assert identity['new_head'] and head['kernel'].shape[-1] == 7
  assert_equal(head, jax.device_get(run.init_state().params['head']))
  rest = {k: v for k, v in state.params.items() if k != 'head'}
  assert_equal(rest, {k: v for k, v in params.items() if k != 'head'})
  assert 'with a new last layer' in capsys.readouterr().out


def test_weights_of_another_network_are_refused(tmp_path):
  path = tmp_path / 'w.safetensors'
  saved(path)
  run = experiment.build(settings(init_from=str(path), model='thin'))
  with pytest.raises(ConfigError, match=r"(?s)^init_from='.*missing: params/"):
    initial.first_state(run)
  gone = str(tmp_path / 'gone')
  run = experiment.build(settings(init_from=gone))
  with pytest.raises(ConfigError, match=rf"^init_from='{gone}': .*cannot be"):
    initial.first_state(run)


@pytest.mark.slow
def test_a_run_starts_where_another_has_ended(tmp_path):
  first = settings(
    method='consam',
    sam__group_size=8,  # which does not suit the batch of the other run
    ema__decay=0.5,
    checkpoint__every_steps=1,
  )
  train.train(first, str(tmp_path / 'a'))
  run = experiment.build(first)
  _, state = restore_newest(workdir.path_of(str(tmp_path / 'a')), run)
  averaged = jax.device_get(weights_of(first, state))
  config = settings(
    init_from=str(tmp_path / 'a'), batch_size=128, bn_group_size=16
  )
  new, identity = initial.first_state(experiment.build(config))
  assert identity['step'] == 4
  assert_equal(new.params['head'], averaged.params['head'])
  for old, both in zip(
    jax.tree.leaves(averaged.batch_stats),
    jax.tree.leaves(jax.device_get(new.batch_stats)),
    strict=True,
  ):
    assert both.shape[0] == 2  # clean and adversarial, from clean
    np.testing.assert_array_equal(both, np.broadcast_to(old, both.shape))


@pytest.mark.slow
def test_a_resumed_run_does_not_read_the_weights_again(tmp_path):
  path = tmp_path / 'w.safetensors'
  saved(path)
  config = settings(init_from=str(path))
  losses = {}
  for name, stops in (('unbroken', (4,)), ('resumed', (2, 4))):
    directory = tmp_path / name
    for stop in stops:
      train.train(dataclasses.replace(config, max_steps=stop), str(directory))
      if stop == 2:
        path.unlink()
    rows = metrics.read_metrics(directory)
    losses[name] = [row['loss'] for row in rows if row['split'] == 'train']
    starts = json.loads((directory / 'config.json').read_text())['starts']
    found = [start.get('init_from') for start in starts]
    assert found[0]['file'] == str(path) and len(found[0]['sha256']) == 64
    assert not any(found[1:])
  assert losses['resumed'] == losses['unbroken']
  saved(path, seed=2)
  directory = workdir.path_of(str(tmp_path / 'unbroken'))
  with pytest.raises(ConfigError, match=r'has other weights than when the run'):
    initial.restore_before(directory, experiment.build(config), 1)


def test_a_url_with_a_password_is_refused():
  with pytest.raises(ConfigError, match=r'^init_from'):
    settings(init_from='gs://user:secret@bucket/w.safetensors')
