"""Parts of splits in the notation of TFDS, such as 'train[:10%]+test[5:]'.

TFDS's own parser would import tensorflow_datasets, which takes seconds, where
only the size of a data set is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from conadv_jax.base.errors import ConfigError

_PART = re.compile(r'([\w-]+)(?:\[([^:\[\]]*):([^:\[\]]*)\])?')
_BOUND = re.compile(r'(-?\d[\d_]*)(%?)')
_FORMS = "such as 'train', 'train[:10000]', 'train[80%:]' or 'train+test'"


class Piece(NamedTuple):
  """Examples start .. stop - 1 of a split, in the order of its files."""

  split: str
  start: int
  stop: int


def names(text: str) -> tuple[str, ...]:
  """The splits that `text` mentions, each once."""
  found = (part.partition('[')[0].strip() for part in text.split('+'))
  return tuple(dict.fromkeys(found))


def parse(text: str, sizes: Mapping[str, int], field: str) -> tuple[Piece, ...]:
  """Reads TFDS's slicing notation.

  Bounds may be left out, negative (from the end) or percentages, which are
  rounded to the nearest example; pieces joined by '+' follow each other.

  Args:
    text: e.g. 'train[:10000]'.
    sizes: {split: its number of examples}.
    field: of the configuration, for the error text.

  Raises:
    ConfigError: `text` is malformed, names no split of `sizes`, reaches beyond
      one, or selects nothing of it.
  """
  known = ', '.join(f'{name} ({size:,})' for name, size in sizes.items())

  def refuse(what: str) -> ConfigError:
    return ConfigError(
      f'{field}={text!r}: {what}; the splits and their examples: {known}'
    )

  def bound(part: str, size: int, default: int) -> int:
    if not part.strip():
      return default
    match = _BOUND.fullmatch(part.strip())
    if not match:
      raise refuse(f'{part!r} is neither a whole number nor a percentage')
    value = int(match[1])
    limit = 100 if match[2] else size
    if abs(value) > limit:
      raise refuse(f'{part.strip()} is out of range')
    # Rounded before it counts from the end, as TFDS does: halves show it.
    count = round(value * size / 100) if match[2] else value
    return count + size * (value < 0)

  pieces = []
  for part in text.split('+'):
    match = _PART.fullmatch(part.strip())
    if not match:
      raise refuse(f'{part!r} is not a part of a split, {_FORMS}')
    name = match[1]
    if name not in sizes:
      raise refuse(f'there is no split {name!r}')
    if match[2] and match[3] and ('%' in match[2]) != ('%' in match[3]):
      raise refuse(f'{part.strip()!r} mixes percentages with numbers')
    start = bound(match[2] or '', sizes[name], 0)
    stop = bound(match[3] or '', sizes[name], sizes[name])
    if start >= stop:
      raise refuse(f'{part.strip()!r} selects no example')
    pieces.append(Piece(name, start, stop))
  return tuple(pieces)


def count(pieces: tuple[Piece, ...]) -> int:
  """The number of examples of all pieces."""
  return sum(piece.stop - piece.start for piece in pieces)


def to_text(pieces: tuple[Piece, ...]) -> str:
  """Pieces in the notation of TFDS, with plain numbers."""
  return '+'.join(f'{p.split}[{p.start}:{p.stop}]' for p in pieces)
