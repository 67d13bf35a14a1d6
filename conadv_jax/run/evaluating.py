"""Evaluates weights, of a run or of a file, and keeps the results."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from conadv_jax import cli, experiment, hosts
from conadv_jax.base import storage
from conadv_jax.base.errors import ConfigError
from conadv_jax.config import Attack, Config, Dataset, from_config_dict, to_dict
from conadv_jax.data import datasets, imagenet_sets
from conadv_jax.data.quarantine import Quarantine
from conadv_jax.method.state import Snapshot
from conadv_jax.run import (
  autoattack,
  compile_cache,
  equal_hosts,
  eval_flags,
  evaluations,
  provenance,
  reports,
  weights_file,
  workdir,
)
from conadv_jax.run.evaluations import Examples, Found, Row
from conadv_jax.run.evaluator import Evaluator, eval_attack, judged, weights_of
from conadv_jax.run.guard import Guard
from conadv_jax.run.reopen import parse_args, restore_newest


def evaluate(argv: Sequence[str]) -> list[Row]:
  """The command: returns the rows that it prints."""
  options, rest = eval_flags.parse(cli.start_hosts(argv))
  attack = 'none' if options.set_name else 'all'
  if options.weights:
    # Of a recipe for training, evaluation takes other things by default.
    ours = [f'--config.eval.attack={attack}', '--config.eval.use_ema=false']
    path = None
    config = from_config_dict(cli.parse_config([rest[0], *ours, *rest[1:]]))
    compile_cache.use(config)
  else:
    free = () if options.set_name else ('dataset.eval_split',)
    path, config = parse_args(rest, free, attack=attack)
  parts = _parts(config, options)
  with Guard(config.hang_timeout_seconds) as guard:
    equal_hosts.check_program(config)
    return _Evaluation(options, config, path, guard)(parts)


def _parts(
  config: Config, options: eval_flags.Options
) -> list[tuple[Dataset, list[Attack]]]:
  """The data sets to evaluate, each with its attacks besides clean images."""
  attacks = [
    eval_attack(config, name, radius)
    for name in config.eval.attacks
    for radius in options.epsilons or (config.eval.epsilon,)
  ]
  if options.epsilons and not attacks:
    raise ConfigError('--epsilons: no attack is set; set --config.eval.attack')
  if not options.set_name:
    part = evaluations.train_part(config)
    return [(config.dataset, attacks), *([(part, [])] if part else [])]
  parts = []
  for name in imagenet_sets.SETS[options.set_name]:
    changed = {'name': name, 'train_split': '', 'eval_split': '',
               'cache': 'none'}  # fmt: skip
    if name.startswith(imagenet_sets.CORRUPTED):
      changed['eval_crop_ratio'] = 1.0  # its images are central crops
    parts.append((dataclasses.replace(config.dataset, **changed), attacks))
  return parts


class _Evaluation:
  """One call of the command."""

  def __init__(
    self,
    options: eval_flags.Options,
    config: Config,
    path: epath.Path | None,
    guard: Guard,
  ):
    """Reads no weights; `path` is of a run, None of a file."""
    self._options, self._path, self._guard = options, path, guard
    self._trained: Mapping[str, Any] = {}
    self._step = 0
    if path is not None:
      self._trained = workdir.read_run(path).get('data', {})
      spec = datasets.recorded(config.dataset, self._trained)
      self._quarantine = workdir.quarantine(path, config)
      self._file, self._head = path / 'summary.json', None
    else:
      spec = datasets.resolve(config.dataset, eval_only=True)
      self._quarantine = Quarantine(max_share=config.dataset.max_bad_share)
      self._file, self._head = _output(options.output, config)
    self._folder = path or self._file.with_suffix('')
    self._run = experiment.build(config, spec=spec, trains=False)

  def __call__(
    self, parts: Sequence[tuple[Dataset, list[Attack]]]
  ) -> list[Row]:
    for dataset, _ in parts:  # Raises for any that is not prepared.
      datasets.get_spec(dataset.name).version(dataset.data_dir)
    rows, like = [], None
    for dataset, attacks in parts:
      examples = self._opened(dataset, like)
      if like is None:
        if self._options.ensemble:
          autoattack.check_count(examples.data['num_examples'])
        weights = self._load()
      found = self._measured(examples, attacks, *weights)
      if self._options.ensemble and like is None:
        found.append(self._autoattacked(examples, weights[0], found[0][0]))
        hosts.say(reports.line(found[-1][0]))
      like = examples.evaluator
      rows += self._stored([row for row, _ in found])
      hosts.say(self._reported(examples, found), end='')
    if self._options.set_name == 'c':
      rows += self._stored([evaluations.of_corruptions(rows)])
      hosts.say(f'mCE {rows[-1]["mce"]:.2f} %')
    return rows

  def _opened(self, dataset: Dataset, like: Evaluator | None) -> Examples:
    # What is evaluated may be elsewhere, and without the training images.
    spec = datasets.resolve(dataset, eval_only=True)
    examples = evaluations.examples_of(
      self._run, spec, dataset, self._quarantine, self._trained, like
    )
    equal_hosts.check_input(self._run, examples.found)
    provenance.check_classes(self._trained, examples.found)
    return examples

  def _load(self) -> tuple[Snapshot, int | None, Mapping[str, Any]]:
    """Weights, their step, and what a row says of those of a file."""
    if self._path is None:
      weights, identity = weights_file.read(self._options.weights, self._run)
      return weights, None, {'weights': identity}
    step, state = restore_newest(self._path, self._run)
    self._step = step
    return weights_of(self._run.config, state), step, {}

  def _measured(
    self,
    examples: Examples,
    attacks: Sequence[Attack],
    weights: Snapshot,
    step: int | None,
    identity: Mapping[str, Any],
  ) -> list[Found]:
    """Rows with what they are of; prints them."""
    config, data = self._run.config, examples.data
    hosts.say(
      f'{data["name"]}, {data["split"]}, {data["num_examples"]} examples, '
      f'{self._options.weights or f"step {step}"}, route {config.eval.route}'
    )
    if self._trained and not provenance.is_own(self._trained, data):
      hosts.say('these are not the examples that the run evaluates itself')
    hosts.say(reports.HEAD)
    found = []
    for row, made in evaluations.measured(
      config, examples, weights, step, attacks, self._before_batch
    ):
      found.append((row | identity, made))
      hosts.say(reports.line(row))
    return found

  def _before_batch(self) -> None:
    self._guard.enter('evaluate', self._step)

  def _autoattacked(
    self, examples: Examples, weights: Snapshot, clean: Row
  ) -> Found:
    """The row of AutoAttack in the ball that `eval` has, from the clean one."""
    settings, names = self._run.config.eval, self._options.ensemble
    images, labels = examples.evaluator.first_examples(
      examples.data['num_examples']
    )
    ball = {'norm': settings.norm or 'linf', 'epsilon': settings.epsilon}
    adversarial, _ = autoattack.attack(
      self._run,
      weights,
      images,
      labels,
      names=names,
      before_batch=self._before_batch,
      **ball,
    )
    made = judged(self._run, weights, adversarial, labels)
    name = 'autoattack'
    if names != autoattack.STANDARD:
      name += f': {", ".join(names)}'
    return evaluations.replaced(clean, {'attack': name, **ball}, made), made

  def _stored(self, rows: list[Row]) -> list[Row]:
    """Keeps `rows`, and returns them."""
    hosts.on_writer(
      'the results', lambda: evaluations.store(self._file, rows, self._head)
    )
    return rows

  def _reported(self, examples: Examples, found: Sequence[Found]) -> str:
    """Draws and writes what the flags ask for; returns what to print of it."""

    def report() -> str:
      lines = []
      if self._options.per_class:
        names, folder = examples.found['class_names'], self._folder
        lines.append(
          reports.write_by_class(found, names, folder / 'evaluations')
        )
      if self._options.epsilons and len(found) > 1:
        title = f'{self._run.config.model}, {examples.data["name"]}'
        names = ('none', *self._run.config.eval.attacks)
        rows = [row for row, _ in found if row['attack'] in names]
        paths = reports.write_curves(rows, title, self._folder / 'plots')
        lines += [f'drawn: {path}' for path in paths]
      return ''.join(f'{line}\n' for line in lines)

    return hosts.on_writer('the reports', report)


def _output(
  output: str, config: Config
) -> tuple[epath.Path, Mapping[str, Any]]:
  """The file for results, whose folder is made, and what else is in it.

  Raises:
    ConfigError: if that is not possible, or it has results of other settings.
  """
  file, head = storage.expand(output), {'config': to_dict(config)}
  del head['config']['eval']  # is in the rows
  del head['config']['dataset']['data_dir']  # a place, and in them

  def prepare() -> None:
    try:
      file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise ConfigError(
        f'--output={output}: cannot be made: {error}'
      ) from error
    known = evaluations.read(file)
    if known and known.get('config') != head['config']:
      raise ConfigError(
        f'--output={output}: holds something else, or results with another '
        'configuration; use another name'
      )

  hosts.on_writer('the output', prepare)
  return file, head
