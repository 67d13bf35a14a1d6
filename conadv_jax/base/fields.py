"""Groups of settings: dataclasses whose fields carry default, rule, meaning.

A group is a frozen dataclass derived from `Group`. Its fields are made by
`number`, `choice` and `setting`, and checked whenever a group is made.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Collection, Iterator, Mapping
from typing import Any, ClassVar

import ml_collections
from ml_collections import config_dict

from conadv_jax.base.errors import ConfigError, unknown

_RULES = {
  '>= 0': lambda x: x >= 0,
  '> 0': lambda x: x > 0,
  '>= 1': lambda x: x >= 1,
  '>= 2': lambda x: x >= 2,
  'in [0, 1)': lambda x: 0 <= x < 1,
  'in (0, 1]': lambda x: 0 < x <= 1,
  'in [0, 1]': lambda x: 0 <= x <= 1,
  'in [0, 2**31)': lambda x: 0 <= x < 2**31,
}
_BOOLS = {'true': True, '1': True, 'false': False, '0': False}


def setting(default: Any, doc: str, *, preset: bool = False, **rules) -> Any:
  """Makes a field of any value.

  Args:
    default: the value where nothing else is set. None: what `doc` says.
    doc: the meaning, with the unit.
    preset: whether a preset's value comes before `default`. A configuration
      has None there until it is resolved.
    **rules: of `number` and `choice`; and `unread`, {field of this group: its
      values with which nothing reads the new one}.
  """
  metadata = {'doc': doc, 'preset': preset, **rules}
  return dataclasses.field(default=default, metadata=metadata)


def number(default: Any, rule: str, doc: str, **others) -> Any:
  """Makes a field whose value must be `rule`, a key of _RULES, and finite."""
  return setting(default, doc, rule=rule, **others)


def choice(default: Any, choices: Collection[str], doc: str, **others) -> Any:
  """Makes a field whose value must be in `choices` when it is checked."""
  return setting(default, doc, choices=choices, **others)


def check(ok: bool, field: str, value: Any, fix: str) -> None:
  """Raises ConfigError with `field`, `value` and `fix` unless `ok`."""
  if not ok:
    raise ConfigError(f'{field}={value!r}: {fix}')


def check_choice(field: str, value: Any, choices: Collection[str]) -> None:
  """Raises ConfigError, with the nearest name, unless `value` is a choice."""
  if not isinstance(value, str) or value not in choices:
    raise unknown(field, value, choices)


@dataclasses.dataclass(frozen=True)
class Group:
  """Base of groups of settings: checks the rules of their fields.

  Attributes:
    prefix: what names of the fields start with in messages, such as 'ema.'.
  """

  prefix: ClassVar[str] = ''

  def __post_init__(self):
    for field in dataclasses.fields(self):
      name, value = self.prefix + field.name, getattr(self, field.name)
      rules = field.metadata
      if value is None:
        continue
      if 'choices' in rules:
        check_choice(name, value, rules['choices'])
      if 'rule' in rules:
        ok = _RULES[rules['rule']](value) and math.isfinite(value)
        check(ok, name, value, f'must be {rules["rule"]} ({rules["doc"]})')


@functools.cache
def kinds(cls: type) -> dict[str, Any]:
  """{field: type} of the group `cls`, in order."""
  hints = typing.get_type_hints(cls)
  return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def defaults(cls: type) -> ml_collections.ConfigDict:
  """The defaults of `cls` and its groups, typed; None where presets decide."""
  values = ml_collections.ConfigDict()
  for field in dataclasses.fields(cls):
    kind = kinds(cls)[field.name]
    if dataclasses.is_dataclass(kind):
      value = defaults(kind)
    elif field.metadata['preset'] or field.default is None:
      value = config_dict.placeholder(_without_none(kind))
    elif field.default is dataclasses.MISSING:
      value = ml_collections.ConfigDict(field.default_factory())
    else:
      value = field.default
    values[field.name] = value
  return values


def complete(cls: type, values: Any, default: Mapping[str, Any]) -> Any:
  """`values` with the fields of `cls` that they lack taken from `default`."""
  if not isinstance(values, Mapping):
    return values  # `build` reports it
  full = {**default, **values}
  for name, kind in kinds(cls).items():
    if dataclasses.is_dataclass(kind):
      full[name] = complete(kind, full[name], default[name])
  return full


def build(cls: type, values: Any, prefix: str = '') -> Any:
  """Makes the group `cls` of `values`, which have all of its fields.

  Raises:
    ConfigError: for an unknown name, a wrong type, or a value out of range.
  """
  if not isinstance(values, Mapping):
    raise ConfigError(f'{prefix[:-1]}={values!r}: must be a group of fields')
  known = kinds(cls)
  for name in values:
    if name not in known:
      raise unknown('config field', prefix + name, [prefix + k for k in known])
  made = {}
  for name, kind in known.items():
    if dataclasses.is_dataclass(kind):
      made[name] = build(kind, values[name], f'{prefix}{name}.')
    else:
      made[name] = _typed(kind, values[name], prefix + name)
  return cls(**made)


def unread(
  cls: type, values: Mapping[str, Any]
) -> Iterator[tuple[str, Any, str, Any]]:
  """Finds fields of `cls` and its groups that are set, and that nothing reads.

  Args:
    cls: the group.
    values: nested; a field that is not there has its default.

  Yields:
    Field and default, then the field that keeps it from being read and its
    value. Names are dotted.
  """
  known = {field.name: field for field in dataclasses.fields(cls)}
  for name, field in known.items():
    kind, value = kinds(cls)[name], values.get(name, field.default)
    if dataclasses.is_dataclass(kind):
      yield from unread(kind, value if isinstance(value, Mapping) else {})
      continue
    for other, idle in field.metadata.get('unread', {}).items():
      chosen = values.get(other, known[other].default)
      if chosen in idle and value != field.default:
        yield cls.prefix + name, field.default, cls.prefix + other, chosen


def parse(cls: type, name: str, text: str) -> Any:
  """The value that `text` stands for in the field `name` of `cls`.

  Args:
    cls: the group.
    name: dotted, such as 'attack.epsilon'.
    text: such as '8'; 'None' is None.

  Raises:
    ConfigError: for a text of another type.
  """
  kind = _without_none(kind_of(cls, name))
  if text == 'None':
    return None
  try:
    return _BOOLS[text.lower()] if kind is bool else kind(text)
  except (ValueError, KeyError) as error:
    raise ConfigError(f'{name}={text!r}: must be {kind.__name__}') from error


def kind_of(cls: type, name: str) -> Any:
  """The type of the field with the dotted `name`.

  Raises:
    ConfigError: if there is none, or if it is a group.
  """
  kind, prefix = cls, ''
  for part in name.split('.'):
    if dataclasses.is_dataclass(kind):
      known = [prefix + field for field in kinds(kind)]
      kind = kinds(kind).get(part)
    else:
      kind = float if _is_mapping(kind) else None
    if kind is None:
      raise unknown('config field', prefix + part, known)
    prefix += f'{part}.'
  if dataclasses.is_dataclass(kind) or _is_mapping(kind):
    raise ConfigError(f'{name}: is a group; set its fields, {name}.NAME=...')
  return kind


def plain(values: Any) -> Any:
  """Nested mappings or ConfigDicts -> nested dicts, a copy."""
  if isinstance(values, ml_collections.ConfigDict):
    values = values.to_dict()
  if isinstance(values, Mapping):
    return {str(name): plain(value) for name, value in values.items()}
  return values


def flatten(values: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  """{'a': {'b': 1}} -> {'a.b': 1}."""
  flat = {}
  for name, value in values.items():
    if isinstance(value, Mapping):
      flat |= flatten(value, f'{prefix}{name}.')
    else:
      flat[prefix + name] = value
  return flat


def differences(
  old: Mapping[str, Any], new: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
  """{dotted name: (old, new)} of nested values that differ; None is missing."""
  before, after = flatten(old), flatten(new)
  return {
    name: (before.get(name), after.get(name))
    for name in before | after
    if before.get(name) != after.get(name)
  }


def _is_mapping(kind: Any) -> bool:
  return typing.get_origin(kind) is Mapping


def _without_none(kind: Any) -> Any:
  """float | None -> float."""
  is_union = isinstance(kind, types.UnionType)
  return typing.get_args(kind)[0] if is_union else kind


def _typed(kind: Any, value: Any, field: str) -> Any:
  if value is None and isinstance(kind, types.UnionType):
    return None
  kind = _without_none(kind)
  if _is_mapping(kind):
    if not isinstance(value, Mapping):
      raise ConfigError(f'{field}={value!r}: must be a mapping name -> number')
    return {k: _typed(float, v, f'{field}.{k}') for k, v in value.items()}
  if kind is float and isinstance(value, int) and not isinstance(value, bool):
    value = float(value)
  if type(value) is not kind:
    raise ConfigError(
      f'{field}={value!r}: must be {kind.__name__}, is {type(value).__name__}'
    )
  if kind is float and not math.isfinite(value):
    raise ConfigError(f'{field}={value!r}: must be finite')
  return value
