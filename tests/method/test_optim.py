"""Optimizers against plain NumPy in float64, and their masks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from conadv_jax import models
from conadv_jax.base.errors import ConfigError
from conadv_jax.config import OPTIMIZER_EPS, Optimizer
from conadv_jax.method import optim

LARS = Optimizer(
  name='lars',
  learning_rate=1.0,
  base_batch_size=256,
  scaling='none',
  momentum=0.9,
  nesterov=False,
  weight_decay=0.05,
  lars_denominator='norm_of_sum',
  trust_coefficient=0.02,
  beta1=0.8,
  beta2=0.95,
  decay=0.7,
  eps=0.0,
)
DENOMINATORS = ('norm_of_sum', 'sum_of_norms')


def config_of(**changes):
  return dataclasses.replace(LARS, **changes)


def rate(count):
  """Differs from step to step: its place before the momentum shows."""
  return 0.5 / (1 + count)


# Leaves by path. `dead` starts at zero; `still` never has a gradient.
SHAPES = {
  'block/conv1/kernel': (3, 3, 2, 4),
  'block/norm1/scale': (2, 4),
  'block/norm1/bias': (2, 4),
  'dead/kernel': (3, 5),
  'head/bias': (5,),
  'head/kernel': (4, 5),
  'still/kernel': (2, 2),
}


def nested(flat):
  tree = {}
  for path, value in flat.items():
    *groups, leaf = path.split('/')
    node = tree
    for group in groups:
      node = node.setdefault(group, {})
    node[leaf] = jnp.asarray(value)
  return tree


def flattened(tree):
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {optim.path_name(path): np.asarray(leaf) for path, leaf in leaves}


def draw_params():
  rng = np.random.default_rng(0)
  params = {path: rng.normal(size=shape) for path, shape in SHAPES.items()}
  params['dead/kernel'][:] = 0
  return params


def draw_grads(step):
  rng = np.random.default_rng(100 + step)
  grads = {path: rng.normal(size=shape) for path, shape in SHAPES.items()}
  grads['still/kernel'][:] = 0
  return grads


def run_jax(tx, num_steps):
  """Parameters by path after each step."""
  params = nested(draw_params())
  state = tx.init(params)

  @jax.jit
  def step(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  history = []
  for i in range(num_steps):
    params, state = step(params, state, nested(draw_grads(i)))
    history.append(flattened(params))
  return history


def run_numpy(new_leaf, num_steps):
  """The same with `new_leaf(path, w, g, memory, step)`, leaf by leaf."""
  params, memory, history = draw_params(), {p: {} for p in SHAPES}, []
  for i in range(num_steps):
    grads = draw_grads(i)
    params = {
      path: new_leaf(path, w, grads[path], memory[path], i)
      for path, w in params.items()
    }
    history.append(params)
  return history


def assert_same(actual, expected):
  for step, (a, e) in enumerate(zip(actual, expected, strict=True)):
    assert a.keys() == e.keys()
    for path in e:
      np.testing.assert_allclose(
        a[path], e[path], 1e-11, 1e-13, err_msg=f'{path}, step {step}'
      )


def decayed(config, path, w, g):
  return g + config.weight_decay * w if path.endswith('kernel') else g


def with_momentum(config, memory, update):
  """What momentum makes of an update that the rate is already in."""
  memory['m'] = config.momentum * memory.get('m', 0.0) + update
  if config.nesterov:
    return config.momentum * memory['m'] + update
  return memory['m']


def numpy_ratio(config, w, g):
  """Trust ratio of a kernel, from the definition."""
  w_norm = np.sqrt((w**2).sum())
  if config.lars_denominator == 'norm_of_sum':
    g_norm = np.sqrt(((g + config.weight_decay * w) ** 2).sum())
    denominator = g_norm + config.eps
  else:
    g_norm = np.sqrt((g**2).sum())
    denominator = g_norm + config.weight_decay * w_norm + config.eps
  if w_norm == 0 or g_norm == 0:
    return 1.0
  return config.trust_coefficient * w_norm / denominator


# ---- Against NumPy --------------------------------------------------------


@pytest.mark.parametrize('denominator', DENOMINATORS)
@pytest.mark.parametrize(
  'momentum, nesterov, eps',
  [(0.9, False, 0.0), (0.9, True, 0.0), (0.0, False, 0.0), (0.9, False, 0.3)],
)
def test_lars_equals_numpy(denominator, momentum, nesterov, eps):
  config = config_of(
    lars_denominator=denominator, momentum=momentum, nesterov=nesterov, eps=eps
  )

  def new_leaf(path, w, g, memory, step):
    update = decayed(config, path, w, g)
    if path.endswith('kernel'):
      update = numpy_ratio(config, w, g) * update
    return w - with_momentum(config, memory, rate(step) * update)

  with jax.enable_x64(True):
    actual = run_jax(optim.make_optimizer(config, rate), 5)
  assert_same(actual, run_numpy(new_leaf, 5))
  # A kernel of zeros has ratio 1 and leaves zero; without a gradient, weight
  # decay alone pulls a kernel in.
  first = actual[0]
  np.testing.assert_allclose(
    first['dead/kernel'],
    -rate(0) * (1 + momentum * nesterov) * draw_grads(0)['dead/kernel'],
  )
  assert (
    np.abs(first['still/kernel']) < np.abs(draw_params()['still/kernel'])
  ).all()


@pytest.mark.parametrize(
  'momentum, nesterov', [(0.9, True), (0.9, False), (0, False)]
)
def test_sgd_equals_numpy(momentum, nesterov):
  config = config_of(name='sgd', momentum=float(momentum), nesterov=nesterov)

  def new_leaf(path, w, g, memory, step):
    # The rate after the momentum, where LARS has it before.
    update = with_momentum(config, memory, decayed(config, path, w, g))
    return w - rate(step) * update

  with jax.enable_x64(True):
    actual = run_jax(optim.make_optimizer(config, rate), 4)
  assert_same(actual, run_numpy(new_leaf, 4))


def test_lamb_equals_numpy():
  config = config_of(name='lamb', eps=1e-2)

  def new_leaf(path, w, g, memory, step):
    b1, b2 = config.beta1, config.beta2
    memory['m'] = b1 * memory.get('m', 0.0) + (1 - b1) * g
    memory['v'] = b2 * memory.get('v', 0.0) + (1 - b2) * g**2
    m_hat = memory['m'] / (1 - b1 ** (step + 1))
    v_hat = memory['v'] / (1 - b2 ** (step + 1))
    update = decayed(config, path, w, m_hat / (np.sqrt(v_hat) + config.eps))
    if path.endswith('kernel'):
      norms = np.linalg.norm(w), np.linalg.norm(update)
      update = update * (norms[0] / norms[1] if all(norms) else 1.0)
    return w - rate(step) * update

  with jax.enable_x64(True):
    actual = run_jax(optim.make_optimizer(config, rate), 5)
  assert_same(actual, run_numpy(new_leaf, 5))


@pytest.mark.parametrize(
  'momentum, nesterov', [(0.9, False), (0.9, True), (0, False)]
)
def test_rmsprop_equals_that_of_tensorflow(momentum, nesterov):
  config = config_of(
    name='rmsprop', momentum=float(momentum), nesterov=nesterov, eps=1e-2
  )

  def new_leaf(path, w, g, memory, step):
    g = decayed(config, path, w, g)
    decay = config.decay
    # Mean square starts at 1; eps inside the root; the rate before momentum.
    memory['s'] = decay * memory.get('s', 1.0) + (1 - decay) * g**2
    update = rate(step) * g / np.sqrt(memory['s'] + config.eps)
    return w - with_momentum(config, memory, update)

  with jax.enable_x64(True):
    actual = run_jax(optim.make_optimizer(config, rate), 4)
  assert_same(actual, run_numpy(new_leaf, 4))


@pytest.mark.parametrize('name', OPTIMIZER_EPS)
def test_a_step_without_a_gradient_goes_where_the_momentum_moves(name):
  config = config_of(name=name, eps=OPTIMIZER_EPS[name], weight_decay=0.0)
  tx, params = optim.make_optimizer(config, rate), nested(draw_params())
  grads = nested(draw_grads(0))
  _, state = tx.update(grads, tx.init(params), params)
  moves = optim.momentum_moves(config, state)
  updates, _ = tx.update(jax.tree.map(jnp.zeros_like, grads), state, params)
  for path, move in flattened(moves).items():
    np.testing.assert_array_equal(
      np.sign(flattened(updates)[path]), np.sign(move)
    )
    assert np.any(move) == ('still' not in path)


# ---- Trust ratios ---------------------------------------------------------


def test_norm_of_sum_is_optax_lars():
  config = config_of(nesterov=True, eps=1e-3)
  kernels = nested({path: path.endswith('kernel') for path in SHAPES})
  kernels = jax.tree.map(bool, kernels)
  reference = optax.lars(
    rate,
    weight_decay=config.weight_decay,
    weight_decay_mask=kernels,
    trust_coefficient=config.trust_coefficient,
    eps=config.eps,
    trust_ratio_mask=kernels,
    momentum=config.momentum,
    nesterov=True,
  )
  actual = run_jax(optim.make_optimizer(config, rate), 3)
  for a, e in zip(actual, run_jax(reference, 3), strict=True):
    jax.tree.map(np.testing.assert_array_equal, a, e)


@pytest.mark.parametrize('weight_decay', [0.0, 0.05, 2.0])
def test_ratio_of_the_sum_is_never_below_that_of_the_norms(weight_decay):
  def ratios(denominator, g, w):
    config = config_of(lars_denominator=denominator, weight_decay=weight_decay)
    return optim.trust_ratio(config, g, w)

  with jax.enable_x64(True):
    g, w = np.random.default_rng(0).normal(size=(2, 200, 3, 4))
    w[0] = 3 * g[0]  # along each other: equal
    w[1] = -3 * g[1]  # against each other: furthest apart
    norm_of_sum, sum_of_norms = (
      np.asarray(jax.vmap(lambda g, w, d=d: ratios(d, g, w))(g, w))
      for d in DENOMINATORS
    )
    np.testing.assert_allclose(norm_of_sum[0], sum_of_norms[0], 1e-12)
    assert (norm_of_sum >= sum_of_norms * (1 - 1e-12)).all()
    if weight_decay:
      assert (norm_of_sum > sum_of_norms)[1:].all()
    # Half of the gradient is shrunk away: the triangle inequality by hand.
    config = config_of(weight_decay=0.5, lars_denominator='norm_of_sum')
    one = jnp.ones((1, 1))
    assert optim.trust_ratio(config, -one, one) == pytest.approx(0.02 / 0.5)
    config = config_of(weight_decay=0.5, lars_denominator='sum_of_norms')
    assert optim.trust_ratio(config, -one, one) == pytest.approx(0.02 / 1.5)


@pytest.mark.parametrize('denominator', DENOMINATORS)
def test_logged_trust_ratios_are_those_that_the_optimizer_applies(denominator):
  config = config_of(lars_denominator=denominator, momentum=0.0, eps=0.1)
  with jax.enable_x64(True):
    params, grads = nested(draw_params()), nested(draw_grads(0))
    tx = optim.make_optimizer(config, lambda _: 1.0)
    updates, _ = tx.update(grads, tx.init(params), params)
    logged = np.asarray(optim.kernel_trust_ratios(config, grads, params))
  names = optim.kernel_names(params)
  assert names == [path for path in sorted(SHAPES) if path.endswith('kernel')]
  assert logged.shape == (len(names),)
  updates, params, grads = map(flattened, (updates, params, grads))
  for name, ratio in zip(names, logged, strict=True):
    direction = grads[name] + config.weight_decay * params[name]
    np.testing.assert_allclose(updates[name], -ratio * direction, 1e-12)


# ---- Masks ----------------------------------------------------------------


# Others differ from one of these in how often a block is there, or how wide.
KINDS = (
  'resnet8', 'resnet18', 'resnet50d', 'seresnet50', 'efficientnet_b0',
  'vit_tiny',
)  # fmt: skip


@pytest.mark.parametrize('name', KINDS)
def test_every_leaf_of_a_model_is_either_kernel_or_plain(name):
  model = models.create(name, num_classes=10, num_routes=2)
  image = jnp.zeros((1, 2, 1, 8, 8, 3))
  variables = jax.eval_shape(
    lambda x: model.init(jax.random.key(0), x, (0, 1), True), image
  )
  params = variables['params']
  mask = jax.tree_util.tree_leaves_with_path(optim.kernel_mask(params))
  mask = {optim.path_name(path): kernel for path, kernel in mask}
  assert len(mask) == len(jax.tree.leaves(params))
  assert all(type(kernel) is bool for kernel in mask.values())
  # Told apart without the rule under test: a kernel has inputs and outputs,
  # all else is per channel, in batch norm once per route.
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    path = optim.path_name(path)
    in_norm = any('norm' in part for part in path.split('/')[-2:-1])
    assert mask[path] == (leaf.ndim >= 2 and not in_norm), path
    if in_norm and 'batch_stats' in variables:
      assert leaf.shape[0] == 2, path
  kernels = [path for path, kernel in mask.items() if kernel]
  assert optim.kernel_names(params) == kernels
  assert 0 < len(kernels) < len(mask)


def test_the_rule_goes_by_the_last_name():
  names = {
    'kernel': True,
    'embedding': True,
    'pos_embedding': True,
    'qkv_kernel': True,
    'scale': False,
    'bias': False,
    'kernel_scale': False,
    'gamma': False,
  }
  # A matrix, or a vector as of an optimizer that is sharded: it says nothing.
  for shape in ((2, 3), (6,)):
    params = {'kernel': {name: jnp.ones(shape) for name in names}}
    assert optim.kernel_mask(params) == {'kernel': names}
    updates = optim.make_optimizer(config_of(name='sgd'), lambda _: 1.0)
    decay, _ = updates.update(
      jax.tree.map(jnp.zeros_like, params), updates.init(params), params
    )
    assert {k: bool(v.any()) for k, v in decay['kernel'].items()} == names


# ---- The table ------------------------------------------------------------


def test_the_table_has_what_a_config_accepts():
  assert optim.OPTIMIZERS.keys() == OPTIMIZER_EPS.keys()


def test_an_optimizer_of_your_own_is_a_line_in_the_table(monkeypatch):
  def sign(config, schedule):
    return optax.sign_sgd(schedule)

  monkeypatch.setitem(optim.OPTIMIZERS, 'sign', sign)
  config = config_of()
  object.__setattr__(config, 'name', 'sign')
  (after,) = run_jax(optim.make_optimizer(config, rate), 1)
  np.testing.assert_allclose(
    after['head/bias'],
    draw_params()['head/bias'] - rate(0) * np.sign(draw_grads(0)['head/bias']),
    1e-6,
  )


def test_an_unknown_optimizer_names_the_nearest():
  config = config_of()
  object.__setattr__(config, 'name', 'lar')
  with pytest.raises(ConfigError, match="optimizer 'lar'; did you mean 'lars'"):
    optim.make_optimizer(config, rate)
