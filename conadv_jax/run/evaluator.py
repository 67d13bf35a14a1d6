"""Measures clean and robust accuracy on the whole eval split."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from conadv_jax import hosts
from conadv_jax.config import Attack, Config
from conadv_jax.data.quarantine import Quarantine
from conadv_jax.data.sources.source import Source
from conadv_jax.devices.mesh import (
  example_sharding,
  local_positions,
  put_batch,
  replicated,
)
from conadv_jax.experiment import Run
from conadv_jax.method import losses
from conadv_jax.method.attack import perturb, sample_start
from conadv_jax.method.pixels import normalize, wide_dtype
from conadv_jax.method.state import Snapshot, Stream, TrainState, stream_key
from conadv_jax.methods import ATTACKS
from conadv_jax.run.timeline import Ticker

Sums = dict[str, jax.Array]
EvalFn = Callable[[Snapshot, Mapping[str, jax.Array], jax.Array], Sums]


def eval_attack(config: Config, name: str) -> Attack:
  """Returns the attack `methods.ATTACKS[name]` as an evaluation makes it.

  With the radius `eval.epsilon`, and no change of batch statistics. Where the
  preset takes more than one step, it takes k = `eval.attack_steps` steps of
  2.5 * epsilon / k (Madry et al. 2018, arXiv:1706.06083).
  """
  preset, epsilon = ATTACKS[name], config.eval.epsilon
  steps = config.eval.attack_steps if preset.steps > 1 else 1
  return dataclasses.replace(
    preset,
    epsilon=epsilon,
    step_size=2.5 * epsilon / steps if steps > 1 else epsilon,
    steps=steps,
    train_mode=False,
    update_batch_stats=False,
  )


def make_eval_fn(run: Run, attack: Attack | None, route: str) -> EvalFn:
  """(weights, batch, batch index) -> sums over the real examples of the batch.

  Sums are `examples`, those of them that could be decoded (`count`), `correct`
  and `loss` (no label smoothing). Batches have bools `is_example`, False on
  padding, and `mask`, False also on images that could not be decoded.
  """

  def eval_fn(weights: Snapshot, batch, index):
    _, logits = _attacked(run, attack, route, weights, batch, index)
    label, mask = batch['label'], batch['mask']
    loss = losses.cross_entropy(logits, label)
    return {
      'examples': batch['is_example'].sum(),
      'count': mask.sum(),
      'correct': (losses.top1(logits, label) * mask).sum(),
      'loss': jnp.where(mask, loss, 0).sum(),
    }

  return jax.jit(eval_fn, out_shardings=replicated(run.mesh))


def attacked(
  run: Run,
  attack: Attack,
  weights: Snapshot,
  images: np.ndarray,
  labels: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
  """Perturbations of a few images, and logits without and with them.

  Args:
    images: uint8 [N, H, W, C].
    labels: int [N].

  Returns:
    delta in grey levels [N, H, W, C] and logits [2, N, K]: clean, attacked.
  """
  batch = {'clean': jnp.array(images)[None], 'label': jnp.array(labels)[None]}
  route = run.config.eval.route

  @jax.jit
  def attack_all(weights, batch):
    _, clean = _attacked(run, None, route, weights, batch, 0)
    delta, logits = _attacked(run, attack, route, weights, batch, 0)
    return delta[0], jnp.stack([clean[0], logits[0]])

  weights = jax.tree.map(np.asarray, jax.device_get(weights))
  return jax.device_get(attack_all(weights, batch))


def _attacked(
  run: Run,
  attack: Attack | None,
  route: str,
  weights: Snapshot,
  batch: Mapping[str, jax.Array],
  index: jax.Array | int,
) -> tuple[jax.Array, jax.Array]:
  """(delta [G, b, H, W, C], logits [G, b, K] on clean + delta)."""
  spec = run.spec
  row = (run.config.routes.index(route),)
  variables = {'params': weights.params, 'batch_stats': weights.batch_stats}
  dtype = wide_dtype(run.config)
  image, label = batch['clean'].astype(dtype), batch['label']

  def logits_of(pixels):
    x = normalize(spec, pixels)[:, None]
    return run.apply_fn(variables, x, row, False)[0][:, 0]

  def loss_fn(pixels, labels):
    return losses.cross_entropy(logits_of(pixels), labels).sum(), None

  delta = jnp.zeros_like(image)
  if attack is not None:
    key = stream_key(run.config.seed, Stream.EVAL_ATTACK, index)
    start = sample_start(attack, key, image, label, spec.num_classes)
    delta, _ = perturb(attack, loss_fn, image, start)
  return delta, logits_of(image + delta)


class Evaluator:
  """Evaluates weights on the whole eval split; compiles once per attack."""

  def __init__(self, run: Run, source: Source, quarantine: Quarantine):
    self._run = run
    self._source = source
    self._quarantine = quarantine
    self._fns: dict[tuple[str, str], EvalFn] = {}
    self._sharding = example_sharding(run.mesh)
    self._groups = run.mesh.size  # nothing here asks for groups
    self._group_size = -(-run.config.eval.batch_size // self._groups)

  def __call__(
    self,
    weights: Snapshot,
    attack: str = 'none',
    route: str | None = None,
    before_batch: Callable[[], None] = lambda: None,
  ) -> dict[str, float]:
    """`top1` in percent and mean `loss`, under `attack` (none, fgsm, pgd).

    Images that cannot be decoded are left out of both; `bad_examples` is their
    number, if there are any, and the quarantine names them. `before_batch` is
    called before each batch, and may raise.

    Raises:
      RuntimeError: if not every example was seen once.
    """
    route = route or self._run.config.eval.route
    if (attack, route) not in self._fns:
      spec = None if attack == 'none' else eval_attack(self._run.config, attack)
      self._fns[attack, route] = make_eval_fn(self._run, spec, route)
    totals = collections.Counter()
    ticker = Ticker()
    for index, batch in enumerate(self.batches()):
      before_batch()
      sums = self._fns[attack, route](weights, batch, jnp.int32(index))
      for name, value in jax.device_get(sums).items():
        totals[name] += float(value)
      if ticker.due():
        of = self._source.num_examples
        hosts.say(f'evaluated {totals["examples"]:.0f} of {of} ({attack})')
    count = totals['count']
    seen = totals['examples']
    if seen != self._source.num_examples:
      raise RuntimeError(
        f'evaluated {seen:.0f} of {self._source.num_examples} examples'
      )
    result = {
      'top1': 100 * totals['correct'] / count,
      'loss': totals['loss'] / count,
    }
    return result if count == seen else result | {'bad_examples': seen - count}

  def first_examples(self, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first images that can be decoded, and their labels.

    Returns:
      uint8 [n, H, W, C] and int32 [n], in the order of the split, where n is
      `count`, or less if the split has no more.
    """
    images, labels = [], []
    for batch in self._host_batches(count):
      images += list(batch['clean'][batch['mask']])
      labels += list(batch['label'][batch['mask']])
      if len(images) >= count:
        break
    return np.stack(images[:count]), np.stack(labels[:count])

  def batches(
    self, example_ids: np.ndarray | None = None
  ) -> Iterator[dict[str, jax.Array]]:
    """Batches of `make_eval_fn` on the devices: of some examples, or of all."""
    layout = (self._sharding, self._groups, self._group_size)
    positions = local_positions(*layout)
    size = self._groups * self._group_size
    for local in self._host_batches(size, positions.reshape(-1), example_ids):
      local['is_example'] = local.pop('id') >= 0
      yield put_batch(*layout, local)

  def _host_batches(
    self,
    batch_size: int,
    positions: np.ndarray | None = None,
    example_ids: np.ndarray | None = None,
  ) -> Iterator[dict[str, np.ndarray]]:
    # The only import of tensorflow in this file is behind this line.
    from conadv_jax.data import pipeline

    return pipeline.eval_batches(
      self._source,
      self._run.config.dataset,
      num_classes=self._run.spec.num_classes,
      batch_size=batch_size,
      positions=positions,
      quarantine=self._quarantine,
      example_ids=example_ids,
    )


def weights_of(config: Config, state: TrainState) -> Snapshot:
  """The weights to evaluate: averaged ones where `eval.use_ema` says so."""
  if config.eval.use_ema:
    return state.ema
  return Snapshot(state.params, state.batch_stats)
