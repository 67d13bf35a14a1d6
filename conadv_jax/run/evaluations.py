"""Results in summary.json, each with what it was measured on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from conadv_jax.base import storage
from conadv_jax.base.errors import ConfigError
from conadv_jax.config import Attack, Config, Dataset
from conadv_jax.data import imagenet_sets
from conadv_jax.data.quarantine import Quarantine
from conadv_jax.data.sources.source import sha256_digits
from conadv_jax.data.spec import DatasetSpec
from conadv_jax.experiment import Run
from conadv_jax.method.state import Snapshot
from conadv_jax.run import provenance, scores, workdir
from conadv_jax.run.evaluator import Evaluator
from conadv_jax.run.scores import Outcomes

Row = dict[str, Any]

# What was measured, and how; all else in a row is what `scores.of` found.
_SUBJECT = (
  'step', 'route', 'use_ema', 'attack', 'norm', 'epsilon', 'attack_steps',
  'restarts', 'batch_size', 'data', 'git_commit', 'weights',
)  # fmt: skip


Found = tuple[Row, Outcomes]


class Examples(NamedTuple):
  """What is evaluated.

  Attributes:
    evaluator: of the examples.
    data: what identifies them, see `provenance.of_result`.
    found: the same with their classes, see `provenance.of_examples`.
    label_sets: which classes are right, bool [N, K]; None is the label alone.
  """

  evaluator: Evaluator
  data: Mapping[str, Any]
  found: Mapping[str, Any]
  label_sets: np.ndarray | None = None


def train_part(config: Config) -> Dataset | None:
  """The data set with `eval.train_split` to evaluate; None where that is ''."""
  split = config.eval.train_split
  # Read once, so that a cache would not pay.
  changed = {'eval_split': split, 'cache': 'none'}
  return dataclasses.replace(config.dataset, **changed) if split else None


def examples_of(
  run: Run,
  spec: DatasetSpec,
  dataset: Dataset,
  quarantine: Quarantine,
  trained: Mapping[str, Any],
  like: Evaluator | None = None,
) -> Examples:
  """Opens the examples of `spec.eval_split`.

  Args:
    run: as it is evaluated.
    spec: of the data set, as resolved.
    dataset: how its images are prepared.
    quarantine: of the run.
    trained: what identifies the examples of the run.
    like: as in `Evaluator`.

  Raises:
    ConfigError: as `DatasetSpec.open`.
  """
  source = spec.open('eval', dataset)
  found = provenance.of_examples(spec, dataset.data_dir, eval=source)
  data = provenance.of_result(spec, found, dataset.data_dir)
  name = f'{data["name"]} {data["split"]} {data["digest"]}/{data["content"]}'
  if provenance.is_own(trained, data):
    name = 'eval'
  evaluator = Evaluator(run, source, quarantine, name, spec.classes, like)
  sets = None
  if spec.name == imagenet_sets.REAL:
    sets = imagenet_sets.label_sets(source, spec.num_classes)
  return Examples(evaluator, data, found, sets)


def measured(
  config: Config,
  examples: Examples,
  weights: Snapshot,
  step: int | None,
  attacks: Sequence[Attack],
  before_batch: Callable[[], None],
) -> Iterator[Found]:
  """Makes a row for clean images, and for each of `attacks`.

  Args:
    config: of the run; `eval` is how it is evaluated.
    examples: what is evaluated.
    weights: those of `step`.
    step: that they were trained to; None where that is not known.
    attacks: from `eval_attack`.
    before_batch: as in `Evaluator`.

  Yields:
    Rows with `step`, `route`, `use_ema`, `attack` ('none' for clean images),
    `norm` of the ball, `epsilon` in grey levels of 255, `attack_steps`,
    `restarts`, `batch_size`, `data`, `git_commit`, and what `scores.of` finds;
    each with its outcomes.
  """
  settings = config.eval
  commit = workdir.git_commit()
  for attack in (None, *attacks):
    made = examples.evaluator.outcomes(
      weights, attack, before_batch=before_batch
    )
    dropped = {}
    if (sets := examples.label_sets) is not None:
      count = len(made.label)
      made = scores.by_label_sets(made, sets)
      dropped = {'unlabeled_examples': count - len(made.label)}
    row = {
      'step': step,
      'route': settings.route,
      'use_ema': settings.use_ema,
      'attack': attack.preset if attack else 'none',
      'norm': attack.norm if attack else None,
      'epsilon': attack.epsilon if attack else 0.0,
      'attack_steps': attack.steps if attack else 0,
      'restarts': settings.restarts if attack and attack.is_random else 1,
      'batch_size': settings.batch_size,
      'data': dict(examples.data),
      'git_commit': commit,
    }
    yield row | scores.of(made) | dropped, made


def replaced(row: Row, changes: Mapping[str, Any], outcomes: Outcomes) -> Row:
  """`row` with `changes` of its subject, and other outcomes.

  Those are of images that could be decoded, as `bad_examples` says.
  """
  bad = {k: row[k] for k in ('bad_examples',) if k in row}
  return {**row, **changes, **scores.of(outcomes), **bad}


def of_corruptions(rows: Sequence[Row]) -> Row:
  """Makes the row of ImageNet-C from those of its data sets.

  Returns:
    A row with `ce`, the error of each corruption, `mce`, their mean, and mean
    `top1`, all of clean images.
  """
  rows = [row for row in rows if row['attack'] == 'none']
  errors = imagenet_sets.corruption_errors(
    {row['data']['name']: row['top1'] for row in rows}
  )
  data = {**rows[0]['data'], 'name': imagenet_sets.CORRUPTED}
  data['num_examples'] = sum(row['data']['num_examples'] for row in rows)
  for key in ('digest', 'content'):
    data[key] = sha256_digits([row['data'][key] for row in rows])
  return {
    **subject(rows[0]),
    'data': data,
    'top1': float(np.mean([row['top1'] for row in rows])),
    'mce': float(np.mean(list(errors.values()))),
    'ce': errors,
  }


def read(file: epath.Path) -> Row:
  """A summary.json, or another file that `store` wrote; {} if there is none.

  Raises:
    ConfigError: if it is not readable.
    StorageError: if the storage fails, in spite of retries.
  """
  if not file.exists():
    return {}
  try:
    return dict(json.loads(storage.read(file.read_text, file)))
  except (ValueError, TypeError) as error:
    raise ConfigError(
      f'{file}: not readable: {error!r}; move it away, and run the command '
      'again'
    ) from error


def store(
  file: epath.Path,
  rows: Sequence[Row],
  summary: Mapping[str, Any] | None = None,
) -> None:
  """Adds `rows` to `evaluations` of a summary.json.

  They take the place only of rows of the very same: weights, examples,
  settings and code.

  Args:
    file: that, or another in its form.
    rows: from `measured`.
    summary: the other content of that file; None leaves it as it is.
  """
  known = read(file)
  new = [subject(row) for row in rows]
  old = [row for row in known.get('evaluations', []) if subject(row) not in new]
  if summary is not None:
    known = dict(summary)
  workdir.write_json(file, {**known, 'evaluations': [*old, *rows]})


def results(row: Row) -> dict[str, float]:
  """What `scores.of` found."""
  return {name: row[name] for name in row if name not in _SUBJECT}


def of_weights(path: epath.Path, config: Config, step: int) -> list[Row]:
  """The rows of `step`, `eval.route` and `eval.use_ema`, the newest last.

  Of several that differ in code alone, the newest. Places are left out, and so
  are rows of old that do not say what they were measured on.
  """
  wanted = (step, config.eval.route, config.eval.use_ema)
  newest: dict[str, Row] = {}
  for row in read(path / 'summary.json').get('evaluations', []):
    if (row['step'], row['route'], row['use_ema']) != wanted:
      continue
    if row.get('data'):
      key = json.dumps({**subject(row), 'git_commit': ''}, sort_keys=True)
      newest.pop(key, None)
      newest[key] = {**row, 'data': subject(row)['data']}
  return list(newest.values())


def subject(row: Row) -> Row:
  """What was measured, and how, but for the place of the files."""
  kept = {name: row[name] for name in _SUBJECT if name in row}
  data = {k: v for k, v in row.get('data', {}).items() if k != 'data_dir'}
  return {**kept, 'data': data}
