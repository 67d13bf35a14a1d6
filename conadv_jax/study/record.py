"""What a study has found, and in what order: files that outlive its runs.

study.csv     a row per run that has ended
choices.json  what each search chose, and from what
study.log     what was done when
"""

from __future__ import annotations

import csv
import datetime as dt
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etils import epath

from conadv_jax.base import storage
from conadv_jax.base.errors import ConfigError
from conadv_jax.run import workdir
from conadv_jax.study.design import Cell

DONE, NON_FINITE, FAILED = 'done', 'non-finite', 'failed'
# Values that two runs of the same cell do not share.
SECONDS = 'seconds'
TIMINGS = (SECONDS, 'images_per_sec', 'git_commit', 'device')
_FIRST = ('cell', 'phase', 'arm', 'seed', 'status', 'digest')

Row = dict[str, Any]


class Record:
  """The rows, choices and log in the directory of a study."""

  def __init__(self, path: epath.Path, name: str):
    """Opens what is in `path`, or begins it.

    Raises:
      ConfigError: it is of another study, or not readable.
    """
    self.path, self.name = path, name
    if storage.is_remote(path):
      raise ConfigError(f'--workdir={path}: a study needs a local directory')
    path.mkdir(parents=True, exist_ok=True)
    self._check_name(name)
    self._rows = {row['cell']: row for row in self._read_rows()}

  def log(self, text: str) -> None:
    """Adds a line with the time, and prints it."""
    now = dt.datetime.now(dt.UTC).isoformat(timespec='seconds')
    print(text, flush=True)
    with open(self.path / 'study.log', 'a', encoding='utf-8') as file:
      file.write(f'{now} {text}\n')

  def has_logged(self, text: str) -> bool:
    """Whether the log has the line `text`, with any time."""
    file = self.path / 'study.log'
    lines = file.read_text().splitlines() if file.exists() else []
    return any(line.partition(' ')[2] == text for line in lines)

  def rows(self, phase: str | None = None) -> list[Row]:
    """The rows, sorted by cell; numbers are floats."""
    found = [self._rows[name] for name in sorted(self._rows)]
    return [row for row in found if phase in (None, row['phase'])]

  def row(self, cell: Cell) -> Row | None:
    """The row of `cell`; None if it has not ended.

    Raises:
      ConfigError: for a row of other settings.
    """
    row = self._rows.get(cell.name)
    if row is not None and row['digest'] != cell.digest:
      raise ConfigError(
        f'{self.path}: {cell.name} was run with other settings (digest '
        f'{row["digest"]}, now {cell.digest}): use another --workdir, or '
        'remove its row from study.csv and its directory'
      )
    return row

  def add(self, row: Row) -> None:
    """Keeps `row`, in the place of an older one of the same cell."""
    self._rows[row['cell']] = row
    storage.write_text(self.path / 'study.csv', to_csv(self._rows.values()))

  def choices(self) -> dict[str, Any] | None:
    """What `choose` has kept."""
    file = self.path / 'choices.json'
    return json.loads(file.read_text()) if file.exists() else None

  def choose(self, choices: Mapping[str, Any]) -> None:
    """Keeps what the searches chose, once and for all."""
    workdir.write_json(self.path / 'choices.json', choices)

  def _check_name(self, name: str) -> None:
    file = self.path / 'study.json'
    if not file.exists():
      workdir.write_json(file, {'study': name})
    found = json.loads(file.read_text())['study']
    if found != name:
      raise ConfigError(
        f'--workdir={self.path}: holds the study {found!r}, not {name!r}; use '
        'another directory'
      )

  def _read_rows(self) -> list[Row]:
    file = self.path / 'study.csv'
    if not file.exists():
      return []
    rows = list(csv.DictReader(io.StringIO(file.read_text())))
    lacking = [name for name in _FIRST if name not in (rows or [_FIRST])[0]]
    if lacking:
      raise ConfigError(f'{file}: has no columns {", ".join(lacking)}')
    return [{k: _number(k, v) for k, v in row.items() if v} for row in rows]


def by_device(row: Row) -> Row:
  """`row` with 'seconds, DEVICE': it cannot be averaged with other devices'."""
  if 'device' not in row:
    return row
  of_device = f'{SECONDS}, {row["device"]}'
  return {of_device if k == SECONDS else k: v for k, v in row.items()}


def times(rows: Iterable[Mapping[str, Any]]) -> list[str]:
  """The names that `by_device` has given in `rows`, sorted."""
  return sorted({k for row in rows for k in row if k.startswith(SECONDS)})


def to_csv(rows: Sequence[Row]) -> str:
  """The table, sorted by cell; the columns that most rows begin with first."""
  rows = sorted(rows, key=lambda row: row['cell'])
  others = sorted({name for row in rows for name in row} - set(_FIRST))
  file = io.StringIO()
  writer = csv.DictWriter(file, [*_FIRST, *others], lineterminator='\n')
  writer.writeheader()
  writer.writerows({k: _shown(v) for k, v in row.items()} for row in rows)
  return file.getvalue()


def _shown(value: Any) -> Any:
  return f'{value:.8g}' if isinstance(value, float) else value


def _number(name: str, text: str) -> Any:
  """Columns of `_FIRST` stay text: a digest may look like a number."""
  if name in _FIRST and name != 'seed':
    return text
  try:
    return float(text)
  except ValueError:
    return text
