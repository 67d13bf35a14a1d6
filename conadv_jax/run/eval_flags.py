"""The flags of `conadv_jax.evaluate` that are no settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from absl import flags

from conadv_jax.base.errors import ConfigError, unknown
from conadv_jax.data import imagenet_sets
from conadv_jax.run import autoattack


class Options(NamedTuple):
  """Flags of the command; its docstring has their meaning."""

  epsilons: tuple[float, ...]
  per_class: bool
  ensemble: tuple[str, ...]  # attacks of AutoAttack
  set_name: str
  weights: str
  output: str


def parse(argv: Sequence[str]) -> tuple[Options, list[str]]:
  """The flags of this command, and the other arguments.

  Raises:
    ConfigError: for a wrong value, or flags that do not go together.
  """
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
  options = Options(
    _radii(given['epsilons']),
    per_class.value,
    autoattack.parse(given['autoattack']),
    given['set'],
    given['weights'],
    given['output'],
  )
  return options, rest


def _radii(text: str) -> tuple[float, ...]:
  """'2,0,1' -> (0.0, 1.0, 2.0)."""
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
