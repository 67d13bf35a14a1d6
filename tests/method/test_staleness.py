"""How a perturbation that has aged is compared with a fresh one."""

import functools

import helpers
import jax
import numpy as np
import pytest

from conadv_jax.method import losses, optim
from conadv_jax.method.attack import attack_batch
from conadv_jax.method.pixels import normalize, perturbed
from conadv_jax.method.setup import Setup
from conadv_jax.method.staleness import make_attack_stats_fn
from conadv_jax.method.state import Perturbation, Snapshot


@functools.cache
def compared():
  """(config, state, batch, the fresh perturbation, stats of another one)."""
  config = helpers.make_config({'attack.epsilon': 8.0})
  _, apply_fn = helpers.tiny_net(config)
  tx = optim.make_optimizer(config.optimizer, lambda count: 0.1)
  mesh = helpers.one_device(config)
  setup = Setup(config, helpers.SPEC, apply_fn, mesh, tx, lambda count: 0.1)
  state = helpers.start_state(config, helpers.random_weights(config), tx)
  (batch,) = helpers.random_batches(config, 1)
  now = Snapshot(state.params, state.batch_stats)
  fresh = jax.jit(lambda b: attack_batch(setup, now, b, state.step)[0])(batch)
  fn = jax.jit(make_attack_stats_fn(setup))

  def stats(delta, batch=batch):
    return jax.device_get(
      fn(state.replace(perturbation=Perturbation(delta)), batch)
    )

  return setup, state, batch, np.asarray(fresh), stats


@pytest.mark.parametrize(
  ('factor', 'agreement', 'cosine'), [(1, 100, 1), (-1, 0, -1), (0.5, 100, 1)]
)
def test_a_multiple_of_the_fresh_one(factor, agreement, cosine):
  *_, fresh, stats = compared()
  found = stats(factor * fresh)
  assert found['delta_cosine'] == pytest.approx(cosine, abs=1e-6)
  zero = 100 * (fresh == 0).mean()  # at a pixel of 0 or 255 that is to leave
  expected = max(agreement, zero)
  assert found['delta_agreement'] == pytest.approx(expected, abs=1e-4)
  if factor == 1:
    assert found['loss_stale'] == found['loss_fresh']
    assert found['top1_stale'] == found['top1_fresh']


def test_no_perturbation_has_no_direction():
  *_, fresh, stats = compared()
  assert stats(0 * fresh)['delta_cosine'] == 0


def test_cosine_loss_and_accuracy_are_those_of_the_images():
  setup, state, batch, fresh, stats = compared()
  delta = np.random.default_rng(1).normal(0, 5, fresh.shape).astype('float32')
  found = stats(delta)
  one, other = (x.reshape(6, -1).astype(np.float64) for x in (delta, fresh))
  norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
  cosine = ((one * other).sum(1) / norms).mean()
  assert found['delta_cosine'] == pytest.approx(cosine, rel=1e-5)

  image = perturbed(batch['clean'].astype('float32'), delta)
  x = normalize(helpers.SPEC, image)[:, None]
  variables = {'params': state.params, 'batch_stats': state.batch_stats}
  route = (setup.config.route_of('adv'),)
  logits = setup.apply_fn(variables, x, route, True)[0][:, 0]
  label = np.argmax(np.asarray(logits), -1).astype(np.int32)
  label[0, 0] = (label[0, 0] + 1) % 5
  found = stats(delta, batch | {'label': label})
  loss = losses.cross_entropy(logits, label).mean()
  assert found['loss_stale'] == pytest.approx(float(loss), rel=1e-5)
  assert found['top1_stale'] == pytest.approx(100 * 5 / 6, rel=1e-6)
