"""Evaluates weights, of a run or of a file, and keeps the results."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from absl import flags
from etils import epath

from conadv_jax import cli, experiment, hosts
from conadv_jax.base import storage
from conadv_jax.base.errors import ConfigError, unknown
from conadv_jax.config import Attack, Config, Dataset, from_config_dict, to_dict
from conadv_jax.data import datasets, imagenet_sets
from conadv_jax.data.quarantine import Quarantine
from conadv_jax.experiment import Run
from conadv_jax.method.state import Snapshot
from conadv_jax.run import (
  autoattack,
  compile_cache,
  evaluations,
  preflight,
  provenance,
  reports,
  scores,
  weights_file,
  workdir,
)
from conadv_jax.run.evaluations import Examples, Row
from conadv_jax.run.evaluator import (
  Evaluator,
  eval_attack,
  judged,
  weights_of,
)
from conadv_jax.run.guard import Guard
from conadv_jax.run.reopen import parse_args, restore_newest
from conadv_jax.run.scores import Outcomes


class _Options(NamedTuple):
  """Flags of the command; its docstring has their meaning."""

  epsilons: tuple[float, ...]
  per_class: bool
  autoattack: tuple[str, ...]
  set_name: str
  weights: str
  output: str


class _Loaded(NamedTuple):
  """Weights, and what a row says of them.

  Attributes:
    weights: to evaluate.
    step: that they were trained to; None where that is not known.
    identity: of weights that are not of a run.
  """

  weights: Snapshot
  step: int | None
  identity: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class _Subject:
  """What is evaluated, before its weights are read.

  Attributes:
    run: as it is evaluated.
    load: reads the weights.
    trained: what identifies the examples of their run; {} without one.
    quarantine: gets the examples that cannot be used.
    file: that the results are added to.
    head: of that file, where it is new; None is a summary.json.
    folder: of pictures and tables.
  """

  run: Run
  load: Callable[[], _Loaded]
  trained: Mapping[str, Any]
  quarantine: Quarantine
  file: epath.Path
  head: Mapping[str, Any] | None
  folder: epath.Path


def evaluate(argv: Sequence[str]) -> list[Row]:
  """The command: returns the rows that it prints."""
  options, rest = _parse(cli.start_hosts(argv))
  attack = 'none' if options.set_name else 'all'
  if options.weights:
    # Of a recipe for training, evaluation takes other things by default.
    ours = [f'--config.eval.attack={attack}', '--config.eval.use_ema=false']
    values = cli.parse_config([rest[0], *ours, *rest[1:]])
    config = from_config_dict(values)
    compile_cache.use(config)
    make_subject = functools.partial(_of_file, config, options)
  else:
    free = () if options.set_name else ('dataset.eval_split',)
    path, config = parse_args(rest, free, attack=attack)
    make_subject = functools.partial(_of_run, path, config)
  parts = _parts(config, options)
  with Guard(config.hang_timeout_seconds) as guard:
    preflight.check_program(config)
    return _evaluate(make_subject(), options, parts, guard)


# ---- What is evaluated ------------------------------------------------------


def _of_run(path: epath.Path, config: Config) -> _Subject:
  trained = workdir.read_run(path).get('data', {})
  run = experiment.build(
    config, spec=datasets.recorded(config.dataset, trained)
  )

  def load() -> _Loaded:
    step, state = restore_newest(path, run)
    return _Loaded(weights_of(config, state), step, {})

  return _Subject(
    run=run,
    load=load,
    trained=trained,
    quarantine=workdir.quarantine(path, config),
    file=path / 'summary.json',
    head=None,
    folder=path,
  )


def _of_file(config: Config, options: _Options) -> _Subject:
  spec = datasets.resolve(config.dataset, eval_only=True)
  run = experiment.build(config, spec=spec)
  output = storage.expand(options.output)
  head = {'config': to_dict(config)}
  del head['config']['eval']  # is in the rows
  hosts.on_writer('the output', lambda: _check_output(output, head))

  def load() -> _Loaded:
    weights, identity = weights_file.read(options.weights, run)
    return _Loaded(weights, None, {'weights': identity})

  return _Subject(
    run=run,
    load=load,
    trained={},
    quarantine=Quarantine(max_share=config.dataset.max_bad_share),
    file=output,
    head=head,
    folder=output.with_suffix(''),
  )


def _check_output(output: epath.Path, head: Mapping[str, Any]) -> None:
  """Makes the folder of `output`; refuses what is not of the same settings."""
  try:
    output.parent.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise ConfigError(f'--output={output}: cannot be made: {error}') from error
  known = evaluations.read(output)
  if known and known.get('config') != head['config']:
    raise ConfigError(
      f'--output={output}: holds something else, or results with another '
      'configuration; use another name'
    )


def _parts(
  config: Config, options: _Options
) -> list[tuple[Dataset, list[Attack]]]:
  """The data sets to evaluate, each with its attacks besides clean images."""
  radii = options.epsilons or (config.eval.epsilon,)
  attacks = [
    eval_attack(config, name, radius)
    for name in config.eval.attacks
    for radius in radii
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


def _opened(
  subject: _Subject, dataset: Dataset, like: Evaluator | None
) -> Examples:
  # What is evaluated may be elsewhere, and without the training images.
  spec = datasets.resolve(dataset, eval_only=True)
  examples = evaluations.examples_of(
    subject.run, spec, dataset, subject.quarantine, subject.trained, like
  )
  preflight.check_input(subject.run, examples.found)
  provenance.check_classes(subject.trained, examples.found)
  return examples


# ---- The evaluation ---------------------------------------------------------


def _evaluate(
  subject: _Subject,
  options: _Options,
  parts: Sequence[tuple[Dataset, list[Attack]]],
  guard: Guard,
) -> list[Row]:
  for dataset, _ in parts:  # Raises for any that is not prepared.
    datasets.get_spec(dataset.name).version(dataset.data_dir)
  rows, like, loaded = [], None, None
  for dataset, attacks in parts:
    examples = _opened(subject, dataset, like)
    like = examples.evaluator
    if options.autoattack and not rows:
      autoattack.check_count(examples.data['num_examples'])
    loaded = loaded or subject.load()
    found = _measured(subject, loaded, examples, attacks, guard)
    if options.autoattack and not rows:
      found.append(
        _autoattacked(subject, loaded, examples, found[0][0], options)
      )
      hosts.say(reports.line(found[-1][0]))
    rows += _stored(subject, [row for row, _ in found])
    hosts.say(_reported(subject, options, examples, found), end='')
  if options.set_name == 'c':
    rows += _stored(subject, [_corruptions(rows)])
    hosts.say(f'mCE {rows[-1]["mce"]:.2f} %')
  return rows


def _measured(
  subject: _Subject,
  loaded: _Loaded,
  examples: Examples,
  attacks: Sequence[Attack],
  guard: Guard,
) -> list[tuple[Row, Outcomes]]:
  """Rows with what they are of; prints them."""
  config, data = subject.run.config, examples.data
  of = loaded.identity['weights']['file'] if loaded.identity else (
    f'step {loaded.step}'
  )  # fmt: skip
  hosts.say(
    f'{data["name"]}, {data["split"]}, {data["num_examples"]} examples, {of}, '
    f'route {config.eval.route}'
  )
  if subject.trained and not provenance.is_own(subject.trained, data):
    hosts.say('these are not the examples that the run evaluates itself')
  hosts.say(reports.HEAD)
  found = []
  for row, made in evaluations.measured(
    config,
    examples,
    loaded.weights,
    loaded.step,
    attacks,
    before_batch=lambda: guard.enter('evaluate', loaded.step),
  ):
    found.append((row | loaded.identity, made))
    hosts.say(reports.line(row))
  return found


def _autoattacked(
  subject: _Subject,
  loaded: _Loaded,
  examples: Examples,
  clean: Row,
  options: _Options,
) -> tuple[Row, Outcomes]:
  """The row of AutoAttack in the ball that `eval` has, from the clean one."""
  settings, names = subject.run.config.eval, options.autoattack
  count = examples.data['num_examples']
  images, labels = examples.evaluator.first_examples(count)
  norm = settings.norm or 'linf'
  adversarial, _ = autoattack.attack(
    subject.run,
    loaded.weights,
    settings.route,
    images,
    labels,
    norm=norm,
    epsilon=settings.epsilon,
    names=names,
  )
  made = judged(subject.run, loaded.weights, adversarial, labels)
  standard = names == autoattack.STANDARD
  of_clean = evaluations.results(clean)
  row = {k: v for k, v in clean.items() if k not in of_clean} | {
    'attack': 'autoattack' if standard else f'autoattack: {", ".join(names)}',
    'norm': norm,
    'epsilon': settings.epsilon,
  }
  bad = {k: v for k, v in of_clean.items() if k == 'bad_examples'}
  return row | scores.of(made) | bad, made


def _corruptions(rows: Sequence[Row]) -> Row:
  clean = [row for row in rows if row['attack'] == 'none']
  errors = imagenet_sets.corruption_errors(
    {row['data']['name']: row['top1'] for row in clean}
  )
  return reports.corruption_row(clean, errors, imagenet_sets.CORRUPTED)


# ---- Results ----------------------------------------------------------------


def _stored(subject: _Subject, rows: list[Row]) -> list[Row]:
  """Keeps `rows`, and returns them."""
  hosts.on_writer(
    'the results', lambda: evaluations.store(subject.file, rows, subject.head)
  )
  return rows


def _reported(
  subject: _Subject,
  options: _Options,
  examples: Examples,
  found: Sequence[tuple[Row, Outcomes]],
) -> str:
  """Draws and writes what `options` ask for; returns what to print of it."""
  config = subject.run.config

  def report() -> str:
    lines = []
    if options.per_class:
      names = examples.found['class_names']
      folder = subject.folder / 'evaluations'
      lines.append(reports.write_by_class(found, names, folder))
    if options.epsilons:
      rows = [row for row, _ in found]
      title = f'{config.model}, {examples.data["name"]}, {rows[0]["route"]}'
      paths = reports.write_curves(rows, title, subject.folder / 'plots')
      lines += [f'drawn: {path}' for path in paths]
    return ''.join(f'{line}\n' for line in lines)

  return hosts.on_writer('the reports', report)


# ---- The command line -------------------------------------------------------


def _parse(argv: Sequence[str]) -> tuple[_Options, list[str]]:
  """The flags of this command, and the others."""
  values = flags.FlagValues()
  text = {
    name: flags.DEFINE_string(name, '', '', flag_values=values)
    for name in ('epsilons', 'autoattack', 'set', 'weights', 'output')
  }
  per_class = flags.DEFINE_bool('per_class', False, '', flag_values=values)
  rest = values(argv, known_only=True)
  given = {name: flag.value for name, flag in text.items()}
  if given['set'] and given['set'] not in imagenet_sets.SETS:
    raise unknown('--set', given['set'], imagenet_sets.SETS)
  if bool(given['weights']) != bool(given['output']):
    raise ConfigError(
      '--weights=FILE.safetensors and --output=FILE.json go together: results '
      'of weights that are not of a run need a place'
    )
  if given['set'] and given['autoattack']:
    raise ConfigError(
      '--autoattack: attacks no other test set; leave out --set'
    )
  return _Options(
    epsilons=_radii(given['epsilons']),
    per_class=per_class.value,
    autoattack=autoattack.parse(given['autoattack']),
    set_name=given['set'],
    weights=given['weights'],
    output=given['output'],
  ), rest


def _radii(text: str) -> tuple[float, ...]:
  """'0,1,2' -> (0.0, 1.0, 2.0), each once, in order."""
  try:
    radii = sorted({float(part) for part in text.split(',')} if text else ())
  except ValueError:
    radii = [-1.0]
  if not all(0 <= radius < float('inf') for radius in radii):
    raise ConfigError(
      f'--epsilons={text}: must be numbers >= 0 with commas between, radii in '
      'grey levels of 255'
    )
  return tuple(radii)
