"""Clean and robust accuracy of a run.

  python -m conadv_jax.evaluate --workdir=DIR [--config.eval.FIELD=VALUE ...]

Reads the newest checkpoint and evaluates every example of the eval split once:
clean, under FGSM and under PGD (`eval.attack`: all, fgsm, pgd or none), in an
L-infinity ball of `eval.epsilon_px` grey levels, through the batch-norm row
`eval.route`. The attack is white-box: it sees the very network that it is
measured on. Prints a table and adds it to summary.json. Several hosts take the
flags of `conadv_jax.train`.
"""

from __future__ import annotations

import collections
import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath

from conadv_jax import attack as attack_lib
from conadv_jax import (
  cli,
  config,
  experiment,
  hosts,
  losses,
  preflight,
  workdir,
)
from conadv_jax import mesh as mesh_lib
from conadv_jax.checkpoint import Checkpoints
from conadv_jax.config import Attack, Config, ConfigError
from conadv_jax.data import cache
from conadv_jax.data.quarantine import Quarantine
from conadv_jax.experiment import Experiment
from conadv_jax.passes import normalize, wide_dtype
from conadv_jax.state import Snapshot, Stream, TrainState, stream_key
from conadv_jax.watchdog import Watchdog

Sums = dict[str, jax.Array]
EvalFn = Callable[[Snapshot, Mapping[str, jax.Array], jax.Array], Sums]


def eval_attack(config: Config, name: str) -> Attack:
  """The attack `fgsm` (one clean-start step) or `pgd` of an evaluation.

  PGD takes `eval.pgd_steps` steps of 2.5 * epsilon / steps from a uniform
  random start (Madry et al. 2018, arXiv:1706.06083).
  """
  epsilon = config.eval.epsilon_px
  steps = config.eval.pgd_steps if name == 'pgd' else 1
  return Attack(
    preset=name,
    norm='linf',
    epsilon_px=epsilon,
    step_size_px=2.5 * epsilon / steps if name == 'pgd' else epsilon,
    steps=steps,
    targeted=False,
    random_start_prob=1.0 if name == 'pgd' else 0.0,
    train_mode=False,
    update_batch_stats=False,
  )


def make_eval_fn(
  experiment: Experiment, attack: Attack | None, route: str
) -> EvalFn:
  """(weights, batch, batch index) -> sums over the real examples of the batch.

  Sums are `examples`, those of them that could be decoded (`count`), `correct`
  and `loss` (no label smoothing). Batches have bools `is_example`, False on
  padding, and `mask`, False also on images that could not be decoded.
  """

  def eval_fn(weights: Snapshot, batch, index):
    _, logits = _attacked(experiment, attack, route, weights, batch, index)
    label, mask = batch['label'], batch['mask']
    loss = losses.cross_entropy(logits, label)
    return {
      'examples': batch['is_example'].sum(),
      'count': mask.sum(),
      'correct': (losses.top1(logits, label) * mask).sum(),
      'loss': jnp.where(mask, loss, 0).sum(),
    }

  return jax.jit(eval_fn, out_shardings=mesh_lib.replicated(experiment.mesh))


def attacked(
  experiment: Experiment,
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
  route = experiment.config.eval.route

  @jax.jit
  def run(weights, batch):
    _, clean = _attacked(experiment, None, route, weights, batch, 0)
    delta, logits = _attacked(experiment, attack, route, weights, batch, 0)
    return delta[0], jnp.stack([clean[0], logits[0]])

  weights = jax.tree.map(np.asarray, jax.device_get(weights))
  return jax.device_get(run(weights, batch))


def _attacked(
  experiment: Experiment,
  attack: Attack | None,
  route: str,
  weights: Snapshot,
  batch: Mapping[str, jax.Array],
  index: jax.Array | int,
) -> tuple[jax.Array, jax.Array]:
  """(delta [G, b, H, W, C], logits [G, b, K] on clean + delta)."""
  spec = experiment.spec
  row = (experiment.config.routes.index(route),)
  variables = {'params': weights.params, 'batch_stats': weights.batch_stats}
  dtype = wide_dtype(experiment.config)
  image, label = batch['clean'].astype(dtype), batch['label']

  def logits_of(pixels):
    x = normalize(spec, pixels)[:, None]
    return experiment.apply_fn(variables, x, row, False)[0][:, 0]

  def loss_fn(pixels, labels):
    return losses.cross_entropy(logits_of(pixels), labels).sum(), None

  delta = jnp.zeros_like(image)
  if attack is not None:
    key = stream_key(experiment.config.seed, Stream.EVAL_ATTACK, index)
    start = attack_lib.sample_start(attack, key, image, label, spec.num_classes)
    delta, _ = attack_lib.perturb(attack, loss_fn, image, start)
  return delta, logits_of(image + delta)


class Evaluator:
  """Evaluates weights on the whole eval split; compiles once per attack."""

  def __init__(
    self, experiment: Experiment, source: Any, quarantine: Quarantine
  ):
    self._experiment = experiment
    self._source = source
    self._quarantine = quarantine
    self._fns: dict[tuple[str, str], EvalFn] = {}
    self._sharding = mesh_lib.example_sharding(experiment.mesh)
    self._groups = experiment.mesh.size  # nothing here asks for groups
    self._group_size = -(-experiment.config.eval.batch_size // self._groups)

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
    route = route or self._experiment.config.eval.route
    if (attack, route) not in self._fns:
      spec = (
        None
        if attack == 'none'
        else eval_attack(self._experiment.config, attack)
      )
      self._fns[attack, route] = make_eval_fn(self._experiment, spec, route)
    totals = collections.Counter()
    for index, batch in enumerate(self._batches()):
      before_batch()
      sums = self._fns[attack, route](weights, batch, jnp.int32(index))
      for name, value in jax.device_get(sums).items():
        totals[name] += float(value)
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
    """Images uint8 [count, H, W, C] and labels, in the order of the split."""
    batch = next(self._host_batches(count))
    return batch['clean'], batch['label']

  def _batches(self) -> Iterable[Mapping[str, jax.Array]]:
    layout = (self._sharding, self._groups, self._group_size)
    positions = mesh_lib.local_positions(*layout)
    size = self._groups * self._group_size
    for local in self._host_batches(size, positions.reshape(-1)):
      local['is_example'] = local.pop('id') >= 0
      yield mesh_lib.put_batch(*layout, local)

  def _host_batches(
    self, batch_size: int, positions: np.ndarray | None = None
  ) -> Iterator[dict[str, np.ndarray]]:
    # The only import of tensorflow in this file is behind this line.
    from conadv_jax.data import pipeline

    return pipeline.eval_batches(
      self._source,
      self._experiment.config.dataset,
      num_classes=self._experiment.spec.num_classes,
      batch_size=batch_size,
      positions=positions,
      quarantine=self._quarantine,
    )


def weights_of(config: Config, state: TrainState) -> Snapshot:
  """The weights to evaluate: averaged ones where `eval.use_ema` says so."""
  if config.eval.use_ema:
    return state.ema
  return Snapshot(state.params, state.batch_stats)


def attack_names(attack: str) -> tuple[str, ...]:
  """Value of `eval.attack` -> the attacks that it stands for."""
  return {'none': (), 'all': ('fgsm', 'pgd')}.get(attack, (attack,))


def evaluate(argv: Sequence[str]) -> list[dict[str, Any]]:
  """The command: returns the rows that it prints."""
  path, settings = parse_args(cli.start_hosts(argv), attack='all')
  with contextlib.ExitStack() as stack:
    watchdog = stack.enter_context(Watchdog(settings.hang_timeout_seconds))
    stack.push(watchdog.verdict)
    return _evaluate(path, settings, watchdog)


def _evaluate(
  path: epath.Path, settings: Config, watchdog: Watchdog
) -> list[dict[str, Any]]:
  preflight.check_program(settings)
  run = experiment.build(settings)
  step, state = restore_newest(path, run)
  source = cache.load(run.spec, 'eval', settings.dataset)
  preflight.check_input(run, run.spec.num_train, source.num_examples)
  quarantine = workdir.quarantine(path, settings)

  evaluator = Evaluator(run, source, quarantine)
  weights = weights_of(settings, state)
  rows = []
  hosts.say(
    f'{settings.dataset.name}, {source.num_examples} examples, step {step}, '
    f'route {settings.eval.route}'
  )
  hosts.say(
    f'{"attack":<10}{"epsilon_px":>11}{"steps":>7}{"top1 %":>9}{"loss":>9}'
  )
  for name in ('none', *attack_names(settings.eval.attack)):
    attack = eval_attack(settings, name) if name != 'none' else None
    row = {
      'step': step,
      'route': settings.eval.route,
      'use_ema': settings.eval.use_ema,
      'attack': name,
      'epsilon_px': attack.epsilon_px if attack else 0.0,
      'attack_steps': attack.steps if attack else 0,
      **evaluator(
        weights, name, before_batch=lambda: watchdog.phase('evaluate', step)
      ),
    }
    rows.append(row)
    hosts.say(
      f'{name:<10}{row["epsilon_px"]:>11g}{row["attack_steps"]:>7}'
      f'{row["top1"]:>9.2f}{row["loss"]:>9.4f}'
    )
  hosts.on_writer('summary.json', lambda: _add_to_summary(path, rows))
  return rows


def parse_args(
  argv: Sequence[str], **eval_defaults: Any
) -> tuple[epath.Path, Config]:
  """The run's directory, and its configuration with the overrides of `argv`.

  Args:
    argv: `--workdir=DIR [--config.field=value ...]`.
    **eval_defaults: fields of `eval` that are not as in training by default.

  Raises:
    ConfigError: if there is no run, or a field was fixed by its training.
  """
  directory = cli.parse_workdir(argv)
  values = ml_collections.ConfigDict(workdir.read_config(directory))
  values.eval.update(eval_defaults)
  trained = config.from_config_dict(values)
  settings = config.from_config_dict(cli.parse_overrides(argv, values))
  _check_overrides(trained, settings)
  return epath.Path(directory), settings


def restore_newest(path: epath.Path, run: Experiment) -> tuple[int, TrainState]:
  """Step and state of the newest checkpoint of the run in `path`.

  Raises:
    ConfigError: if there is none.
  """
  step = None
  if (path / 'checkpoints').exists():
    checkpoints = Checkpoints(path, read_only=True)
    step = checkpoints.latest_step()
  if step is None:
    raise ConfigError(f'workdir={str(path)!r}: holds no checkpoint yet')
  step, state, _ = checkpoints.restore(run.abstract_state())
  return step, state


def _check_overrides(trained: Config, settings: Config) -> None:
  places = ('dataset.data_dir', 'dataset.cache', 'dataset.max_bad_share')
  free = ('eval.', *places)
  for name, (old, new) in config.changes(trained, settings, free).items():
    raise ConfigError(
      f'{name}={new!r}: the run was trained with {old!r}; only eval.*, '
      f'{", ".join(places)} can be set here'
    )


def _add_to_summary(path: epath.Path, rows: list[dict[str, Any]]) -> None:
  """Adds `rows` to `evaluations`, in place of earlier ones of the same kind."""
  summary = {}
  if (path / 'summary.json').exists():
    summary = json.loads((path / 'summary.json').read_text())

  def kind(row):
    results = ('top1', 'loss', 'bad_examples')
    return {k: v for k, v in row.items() if k not in results}

  new = [kind(row) for row in rows]
  old = [r for r in summary.get('evaluations', []) if kind(r) not in new]
  workdir.write_json(
    path / 'summary.json', {**summary, 'evaluations': old + rows}
  )


if __name__ == '__main__':
  cli.run(evaluate, __doc__)
