"""Attacks by hand on linear models, their random starts, and their bounds."""

import dataclasses
import functools
import types

import helpers
import hypothesis
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import strategies as st

from conadv_jax.config import Attack
from conadv_jax.method.attack import Start, attack_batch, perturb, sample_start
from conadv_jax.method.setup import Setup
from conadv_jax.method.state import Snapshot, Stream, stream_key
from conadv_jax.methods import ATTACKS

FGSM = Attack(
  preset='fgsm',
  norm='linf',
  epsilon=4.0,
  step_size=4.0,
  steps=1,
  targeted=False,
  random_start_prob=0.0,
  train_mode=True,
  update_batch_stats=False,
)
# Random numbers take long to compile, and no time to draw.
UNOPTIMISED = {'xla_backend_optimization_level': '0'}
GREY = jnp.full((1, 1, 1, 2, 1), 100.0)


def attack_of(**changes):
  return dataclasses.replace(FGSM, **changes)


def clean_start(image, labels=None):
  labels = jnp.zeros(image.shape[:2], jnp.int32) if labels is None else labels
  return Start(jnp.zeros_like(image), labels)


def linear_loss(w):
  """Cross-entropy of two classes with logits (0, w . pixels)."""

  def loss_fn(pixels, labels):
    score = jnp.sum(pixels * w, (-3, -2, -1))
    logits = jnp.stack([jnp.zeros_like(score), score], -1)
    log_p = jax.nn.log_softmax(logits)
    loss = -jnp.take_along_axis(log_p, labels[..., None], -1)
    return loss.sum(), None

  return loss_fn


def delta_of(attack, loss_fn, image, labels=None):
  run = jax.jit(functools.partial(perturb, attack, loss_fn))
  delta, _ = run(image, clean_start(image, labels))
  return delta


# ---- By hand --------------------------------------------------------------


@pytest.mark.parametrize('label, sign', [(0, 1), (1, -1)])
def test_fgsm_on_a_linear_model_is_epsilon_sign_w(label, sign):
  w = 1e-3 * jnp.array([3.0, -0.01]).reshape(1, 2, 1)
  labels = jnp.full((1, 1), label)
  delta = delta_of(
    attack_of(epsilon=7.0, step_size=7.0), linear_loss(w), GREY, labels
  )
  # The loss of class 0 grows with the score, that of class 1 falls.
  np.testing.assert_array_equal(delta.ravel(), [7.0 * sign, -7.0 * sign])


def test_targeted_fgsm_goes_the_other_way():
  w = 1e-3 * jnp.array([3.0, -0.01]).reshape(1, 2, 1)
  towards = jnp.ones((1, 1), jnp.int32)
  attack = attack_of(targeted=True)
  delta = delta_of(attack, linear_loss(w), GREY, towards)
  np.testing.assert_array_equal(delta.ravel(), [4.0, -4.0])
  away = delta_of(FGSM, linear_loss(w), GREY, towards)
  np.testing.assert_array_equal(away, -delta)


def test_the_box_cuts_what_leaves_it():
  image = jnp.array([255.0, 254.0, 0.0, 1.0]).reshape(1, 1, 1, 4, 1)
  w = 1e-3 * jnp.array([1.0, 1.0, -1.0, -1.0]).reshape(1, 4, 1)
  delta = delta_of(FGSM, linear_loss(w), image)
  np.testing.assert_array_equal(delta.ravel(), [0.0, 1.0, 0.0, -1.0])


def test_l2_step_on_a_linear_model_has_the_step_size_along_w():
  w = 1e-3 * jnp.array([3.0, -4.0]).reshape(1, 2, 1)
  attack = attack_of(norm='l2', epsilon=9.0, step_size=2.0)
  one = delta_of(attack, linear_loss(w), GREY)
  np.testing.assert_allclose(one.ravel(), [1.2, -1.6], 1e-6)
  two = delta_of(dataclasses.replace(attack, steps=2), linear_loss(w), GREY)
  np.testing.assert_allclose(two.ravel(), [2.4, -3.2], 1e-6)
  # 2 * 2.0 exceeds a radius of 3: the ball cuts the length, not the direction.
  small = dataclasses.replace(attack, steps=2, epsilon=3.0)
  cut = delta_of(small, linear_loss(w), GREY)
  np.testing.assert_allclose(cut.ravel(), [1.8, -2.4], 1e-6)
  towards = dataclasses.replace(attack, targeted=True)
  away = delta_of(towards, linear_loss(w), GREY)
  np.testing.assert_allclose(away.ravel(), [-1.2, 1.6], 1e-6)


def test_l2_norms_are_per_example():
  image = jnp.full((2, 3, 1, 2, 1), 100.0)
  size = jnp.arange(1.0, 7.0).reshape(2, 3, 1, 1, 1)
  w = size * jnp.array([3.0, -4.0]).reshape(1, 2, 1)
  attack = attack_of(norm='l2', epsilon=9.0, step_size=5.0)
  delta = delta_of(attack, lambda x, _: ((x * w).sum(), None), image)
  expected = np.broadcast_to([3.0, -4.0], (2, 3, 2))
  np.testing.assert_allclose(delta[:, :, 0, :, 0], expected, 1e-6)


def perturb_along(attack, w):
  """The perturbation of GREY where `w` is the gradient everywhere.

  An argument of jit, as weights are: XLA reorders arithmetic with constants.
  """

  @jax.jit
  def run(w):
    loss_fn = lambda x, _: (jnp.sum(x * w), None)  # noqa: E731
    return perturb(attack, loss_fn, GREY, clean_start(GREY))[0]

  return run(jnp.asarray(w, jnp.float32).reshape(1, 2, 1))


@pytest.mark.parametrize('norm', ['linf', 'l2'])
@pytest.mark.parametrize('steps', [1, 3])
def test_zero_gradient_is_a_zero_step(norm, steps):
  delta = perturb_along(attack_of(norm=norm, steps=steps), [0.0, 0.0])
  np.testing.assert_array_equal(delta, np.zeros_like(GREY))


@pytest.mark.parametrize('scale', [1e-8, 1e-17, 1e-20, 1e-25, 1e-30])
def test_l2_step_has_the_step_size_however_small_the_gradient(scale):
  # A confident network leaves gradients whose squares underflow float32.
  attack = attack_of(norm='l2', epsilon=9.0, step_size=2.0)
  delta = perturb_along(attack, [3 * scale, -4 * scale])
  np.testing.assert_allclose(delta.ravel(), [1.2, -1.6], 1e-5)


# ---- Bounds and steps -----------------------------------------------------


def bumpy_loss(pixels, labels):
  """Smooth, with gradients of all signs and sizes."""
  phase = jnp.arange(pixels[0, 0].size).reshape(pixels.shape[2:])
  wave = jnp.sin(0.7 * pixels + phase + labels[..., None, None, None])
  return jnp.sum(wave * jnp.cos(0.05 * pixels.sum((2, 3, 4), keepdims=True))), 0


@functools.partial(jax.jit, static_argnames=('norm', 'steps', 'targeted'))
def bounded(norm, steps, targeted, epsilon, step_size, image, start):
  # Stands in for `Attack`, which takes no tracers: one program for all sizes.
  attack = types.SimpleNamespace(
    rule='gradient',
    norm=norm,
    steps=steps,
    targeted=targeted,
    epsilon=epsilon,
    step_size=step_size,
  )
  start = Start(start, jnp.zeros(image.shape[:2], jnp.int32))
  return perturb(attack, bumpy_loss, image, start, 0)[0]


PIXELS = st.one_of(st.sampled_from([0, 255]), st.integers(0, 255))
SIZES = st.floats(0, 300, width=32, allow_subnormal=False)


@pytest.mark.parametrize('norm', ['linf', 'l2'])
@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(
  image=hnp.arrays(np.uint8, (2, 1, 2, 2, 1), elements=PIXELS),
  epsilon=SIZES,
  step_size=SIZES,
  steps=st.sampled_from([1, 2, 5]),
  start=st.floats(-300, 300, width=32),
)
def test_perturbations_stay_in_ball_and_box(
  norm, image, epsilon, step_size, steps, start
):
  image = jnp.asarray(image, jnp.float32)
  start = jnp.full_like(image, start)
  delta = bounded(norm, steps, False, epsilon, step_size, image, start)
  delta = np.asarray(delta)
  adv = np.asarray(image) + delta
  assert adv.min() >= 0 and adv.max() <= 255
  if norm == 'linf':
    assert np.abs(delta).max() <= np.float32(epsilon)
  else:
    # The norm is itself rounded in float32.
    norms = np.linalg.norm(delta.astype(np.float64).reshape(2, -1), axis=1)
    assert norms.max() <= epsilon * (1 + 1e-6)


@pytest.mark.parametrize('norm', ['linf', 'l2'])
@pytest.mark.parametrize('targeted', [False, True])
@pytest.mark.parametrize('steps', [1, 2, 5])
def test_steps_equal_a_plain_loop(norm, targeted, steps):
  with jax.enable_x64(True):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (2, 3, 2, 2, 1)).astype(np.float64)
    noise = rng.uniform(-9, 9, image.shape)  # outside the ball, too
    epsilon, size = (6.0, 2.5) if norm == 'linf' else (9.0, 4.0)
    delta = bounded(norm, steps, targeted, epsilon, size, image, noise)

    def project(d):
      if norm == 'linf':
        d = np.clip(d, -epsilon, epsilon)
      else:
        length = np.sqrt((d**2).sum((2, 3, 4), keepdims=True))
        d = d * np.minimum(1, epsilon / length)
      return np.clip(image + d, 0, 255) - image

    gradient = jax.jit(jax.grad(bumpy_loss, has_aux=True))
    expected = project(noise)
    for _ in range(steps):
      g, _ = gradient(image + expected, np.zeros((2, 3), np.int32))
      g = np.asarray(g)
      if norm == 'linf':
        step = np.sign(g)
      else:
        step = g / np.sqrt((g**2).sum((2, 3, 4), keepdims=True))
      expected = project(expected + (-size if targeted else size) * step)
    np.testing.assert_allclose(delta, expected, atol=1e-9)


def test_aux_is_that_of_the_last_gradient():
  loss_fn = lambda x, _: (x.sum(), x[0, 0, 0, 0, 0])  # noqa: E731
  for steps, seen in ((1, 100.0), (3, 102.0)):
    attack = attack_of(step_size=1.0, steps=steps)
    start = clean_start(GREY)
    _, aux = perturb(attack, loss_fn, GREY, start, jnp.array(0.0))
    assert aux == seen


@pytest.mark.parametrize('norm', ['linf', 'l2'])
@pytest.mark.parametrize('steps', [1, 2])
def test_perturbations_carry_no_gradient(norm, steps):
  attack = attack_of(norm=norm, steps=steps, step_size=1.0)

  def sum_of_squares(w, image):
    loss_fn = lambda x, _: (jnp.sum(w * x**2), None)  # noqa: E731
    return jnp.square(delta_of(attack, loss_fn, image)).sum()

  value, grads = jax.value_and_grad(sum_of_squares, (0, 1))(2.0, GREY)
  assert value > 0
  assert grads[0] == 0
  np.testing.assert_array_equal(grads[1], np.zeros_like(GREY))


# ---- Random starts and targets --------------------------------------------


def random_signs(**changes):
  return dataclasses.replace(ATTACKS['random_signs'], **changes)


@functools.partial(
  jax.jit,
  static_argnames=('attack', 'shape', 'num_classes'),
  compiler_options=UNOPTIMISED,
)
def sample(attack, shape, labels=None, num_classes=10):
  image = jnp.full(shape, 100.0)
  labels = jnp.zeros(shape[:2], jnp.int32) if labels is None else labels
  return sample_start(attack, jax.random.key(0), image, labels, num_classes)


@pytest.mark.parametrize('norm', ['linf', 'l2'])
def test_random_start_probability_0_and_1(norm):
  never = sample(attack_of(norm=norm), (4, 8, 2, 2, 1)).delta
  np.testing.assert_array_equal(never, np.zeros_like(never))
  always = attack_of(norm=norm, random_start_prob=1.0)
  assert (sample(always, (4, 8, 2, 2, 1)).delta != 0).all()


@pytest.mark.parametrize('norm', ['linf', 'l2'])
def test_random_start_is_drawn_once_per_group(norm):
  attack = attack_of(norm=norm, random_start_prob=0.5)
  delta = np.asarray(sample(attack, (256, 4, 2, 2, 1)).delta)
  used = (delta != 0).reshape(256, -1)
  np.testing.assert_array_equal(used.all(1), used.any(1))
  # 256 fair draws: outside these bounds once in a million runs.
  assert 89 <= used.all(1).sum() <= 167


def test_linf_start_is_uniform_in_the_ball():
  attack = attack_of(epsilon=3.0, random_start_prob=1.0)
  delta = np.asarray(sample(attack, (8, 64, 4, 4, 1)).delta)
  assert np.abs(delta).max() <= 3
  uniform = scipy.stats.uniform(-3, 6)
  assert scipy.stats.kstest(delta.ravel(), uniform.cdf).pvalue > 1e-3
  # Pixels and examples are drawn apart from each other.
  correlation = np.corrcoef(delta.reshape(512, 16).T) - np.eye(16)
  assert np.abs(correlation).max() < 5 / np.sqrt(512)


@pytest.mark.parametrize('pixels', [2, 12])
def test_l2_start_is_uniform_in_the_ball(pixels):
  # Uniform in a ball of d dimensions: (|delta| / epsilon) ** d is uniform in
  # [0, 1], and independent of the direction, which favours no axis.
  attack = attack_of(norm='l2', epsilon=30.0, random_start_prob=1.0)
  delta = np.asarray(sample(attack, (8, 512, 1, pixels, 1)).delta, np.float64)
  delta = delta.reshape(-1, pixels)
  radius = np.linalg.norm(delta, axis=1)
  assert radius.max() <= 30 * (1 + 1e-6)
  share = (radius / 30) ** pixels
  assert scipy.stats.kstest(share, 'uniform').pvalue > 1e-3
  # The angle in a plane of two axes is uniform.
  angle = np.arctan2(delta[:, 0], delta[:, 1]) / (2 * np.pi) + 0.5
  assert scipy.stats.kstest(angle, 'uniform').pvalue > 1e-3
  assert abs(np.corrcoef(share, angle)[0, 1]) < 5 / np.sqrt(len(share))


def test_random_signs_are_epsilon_times_fair_signs():
  attack = random_signs(epsilon=3.0)
  delta = np.asarray(sample(attack, (8, 64, 4, 4, 1)).delta)
  assert set(np.unique(delta)) == {-3.0, 3.0}
  # 8,192 fair draws: outside these bounds once in a million runs.
  assert 3875 <= (delta > 0).sum() <= 4317
  correlation = np.corrcoef(delta.reshape(512, 16).T) - np.eye(16)
  assert np.abs(correlation).max() < 5 / np.sqrt(512)


def test_a_random_direction_has_the_length_epsilon():
  attack = random_signs(norm='l2', epsilon=30.0)
  delta = np.asarray(sample(attack, (8, 512, 1, 2, 1)).delta, np.float64)
  delta = delta.reshape(-1, 2)
  np.testing.assert_allclose(np.linalg.norm(delta, axis=1), 30, 1e-6)
  angle = np.arctan2(delta[:, 0], delta[:, 1]) / (2 * np.pi) + 0.5
  assert scipy.stats.kstest(angle, 'uniform').pvalue > 1e-3


def test_targets_are_uniform_over_the_other_classes():
  labels = jnp.arange(20_000).reshape(20, 1000) % 10
  attack = attack_of(targeted=True)
  start = sample(attack, (20, 1000, 1, 1, 1), labels)
  targets, labels = np.asarray(start.labels), np.asarray(labels)
  assert targets.min() == 0 and targets.max() == 9
  assert (targets != labels).all()
  counts = np.zeros((10, 10))
  np.add.at(counts, (labels.ravel(), targets.ravel()), 1)
  for label in range(10):
    others = np.delete(counts[label], label)
    assert scipy.stats.chisquare(others).pvalue > 1e-4
  assert not np.asarray(start.delta).any()


def test_with_two_classes_the_target_is_the_other_one():
  labels = jnp.array([[0, 1, 1, 0]])
  start = sample(attack_of(targeted=True), (1, 4, 1, 1, 1), labels, 2)
  np.testing.assert_array_equal(start.labels, 1 - labels)


def test_an_untargeted_attack_keeps_the_labels():
  labels = jnp.arange(10).reshape(2, 5)
  attack = attack_of(random_start_prob=1.0)
  start = sample(attack, (2, 5, 1, 1, 1), labels)
  np.testing.assert_array_equal(start.labels, labels)


# ---- The attack of the training step --------------------------------------

WEIGHTS = Snapshot(jnp.zeros(()), jnp.zeros(()))


def linear_apply(calls=None):
  """An `apply_fn` with logits linear in the pixels."""

  def apply_fn(variables, x, routes, train):
    if calls is not None:
      calls.append((x.shape, routes, train))
    w = jnp.sin(jnp.arange(x[0, 0, 0].size * 5.0)).reshape(-1, 5)
    logits = x.reshape(*x.shape[:3], -1) @ w
    return logits, variables['batch_stats']

  return apply_fn


def step_attack(fields, calls=None):
  """(a batch, batch index -> perturbation of that batch)."""
  config = helpers.make_config(fields)
  batch = helpers.random_batches(config, 1)[0]
  setup = Setup(config, helpers.SPEC, linear_apply(calls), None, None, None)
  run = jax.jit(
    lambda index: attack_batch(setup, WEIGHTS, batch, index)[0],
    compiler_options=UNOPTIMISED,
  )
  return batch, lambda index: np.asarray(run(index))


def test_noise_is_a_function_of_seed_and_batch_index():
  fields = {'attack.preset': 'pgd', 'attack.step_size': 0.5}
  _, of_seed_0 = step_attack(fields)
  _, of_seed_1 = step_attack(fields | {'seed': 1})
  delta = of_seed_0(3)
  np.testing.assert_array_equal(of_seed_0(3), delta)
  # Nor is index 4 of a seed another name for index 3 of the next.
  others = delta, of_seed_0(4), of_seed_1(3)
  for i, j in ((0, 1), (0, 2), (1, 2)):
    assert (others[i] != others[j]).mean() > 0.5


@pytest.mark.parametrize('norm', ['linf', 'l2'])
def test_without_steps_the_projected_start_is_the_perturbation(norm):
  calls = []
  fields = {'attack.preset': 'random_signs', 'attack.norm': norm}
  batch, delta_of = step_attack(fields, calls)
  delta = delta_of(2)
  assert not calls, 'the network was asked'
  config = helpers.make_config(fields)
  image = batch['clean'].astype(np.float32)
  key = stream_key(config.seed, Stream.ATTACK, 2)
  start = sample_start(config.attack, key, image, batch['label'], 5).delta
  np.testing.assert_allclose(delta, np.clip(start, -image, 255 - image), 1e-6)
  assert (delta != delta_of(3)).any()


@pytest.mark.parametrize('train_mode', [True, False])
def test_the_step_attacks_in_grey_levels_with_the_adversarial_route(train_mode):
  calls = []
  fields = {
    'method': 'conadv_aa',
    'attack.epsilon': 6.0,
    'attack.train_mode': train_mode,
  }
  batch, delta_of = step_attack(fields, calls)
  delta = delta_of(0)
  adv = batch['clean'] + delta
  # FGSM moves by 6 grey levels, whatever the normalisation, but for the box.
  assert set(np.unique(adv - np.clip(adv, 0, 255))) == {0}
  inside = (adv > 0) & (adv < 255)
  assert inside.sum() > 50
  assert set(np.unique(np.abs(delta[inside]))) == {6.0}
  assert calls == [((2, 1, 3, 4, 4, 2), (2,), train_mode)]


@pytest.mark.parametrize(
  'preset, expected',
  [
    ('fgsm', dict(step_size=4.0, steps=1, targeted=False, start=0.0)),
    ('paper', dict(step_size=4.0, steps=1, targeted=True, start=0.8)),
    ('pgd', dict(step_size=1.0, steps=5, targeted=False, start=1.0)),
    (
      'random_signs',
      dict(step_size=None, steps=0, targeted=False, start=1.0, where='extreme'),
    ),
  ],
)
def test_presets_have_their_documented_values(preset, expected):
  attack = helpers.make_config({'attack.preset': preset}).attack
  assert attack == Attack(
    preset=preset,
    norm='linf',
    epsilon=4.0,
    step_size=expected['step_size'],
    steps=expected['steps'],
    targeted=expected['targeted'],
    random_start=expected.get('where', 'ball'),
    random_start_prob=expected['start'],
    train_mode=True,
    update_batch_stats=False,
  )
