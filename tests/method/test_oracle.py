"""The training step against an independent NumPy one, in float64."""

import dataclasses
import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest

from conadv_jax.method import optim, sam
from conadv_jax.method.attack import (
  sample_start,
)
from conadv_jax.method.staleness import pending_perturbation
from conadv_jax.method.state import Perturbation, Stream, stream_key

pytestmark = pytest.mark.usefixtures('x64')

STEPS = 12
TOLERANCE = 1e-9

FGSM = {'attack.preset': 'fgsm', 'attack.epsilon': 6.0}
# A probability between 0 and 1: groups with and without a random start.
PGD2 = {
  'attack.preset': 'pgd',
  'attack.steps': 2,
  'attack.epsilon': 6.0,
  'attack.step_size': 4.0,
  'attack.random_start_prob': 0.6,
}
L2 = PGD2 | {
  'attack.norm': 'l2',
  'attack.epsilon': 40.0,
  'attack.step_size': 30.0,
}
PAPER = {'attack.preset': 'paper'}
NORM_OF_SUM = {'optimizer.lars_denominator': 'norm_of_sum'}
SUM_OF_NORMS = {'optimizer.lars_denominator': 'sum_of_norms'}
SGD = {'optimizer.name': 'sgd', 'optimizer.learning_rate': 0.3}
EMA = {'ema.decay': 0.9}
# Two groups of ten are attacked.
FAST = {'method': 'fast_advprop', 'batch_size': 30, 'attack.epsilon': 6.0}


def conadv(tau, *, aa=False):
  method = 'conadv_aa' if aa else 'conadv'
  return {'method': method, 'staleness_steps': tau}


# Not the full product: every value of every axis, and the pairs that share
# code (staleness with random starts, with old statistics, with moved ones).
CASES = {
  'baseline': {'method': 'baseline'} | SGD | EMA,
  'disadv-fgsm-lars': {'method': 'disadv'} | FGSM | NORM_OF_SUM,
  'tau0-aa-pgd-lars2': conadv(0, aa=True) | PGD2 | SUM_OF_NORMS,
  'tau0-fgsm-moves_stats': conadv(0)
  | FGSM
  | {'attack.update_batch_stats': True},
  'tau1-fgsm-lars2': conadv(1) | FGSM | SUM_OF_NORMS,
  'tau1-aa-pgd-sgd-ema': conadv(1, aa=True) | PGD2 | SGD | EMA,
  'tau1-l2-nesterov': conadv(1) | L2 | {'optimizer.nesterov': True},
  'tau2-aa-fgsm-weights': conadv(2, aa=True)
  | FGSM
  | {'loss.view_weights': {'clean': 1.0, 'aa': 0.5, 'adv': 2.0}},
  'tau2-paper-ema_params': conadv(2) | PAPER | EMA | {'ema.batch_stats': False},
  'tau2-pgd-eval_mode': conadv(2) | PGD2 | {'attack.train_mode': False},
  'tau3-pgd-moves_stats': conadv(3)
  | PGD2
  | SUM_OF_NORMS
  | {'attack.update_batch_stats': True},
  'tau3-aa-l2-sgd': conadv(3, aa=True) | L2 | SGD,
  'fast_advprop-lars': FAST | NORM_OF_SUM | EMA,
  'fast_advprop-l2-sgd-weights': FAST
  | SGD
  | {
    'attack.norm': 'l2',
    'attack.epsilon': 40.0,
    'attack.random_start_prob': 0.5,
    'loss.view_weights': {'clean': 1.0, 'aa': 1.0, 'adv': 3.0},
  },
}

# Weights are perturbed: each ascent, length, mask and kind of group.
SIZE = {'sam.rho': 0.3}
ADAPTIVE = {'sam.normalize': 'adaptive'}
LAYERWISE = {'sam.normalize': 'layerwise', 'sam.rho': 0.1}
NORM_ONLY = {'sam.mask': 'norm_only'}


def consam(tau):
  return {'method': 'consam', 'staleness_steps': tau} | SIZE


CASES |= {
  'sam-lars': {'method': 'sam'} | SIZE | NORM_OF_SUM,
  'sam-adaptive-sgd': {'method': 'sam'} | SIZE | ADAPTIVE | SGD | EMA,
  'sam-layerwise-parts': {'method': 'sam', 'microbatches': 2} | LAYERWISE,
  'sam-groups-norm_only': {'method': 'sam', 'microbatches': 2}
  | SIZE
  | NORM_ONLY
  | {'sam.group_size': 6, 'batch_size': 12},
  'consam1-lars2': consam(1) | SUM_OF_NORMS | EMA,
  'consam1-norm_only-adaptive': consam(1) | NORM_ONLY | ADAPTIVE | SGD,
  'consam1-groups': consam(1)
  | {'microbatches': 2, 'sam.group_size': 6, 'batch_size': 12},
  'consam2-layerwise': consam(2) | LAYERWISE | SUM_OF_NORMS,
  'consam2-norm_only': consam(2) | NORM_ONLY | {'microbatches': 2},
  'sampa-sgd': {'method': 'sampa'} | SIZE | SGD | {'sam.mix': 0.3},
  'sampa-adaptive-lars': {'method': 'sampa'} | SIZE | ADAPTIVE | SUM_OF_NORMS,
  'sampa-layerwise': {'method': 'sampa'} | LAYERWISE | SGD,
  'msam-sgd': {'method': 'msam'} | SIZE | SGD,
  'msam-layerwise-lars2': {'method': 'msam'} | LAYERWISE | SUM_OF_NORMS,
  'conadv_consam-layerwise': {'method': 'conadv_consam'} | FGSM | LAYERWISE,
  'conadv_consam2-sgd': {'method': 'conadv_consam', 'staleness_steps': 2}
  | FGSM
  | SIZE
  | SGD
  | {'loss.view_weights': {'clean': 1.0, 'aa': 1.0, 'adv': 2.0}},
}

# Each staleness code, view and optimizer; the other cases are slow tests.
QUICK = (
  'baseline',
  'tau0-fgsm-moves_stats',
  'tau1-fgsm-lars2',
  'tau2-aa-fgsm-weights',
  'fast_advprop-lars',
  'sam-lars',
  'consam1-groups',
  'consam2-layerwise',
  'sampa-sgd',
)


def learning_rate(config, count, cos=np.cos):
  """A rate that differs in every step, up and down."""
  return config.optimizer.learning_rate * (0.3 + 0.1 * cos(1.0 * count))


def setting_of(config):
  """`config` in the oracle's terms."""
  attack, optimizer = config.attack, config.optimizer
  name = optimizer.name
  if name == 'lars':
    name = f'lars_{optimizer.lars_denominator}'
  views = tuple(view for view, _ in config.views)
  return oracle.Setting(
    views=views,
    rows=tuple(range(len(views))),  # one route a view, in the same order
    adv_row=views.index('adv') if 'adv' in views else None,
    weights=tuple(
      config.loss.view_weights[v]
      / sum(config.loss.view_weights[u] for u in views)
      for v in views
    ),
    tau=config.staleness_steps,
    # One more: the lookahead makes a step of its own.
    rates=tuple(learning_rate(config, t) for t in range(STEPS + 1)),
    optimizer=name,
    momentum=optimizer.momentum,
    nesterov=optimizer.nesterov,
    weight_decay=optimizer.weight_decay,
    trust_coefficient=optimizer.trust_coefficient,
    label_smoothing=config.loss.label_smoothing,
    mean=helpers.SPEC.mean,
    std=helpers.SPEC.std,
    norm=attack.norm,
    epsilon=attack.epsilon,
    step_size=attack.step_size,
    attack_steps=attack.steps,
    targeted=attack.targeted,
    train_mode=attack.train_mode,
    update_batch_stats=attack.update_batch_stats,
    ema_decay=config.ema.decay,
    ema_batch_stats=config.ema.batch_stats,
    bn_momentum=0.9,
    bn_epsilon=1e-5,
    adv_every=config.adv_every,
    ascent=config.ascent,
    rho=config.sam.rho,
    normalize=config.sam.normalize,
    norm_only=config.sam.mask == 'norm_only',
    sam_groups=(config.sam.group_size or config.batch_size)
    // config.bn_group_size,
    mix=config.sam.mix,
  )


def attack_starts(config, batches):
  """Random starts of the attack on each batch: all that the oracle is given."""

  @jax.jit
  def sample(t, image, labels):
    key = stream_key(config.seed, Stream.ATTACK, t)
    return sample_start(
      config.attack, key, image, labels, helpers.SPEC.num_classes
    )

  return [
    jax.device_get(sample(t, batch['clean'].astype(np.float64), batch['label']))
    for t, batch in enumerate(batches)
  ]


def library_records(config, weights, batches):
  """What `conadv_jax` makes of the same run, in the oracle's terms."""
  schedule = functools.partial(learning_rate, config, cos=jnp.cos)
  tx = optim.make_optimizer(config.optimizer, schedule)
  _, apply_fn = helpers.tiny_net(config)
  step = jax.jit(
    helpers.make_step(
      config, helpers.SPEC, apply_fn, tx, schedule, helpers.one_device(config)
    ),
    donate_argnums=0,
  )
  state = helpers.start_state(config, weights, tx)
  state = pending_perturbation(config, step, state, batches[0])
  records = []
  for batch, following in zip(batches, batches[1:], strict=False):
    pending = jax.device_get(state.perturbation) or Perturbation()
    state, metrics = step(state, batch, following)
    kept = jax.device_get(state)
    records.append(
      oracle.Record(
        losses={k: v for k, v in metrics.items() if k.startswith('loss')},
        perturbation=pending.images,
        ascent=groups_of(config, pending.weights),
        params=kept.params,
        stats=kept.batch_stats,
        trace=optax.tree.get(kept.opt_state, 'trace'),
        ema=kept.ema and (kept.ema.params, kept.ema.batch_stats),
      )
    )
  return records


def groups_of(config, d):
  """The pending d_t as the oracle has it, or None."""
  if d is None:
    return None
  count = config.batch_size // (config.sam.group_size or config.batch_size)
  if count == 1:
    return [d]
  return [jax.tree.map(lambda x, k=k: x[k, 0], d) for k in range(count)]


@pytest.mark.parametrize(
  'name',
  [
    *QUICK,
    *(pytest.param(n, marks=pytest.mark.slow) for n in CASES if n not in QUICK),
  ],
)
def test_twelve_steps_equal_the_numpy_oracle(name):
  config = helpers.make_config({'dtype': 'float64', 'seed': 7} | CASES[name])
  weights = helpers.random_weights(config)
  batches = helpers.random_batches(config, STEPS + 1)
  starts = [None] * len(batches)
  if config.is_adversarial:
    starts = attack_starts(config, batches)
  plain = jax.device_get((weights.params, weights.batch_stats))
  expected = oracle.train(setting_of(config), *plain, batches, starts)
  actual = library_records(config, weights, batches)
  for t, (a, e) in enumerate(zip(actual, expected, strict=True)):
    if config.staleness_steps == 0:
      # Never leaves the step; the loss on it is compared.
      e.perturbation = None
    if config.staleness_steps == 0 or not config.ascends:
      e.ascent = None
    elif config.sam.mask == 'norm_only':
      e.ascent = [sam.chosen(config, d) for d in e.ascent]
    if config.ema.decay == 0:
      e.ema = None
    for field in dataclasses.fields(oracle.Record):
      pair = (getattr(r, field.name) for r in (a, e))
      try:
        helpers.assert_close(*pair, TOLERANCE)
      except AssertionError as error:
        raise AssertionError(f'step {t}, {field.name}: {error}') from error


def test_the_run_of_the_oracle_moves_everything_it_is_compared_on():
  """Else the comparison above could hold for a step that does nothing."""
  config = helpers.make_config(
    {'dtype': 'float64', 'seed': 7} | CASES['tau1-aa-pgd-sgd-ema']
  )
  weights = helpers.random_weights(config)
  batches = helpers.random_batches(config, STEPS + 1)
  start = jax.device_get((weights.params, weights.batch_stats))
  records = oracle.train(
    setting_of(config), *start, batches, attack_starts(config, batches)
  )
  last = records[-1]
  moved = jax.tree.map(
    lambda before, after: np.abs(after - before),
    start,
    (last.params, last.stats),
  )
  for path, change in jax.tree_util.tree_leaves_with_path(moved):
    per_row = change if 'norm' in str(path) else change.ravel()
    assert (per_row.max(-1) > 1e-3).all(), (path, change)
  assert np.abs(last.perturbation).max() == config.attack.epsilon
  assert last.losses['loss_adv'] != last.losses['loss_clean']
