"""The files of an analysis: what was found, and on what."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from etils import epath

from conadv_jax import hosts
from conadv_jax.base import fields, storage
from conadv_jax.base.errors import ConfigError
from conadv_jax.run import workdir


class Found(NamedTuple):
  """What an analysis yields.

  Attributes:
    values: short names -> numbers, of which a study can make columns.
    curves: what its picture shows.
  """

  values: dict[str, Any]
  curves: dict[str, Any]


def known(file: epath.Path, asked: Mapping[str, Any]) -> Found | None:
  """What `file` has; None if it is not there.

  Raises:
    ConfigError: if it answers another question than `asked`, or cannot be read.
  """

  def read() -> dict[str, Any] | None:
    if not file.exists():
      return None
    try:
      content = json.loads(storage.read(file.read_text, file))
      return {name: content[name] for name in ('asked', *Found._fields)}
    except (ValueError, KeyError, TypeError) as error:
      raise ConfigError(
        f'{file}: not the result of an analysis: {error!r}; move it away'
      ) from error

  content = hosts.on_writer(file.name, read)
  if content is None:
    return None
  different = fields.differences(content.pop('asked'), _plain(asked))
  different.pop('data.data_dir', None)  # data may move
  if different:
    lines = (f'{name}: {a!r} -> {b!r}' for name, (a, b) in different.items())
    raise ConfigError(
      f'{file}: has the result of other settings:\n  '
      + '\n  '.join(lines)
      + '\nuse another --output=DIR, or move that file away'
    )
  return Found(**content)


def write(
  file: epath.Path, asked: Mapping[str, Any], found: Found, seconds: float
) -> Found:
  """Writes the file; returns `found` as `known` would.

  Besides `asked`, `values` and `curves` it has `git_commit`, `versions` and
  `devices`, which made it, and `seconds`. Numbers that are not finite are null.
  """
  found = Found(*map(_plain, found))
  content = {
    'asked': _plain(asked),
    'git_commit': workdir.git_commit(),
    **workdir.built_with(),
    'seconds': round(seconds, 1),
    **found._asdict(),
  }

  def put() -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    workdir.write_json(file, content)

  hosts.on_writer(file.name, put)
  return found


def table(found: Found) -> str:
  """The values as two columns."""
  width = max(map(len, found.values))
  return '\n'.join(
    f'  {name:<{width}}  {"?" if value is None else format(value, ".6g")}'
    for name, value in found.values.items()
  )


def _plain(value: Any) -> Any:
  """Any numbers and arrays as what JSON has."""
  text = json.dumps(value, default=lambda x: x.tolist())
  return json.loads(text, parse_constant=lambda _: None)
