"""Measures clean and robust accuracy on every example of a source."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from conadv_jax import hosts
from conadv_jax.config import Attack, Config
from conadv_jax.data import pipeline
from conadv_jax.data.quarantine import Quarantine
from conadv_jax.data.sources.source import Source
from conadv_jax.devices import loops
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
from conadv_jax.run import scores
from conadv_jax.run.scores import Outcomes
from conadv_jax.run.timeline import Ticker

EvalFn = Callable[
  [Snapshot, Mapping[str, jax.Array], jax.Array], dict[str, jax.Array]
]


def eval_attack(
  config: Config, name: str, epsilon: float | None = None
) -> Attack:
  """Returns the attack `methods.ATTACKS[name]` as an evaluation makes it.

  With the radius `epsilon`, or `eval.epsilon`, in `eval.norm`, and no change of
  batch statistics. Where the preset takes more than one step, it takes k =
  `eval.attack_steps` steps of 2.5 * epsilon / k (Madry et al. 2018,
  arXiv:1706.06083).
  """
  preset, settings = ATTACKS[name], config.eval
  epsilon = settings.epsilon if epsilon is None else epsilon
  steps = settings.attack_steps if preset.steps > 1 else preset.steps
  return dataclasses.replace(
    preset,
    preset=name,
    norm=settings.norm or preset.norm,
    epsilon=epsilon,
    step_size=2.5 * epsilon / steps if steps > 1 else epsilon,
    steps=steps,
    train_mode=False,
    update_batch_stats=False,
  )


def make_logits_fn(
  run: Run, weights: Snapshot, route: str, classes: Sequence[int] = ()
) -> Callable[[jax.Array], jax.Array]:
  """Returns the function pixels [G, b, H, W, C] -> logits [G, b, K].

  Args:
    run: as it is evaluated.
    weights: of the network.
    route: batch-norm row.
    classes: the logits of others are -inf; () is all.
  """
  row = (run.config.routes.index(route),)
  variables = {'params': weights.params, 'batch_stats': weights.batch_stats}
  allowed = np.isin(np.arange(run.spec.num_classes), classes)

  def logits_of(pixels: jax.Array) -> jax.Array:
    x = normalize(run.spec, pixels)[:, None]
    logits = run.apply_fn(variables, x, row, False)[0][:, 0]
    return jnp.where(allowed, logits, -jnp.inf) if classes else logits

  return logits_of


def became(
  logits: jax.Array, label: jax.Array, usable: jax.Array
) -> dict[str, jax.Array]:
  """Returns the fields of `Outcomes`, [..., K] -> [...]."""
  _, first = jax.lax.top_k(logits, min(5, logits.shape[-1]))
  return {
    'label': label,
    'first': first,
    'right': first == label[..., None],
    'confidence': jax.nn.softmax(logits).max(-1),
    'loss': losses.cross_entropy(logits, label),
    'usable': usable,
  }


def make_eval_fn(
  run: Run, attack: Attack | None, route: str, classes: Sequence[int] = ()
) -> EvalFn:
  """(weights, batch, index of the batch) -> what became of each example.

  Those are the fields of `Outcomes`, [G, b, ...], on every host, and
  `is_example`, False on padding. Images that could not be decoded have a False
  `mask` in the batch, too.
  """

  def eval_fn(weights: Snapshot, batch, index):
    logits_of = make_logits_fn(run, weights, route, classes)
    _, logits = _attacked(run, attack, logits_of, batch, index)
    made = became(logits, batch['label'], batch['mask'])
    return made | {'is_example': batch['is_example']}

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

  @jax.jit
  def attack_all(weights, batch):
    logits_of = make_logits_fn(run, weights, run.config.eval.route)
    _, clean = _attacked(run, None, logits_of, batch, 0)
    delta, logits = _attacked(run, attack, logits_of, batch, 0)
    return delta[0], jnp.stack([clean[0], logits[0]])

  weights = jax.tree.map(np.asarray, jax.device_get(weights))
  return jax.device_get(attack_all(weights, batch))


def judged(
  run: Run, weights: Snapshot, images: np.ndarray, labels: np.ndarray
) -> Outcomes:
  """What becomes of images as they are, float [N, H, W, C] in grey levels."""
  weights = jax.tree.map(np.asarray, jax.device_get(weights))

  @jax.jit
  def judge(weights, pixels, label):
    logits_of = make_logits_fn(run, weights, run.config.eval.route)
    return became(logits_of(pixels[None])[0], label, jnp.full(len(label), True))

  parts = []
  for start in range(0, len(images), run.config.eval.batch_size):
    part = slice(start, start + run.config.eval.batch_size)
    made = jax.device_get(judge(weights, images[part], labels[part]))
    parts.append(Outcomes(**made))
  return Outcomes(*map(np.concatenate, zip(*parts, strict=True)))


def _attacked(
  run: Run,
  attack: Attack | None,
  logits_of: Callable[[jax.Array], jax.Array],
  batch: Mapping[str, jax.Array],
  index: jax.Array | int,
) -> tuple[jax.Array, jax.Array]:
  """(delta [G, b, H, W, C], logits [G, b, K] on clean + delta)."""
  image, label = batch['clean'].astype(wide_dtype(run.config)), batch['label']

  def loss_fn(pixels, labels):
    return losses.cross_entropy(logits_of(pixels), labels).sum(), None

  delta = jnp.zeros_like(image)
  if attack is not None:
    key = stream_key(run.config.seed, Stream.EVAL_ATTACK, index)
    start = sample_start(attack, key, image, label, run.spec.num_classes)
    with loops.of_mesh(run.mesh):
      delta, _ = perturb(attack, loss_fn, image, start)
  return delta, logits_of(image + delta)


class Evaluator:
  """Evaluates weights on all examples; compiles once per attack."""

  def __init__(
    self,
    run: Run,
    source: Source,
    quarantine: Quarantine,
    name: str = 'eval',
    classes: Sequence[int] = (),
    like: Evaluator | None = None,
  ):
    """Reads nothing.

    Args:
      run: as it is evaluated.
      source: of the examples.
      quarantine: gets those that cannot be used, under
      name: of the examples.
      classes: that predictions are restricted to; () is all.
      like: of the same run; what it has compiled is not compiled again.
    """
    self._run = run
    self._source = source
    self._quarantine = quarantine
    self._name = name
    self._classes = tuple(classes)
    self._fns: dict[Any, EvalFn] = like._fns if like else {}
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
    """What `scores.of` finds, under `attack`, a name in ATTACKS or none.

    The arguments are those of `outcomes`.
    """
    made = None if attack == 'none' else eval_attack(self._run.config, attack)
    return scores.of(self.outcomes(weights, made, route, before_batch))

  def outcomes(
    self,
    weights: Snapshot,
    attack: Attack | None,
    route: str | None = None,
    before_batch: Callable[[], None] = lambda: None,
  ) -> Outcomes:
    """Evaluates every example, in their order; on every host.

    Args:
      weights: to evaluate.
      attack: from `eval_attack`; None for clean images. If it is random, an
        example has the worst outcome of `eval.restarts` of them.
      route: batch-norm row; None is `eval.route`.
      before_batch: called before each batch, and may raise.

    Raises:
      RuntimeError: if not every example was seen once.
    """
    config = self._run.config
    route = route or config.eval.route
    key = (attack, route, self._classes)
    if key not in self._fns:
      self._fns[key] = make_eval_fn(self._run, *key)
    fn = self._fns[key]
    restarts = config.eval.restarts if attack and attack.is_random else 1
    total = self._source.num_examples
    count = -(-total // (self._groups * self._group_size))
    parts, ticker, seen = [], Ticker(), 0
    for index, batch in enumerate(self.batches()):
      tries = []
      for restart in range(restarts):
        before_batch()
        # Its random numbers are those of a batch after the last one.
        place = jnp.int32(index + restart * count)
        found = jax.device_get(fn(weights, batch, place))
        there = found.pop('is_example')
        tries.append(Outcomes(**{k: x[there] for k, x in found.items()}))
      parts.append(scores.worst(tries))
      seen += int(there.sum())
      if ticker.due():
        name = attack.preset if attack else 'none'
        hosts.say(f'evaluated {seen} of {total} ({name})')
    if seen != total:
      raise RuntimeError(f'evaluated {seen} of {total} examples')
    return Outcomes(*map(np.concatenate, zip(*parts, strict=True)))

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
    return pipeline.eval_batches(
      self._source,
      self._run.config.dataset,
      num_classes=self._run.spec.num_classes,
      batch_size=batch_size,
      positions=positions,
      quarantine=self._quarantine,
      name=self._name,
      example_ids=example_ids,
    )


def weights_of(config: Config, state: TrainState) -> Snapshot:
  """The weights to evaluate: averaged ones where `eval.use_ema` says so."""
  if config.eval.use_ema:
    return state.ema
  return Snapshot(state.params, state.batch_stats)
