r"""Concurrent adversarial learning (ConAdv, arXiv:2106.00221) in one file.

Trains a small residual network on scikit-learn's digits with LARS and a large
batch. Each step updates the weights on batch t and, independently, attacks
batch t + 1 with weights that are tau steps old; tau = 0 is sequential (DisAdv).

Run:  python examples/conadv_minimal.py --tau=1 --batch_size=320 --epochs=40

Images are in grey levels, [G, b, H, W, C]: G batch-norm groups of b examples.
The network takes V views of them, [G, V, b, H, W, C]. Parameters and batch-norm
statistics are flat dicts; those of a batch norm have a row for each view.
"""

import argparse
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn import datasets

MEAN, STD = 77.8, 95.9  # of the grey levels of the training images
BOTH = np.arange(2)[:, None, None, None]  # batch-norm rows of both views
CLEAN, ADV = BOTH[:1], BOTH[1:]
NHWC = ('NHWC', 'HWIO', 'NHWC')  # images, kernels, results


def network(params, images, rows, stats=None):
  """Images [G, V, b, H, W, C] -> logits [G, V, b, K], statistics [V, C].

  Batch norms use the row of each view. They normalise by `stats`, or if that is
  None by the statistics of each group of each view, and return their means.
  """
  seen = {}

  def layer(name, x, stride=1):  # convolution and batch norm
    folded, kernel = x.reshape(-1, *x.shape[3:]), params[f'{name}/kernel']
    y = jax.lax.conv_general_dilated(
      folded, kernel, (stride, stride), 'SAME', dimension_numbers=NHWC
    )
    y = y.reshape(*x.shape[:3], *y.shape[1:])
    if stats is None:
      mean = y.mean((2, 3, 4), keepdims=True)  # [G, V, 1, 1, 1, C]
      var = y.var((2, 3, 4), keepdims=True)
      seen[f'{name}/mean'] = mean.mean((0, 2, 3, 4))
      seen[f'{name}/var'] = var.mean((0, 2, 3, 4))
    else:
      mean, var = stats[f'{name}/mean'][rows], stats[f'{name}/var'][rows]
    scale, bias = params[f'{name}/scale'][rows], params[f'{name}/bias'][rows]
    return (y - mean) * jax.lax.rsqrt(var + 1e-5) * scale + bias

  x = jax.nn.relu(layer('stem', (images - MEAN) / STD))
  for stage, stride in enumerate((1, 2, 2), start=1):
    block = f'stage{stage}_block1'
    y = jax.nn.relu(layer(f'{block}/conv1', x, stride))
    if stride > 1:
      x = layer(f'{block}/conv_shortcut', x, stride)
    x = jax.nn.relu(layer(f'{block}/conv2', y) + x)
  return x.mean((3, 4)) @ params['head/kernel'] + params['head/bias'], seen


def attack(params, images, labels, epsilon, row, stats=None):
  """FGSM (arXiv:1412.6572): epsilon * sign(gradient), kept in [0, 255]."""

  def loss(images):
    logits, _ = network(params, images[:, None], row, stats)
    targets = jax.nn.one_hot(labels, 10)
    return optax.softmax_cross_entropy(logits[:, 0], targets).sum()

  delta = epsilon * jnp.sign(jax.grad(loss)(images))
  return jnp.clip(delta, -images, 255 - images)


def loss_fn(params, images, labels, delta):
  """Label-smoothed cross-entropy, averaged over examples and both views."""
  views = jnp.stack([images, jnp.clip(images + delta, 0, 255)], axis=1)
  logits, seen = network(params, views, BOTH)
  targets = optax.smooth_labels(jax.nn.one_hot(labels, 10), 0.1)[:, None]
  losses = optax.softmax_cross_entropy(logits, targets).mean((0, 2))  # [V]
  return losses.mean(), (losses, seen)


def make_optimizer(params, peak, warmup_steps, total_steps):
  """LARS (arXiv:1708.03888) on kernels; linear warm-up, quadratic decay."""
  kernels = {name: name.endswith('kernel') for name in params}
  warmup = optax.linear_schedule(0, peak, warmup_steps)
  decay = optax.polynomial_schedule(peak, 0, 2, total_steps - warmup_steps)
  rate = optax.join_schedules([warmup, decay], [warmup_steps])
  return optax.lars(rate, 1e-4, kernels, trust_ratio_mask=kernels)


class State(NamedTuple):
  params: dict  # theta_t
  stats: dict  # running batch-norm statistics
  opt_state: optax.OptState
  queue: tuple  # theta_{t+1-tau}, ..., theta_t: the first attacks batch t + 1
  delta: jax.Array  # delta_t, made with theta_{t-tau}; not read if tau = 0


def initial_state(params, stats, batch, optimizer, tau, epsilon):
  """The state before step 0; weights older than theta_0 are theta_0."""
  delta = attack(params, *batch, epsilon, ADV)
  return State(params, stats, optimizer.init(params), (params,) * tau, delta)


def train_step(state, batch, next_batch, optimizer, tau, epsilon):
  """Algorithm 1: theta_t, delta_t -> theta_{t+1}, delta_{t+1}; losses [V]."""
  params, stats, opt_state, queue, delta = state
  if tau:  # concurrent: neither this nor the update needs the other's result
    pending = attack(queue[0], *next_batch, epsilon, ADV)
  else:  # sequential: the update waits for the attack on its own batch
    pending = delta = attack(params, *batch, epsilon, ADV)
  grad_fn = jax.grad(loss_fn, has_aux=True)
  grads, (losses, seen) = grad_fn(params, *batch, delta)
  updates, opt_state = optimizer.update(grads, opt_state, params)
  params = optax.apply_updates(params, updates)
  stats = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, stats, seen)
  return State(params, stats, opt_state, (*queue, params)[1:], pending), losses


def accuracy(state, images, labels, epsilon):
  """Top-1 (%) on the clean row, under FGSM if epsilon > 0."""
  params, stats = state.params, state.stats
  images += attack(params, images, labels, epsilon, CLEAN, stats)
  logits, _ = network(params, images[:, None], CLEAN, stats)
  return 100 * (logits[:, 0].argmax(-1) == labels).mean()


def initial_weights(rng):
  """He initialisation; the last scale of each block starts at zero."""
  kernels = {'stem': (3, 1, 16)}  # size, channels, features
  for stage, (c, d) in enumerate([(16, 16), (16, 32), (32, 64)], start=1):
    block = f'stage{stage}_block1'
    kernels |= {f'{block}/conv1': (3, c, d), f'{block}/conv2': (3, d, d)}
    if c != d:
      kernels[f'{block}/conv_shortcut'] = (1, c, d)
  params, stats = {}, {}
  for name, (k, c, d) in kernels.items():
    params[f'{name}/kernel'] = rng.normal(0, (2 / d) ** 0.5 / k, (k, k, c, d))
    params[f'{name}/scale'] = np.full((2, d), 'conv2' not in name)
    stats[f'{name}/var'] = np.ones((2, d))
    params[f'{name}/bias'] = stats[f'{name}/mean'] = np.zeros((2, d))
  params['head/kernel'] = 0.01 * rng.normal(size=(64, 10))
  params['head/bias'] = np.zeros(10)
  return jax.tree.map(lambda x: jnp.asarray(x, float), (params, stats))


def batches(images, labels, batch_size, rng):
  """Endless batches of shuffled digits, shifted by up to one pixel."""
  padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
  crops = np.lib.stride_tricks.sliding_window_view(padded, (8, 8), (1, 2))
  group, order = min(64, batch_size), np.array([], int)
  while True:
    while len(order) < batch_size:
      order = np.append(order, rng.permutation(len(images)))
    ids, order = np.split(order, [batch_size])
    x = crops[ids, *rng.integers(3, size=(2, batch_size))]
    yield x.reshape(-1, group, 8, 8, 1), labels[ids].reshape(-1, group)


def main():
  parser = argparse.ArgumentParser()
  flags = dict(tau=1, batch_size=320, epochs=40, epsilon=16.0, seed=0)
  for name, value in flags.items():
    parser.add_argument(f'--{name}', type=type(value), default=value)
  args = parser.parse_args()
  images, labels = datasets.load_digits(return_X_y=True)
  images = np.rint(images.reshape(-1, 8, 8, 1) * (255 / 16)).astype('float32')
  test = np.arange(len(images)) % 5 == 0
  unseen = images[None, test], labels[None, test]
  rng = np.random.default_rng(args.seed)
  feed = batches(images[~test], labels[~test], args.batch_size, rng)
  epoch_steps = (~test).sum() / args.batch_size
  steps = round(args.epochs * epoch_steps)
  params, stats = initial_weights(rng)
  peak = 8 * (args.batch_size / 320) ** 0.5
  optimizer = make_optimizer(params, peak, round(5 * epoch_steps), steps)
  fixed = dict(optimizer=optimizer, tau=args.tau, epsilon=args.epsilon)
  step_fn = jax.jit(train_step, static_argnames=tuple(fixed))
  start_fn = jax.jit(initial_state, static_argnames=tuple(fixed))
  evaluate = jax.jit(accuracy)
  batch = next(feed)
  state = start_fn(params, stats, batch, **fixed)
  start = time.monotonic()
  for step, next_batch in zip(range(1, steps + 1), feed, strict=False):
    state, (clean, adv) = step_fn(state, batch, next_batch, **fixed)
    batch = next_batch
    if step % 20 == 0 or step == steps:
      top1, robust = (evaluate(state, *unseen, e) for e in (0.0, args.epsilon))
      left = (time.monotonic() - start) / step * (steps - step)
      print(
        f'step {step}/{steps}: loss clean {clean:.3f}, adv {adv:.3f}; '
        f'top-1 clean {top1:.2f} %, FGSM {robust:.2f} %; {left:.0f} s left'
      )


if __name__ == '__main__':
  main()
