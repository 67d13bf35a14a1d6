"""What tells the examples of a run, and those of a result, from others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from conadv_jax.base.errors import ConfigError, printable
from conadv_jax.data.sources.source import Source
from conadv_jax.data.spec import DatasetSpec

Data = dict[str, Any]

_SHOWN = 3  # labels of a difference that are named


def of_examples(spec: DatasetSpec, data_dir: str, **sources: Source) -> Data:
  """What identifies the examples of `sources`; JSON can hold it.

  Args:
    spec: of the data set.
    data_dir: where it is. It is no part of the result: data may move.
    **sources: the open splits: `train`, `eval` or both.

  Returns:
    `version` of the data set, `num_classes`, `class_names` in the order of the
    labels ([] where the files do not name them), and for each source its
    `num_` of examples, `_digest` and `_content`, see `Source`. Of `train` also
    how it is `shuffled`: a cache changes that of TFRecord files.
  """
  names = next(iter(sources.values())).class_names
  data = {
    'version': spec.version(data_dir),
    'num_classes': spec.num_classes,
    'class_names': [printable(name) for name in names],
  }
  for part, source in sources.items():
    data |= {
      f'num_{part}': source.num_examples,
      f'{part}_digest': source.digest,
      f'{part}_content': source.content,
    }
  if 'train' in sources:
    in_windows = sources['train'].in_windows
    data['shuffled'] = 'in windows' if in_windows else 'as a whole'
  return data


def of_result(
  spec: DatasetSpec,
  data: Data,
  data_dir: str,
  part: Literal['train', 'eval'] = 'eval',
) -> Data:
  """What the examples of a result are: `data` of one split, by name."""
  return {
    'name': spec.name,
    'split': {'train': spec.train_split, 'eval': spec.eval_split}[part],
    'version': data['version'],
    'num_examples': data[f'num_{part}'],
    'digest': data[f'{part}_digest'],
    'content': data[f'{part}_content'],
    'data_dir': data_dir,
  }


def is_own(trained: Mapping[str, Any], result: Data) -> bool:
  """Whether `result` is of the eval split that the run has, as it was then."""
  return all(
    trained.get(f'eval_{name}') == result[name]
    for name in ('digest', 'content')
  )


def changes(trained: Mapping[str, Any], now: Data) -> list[str]:
  """A line for each fact of `now` that was another when the run was trained.

  Neither a fact that the run did not record is compared, nor the content: a
  file that was damaged since is a bad example, and ends no run.
  """
  lines = []
  for name, value in now.items():
    old = trained.get(name, value)
    if old == value or name.endswith('_content'):
      continue
    if name == 'class_names':
      lines.append(f'data.{name}: {_class_changes(old, value)}')
    else:
      lines.append(f'data.{name}: {old!r} -> {value!r}')
  return lines


def check_classes(trained: Mapping[str, Any], now: Data) -> None:
  """Checks that labels mean what they meant when the run was trained.

  Raises:
    ConfigError: naming the classes that differ.
  """
  names = ('num_classes', 'class_names')
  lines = changes(trained, {name: now[name] for name in names})
  if lines:
    raise ConfigError(
      'the run was trained on other classes:\n  '
      + '\n  '.join(lines)
      + '\nset dataset.data_dir to examples of its classes, under their names'
    )


def _class_changes(old: Sequence[str], new: Sequence[str]) -> str:
  """Says which labels have another name, and which names came and went."""
  moved = [
    f'label {label} was {one!r}, is {other!r}'
    for label, (one, other) in enumerate(zip(old, new, strict=False))
    if one != other
  ]
  parts = [*moved[:_SHOWN]]
  if len(moved) > _SHOWN:
    parts.append(f'and {len(moved) - _SHOWN} more labels')
  for what, here, there in (('gone', old, new), ('new', new, old)):
    if found := sorted(set(here) - set(there)):
      more = f' and {len(found) - _SHOWN} more' if found[_SHOWN:] else ''
      parts.append(f'{what}: {", ".join(map(repr, found[:_SHOWN]))}{more}')
  return '; '.join(parts)
