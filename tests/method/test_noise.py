"""The gradient noise scale: closed forms, and what a step logs of it."""

import helpers
import jax
import numpy as np
import pytest

from conadv_jax import experiment, models
from conadv_jax.base.errors import ConfigError
from conadv_jax.devices.mesh import Places
from conadv_jax.method import noise
from conadv_jax.method.gradients import loss_gradient
from conadv_jax.method.pixels import trained_views
from conadv_jax.method.state import Perturbation, Snapshot

BATCH = 16


def test_two_gradients_by_hand():
  # (3, 1) and (1, 1): squares 10 and 2, of their mean 5, their product 4.
  found = noise.estimates(2, 2, part_square=6.0, square=5.0)
  assert found == {'noise_square': 4, 'noise_trace': 2, 'noise_scale': 0.5}


def test_a_gaussian_problem_has_its_closed_form():
  """Loss |w - x|^2 / 2 of x ~ N(mu, Sigma): G = w - mu, and x is the noise."""
  rng = np.random.default_rng(0)
  gradient, deviation = np.array([1.0, -2.0, 0.5]), np.array([1.0, 3.0, 2.0])
  x = rng.standard_normal((20_000, 4, 3, 3)) * deviation  # 4 parts of 3
  parts = (gradient - x).mean(2)
  part_square = (parts**2).sum(-1).mean(1)
  square = (parts.mean(1) ** 2).sum(-1)
  found = noise.estimates(12, 4, part_square, square)
  for name, expected in (('noise_square', 5.25), ('noise_trace', 14.0)):
    error = found[name].std() / 20_000**0.5
    assert error < 0.05 * expected
    assert found[name].mean() == pytest.approx(expected, abs=3 * error)


@pytest.fixture
def tiny(monkeypatch):
  monkeypatch.setitem(models.MODELS, 'tiny', models.Entry(helpers.TinyNet, 4))


def build(devices, **fields):
  fields = {'model': 'tiny', 'batch_size': BATCH, 'noise_scale': True} | fields
  config = helpers.make_config({'bn_group_size': 2} | fields)
  return experiment.build(config, jax.devices()[:devices], helpers.SPEC)


def a_step(run):
  """(state, batch, metrics) of a step, on the host."""
  batch, following = (
    run.put_batch({k: x.reshape(-1, *x.shape[2:]) for k, x in batch.items()})
    for batch in helpers.random_batches(run.config, 2)
  )
  state = run.init_state()
  if run.config.staleness_steps:
    delta = np.random.default_rng(0).normal(
      0, 3, state.perturbation.images.shape
    )
    delta = jax.device_put(delta, state.perturbation.images.sharding)
    state = state.replace(perturbation=Perturbation(delta))
  before = jax.device_get(state)
  _, metrics = run.compile_step()(state, batch, following)
  return before, jax.device_get(batch), jax.device_get(metrics)


@pytest.mark.usefixtures('tiny', 'x64')
@pytest.mark.parametrize(
  ('devices', 'microbatches', 'method'),
  [
    (2, 2, 'conadv'),
    pytest.param(1, 4, 'conadv', marks=pytest.mark.slow),
    pytest.param(4, 1, 'baseline', marks=pytest.mark.slow),
  ],
)
def test_a_step_logs_what_the_gradients_of_four_parts_say(
  devices, microbatches, method
):
  run = build(
    devices, microbatches=microbatches, method=method, dtype='float64'
  )
  state, batch, metrics = a_step(run)
  now = Snapshot(state.params, state.batch_stats)

  @jax.jit
  def gradient(batch, delta):
    images = trained_views(run.config, batch, delta)
    places = Places.of(*batch['label'].shape)
    return loss_gradient(
      run.setup, now, images, batch['label'], state.step, places
    ).grads

  delta = state.perturbation and state.perturbation.images
  grads = []
  for part in range(4):
    groups = slice(2 * part, 2 * part + 2)
    of_part = jax.tree.map(lambda x, g=groups: x[g], (batch, delta))
    leaves = jax.tree.leaves(gradient(*of_part))
    grads.append(np.concatenate([np.ravel(x) for x in leaves]))
  grads = np.array(grads)
  small = (grads**2).sum(1).mean()
  large = (grads.mean(0) ** 2).sum()
  square = (16 * large - 4 * small) / 12
  trace = (small - large) / (1 / 4 - 1 / 16)
  assert metrics['noise_square'] == pytest.approx(square, rel=1e-9)
  assert metrics['noise_trace'] == pytest.approx(trace, rel=1e-9)
  assert metrics['noise_scale'] == pytest.approx(trace / square, rel=1e-9)
  assert trace > 0


@pytest.mark.slow
@pytest.mark.usefixtures('tiny', 'x64')
def test_a_sharded_optimizer_and_buckets_log_the_same():
  fields = {'dtype': 'float64', 'method': 'baseline'}
  _, _, expected = a_step(build(4, **fields))
  packed = {'shard_optimizer': True, 'grad_buckets': 1}
  _, _, found = a_step(build(4, **fields, **packed))
  for name in ('noise_square', 'noise_trace'):
    assert found[name] == pytest.approx(expected[name], rel=1e-9)


@pytest.mark.usefixtures('tiny')
def test_gradients_of_two_batches_are_refused():
  with pytest.raises(ConfigError, match="^noise_scale=True: .*'sampa' mixes"):
    build(4, method='sampa')


@pytest.mark.usefixtures('tiny')
@pytest.mark.parametrize(
  ('devices', 'group', 'fix'),
  [(1, 2, 'microbatches=2'), (4, 8, 'smaller bn_group_size')],
)
def test_what_has_no_parts_is_refused(devices, group, fix):
  with pytest.raises(ConfigError, match=f'^noise_scale=True: .*{fix}'):
    build(devices, bn_group_size=group)
