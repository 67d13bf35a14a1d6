"""The step: what each sub-step reads, what it leaves alone, what it repeats."""

import dataclasses
import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flow import Flow, contractions, equations

from conadv_jax.method import losses, optim
from conadv_jax.method.attack import (
  perturb,
  sample_start,
)
from conadv_jax.method.pixels import normalize
from conadv_jax.method.staleness import pending_perturbation
from conadv_jax.method.state import Perturbation, Stream, copied, stream_key

STALENESS = (1, *(pytest.param(tau, marks=pytest.mark.slow) for tau in (2, 3)))
STEPS = 6

# Random starts in some groups only, two gradient steps and averaged weights:
# whatever a step could get wrong when it is repeated.
FIELDS = {
  'attack.preset': 'pgd',
  'attack.steps': 2,
  'attack.random_start_prob': 0.5,
  'ema.decay': 0.9,
}


def schedule(count):
  return 0.2 / (1.0 + count)


@dataclasses.dataclass(frozen=True)
class Run:
  """A compiled step and the states of a run of it, on the host.

  Attributes:
    states: state_0 .. state_{STEPS}, each with its pending perturbation.
    metrics: of step 0 .. STEPS - 1.
    batches: batch_0 .. batch_{STEPS}.
  """

  config: object
  step: object
  states: list
  metrics: list
  batches: list


def jit_step(config):
  _, apply_fn = helpers.tiny_net(config)
  tx = optim.make_optimizer(config.optimizer, schedule)
  return jax.jit(
    helpers.make_step(
      config, helpers.SPEC, apply_fn, tx, schedule, helpers.one_device(config)
    )
  )


def start(config):
  tx = optim.make_optimizer(config.optimizer, schedule)
  return helpers.start_state(config, helpers.random_weights(config), tx)


@functools.cache
def trained(tau):
  """A float32 `Run` of staleness `tau`."""
  config = helpers.make_config(FIELDS | {'staleness_steps': tau})
  step = jit_step(config)
  batches = helpers.random_batches(config, STEPS + 1)
  state = pending_perturbation(config, step, start(config), batches[0])
  states, all_metrics = [jax.device_get(state)], []
  for batch, following in zip(batches, batches[1:], strict=False):
    state, metrics = step(state, batch, following)
    states.append(jax.device_get(state))
    all_metrics.append(jax.device_get(metrics))
  return Run(config, step, states, all_metrics, batches)


# ---- What the two sub-steps share ------------------------------------------


@pytest.mark.parametrize('tau', STALENESS)
def test_the_update_has_the_same_bits_whatever_the_next_batch(tau):
  run = trained(tau)
  old, now, following, other = run.states[4], *run.batches[4:6], run.batches[0]
  a, a_metrics = run.step(old, now, following)
  b, b_metrics = run.step(old, now, other)
  assert helpers.bits(a.perturbation) != helpers.bits(b.perturbation)
  same = a.replace(perturbation=None), b.replace(perturbation=None)
  assert helpers.bits(same[0]) == helpers.bits(same[1])
  assert helpers.bits(a_metrics) == helpers.bits(b_metrics)


@pytest.mark.parametrize('tau', STALENESS)
def test_the_attack_has_the_same_bits_whatever_is_trained_on(tau):
  run = trained(tau)
  old, now, following, other = run.states[4], *run.batches[4:6], run.batches[0]
  a, _ = run.step(old, now, following)
  b, _ = run.step(old, other, following)
  c, _ = run.step(
    old.replace(
      perturbation=Perturbation(old.perturbation.images[::-1]),
      opt_state=jax.tree.map(lambda x: x + 1, old.opt_state),
    ),
    now,
    following,
  )
  for changed in (b, c):
    assert helpers.bits(a.params) != helpers.bits(changed.params)
    assert helpers.bits(a.perturbation) == helpers.bits(changed.perturbation)


@functools.cache
def flow(tau):
  return Flow(staleness_steps=tau)


@pytest.mark.parametrize('tau', STALENESS)
def test_neither_sub_step_is_computed_from_the_other(tau):
  this = flow(tau)
  # Statistics that overflow stop an update.
  update = {'batch', 'params', 'perturbation', 'batch_stats'}
  assert this.to('params')[0] == update | {'opt_state'}
  assert this.to('opt_state')[0] == update | {'opt_state'}
  assert this.to('batch_stats')[0] == update
  counters = {'step', 'nonfinite_steps', 'nonfinite_streak'}
  assert this.to('metrics')[0] == update | counters
  attacker = 'params' if tau == 1 else 'snapshots[1]'
  # `step` addresses the random start.
  assert this.to('perturbation')[0] == {'next_batch', 'step', attacker}


def test_the_attack_does_not_wait_for_the_verdict_on_a_loss():
  this = Flow(**{'spike.sigmas': 6.0, 'staleness_steps': 2})
  assert 'spikes' in this.to('params')[0]
  assert this.to('perturbation')[0] == {'next_batch', 'step', 'snapshots[1]'}


def test_without_staleness_the_update_waits_for_the_attack():
  """Else the test above would hold of a step that attacks nothing."""
  this = flow(0)
  assert 'perturbation' not in this.inputs + this.outputs
  needed, jaxpr = this.to('params')
  assert needed == {'batch', 'params', 'batch_stats', 'opt_state', 'step'}
  attack = np.array(contractions(flow(1).to('perturbation')[1]))
  update = np.array(contractions(flow(1).to('params')[1]))
  assert (contractions(jaxpr) == attack + update).all()


def test_an_attack_that_moves_statistics_leaves_the_update_independent():
  this = Flow(**{'staleness_steps': 2, 'attack.update_batch_stats': True})
  update = {'batch', 'params', 'perturbation', 'batch_stats', 'opt_state'}
  assert this.to('params', 'opt_state')[0] == update
  assert {'next_batch', 'snapshots[1]'} <= this.to('batch_stats')[0]
  assert this.to('perturbation')[0] == {'next_batch', 'step', 'snapshots[1]'}


def test_an_attack_in_evaluation_mode_reads_the_statistics_of_its_snapshot():
  for tau, stats in ((1, 'batch_stats'), (2, 'snapshots[1]')):
    this = Flow(**{'staleness_steps': tau, 'attack.train_mode': False})
    needed, _ = this.to('perturbation')
    assert stats in needed
    assert needed <= {'next_batch', 'step', 'params', stats}


@pytest.mark.parametrize('tau', (1, 2))
def test_the_attack_computes_no_kernel_gradient(tau):
  """Convolutions: forward and for the pixels; for kernels in the update only.

  That is 2F of arithmetic, where a gradient for everything would be 3F.
  """
  this = flow(tau)
  _, attack = this.to('perturbation')
  _, update = this.to('params')
  convs, denses = (sum(len(k) == n for k in this.kernels) for n in (4, 2))
  assert contractions(attack) == (2 * convs, 2 * denses)
  # The update needs no gradient for its pixels: one convolution less than 3F.
  assert contractions(update) == (3 * convs - 1, 3 * denses)

  shapes = {tuple(sorted(shape)) for shape in this.kernels}

  def kernel_shaped(jaxpr):
    """Kinds of the equations that make an array of a kernel's shape."""
    return {
      equation.primitive.name
      for equation in equations(jaxpr)
      for out in equation.outvars
      if tuple(sorted(out.aval.shape)) in shapes
    }

  # 'pvary' marks a device's own copy of the weights; it computes nothing.
  rearranged = {'rev', 'transpose', 'convert_element_type', 'copy', 'pvary'}
  assert kernel_shaped(attack) <= rearranged
  assert {'conv_general_dilated', 'dot_general'} <= kernel_shaped(update)


@pytest.mark.parametrize('tau', (0, 1))
def test_random_signs_ask_nothing_of_the_network(tau):
  this = Flow(**{'staleness_steps': tau, 'attack.preset': 'random_signs'})
  if tau:
    needed, jaxpr = this.to('perturbation')
    assert needed == {'next_batch', 'step'}
    assert contractions(jaxpr) == (0, 0)
  # The whole step has the passes of its update, and no others.
  update = flow(1).to('params')[1]
  assert contractions(this.jaxpr) == contractions(update)
  assert contractions(flow(tau).jaxpr) > contractions(update)


def test_fast_advprop_wastes_no_pass():
  """One pass of the attack yields both of its gradients."""
  fields = {'method': 'fast_advprop', 'attack.preset': None, 'batch_size': 15}
  this = Flow(**fields, staleness_steps=0)
  convs, denses = (sum(len(k) == n for k in this.kernels) for n in (4, 2))
  # Forward, pixels and kernels; without the pixels of what is trained on.
  assert contractions(this.jaxpr) == (3 * (3 * convs) - 2, 3 * (3 * denses))


# ---- What a step does ------------------------------------------------------


def test_staleness_0_equals_the_sequential_loop(x64):
  """`disadv` as anyone would write it: attack, then train on both."""
  config = helpers.make_config(
    FIELDS | {'dtype': 'float64', 'method': 'disadv'}
  )
  _, apply_fn = helpers.tiny_net(config)
  tx = optim.make_optimizer(config.optimizer, schedule)
  weights = helpers.random_weights(config)
  clean_route, adv_route = 0, 1

  def loss_of(params, stats, pixels, labels, route, smoothing):
    variables = {'params': params, 'batch_stats': stats}
    x = normalize(helpers.SPEC, pixels)[:, None]
    logits, stats = apply_fn(variables, x, (route,), True)
    return losses.cross_entropy(logits[:, 0], labels, smoothing), stats

  @jax.jit
  def attack(params, stats, image, labels, t):
    def loss(pixels, labels):
      each, _ = loss_of(params, stats, pixels, labels, adv_route, 0.0)
      return each.sum(), None

    key = stream_key(config.seed, Stream.ATTACK, t)
    start = sample_start(
      config.attack, key, image, labels, helpers.SPEC.num_classes
    )
    return perturb(config.attack, loss, image, start)[0]

  @jax.jit
  def update(params, stats, opt_state, clean, adv, labels):
    def loss(params):
      smoothing = config.loss.label_smoothing
      a, moved = loss_of(params, stats, clean, labels, clean_route, smoothing)
      b, moved = loss_of(params, moved, adv, labels, adv_route, smoothing)
      return (a.mean() + b.mean()) / 2, moved

    (value, moved), grads = jax.value_and_grad(loss, has_aux=True)(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), moved, opt_state, value

  step = jax.jit(
    helpers.make_step(
      config, helpers.SPEC, apply_fn, tx, schedule, helpers.one_device(config)
    )
  )
  state = helpers.start_state(config, weights, tx)
  expected = weights.params, weights.batch_stats, tx.init(weights.params)
  for t, batch in enumerate(helpers.random_batches(config, 4)):
    clean, labels = batch['clean'].astype(np.float64), batch['label']
    delta = attack(*expected[:2], clean, labels, t)
    adv = np.clip(clean + delta, 0, 255)
    *expected, loss = update(*expected, clean, adv, labels)
    # Without staleness the next batch is not read.
    nothing = jax.tree.map(np.zeros_like, batch)
    state, metrics = step(state, batch, nothing)
    actual = state.params, state.batch_stats, state.opt_state
    helpers.assert_close(actual, tuple(expected), 1e-12)
    helpers.assert_close(metrics['loss'], loss, 1e-12)
    assert state.perturbation is None
    assert state.snapshots == ()


@pytest.mark.parametrize('routes', ((0, 1, 2), (2, 0, 1), (1,)))
@pytest.mark.parametrize('train', (True, False))
def test_views_in_one_batch_equal_views_one_by_one(x64, routes, train):
  config = helpers.make_config({'dtype': 'float64', 'method': 'conadv_aa'})
  _, apply_fn = helpers.tiny_net(config)
  weights = helpers.random_weights(config)
  variables = {'params': weights.params, 'batch_stats': weights.batch_stats}
  shape = (2, len(routes), 3, *helpers.SPEC.image_shape)
  x = np.random.default_rng(0).normal(size=shape)

  @jax.jit
  def at_once(x):
    return apply_fn(variables, x, routes, train)

  @functools.partial(jax.jit, static_argnums=2)
  def alone(stats, x, route):
    one = variables | {'batch_stats': stats}
    return apply_fn(one, x[:, None], (route,), train)

  logits, stats = at_once(x)
  expected = weights.batch_stats
  for view, route in enumerate(routes):
    one, expected = alone(expected, x[:, view], route)
    helpers.assert_close(logits[:, view], one[:, 0], 1e-12)
  helpers.assert_close(stats, expected, 1e-12)


def rows(tree, row):
  return jax.tree.map(lambda x: np.asarray(x)[row], tree)


def test_the_clean_statistics_are_those_of_a_run_without_attack(x64):
  fields = {'dtype': 'float64', 'optimizer.name': 'sgd'}
  conadv = helpers.make_config(fields)
  baseline = helpers.make_config(fields | {'method': 'baseline'})
  weights = helpers.random_weights(conadv)
  first_row = jax.tree_util.tree_map_with_path(
    lambda path, x: x[:1] if 'norm' in str(path) else x, weights
  )
  batches = helpers.random_batches(conadv, 2)
  stats = {}
  for config, start_weights in ((conadv, weights), (baseline, first_row)):
    _, apply_fn = helpers.tiny_net(config)
    tx = optim.make_optimizer(config.optimizer, schedule)
    step = jax.jit(
      helpers.make_step(
        config, helpers.SPEC, apply_fn, tx, schedule, helpers.one_device(config)
      )
    )
    state = helpers.start_state(config, start_weights, tx)
    stats[config.method] = step(state, *batches)[0].batch_stats
  before, conadv, baseline = (
    rows(s, 0)
    for s in (weights.batch_stats, stats['conadv'], stats['baseline'])
  )
  helpers.assert_close(conadv, baseline, 1e-12)
  assert helpers.bits(conadv) != helpers.bits(before)


@pytest.mark.parametrize('moves_stats', (False, True))
def test_adversarial_images_move_adversarial_statistics_only(moves_stats):
  if moves_stats:
    config = helpers.make_config({'attack.update_batch_stats': True})
    _, apply_fn = helpers.tiny_net(config)
    tx = optim.make_optimizer(config.optimizer, schedule)
    step = jax.jit(
      helpers.make_step(
        config, helpers.SPEC, apply_fn, tx, schedule, helpers.one_device(config)
      )
    )
    state, batches = start(config), helpers.random_batches(config, 3)
  else:
    run = trained(1)
    step, state, batches = run.step, run.states[2], run.batches
  a, _ = step(state, batches[0], batches[1])
  others = {
    'next batch': step(state, batches[0], batches[2])[0],
    'perturbation': step(
      state.replace(perturbation=Perturbation(state.perturbation.images + 3)),
      *batches[:2],
    )[0],
  }
  moved = set()
  for name, b in others.items():
    clean = (rows(s.batch_stats, 0) for s in (a, b))
    assert helpers.bits(next(clean)) == helpers.bits(next(clean))
    adv = (rows(s.batch_stats, 1) for s in (a, b))
    if helpers.bits(next(adv)) != helpers.bits(next(adv)):
      moved.add(name)
  # The view that is trained on moves its row; the attack does if told to.
  assert moved == {'perturbation'} | ({'next batch'} if moves_stats else set())


# ---- Steps that are not finite ---------------------------------------------

KEPT = ('params', 'batch_stats', 'opt_state', 'ema')


def kept(state):
  return helpers.bits([getattr(state, field) for field in KEPT])


def with_bad_pixel(state):
  perturbation = np.array(state.perturbation.images)
  perturbation[0, 0, 0, 0, 0] = np.nan
  return state.replace(perturbation=Perturbation(perturbation))


def counts(state):
  return tuple(
    int(x) for x in (state.step, state.nonfinite_steps, state.nonfinite_streak)
  )


@pytest.mark.slow
@pytest.mark.parametrize('tau', (1, 2))
def test_a_step_that_is_not_finite_is_counted_and_not_applied(tau):
  run = trained(tau)
  batches = run.batches
  good = run.states[2]
  state, metrics = run.step(with_bad_pixel(good), batches[2], batches[3])
  assert np.isnan(metrics['loss'])
  assert counts(state) == (3, 1, 1)
  assert kept(state) == kept(good)

  state, metrics = run.step(with_bad_pixel(state), batches[3], batches[4])
  assert counts(state) == (4, 2, 2)
  assert (metrics['nonfinite_steps'], metrics['nonfinite_streak']) == (2, 2)
  assert kept(state) == kept(good)

  # The next good step is what it would have been without the bad ones: the
  # learning rate counts the updates that were made.
  same = good.replace(perturbation=state.perturbation)
  direct, _ = run.step(same, batches[4], batches[5])
  state, metrics = run.step(state, batches[4], batches[5])
  assert counts(state) == (5, 2, 0)
  assert kept(state) == kept(direct) != kept(good)
  assert metrics['learning_rate'] == np.float32(schedule(2.0))
  again = pending_perturbation(run.config, run.step, state, batches[5])
  assert helpers.bits(again.perturbation) == helpers.bits(state.perturbation)


@pytest.mark.parametrize('leaf', ('conv1', 'head'))
def test_weights_that_are_not_finite_stay_as_they_are(leaf):
  run = trained(1)
  state = copied(run.states[2])
  state.params[leaf]['kernel'] = state.params[leaf]['kernel'].at[0].set(jnp.nan)
  new, metrics = run.step(state, run.batches[2], run.batches[3])
  assert np.isnan(metrics['loss'])
  assert counts(new) == (3, 1, 1)
  assert kept(new) == kept(state)


def test_a_gradient_norm_that_overflows_is_not_applied_though_the_loss_is():
  run = trained(1)
  state = copied(run.states[2])
  state.params['head']['kernel'] *= 1e25
  new, metrics = run.step(state, run.batches[2], run.batches[3])
  assert np.isfinite(metrics['loss'])
  assert np.isinf(metrics['grad_norm'])
  assert counts(new) == (3, 1, 1)
  assert kept(new) == kept(state)


def test_a_variance_that_overflows_is_not_applied_though_the_rest_is_finite():
  """Batch norm then multiplies by 0: neither loss nor gradient shows it."""
  run = trained(1)
  state = copied(run.states[2])
  state.params['conv1']['kernel'] *= 1e19
  new, metrics = run.step(state, run.batches[2], run.batches[3])
  assert np.isfinite(metrics['loss']) and np.isfinite(metrics['grad_norm'])
  assert counts(new) == (3, 1, 1)
  assert kept(new) == kept(state)


def test_attack_statistics_that_are_not_finite_are_left_out():
  """They come from older weights: the loss of the step does not show them."""
  config = helpers.make_config(
    FIELDS | {'staleness_steps': 2, 'attack.update_batch_stats': True}
  )
  step, batches = jit_step(config), helpers.random_batches(config, 2)
  state = copied(start(config))
  state.snapshots[1].params['conv1']['kernel'] *= 1e30
  new, metrics = step(state, *batches)
  assert np.isfinite(metrics['loss']) and np.isfinite(metrics['grad_norm'])
  assert counts(new) == (1, 0, 0)
  assert kept(new) != kept(state)
  for leaf in jax.tree.leaves(new.batch_stats):
    assert np.isfinite(leaf).all()


# ---- Snapshots -------------------------------------------------------------


@pytest.mark.parametrize('tau', STALENESS)
def test_snapshots_are_the_weights_of_the_last_steps_oldest_first(tau):
  run = trained(tau)
  for t, state in enumerate(run.states):
    assert len(state.snapshots) == tau
    for i, snapshot in enumerate(state.snapshots):
      then = run.states[max(t - tau + i, 0)]
      assert helpers.bits(snapshot.params) == helpers.bits(then.params)
      assert helpers.bits(snapshot.batch_stats) == helpers.bits(
        then.batch_stats
      )


@pytest.mark.parametrize('tau', STALENESS)
def test_the_pending_perturbation_is_made_again_bit_for_bit(tau):
  run = trained(tau)
  for t, state in enumerate(run.states):
    restored = state.replace(perturbation=None)  # as after a restore
    batch = jax.tree.map(jnp.asarray, run.batches[t])
    again = pending_perturbation(run.config, run.step, restored, batch)
    assert np.abs(state.perturbation.images).max() > 1
    assert helpers.bits(again) == helpers.bits(state)


def test_each_batch_is_attacked_from_a_start_of_its_own():
  run = trained(1)
  state = run.states[2]
  later = state.replace(step=state.step + 1)
  same = run.batches[3], run.batches[4]
  a, b = (run.step(s, *same)[0] for s in (state, later))
  assert helpers.bits(a.params) == helpers.bits(b.params)
  assert helpers.bits(a.perturbation) != helpers.bits(b.perturbation)
