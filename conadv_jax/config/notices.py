"""Tells of fields that have a new name, and of sizes that look wrong."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable

from conadv_jax.base.errors import ConfigError
from conadv_jax.methods import Attack

# Names that fields had in earlier versions -> what to write now.
RENAMED = {
  'attack.epsilon_px': 'attack.epsilon',
  'attack.step_size_px': 'attack.step_size',
  'eval.epsilon_px': 'eval.epsilon',
  'eval.pgd_steps': 'eval.attack_steps',
  'dataset.num_train': "dataset.train_split, 'train[:N]' (left out for N = 0)",
  'dataset.num_eval': "dataset.eval_split, 'test[:N]' (left out for N = 0)",
}


def check_not_renamed(names: Iterable[str]) -> None:
  """Raises ConfigError if any of `names` has a new name; it lists them all."""
  old = [name for name in names if name in RENAMED]
  if old:
    raise ConfigError(
      'config fields with a new name:\n  '
      + '\n  '.join(f'{name} -> {RENAMED[name]}' for name in old)
    )


def warn_of_fractions(attack: Attack, eval_epsilon: float) -> None:
  """Warns of sizes that look like shares of the whole range of a pixel."""
  sizes = {'attack.epsilon': attack.epsilon, 'eval.epsilon': eval_epsilon}
  if attack.step_size != attack.default_step_size:
    sizes['attack.step_size'] = attack.step_size
  for name, value in sizes.items():
    if 0 < value < 1:
      _warn_of_fraction(name, value)


@functools.cache
def _warn_of_fraction(name: str, value: float) -> None:
  """Once for a value: a configuration is read several times in a run."""
  print(
    f'warning: {name}={value:g} is read as grey levels of 255; for images in '
    f'[0, 1] that is {value / 255:.2g}. {value:g} of the whole range would be '
    f'{name}={value * 255:g}',
    file=sys.stderr,
  )
