"""Recipes: files that make a configuration, by name or by path.

A recipe has `get_config(arg)`, and `ARGUMENTS` with the arguments that it can
be given after a colon, and their defaults: `digits:method=conadv,seed=1`.
What a recipe computes from an argument follows that argument, however it is
set: `--config.batch_size=64` makes the recipe again with `batch_size=64`.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import pathlib
import sys
import traceback
import types
from collections.abc import Mapping
from typing import Any

import ml_collections

from conadv_jax.base import fields
from conadv_jax.base.errors import ConfigError, unknown
from conadv_jax.config import Config
from conadv_jax.config.notices import check_not_renamed
from conadv_jax.methods import METHODS

_PACKAGE = pathlib.Path(__file__).parents[1]
# In a wheel recipes are in the package, in a checkout beside it.
FOLDERS = (_PACKAGE / 'configs', _PACKAGE.parent / 'configs')

# Names of batch sizes on ImageNet.
BATCH_SIZES = {f'{k}k': 1024 * k for k in (4, 8, 16, 32, 64, 96)}


def shipped(folder: str = '') -> dict[str, pathlib.Path]:
  """{name: file} of what comes with this package: recipes, or in `folder`."""
  paths = [path for f in FOLDERS for path in (f / folder).glob('[!_]*.py')]
  return {path.stem: path for path in sorted(paths)}


def listed() -> str:
  """A line for each recipe that comes with this package; none is run."""
  found = shipped()
  width = max(map(len, found), default=0)
  lines = []
  for name, path in found.items():
    page = ast.get_docstring(ast.parse(path.read_text(encoding='utf-8')))
    lines.append(f'{name:{width}}  {(page or "").partition(chr(10))[0]}')
  return '\n'.join(lines)


def load(text: str, overrides: Mapping[str, str]) -> dict[str, Any]:
  """The configuration of a recipe, as nested dicts.

  Args:
    text: 'NAME[:k=v,...]' of a shipped recipe, or 'FILE.py[:k=v,...]'.
    overrides: {'attack.epsilon': '8'}, as `fields.parse` reads them. Those of
      arguments of the recipe are given to it, the others are set afterwards.

  Raises:
    ConfigError: for an unknown recipe, field or argument, a value of another
      type, or an error of the file.
  """
  name, _, arg = text.partition(':')
  path = find('recipe', f'--config={name}', name, shipped())
  flag = f'--config={text}'
  module = run_file(path, flag)
  if not callable(getattr(module, 'get_config', None)):
    raise ConfigError(f'{flag}: {path} defines no get_config()')
  arguments = getattr(module, 'ARGUMENTS', {})
  given = [f'{k}={v}' for k, v in overrides.items() if k in arguments]
  arg = ','.join(filter(None, [arg, *given]))
  takes_one = inspect.signature(module.get_config).parameters
  if arg and not takes_one:
    raise ConfigError(f'{flag}: {path.name} takes no arguments')
  try:
    values = module.get_config(arg) if arg else module.get_config()
  except ConfigError:
    raise
  except Exception as error:
    raise _file_error(flag, path, error) from error
  others = {k: v for k, v in overrides.items() if k not in arguments}
  return override(fields.plain(values), others)


def override(
  values: Mapping[str, Any], overrides: Mapping[str, str]
) -> dict[str, Any]:
  """`values` with dotted fields set from texts, as `fields.parse` reads them.

  One that chooses another optimizer, schedule or the like takes what only the
  old one reads back to its default.

  Raises:
    ConfigError: for an unknown or renamed field, or a value of another type.
  """
  check_not_renamed(overrides)
  values = fields.plain(values)
  for name, text in overrides.items():
    _set(values, name, fields.parse(Config, name, text))
  for name, default, other, _ in list(fields.unread(Config, values)):
    if other in overrides and name not in overrides:
      _set(values, name, default)
  return values


def parse_args(arg: str | None, defaults: Mapping[str, Any]) -> dict[str, Any]:
  """Arguments of a recipe: 'k=v,...' typed like `defaults`.

  Raises:
    ConfigError: for an unknown name or a value that does not parse.
  """
  parsed = dict(defaults)
  for item in (arg or '').split(','):
    if not item:
      continue
    name, equals, text = item.partition('=')
    if name not in defaults:
      raise unknown('config argument', name, defaults)
    kind = type(defaults[name])
    try:
      if not equals:
        raise ValueError('missing "=value"')
      if kind is bool:
        parsed[name] = {'true': True, 'false': False}[text.lower()]
      else:
        parsed[name] = kind(text)
    except (ValueError, KeyError) as error:
      raise ConfigError(
        f'config argument {item!r}: {name} needs a {kind.__name__}'
      ) from error
  return parsed


def batch_size_of(text: str) -> int:
  """'96k' -> 98304, by name, or a plain number.

  Raises:
    ConfigError: for anything else.
  """
  if text in BATCH_SIZES:
    return BATCH_SIZES[text]
  if not text.isdecimal() or not int(text):
    raise ConfigError(
      f'batch_size={text!r}: must be a number or one of '
      + ', '.join(BATCH_SIZES)
    )
  return int(text)


def set_imagenet(c: ml_collections.ConfigDict, image_size_px: int) -> None:
  """Sets ImageNet, resized and attacked as in the paper's code.

  Without antialiasing; methods that stand for an attack keep theirs.
  """
  fields.check_choice('method', c.method, METHODS)
  c.attack.preset = METHODS[c.method].attack or 'paper'
  c.dataset.name = 'imagenet2012'
  c.dataset.image_size_px = image_size_px
  c.dataset.random_flip = True
  c.dataset.antialias = False
  c.eval.batch_size = 1024
  c.eval.every_steps = max(1, round(4 * 1_281_167 / c.batch_size))
  c.checkpoint.every_steps = max(1, round(1_281_167 / c.batch_size))
  c.log_every_steps = min(50, c.checkpoint.every_steps)


def _set(values: dict[str, Any], name: str, value: Any) -> None:
  *groups, leaf = name.split('.')
  for group in groups:
    values = values.setdefault(group, {})
  values[leaf] = value


def find(
  kind: str, flag: str, name: str, known: Mapping[str, pathlib.Path]
) -> pathlib.Path:
  """The file called `name`: one of `known`, or a path.

  Args:
    kind: of file, for the error text.
    flag: that names it, likewise.
    name: of `known`, or of a file; `~` is the home.
    known: {name: file} of what comes with this package.

  Raises:
    ConfigError: there is no such file.
  """
  if name in known:
    return known[name]
  path = pathlib.Path(name).expanduser()
  if not path.is_file():
    if path.suffix or len(path.parts) > 1:
      raise ConfigError(f'{flag}: there is no such file')
    raise unknown(kind, name, known)
  return path.absolute()


def run_file(path: pathlib.Path, flag: str) -> types.ModuleType:
  """The module of a file of Python; a changed file is read anew.

  Args:
    path: the file.
    flag: that names it, such as '--config=NAME', for the error text.

  Raises:
    ConfigError: the file does not run, or raises one itself.
  """
  name = f'recipe {path}'  # A file may run one of its own name, elsewhere.
  spec = importlib.util.spec_from_file_location(name, path)
  if spec is None or spec.loader is None:
    raise ConfigError(f'{flag}: must be a file of Python, NAME.py')
  module = sys.modules[name] = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
  except Exception as error:
    raise _file_error(flag, path, error) from error
  finally:
    del sys.modules[name]
  return module


def _file_error(flag: str, path: pathlib.Path, error: Exception) -> ConfigError:
  frames = traceback.extract_tb(error.__traceback__)
  lines = [f.lineno for f in frames if f.filename == str(path)]
  line = f', line {lines[-1]}' if lines else ''
  return ConfigError(f'{flag}{line}: {type(error).__name__}: {error}')
