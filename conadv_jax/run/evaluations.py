"""Results in summary.json, each with what it was measured on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from conadv_jax.base import storage
from conadv_jax.base.errors import ConfigError
from conadv_jax.config import Config
from conadv_jax.method.state import Snapshot
from conadv_jax.run import workdir
from conadv_jax.run.evaluator import Evaluator, eval_attack

Row = dict[str, Any]

# What was measured, and how; all else in a row is what `Evaluator` found.
_SUBJECT = (
  'step', 'route', 'use_ema', 'attack', 'epsilon', 'attack_steps', 'batch_size',
  'data', 'git_commit',
)  # fmt: skip


def measured(
  config: Config,
  evaluator: Evaluator,
  weights: Snapshot,
  step: int,
  data: Mapping[str, Any],
  before_batch: Callable[[], None],
) -> Iterator[Row]:
  """Makes a row for clean images, and for each of `eval.attacks`.

  Args:
    config: of the run; `eval` is how it is evaluated.
    evaluator: of the examples.
    weights: those of `step`.
    step: that they were trained to.
    data: what identifies the examples, see `provenance.of_result`.
    before_batch: as in `Evaluator`.

  Yields:
    Rows with `step`, `route`, `use_ema`, `attack` ('none' for clean images),
    `epsilon` in grey levels of 255, `attack_steps`, `batch_size`, `data`,
    `git_commit`, and the results of `Evaluator`.
  """
  settings = config.eval
  commit = workdir.git_commit()
  for name in ('none', *settings.attacks):
    attack = eval_attack(config, name) if name != 'none' else None
    yield {
      'step': step,
      'route': settings.route,
      'use_ema': settings.use_ema,
      'attack': name,
      'epsilon': attack.epsilon if attack else 0.0,
      'attack_steps': attack.steps if attack else 0,
      'batch_size': settings.batch_size,
      'data': dict(data),
      'git_commit': commit,
      **evaluator(weights, name, before_batch=before_batch),
    }


def read(path: epath.Path) -> Row:
  """summary.json of the run in `path`; {} if there is none.

  Raises:
    ConfigError: if it is not readable.
    StorageError: if the storage fails, in spite of retries.
  """
  file = path / 'summary.json'
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
  path: epath.Path, rows: Sequence[Row], summary: Mapping[str, Any] | None
) -> None:
  """Adds `rows` to `evaluations` of summary.json.

  They take the place only of rows of the very same: weights, examples,
  settings and code.

  Args:
    path: the work directory.
    rows: from `measured`.
    summary: the other content of that file; None leaves it as it is.
  """
  known = read(path)
  new = [_subject(row) for row in rows]
  old = [
    row for row in known.get('evaluations', []) if _subject(row) not in new
  ]
  if summary is not None:
    known = dict(summary)
  workdir.write_json(
    path / 'summary.json', {**known, 'evaluations': [*old, *rows]}
  )


def results(row: Row) -> dict[str, float]:
  """What `Evaluator` found."""
  return {name: row[name] for name in row if name not in _SUBJECT}


def of_weights(path: epath.Path, config: Config, step: int) -> list[Row]:
  """The rows of `step`, `eval.route` and `eval.use_ema`, the newest last.

  Of several that differ in code alone, the newest. Places are left out, and so
  are rows of old that do not say what they were measured on.
  """
  wanted = (step, config.eval.route, config.eval.use_ema)
  newest: dict[str, Row] = {}
  for row in read(path).get('evaluations', []):
    if (row['step'], row['route'], row['use_ema']) != wanted:
      continue
    if row.get('data'):
      subject = json.dumps({**_subject(row), 'git_commit': ''}, sort_keys=True)
      newest.pop(subject, None)
      newest[subject] = {**row, 'data': _subject(row)['data']}
  return list(newest.values())


def _subject(row: Row) -> Row:
  """What was measured, and how, but for the place of the files."""
  kept = {name: row.get(name) for name in _SUBJECT}
  data = {k: v for k, v in row.get('data', {}).items() if k != 'data_dir'}
  return {**kept, 'data': data}
