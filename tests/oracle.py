"""ConAdv in plain NumPy, float64: what `conadv_jax` is compared with.

Imports nothing of the package. It takes the slow, obvious way wherever the
package takes a fast one: one forward and backward pass per batch-norm group and
view, gradients by hand, and every weight the run ever had in a list, from which
the attack on batch t picks theta_{t - tau}.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import numpy as np

Tree = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Setting:
  """What the oracle needs to know of a run.

  Attributes:
    views: names, in order.
    rows: batch-norm row of each view.
    adv_row: batch-norm row of the attack.
    weights: of the views in the loss, summing to 1.
    tau: age in steps of the weights that attack.
    rates: learning rate of each step.
    optimizer: 'lars_norm_of_sum', 'lars_sum_of_norms' or 'sgd'.
    adv_every: n of Fast AdvProp; 0 for other methods.
    ascent: what perturbs the weights, such as 'gradient' or 'none'.
    sam_groups: batch-norm groups that share a perturbation of the weights.
  """

  views: tuple[str, ...]
  rows: tuple[int, ...]
  adv_row: int | None
  weights: tuple[float, ...]
  tau: int
  rates: tuple[float, ...]
  optimizer: str
  momentum: float
  nesterov: bool
  weight_decay: float
  trust_coefficient: float
  label_smoothing: float
  mean: tuple[float, ...]
  std: tuple[float, ...]
  norm: str
  epsilon: float
  step_size: float
  attack_steps: int
  targeted: bool
  train_mode: bool
  update_batch_stats: bool
  ema_decay: float
  ema_batch_stats: bool
  bn_momentum: float
  bn_epsilon: float
  adv_every: int
  ascent: str
  rho: float
  normalize: str
  norm_only: bool
  sam_groups: int
  mix: float


@dataclasses.dataclass
class Record:
  """What one step of the oracle leaves to compare with."""

  losses: dict[str, float]
  perturbation: np.ndarray | None
  ascent: Any
  params: Tree
  stats: Tree
  trace: Tree
  ema: tuple[Tree, Tree]


def train(s, params, stats, batches, starts):
  """Records of len(batches) - 1 steps: the last batch is only attacked.

  `starts[t]` is (first perturbation, labels) of the attack on batch t.
  """
  history = [(params, stats)]
  trace = _map(np.zeros_like, params)
  ema = (params, stats)
  records = []
  ahead = [params, params]  # y_0, y_1 of the lookahead
  for t in range(len(batches) - 1):
    params, stats = history[t]
    delta, offsets = None, None
    d = _direction(s, history, ahead, stats, trace, batches, t)
    if d is not None:
      offsets = [_offset(s, params, of_group) for of_group in d]
    if s.adv_every:
      losses, grads, moved = _fast_advprop(
        s, params, stats, batches[t], starts[t]
      )
    else:
      if s.adv_row is not None:
        delta, _ = _attack(
          s, *history[max(t - s.tau, 0)], stats, batches[t], starts[t]
        )
      losses, grads, moved = _loss_and_gradient(
        s, params, stats, batches[t], delta, offsets
      )
    if s.update_batch_stats:
      later = t + (s.tau > 0)  # the batch that is attacked in step t
      _, attacked = _attack(
        s, *history[max(later - s.tau, 0)], stats, batches[later], starts[later]
      )
      moved = _halfway(moved, attacked, s.adv_row)
    if s.ascent in ('gradient', 'lookahead'):
      later = t + (s.tau > 0)  # the batch that is ascended on in step t
      weights = _ascent_weights(s, history, ahead, later)
      next_d, ascended = _ascent(s, weights, stats, batches[later])
      if s.rho:
        for row in _rows_of_ascent(s):
          moved = _with_row(moved, ascended, row)
    if s.ascent == 'lookahead':
      grads = _map(lambda p, x: (1 - s.mix) * p + s.mix * x, grads, next_d[0])
    new, trace = _descend(s, s.rates[t], params, grads, trace)
    if s.ascent == 'lookahead':
      ahead.append(_descend(s, s.rates[t + 1], new, next_d[0], trace)[0])
    ema = _average(s, ema, (new, moved))
    history.append((new, moved))
    records.append(Record(losses, delta, d, new, moved, trace, ema))
  return records


def _ascent_weights(s, history, ahead, t):
  """The weights whose gradient of batch t perturbs."""
  if s.ascent == 'lookahead':
    return ahead[t]
  return history[max(t - s.tau, 0)][0]


def _direction(s, history, ahead, stats, trace, batches, t):
  """d_t of each group of examples, or None."""
  if s.ascent == 'none':
    return None
  if s.ascent == 'momentum':
    sign = -1.0 if s.optimizer == 'sgd' else 1.0
    return [_map(lambda m: sign * m, trace)]
  weights = _ascent_weights(s, history, ahead, t)
  return _ascent(s, weights, stats, batches[t])[0]


def _ascent(s, params, stats, batch):
  """Gradients of each group of examples, and moved statistics."""
  kept = [i for i, view in enumerate(s.views) if view != 'adv']
  views, rows, weights = (
    tuple(values[i] for i in kept) for values in (s.views, s.rows, s.weights)
  )
  weights = tuple(w / sum(weights) for w in weights)
  s = dataclasses.replace(s, views=views, rows=rows, weights=weights)
  _, _, moved = _loss_and_gradient(s, params, stats, batch, None, None)
  starts = range(0, len(batch['label']), s.sam_groups)
  parts = [
    {name: x[i : i + s.sam_groups] for name, x in batch.items()} for i in starts
  ]
  found = [
    _loss_and_gradient(s, params, stats, part, None, None)[1] for part in parts
  ]
  return found, moved


def _offset(s, params, d):
  """rho N(d), by layer and name."""
  if s.norm_only:
    d = {k: x if 'norm' in k else _map(np.zeros_like, x) for k, x in d.items()}

  def scaled(x, size, by=1.0):
    return s.rho * by * x / size if size else np.zeros_like(x)

  def length(tree):
    return np.sqrt(sum((x**2).sum() for x in _leaves(tree)))

  if s.normalize == 'global':
    return _map(lambda x: scaled(x, length(d)), d)
  if s.normalize == 'adaptive':
    size = length(_map(lambda w, x: w * x, params, d))
    return _map(lambda w, x: scaled(x, size, w**2), params, d)

  def layerwise(w, x):
    return scaled(x, length(x), length(w))

  def by_row(w, x):
    return np.stack([layerwise(*pair) for pair in zip(w, x, strict=True)])

  return {
    layer: {
      name: by_row(w, d[layer][name])
      if 'norm' in layer
      else layerwise(w, d[layer][name])
      for name, w in leaves.items()
    }
    for layer, leaves in params.items()
  }


def _rows_of_ascent(s):
  pairs = zip(s.views, s.rows, strict=True)
  return {row for view, row in pairs if view != 'adv'}


def _leaves(tree):
  if not isinstance(tree, dict):
    return [tree]
  return [x for part in tree.values() for x in _leaves(part)]


def _with_row(a, b, row):
  new = copy.deepcopy(a)
  for layer in a:
    for name in ('mean', 'var'):
      new[layer][name][row] = b[layer][name][row]
  return new


def _attack(s, params, old_stats, stats, batch, start):
  """Perturbation of `batch`, and `stats` moved by its last gradient.

  `old_stats` belong to `params`, and matter in evaluation mode alone.
  """
  image = batch['clean'].astype(np.float64)
  delta, labels = (np.array(x) for x in start)
  delta = _project(s, delta.astype(np.float64), image)
  for _ in range(s.attack_steps):
    per_group = []
    for g in range(len(image)):
      net = Network(s, params, old_stats, s.adv_row, s.train_mode)
      logits = net.forward((image[g] + delta[g] - s.mean) / s.std)
      _, d_logits = _cross_entropy(logits, labels[g], 0.0)
      d_pixels = net.backward(d_logits) / s.std
      per_group.append(net.batch_stats)
      if s.norm == 'linf':
        direction = np.sign(d_pixels)
      else:
        direction = d_pixels / _length(d_pixels)
      sign = -1.0 if s.targeted else 1.0
      delta[g] += sign * s.step_size * direction
    delta = _project(s, delta, image)
  if s.train_mode:
    stats = _move(s, stats, {s.adv_row: [per_group]})
  return delta, stats


def _length(x):
  """L2 norm of each example of [..., H, W, C]."""
  return np.sqrt((x**2).sum((-3, -2, -1), keepdims=True))


def _project(s, delta, image):
  if s.norm == 'linf':
    delta = np.clip(delta, -s.epsilon, s.epsilon)
  else:
    length = _length(delta)
    delta = np.where(
      length > s.epsilon,
      delta * s.epsilon / np.where(length, length, 1.0),
      delta,
    )
  return np.clip(image + delta, 0.0, 255.0) - image


def _loss_and_gradient(s, params, stats, batch, delta, offsets):
  """Losses by view and their weighted mean, gradient, moved statistics.

  Each group of examples is trained at its own `offsets` from `params`.
  """
  at = [_map(np.add, params, x) for x in offsets] if offsets else [params]
  if len(at) == 1:
    at = at * len(batch['label'])
  else:
    at = [x for x in at for _ in range(s.sam_groups)]
  images = {v: batch[v].astype(np.float64) for v in s.views if v != 'adv'}
  if delta is not None:
    images['adv'] = np.clip(images['clean'] + delta, 0.0, 255.0)
  labels = batch['label']
  total = _map(np.zeros_like, params)
  losses, by_row = {}, {}
  for view, row, weight in zip(s.views, s.rows, s.weights, strict=True):
    loss, per_group = 0.0, []
    for g in range(len(labels)):
      net = Network(s, at[g], stats, row, True)
      logits = net.forward((images[view][g] - s.mean) / s.std)
      each, d_logits = _cross_entropy(logits, labels[g], s.label_smoothing)
      loss += each.sum() / labels.size
      net.backward(d_logits * weight / labels.size)
      total = _map(np.add, total, net.grads)
      per_group.append(net.batch_stats)
    losses[f'loss_{view}'] = loss
    by_row.setdefault(row, []).append(per_group)
  losses['loss'] = sum(
    w * losses[f'loss_{v}'] for v, w in zip(s.views, s.weights, strict=True)
  )
  return losses, total, _move(s, stats, by_row)


def _fast_advprop(s, params, stats, batch, start):
  """The same three of Fast AdvProp, which attacks one group of `adv_every`."""
  image, labels = batch['clean'].astype(np.float64), batch['label']
  noise = _project(s, np.array(start[0], np.float64), image)
  clean_row, adv_row = s.rows

  def one_pass(row, pixels, labels):
    net = Network(s, params, stats, row, True)
    logits = net.forward((pixels - s.mean) / s.std)
    each, d_logits = _cross_entropy(logits, labels, s.label_smoothing)
    slope = net.backward(d_logits / len(labels)) / s.std
    return each.mean(), net, slope

  clean, first, second = [], [], []
  for g in range(len(image)):
    if (g + 1) % s.adv_every:
      clean.append(one_pass(clean_row, image[g], labels[g]))
      continue
    first.append(one_pass(adv_row, image[g] + noise[g], labels[g]))
    slope = first[-1][2]
    direction = np.sign(slope) if s.norm == 'linf' else slope / _length(slope)
    delta = _project(s, noise[g] + s.step_size * direction, image[g])
    second.append(one_pass(adv_row, image[g] + delta, labels[g]))

  moved = stats
  for row, passes in ((adv_row, first), (adv_row, second), (clean_row, clean)):
    moved = _move(s, moved, {row: [[net.batch_stats for _, net, _ in passes]]})

  def mean_gradient(passes):
    grads = [net.grads for _, net, _ in passes]
    return _map(lambda *leaves: sum(leaves) / len(leaves), *grads)

  of_clean = mean_gradient(clean)
  of_adv = _map(
    lambda a, b: (a + b) / 2, mean_gradient(first), mean_gradient(second)
  )
  a = s.weights[0] * (s.adv_every - 1)
  b = s.weights[1]
  a, b = a / (a + b), b / (a + b)
  grads = {}
  for layer in params:
    x, y = (a, b) if 'norm' not in layer else (1.0, 1.0)
    grads[layer] = _map(
      lambda c, d, x=x, y=y: x * c + y * d, of_clean[layer], of_adv[layer]
    )
  losses = {
    'loss_clean': np.mean([loss for loss, _, _ in clean]),
    'loss_adv': np.mean([loss for loss, _, _ in second]),
  }
  losses['loss'] = a * losses['loss_clean'] + b * losses['loss_adv']
  return losses, grads, moved


def _cross_entropy(logits, labels, smoothing):
  """Losses [b] against smoothed targets, and d sum / d logits [b, K]."""
  classes = logits.shape[-1]
  target = np.full(logits.shape, smoothing / classes)
  target[np.arange(len(labels)), labels] += 1.0 - smoothing
  shifted = logits - logits.max(-1, keepdims=True)
  log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
  return -(target * log_p).sum(-1), np.exp(log_p) - target


def _move(s, stats, by_row):
  """Running statistics after the groups of `by_row`: {row: [view][group]}."""
  new = copy.deepcopy(stats)
  for row, views in by_row.items():
    for layer in stats:
      for name in ('mean', 'var'):
        seen = np.mean([[g[layer][name] for g in v] for v in views], (0, 1))
        old = stats[layer][name][row]
        new[layer][name][row] = s.bn_momentum * old + (1 - s.bn_momentum) * seen
  return new


def _halfway(a, b, row):
  new = copy.deepcopy(a)
  for layer in a:
    for name in ('mean', 'var'):
      new[layer][name][row] = (a[layer][name][row] + b[layer][name][row]) / 2
  return new


def _descend(s, rate, params, grads, trace):
  """One optimizer step: new params and new momentum buffers.

  LARS keeps rate * direction in its buffer, SGD the bare direction: the two
  differ whenever the rate changes.
  """
  new, buffers = {}, {}
  for layer in params:
    new[layer], buffers[layer] = {}, {}
    for name, w in params[layer].items():
      g, m = grads[layer][name], trace[layer][name]
      kernel = name == 'kernel'
      step = g + s.weight_decay * w if kernel else g
      if s.optimizer != 'sgd':
        step = -rate * (_trust_ratio(s, w, g) if kernel else 1.0) * step
      m = s.momentum * m + step
      move = s.momentum * m + step if s.nesterov else m
      buffers[layer][name] = m
      new[layer][name] = w - rate * move if s.optimizer == 'sgd' else w + move
  return new, buffers


def _trust_ratio(s, w, g):
  def size(x):
    return np.sqrt((x**2).sum())

  if s.optimizer == 'lars_norm_of_sum':
    below = size(g + s.weight_decay * w)
  else:
    below = size(g) + s.weight_decay * size(w)
  return s.trust_coefficient * size(w) / below


def _average(s, ema, now):
  def mean(old, new):
    return s.ema_decay * old + (1 - s.ema_decay) * new

  params = _map(mean, ema[0], now[0])
  stats = _map(mean, ema[1], now[1]) if s.ema_batch_stats else now[1]
  return params, stats


def _map(f, *trees):
  """`f` on the leaves of nested dicts."""
  if not isinstance(trees[0], dict):
    return f(*trees)
  return {k: _map(f, *(t[k] for t in trees)) for k in trees[0]}


class Network:
  """Twice 3x3 convolution, batch norm, relu; mean over pixels; dense.

  One group of one view: batch norm sees the whole of `x` [b, H, W, C]. After
  `forward`, `batch_stats` has its statistics; after `backward`, `grads` the
  gradient of every parameter, zero in the rows of the other routes.
  """

  def __init__(self, s, params, stats, row, train):
    self.s, self.params, self.stats = s, params, stats
    self.row, self.train = row, train
    self.grads = _map(np.zeros_like, params)
    self.batch_stats = {}
    self.saved = {}

  def forward(self, x):
    for i in '12':
      x = self._conv(f'conv{i}', x)
      x = self._norm(f'norm{i}', x)
      self.saved[f'relu{i}'] = x > 0
      x = np.where(x > 0, x, 0.0)
    self.saved['pixels'] = x.shape
    x = x.mean((1, 2))
    self.saved['head'] = x
    head = self.params['head']
    return x @ head['kernel'] + head['bias']

  def backward(self, dy):
    """d loss / d logits -> d loss / d x, filling `grads`."""
    self.grads['head']['kernel'] = self.saved['head'].T @ dy
    self.grads['head']['bias'] = dy.sum(0)
    dy = dy @ self.params['head']['kernel'].T
    shape = self.saved['pixels']
    pixels = shape[1] * shape[2]
    dy = np.broadcast_to(dy[:, None, None], shape) / pixels
    for i in '21':
      dy = np.where(self.saved[f'relu{i}'], dy, 0.0)
      dy = self._norm_backward(f'norm{i}', dy)
      dy = self._conv_backward(f'conv{i}', dy)
    return dy

  def _conv(self, name, x):
    kernel = self.params[name]['kernel']
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    self.saved[name] = padded
    h, w = x.shape[1:3]
    return sum(
      padded[:, i : i + h, j : j + w] @ kernel[i, j]
      for i in range(3)
      for j in range(3)
    )

  def _conv_backward(self, name, dy):
    kernel, padded = self.params[name]['kernel'], self.saved[name]
    h, w = dy.shape[1:3]
    dx = np.zeros_like(padded)
    for i in range(3):
      for j in range(3):
        window = padded[:, i : i + h, j : j + w]
        self.grads[name]['kernel'][i, j] = np.einsum(
          'bhwc,bhwd->cd', window, dy
        )
        dx[:, i : i + h, j : j + w] += dy @ kernel[i, j].T
    return dx[:, 1:-1, 1:-1]

  def _norm(self, name, x):
    if self.train:
      mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
      self.batch_stats[name] = {'mean': mean, 'var': var}
    else:
      mean, var = (self.stats[name][k][self.row] for k in ('mean', 'var'))
    std = np.sqrt(var + self.s.bn_epsilon)
    x_hat = (x - mean) / std
    self.saved[name] = x_hat, std
    layer = self.params[name]
    return x_hat * layer['scale'][self.row] + layer['bias'][self.row]

  def _norm_backward(self, name, dy):
    x_hat, std = self.saved[name]
    self.grads[name]['scale'][self.row] = (dy * x_hat).sum((0, 1, 2))
    self.grads[name]['bias'][self.row] = dy.sum((0, 1, 2))
    dx_hat = dy * self.params[name]['scale'][self.row]
    if not self.train:
      return dx_hat / std
    # The mean and the variance depend on x too (Ioffe and Szegedy, section 3).
    through_mean = dx_hat.mean((0, 1, 2))
    through_var = x_hat * (dx_hat * x_hat).mean((0, 1, 2))
    return (dx_hat - through_mean - through_var) / std
