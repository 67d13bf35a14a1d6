"""The flags of the command, with their defaults and rules."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from conadv_jax.base import fields
from conadv_jax.base.errors import ConfigError
from conadv_jax.base.fields import Group, choice, number, setting

NAMES = ('curvature', 'sharpness', 'landscape', 'staleness', 'noise')


@dataclasses.dataclass(frozen=True)
class Options(Group):
  """What is analysed, and how finely."""

  what: str = setting('all', 'names of analyses with commas between, or all')
  output: str = setting('', "a directory; '' = analysis/ of the run")
  split: str = choice('train', ('train', 'eval'), 'of the examples')
  examples: int = number(2000, '>= 1', 'or the whole split if it has fewer')
  seed: int = number(
    0, 'in [0, 2**31)', 'of examples, start vectors, probes and directions'
  )
  eigenvalues: int = number(5, '>= 1', 'of the Hessian, the largest')
  probes: int = number(100, '>= 2', 'random vectors for the trace')
  rho: str = setting('0.05,0.1', 'radii of the plain sharpness')
  rho_adaptive: str = setting('0.1,0.5', 'radii relative to each weight')
  ascent_steps: int = number(20, '>= 1', 'gradients per radius')
  span: float = number(1.0, '> 0', 'of directions as long as the weights')
  points: int = number(41, '>= 2', 'on the line, from -span to span')
  grid: int = number(15, '>= 2', 'on each side of the plane')
  at: str = setting(
    '', "steps of staleness; '' = the 16th after each checkpoint"
  )

  def __post_init__(self):
    super().__post_init__()
    for name in self.names:
      fields.check_choice('what', name, NAMES)
    for name in ('rho', 'rho_adaptive'):
      ok = self.radii(name) and min(self.radii(name)) > 0
      fix = 'must be positive numbers with commas between'
      fields.check(bool(ok), name, getattr(self, name), fix)

  @property
  def names(self) -> list[str]:
    """Those of `what`."""
    return list(NAMES) if self.what == 'all' else self.what.split(',')

  def radii(self, name: str) -> list[float]:
    """The numbers of `rho` or `rho_adaptive`."""
    return self._numbers(name, float)

  @property
  def steps(self) -> list[int]:
    """Those of `at`, ascending."""
    return sorted(set(self._numbers('at', int)))

  def _numbers(self, name: str, kind: Callable[[str], Any]) -> list[Any]:
    text = getattr(self, name)
    try:
      return [kind(part) for part in text.split(',') if part]
    except ValueError as error:
      raise ConfigError(
        f'{name}={text!r}: must be numbers with commas between'
      ) from error


def parse(argv: Sequence[str]) -> tuple[Options, list[str]]:
  """The flags of `argv` that are `Options`, and its other arguments.

  Raises:
    ConfigError: for a wrong value.
  """
  parser = argparse.ArgumentParser(
    add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS
  )
  for field in dataclasses.fields(Options):
    parser.add_argument(f'--{field.name}')
  given, rest = parser.parse_known_args(argv)
  return Options(
    **{name: fields.parse(Options, name, x) for name, x in vars(given).items()}
  ), rest
