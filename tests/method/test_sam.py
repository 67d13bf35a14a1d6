"""Perturbed weights: which gradient, how long, what it costs, what is refused.

`test_oracle.py` has twelve steps of each kind against NumPy.
"""

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flow import Flow, contractions, equations

from conadv_jax import experiment
from conadv_jax.base.errors import ConfigError
from conadv_jax.devices.mesh import Places
from conadv_jax.method import optim, sam
from conadv_jax.method.gradients import training_loss
from conadv_jax.method.pixels import wide_dtype
from conadv_jax.method.setup import Setup
from conadv_jax.method.staleness import pending_perturbation
from conadv_jax.method.state import Snapshot
from conadv_jax.methods import Method

STEPS = 4
SLOW = pytest.mark.slow


def schedule(count):
  return 0.2 / (1.0 + count)


def history(config, bad_step=None):
  """States and metrics of a few steps of `config`, on the host."""
  weights = helpers.random_weights(config)
  optimizer = optim.make_optimizer(config.optimizer, schedule)
  _, apply_fn = helpers.tiny_net(config)
  step_fn = jax.jit(
    helpers.make_step(
      config,
      helpers.SPEC,
      apply_fn,
      optimizer,
      schedule,
      helpers.one_device(config),
    ),
    donate_argnums=0,
  )
  batches = helpers.random_batches(config, STEPS + 1)
  state = helpers.start_state(config, weights, optimizer)
  state = pending_perturbation(config, step_fn, state, batches[0])
  found = []
  for t in range(STEPS):
    if t == bad_step:
      d = jax.tree.map(lambda x: x.at[0].set(jnp.nan), state.perturbation)
      state = state.replace(perturbation=d)
    state, values = step_fn(state, *batches[t : t + 2])
    found.append(jax.device_get((state, values)))
  return found


# ---- What is computed from what --------------------------------------------


@pytest.mark.parametrize(
  ('method', 'tau', 'attacker'),
  [
    ('consam', 1, 'params'),
    pytest.param('consam', 2, 'snapshots[1]', marks=SLOW),
    pytest.param('conadv_consam', 1, 'params', marks=SLOW),
  ],
)
def test_ascent_and_update_share_no_result(method, tau, attacker):
  this = Flow(method=method, staleness_steps=tau)
  update = {'batch', 'params', 'perturbation', 'batch_stats', 'opt_state'}
  assert this.to('params', 'opt_state')[0] == update
  needed = this.to('perturbation')[0]
  assert {'next_batch', attacker} <= needed <= {'next_batch', attacker, 'step'}
  assert this.to('batch_stats')[0] == update - {'opt_state'} | {
    'next_batch',
    attacker,
  }


@pytest.mark.parametrize('method', ('consam', 'sampa'))
def test_sums_in_vectors_do_not_join_what_an_ascent_yields(method):
  """Not even its statistics, which would make the weights wait for it."""
  this = Flow(method=method, grad_buckets=1)
  needed = this.to('params', 'opt_state')[0]
  assert ('next_batch' in needed) == (method == 'sampa')
  assert 'batch' not in this.to('perturbation')[0]


def test_the_lookahead_ascends_beside_the_update_too():
  this = Flow(method='sampa')
  assert this.to('perturbation')[0] == {'next_batch', 'snapshots[1]'}
  # The update takes both gradients, and neither waits for the other.
  assert {'batch', 'next_batch'} <= this.to('params')[0]


def test_without_staleness_the_update_waits_for_the_ascent():
  this = Flow(method='sam')
  assert 'perturbation' not in this.inputs + this.outputs
  assert 'next_batch' not in this.to('params')[0]
  convs, denses = (sum(len(k) == n for k in this.kernels) for n in (4, 2))
  assert contractions(this.jaxpr) == (2 * (3 * convs - 1), 2 * 3 * denses)


@pytest.mark.parametrize('mask', ('all', 'norm_only'))
def test_the_ascent_computes_the_gradients_it_needs(mask):
  """Pixels are not asked for; nor, with `norm_only`, is any kernel."""
  this = Flow(**{'method': 'consam', 'sam.mask': mask})
  _, jaxpr = this.to('perturbation')
  convs, denses = (sum(len(k) == n for k in this.kernels) for n in (4, 2))
  passes = 3 if mask == 'all' else 2
  assert contractions(jaxpr) == (passes * convs - 1, passes * denses)
  shapes = {tuple(sorted(shape)) for shape in this.kernels}
  made = {
    equation.primitive.name
    for equation in equations(jaxpr)
    for out in equation.outvars
    if tuple(sorted(out.aval.shape)) in shapes
  }
  is_contracted = bool(made & {'conv_general_dilated', 'dot_general'})
  assert is_contracted == (mask == 'all')


@pytest.mark.parametrize('method', ('msam', 'random'))
def test_free_directions_cost_no_pass(method):
  assert contractions(Flow(method=method).jaxpr) == contractions(
    Flow(method='baseline').jaxpr
  )


def test_flops_are_those_of_the_papers():
  """In units of the forward pass: 3 of the baseline, 6 and 5 with an ascent."""

  def flops(method, **fields):
    fields = {f'sam.{name}': value for name, value in fields.items()}
    config = helpers.make_config({'method': method, 'batch_size': 3} | fields)
    return experiment.build(config, jax.devices()[:1]).flops_per_device()

  ratio = flops('consam') / flops('baseline')
  assert ratio == flops('sam') / flops('baseline') == 2
  assert flops('msam') == flops('random') == flops('baseline')
  few = flops('consam', mask='norm_only') / flops('baseline')
  assert few == pytest.approx(5 / 3, abs=0.01)
  both = flops('conadv_consam') - flops('conadv')
  assert both == flops('baseline')


# ---- How weights are moved -------------------------------------------------

PARAMS = {
  'conv': {'kernel': np.array([[3.0, 4.0]])},
  'norm': {'scale': np.array([[1.0], [2.0]]), 'bias': np.array([[0.0], [4.0]])},
}
NOW = Snapshot(PARAMS, {'norm': {'mean': np.zeros((2, 1))}})
D = {
  'conv': {'kernel': np.array([[2.0, 0.0]])},
  'norm': {
    'scale': np.array([[0.0], [1.0]]),
    'bias': np.array([[0.0], [-2.0]]),
  },
}


@pytest.mark.parametrize(
  ('normalize', 'expected'),
  [
    # |d| = 3.
    ('global', ([[0.2, 0.0]], [[0.0], [0.1]], [[0.0], [-0.2]])),
    # T d = (6, 0; 0, 2; 0, -8), |T d|^2 = 104; times T again.
    (
      'adaptive',
      ([[18, 0.0]], [[0.0], [4]], [[0.0], [-32]]),
    ),
    # |w| / |d| of the kernel 5 / 2; of each row of the others.
    ('layerwise', ([[1.5, 0.0]], [[0.0], [0.6]], [[0.0], [-1.2]])),
  ],
)
def test_directions_by_hand(normalize, expected, x64):
  config = helpers.make_config(
    {'method': 'consam', 'sam.rho': 0.3, 'sam.normalize': normalize}
  )
  factor = 0.3 / np.sqrt(104) if normalize == 'adaptive' else 1
  moved = sam.moved(config, NOW, D).params
  offsets = jax.tree.map(np.subtract, moved, PARAMS)
  kernel, scale, bias = (factor * np.array(x) for x in expected)
  expected = {
    'conv': {'kernel': kernel},
    'norm': {'scale': scale, 'bias': bias},
  }
  helpers.assert_close(offsets, expected, 1e-14)


@pytest.mark.parametrize('normalize', ('global', 'adaptive', 'layerwise'))
def test_a_direction_of_zeros_moves_nothing_and_one_of_nan_all(normalize, x64):
  config = helpers.make_config({'method': 'consam', 'sam.normalize': normalize})
  nothing = jax.tree.map(np.zeros_like, D)
  helpers.assert_close(sam.moved(config, NOW, nothing).params, PARAMS, 0)
  bad = jax.tree.map(lambda x: x * np.nan, D)
  leaves = jax.tree.leaves(sam.moved(config, NOW, bad).params)
  assert all(np.isnan(x).all() for x in leaves)


def test_random_directions_are_of_the_step_and_as_long_as_rho():
  config = helpers.make_config({'method': 'random', 'sam.rho': 0.7})
  setup = Setup(config, helpers.SPEC, None, None, None, schedule)
  weights = helpers.random_weights(config)
  optimizer = optim.make_optimizer(config.optimizer, schedule)
  first = helpers.start_state(config, weights, optimizer)

  def offset(state):
    d = sam.free_direction(setup, state)
    params = sam.moved(config, weights, d).params
    return jax.tree.map(np.subtract, params, weights.params)

  a, b = offset(first), offset(first.replace(step=first.step + 1))
  for e in (a, b):
    assert optax.tree.norm(e) == pytest.approx(0.7, rel=1e-5)
  product = optax.tree.vdot(a, b) / 0.7**2
  assert abs(product) < 0.4


# ---- Equivalences ----------------------------------------------------------


def test_sequential_sam_equals_optax(x64):
  fields = {
    'dtype': 'float64', 'method': 'sam', 'sam.rho': 0.2,
    'optimizer.name': 'sgd', 'optimizer.nesterov': True,
  }  # fmt: skip
  config = helpers.make_config(fields)
  _, apply_fn = helpers.tiny_net(config)
  setup = Setup(config, helpers.SPEC, apply_fn, None, None, schedule)
  weights = helpers.random_weights(config)
  theirs = optax.contrib.sam(
    optim.make_optimizer(config.optimizer, schedule),
    optax.chain(optax.contrib.normalize(), optax.sgd(config.sam.rho)),
    opaque_mode=True,
  )
  params, state = weights.params, theirs.init(weights.params)
  batches = helpers.random_batches(config, STEPS + 1)

  @jax.jit
  def step(params, state, batch):
    def grad_fn(params, _):
      images = {'clean': batch['clean'].astype(wide_dtype(config))}
      return jax.grad(training_loss, 1, has_aux=True)(
        setup,
        params,
        weights.batch_stats,
        images,
        batch['label'],
        0,
        Places(None, None),
      )[0]

    grads = grad_fn(params, 0)
    updates, state = theirs.update(grads, state, params, grad_fn=grad_fn)
    return optax.apply_updates(params, updates), state

  for (ours, _), batch in zip(history(config), batches, strict=False):
    params, state = step(params, state, batch)
    helpers.assert_close(ours.params, params, 1e-12)


@pytest.mark.parametrize(
  'fields',
  [
    {'method': 'sam'},
    {'method': 'consam', 'staleness_steps': 2},
    pytest.param({'method': 'msam'}, marks=SLOW),
    pytest.param({'method': 'random'}, marks=SLOW),
    pytest.param({'method': 'sampa', 'sam.mix': 0.0}, marks=SLOW),
  ],
  ids=lambda fields: fields['method'],
)
def test_without_rho_it_is_the_baseline_bit_for_bit(fields):
  def run(fields):
    return [
      helpers.bits([state.params, state.batch_stats, state.opt_state, values])
      for state, values in history(helpers.make_config(fields))
    ]

  baseline = run({'method': 'baseline'})
  assert run(fields | {'sam.rho': 0.0}) == baseline
  assert run(fields | {'sam.rho': 0.1}) != baseline


# ---- Bad steps and bad settings --------------------------------------------


@pytest.mark.parametrize('method', ('consam', 'sampa'))
def test_an_ascent_that_is_not_finite_costs_one_step(method):
  found = history(helpers.make_config({'method': method}), bad_step=1)
  (before, _), (after, _), (later, values), _ = found
  assert helpers.bits(after.params) == helpers.bits(before.params)
  assert helpers.bits(later.params) != helpers.bits(after.params)
  assert values['nonfinite_steps'] == 1
  assert values['nonfinite_streak'] == 0
  assert np.isfinite(jax.tree.leaves(later.batch_stats)[0]).all()


def test_a_lookahead_that_is_not_finite_stays_at_the_weights():
  config = helpers.make_config({'method': 'sampa'})
  optimizer = optim.make_optimizer(config.optimizer, schedule)
  mesh = helpers.one_device(config)
  setup = Setup(config, helpers.SPEC, None, mesh, optimizer, schedule)
  state = helpers.start_state(config, helpers.random_weights(config), optimizer)
  for value, stays in ((1.0, False), (jnp.nan, True)):
    d = jax.tree.map(lambda x, value=value: x + value, state.params)
    found = sam.lookahead(setup, state, d)
    assert (helpers.bits(found.params) == helpers.bits(state.params)) == stays


def test_statistics_come_from_the_pass_of_the_ascent_alone():
  """From weights that are not perturbed, and once a step."""
  config = helpers.make_config({'method': 'sam', 'sam.rho': 2.0})
  baseline = helpers.make_config({'method': 'baseline'})
  ours, theirs = (history(c)[0][0] for c in (config, baseline))
  helpers.assert_close(ours.batch_stats, theirs.batch_stats, 1e-6)
  with pytest.raises(AssertionError):
    helpers.assert_close(ours.params, theirs.params, 1e-3)


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'sam.rho': -0.1}, r'sam.rho=-0.1: must be >= 0'),
    ({'sam.mask': 'kernels'}, r"sam.mask.*'kernels'.*norm_only"),
    ({'sam.normalize': 'globl'}, r"sam.normalize.*'globl'.*global"),
    ({'sam.group_size': 4}, r'sam.group_size=4: must divide batch_size=6'),
    ({'sam.group_size': 5}, r'sam.group_size=5: must divide batch_size=6'),
    ({'method': 'sampa', 'staleness_steps': 2}, 'looks one step ahead'),
    ({'method': 'sampa', 'sam.mask': 'norm_only'}, "leave it at 'all'"),
    ({'method': 'sampa', 'sam.group_size': 3}, 'leave it at 0'),
    ({'method': 'sam', 'staleness_steps': 1}, "for more, use 'consam'"),
    ({'method': 'msam', 'staleness_steps': 1}, 'perturbs with no gradient'),
    ({'method': 'msam', 'optimizer.momentum': 0.0}, 'optimizer.momentum=0.0'),
    (
      {'method': 'conadv_consam', 'loss.view_weights': {'clean': 0, 'adv': 1}},
      r"has a loss of \['clean'\], which must not all be 0",
    ),
  ],
)
def test_bad_settings_are_refused(fields, message):
  with pytest.raises(ConfigError, match=message):
    helpers.make_config({'method': 'consam'} | fields)


def test_a_group_is_a_part_of_the_batch():
  def build(**fields):
    return helpers.make_config(
      {'method': 'consam', 'sam.group_size': 3} | fields
    )

  with pytest.raises(
    ConfigError, match=r'sam.group_size=3: .* set microbatches=2'
  ):
    sam.check_parts(build(), helpers.one_device(build()))
  config = build(microbatches=2)
  sam.check_parts(config, helpers.one_device(config))
  assert sam.in_groups(config)
  whole = helpers.make_config({'method': 'consam', 'sam.group_size': 6})
  assert not sam.in_groups(whole)


@pytest.mark.parametrize(
  'fields',
  [
    {'method': 'consam', 'sam.group_size': 3},
    {'method': 'baseline', 'noise_scale': True},
    {'method': 'fast_advprop'},
  ],
  ids=lambda fields: fields['method'],
)
def test_weights_are_read_on_devices_that_training_could_not_have(fields):
  config = helpers.make_config({'model': 'resnet8'} | fields)
  where = jax.devices()[:1], helpers.SPEC
  with pytest.raises(ConfigError, match='microbatches'):
    experiment.build(config, *where)
  experiment.build(config, *where, trains=False).abstract_state()


def test_a_method_that_perturbs_weights_needs_what_they_are_made_with():
  clean = (('clean', 'clean'),)
  for fields in (
    {'ascent': 'gradient'},
    {'ascent': 'momentum', 'staleness_steps': 1},
    {'ascent': 'lookahead', 'staleness_steps': 2},
    {'ascent': 'upwards', 'staleness_steps': 1},
  ):
    with pytest.raises(ConfigError, match='ascent|staleness_steps'):
      Method(clean, **fields)
