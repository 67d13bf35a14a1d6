"""The manifest of a checkpoint: what its leaves are, and their checksums.

Storage libraries restore flipped bits without an error, and cast what has
another type; this file says what must come back.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from conadv_jax.base.errors import CheckpointError
from conadv_jax.method.state import TrainState

_FORMAT = 1


def make(
  step: int, state: TrainState, sums: dict[str, str], facts: Mapping[str, Any]
) -> dict[str, Any]:
  """The content of the file.

  Args:
    step: of the run.
    state: what is saved.
    sums: {path: checksum} of its leaves, from `checksum`.
    facts: further content that JSON can hold.
  """
  leaves = jax.tree_util.tree_leaves_with_path(state)
  content = {
    'format': _FORMAT,
    'step': step,
    'facts': dict(facts),
    'leaves': {
      (name := jax.tree_util.keystr(path)): {
        'shape': list(x.shape),
        'dtype': str(x.dtype),
        'sum': sums[name],
      }
      for path, x in leaves
    },
  }
  return content | {'digest': digest(content)}


def digest(content: Mapping[str, Any]) -> str:
  """SHA-256 of the content without its digest, whatever the order of keys."""
  text = json.dumps(content, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def read(path: epath.Path) -> dict[str, Any]:
  """The content of the manifest of the checkpoint in `path`.

  Raises:
    CheckpointError: for one that is missing or edited.
  """
  file = path / 'manifest' / 'metadata'
  try:
    content = json.loads(file.read_text())
    written = content.pop('digest')
  except (OSError, ValueError, KeyError, AttributeError) as error:
    raise CheckpointError(f'{file}: no manifest: {error!r}') from error
  if written != digest(content):
    raise CheckpointError(f'{file}: not as it was written')
  return content


def check_declared(
  manifest: Mapping[str, Any], step: int, like: TrainState
) -> None:
  """Refuses another step, or other paths, shapes or types than `like` has.

  Raises:
    CheckpointError: with the first leaf that differs.
  """
  if (manifest['format'], manifest['step']) != (_FORMAT, step):
    raise CheckpointError(
      f'the manifest is of format {manifest["format"]}, step '
      f'{manifest["step"]}; expected {_FORMAT} and {step}'
    )
  leaves = jax.tree_util.tree_leaves_with_path(like)
  ours = {
    jax.tree_util.keystr(path): [list(x.shape), str(x.dtype)]
    for path, x in leaves
  }
  theirs = {
    name: [x['shape'], x['dtype']] for name, x in manifest['leaves'].items()
  }
  for name in sorted(ours.keys() | theirs.keys()):
    if ours.get(name) != theirs.get(name):
      raise CheckpointError(
        f'leaf {name} is {theirs.get(name, "missing")}, this run needs '
        f'{ours.get(name, "none")}'
      )
