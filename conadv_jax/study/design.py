"""What a study asks: arms, seeds, what is tuned, and what is compared.

A study file, such as `configs/studies/fashion_mnist.py`, defines STUDY. Every
choice is made on a validation split by searches of equal budget; the test split
is for the arms, once all choices are fixed.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import itertools
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from conadv_jax.analysis import options
from conadv_jax.base.errors import ConfigError, unknown
from conadv_jax.base.fields import differences, flatten
from conadv_jax.config import (
  Config,
  default_config,
  from_config_dict,
  recipes,
)

Fields = Mapping[str, Any]  # {dotted name of a field: value}

SEARCH, FINAL = 'search', 'final'
PLACES = ('dataset.data_dir', 'compile_cache')
# Where things are is no part of what was run, and neither are the parts that a
# batch is computed in: they hold whole batch-norm groups.
HOW = (*PLACES, 'microbatches')
# Not among those of the arms, which would be tuned on their own luck else.
_SEARCH_SEED = 1000


@dataclasses.dataclass(frozen=True)
class Search:
  """A search goes field by field and keeps the best value of each.

  Attributes:
    fields: of the configuration, in all of its runs.
    grid: {field: values, ascending}. A later field is tried with the best
      values of those before. A best value at an end adds one beyond it.
  """

  fields: Fields
  grid: Mapping[str, tuple[float, ...]]


@dataclasses.dataclass(frozen=True)
class Arm:
  """An arm is a configuration that is run with several seeds.

  Attributes:
    fields: of the configuration.
    seeds: how many; they are 0, 1, ...
    search: whose choices it takes; '' = none.
    line: the curve that it is a point of; '' = its name.
  """

  fields: Fields
  seeds: int
  search: str = ''
  line: str = ''


@dataclasses.dataclass(frozen=True)
class Figure:
  """A figure shows arms along one field.

  Attributes:
    arms: their names.
    axis: the field; '' sets the arms side by side.
    line: the one curve that all are points of; '' = those of the arms.
  """

  arms: tuple[str, ...]
  axis: str = 'batch_size'
  line: str = ''


@dataclasses.dataclass(frozen=True)
class Study:
  """A study: which runs, and what is asked of them.

  Attributes:
    config: the recipe that everything is over, as --config has it.
    fields: of every run.
    validation: split that choices are made on.
    test: split that arms are measured on.
    searches: by name; of the same number of runs each.
    arms: by name.
    small: the arm of the baseline at a small batch; '' = no gap is asked for.
    large: that at the large batch.
    recover: arms that may give back what the large batch loses.
    equivalent: (arm, arm, margin in points) that are asked to be equal.
    min_train_top1: percentage of the training examples that an arm is to fit.
    figures: by name.
    analyse: flags of `conadv_jax.analysis`, which measures the weights of
      each run of `analysed`; () = none.
    analysed: arms; () = all.
    how: fields of `HOW`, over those of every run.
  """

  config: str
  validation: str
  test: str
  arms: Mapping[str, Arm]
  fields: Fields = dataclasses.field(default_factory=dict)
  searches: Mapping[str, Search] = dataclasses.field(default_factory=dict)
  small: str = ''
  large: str = ''
  recover: tuple[str, ...] = ()
  equivalent: tuple[tuple[str, str, float], ...] = ()
  min_train_top1: float = 0.0
  figures: Mapping[str, Figure] = dataclasses.field(default_factory=dict)
  analyse: tuple[str, ...] = ()
  analysed: tuple[str, ...] = ()
  how: Fields = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    if self.searches and self.validation == self.test:
      raise ConfigError(
        f'validation={self.validation!r}: is the test split, which choices '
        'must not see; name another one'
      )
    if rest := options.parse(self.analyse)[1]:
      raise ConfigError(
        f'analyse={self.analyse}: {rest} are no flags of conadv_jax.analysis; '
        "an example is '--what=curvature'"
      )
    for arm in self.arms.values():
      if arm.search and arm.search not in self.searches:
        raise unknown('search', arm.search, self.searches)
    shown = [arm for figure in self.figures.values() for arm in figure.arms]
    for name in (*self.asked, *shown, *self.analysed):
      if name not in self.arms:
        raise unknown('arm', name, self.arms)
    if 'minima' in self.figures:
      raise ConfigError(
        'figures: the report itself draws minima.png; choose another name'
      )
    usual = flatten(default_config().to_dict())
    known = [k for k, value in usual.items() if not isinstance(value, str)]
    for figure in self.figures.values():
      if figure.axis and figure.axis not in known:
        raise unknown('axis', figure.axis, known)
    if self.recover and not (self.small and self.large):
      raise ConfigError('recover: a recovery needs arms `small` and `large`')
    budgets = {
      name: 1 + sum(len(values) - 1 for values in search.grid.values())
      for name, search in self.searches.items()
    }
    if len(set(budgets.values())) > 1:
      raise ConfigError(
        f'searches of unequal budget, in runs: {budgets}; a method that is '
        'tuned longer wins for that alone'
      )

  @property
  def asked(self) -> set[str]:
    """The arms of the gap, of what may recover it, and of equivalences."""
    pairs = [arm for *pair, _ in self.equivalent for arm in pair]
    return {self.small, self.large, *self.recover, *pairs} - {''}

  @property
  def untuned(self) -> dict[str, Fields]:
    """Choices of searches that choose nothing."""
    return dict.fromkeys(self.searches, {})

  def final_cells(self, choices: Mapping[str, Fields]) -> Iterator[Cell]:
    """The runs of all arms, with what the searches chose.

    Those that answer what is asked come first, so that a study which is stopped
    has an answer; and of these and of the others, seed by seed.
    """
    most = max((arm.seeds for arm in self.arms.values()), default=0)
    order = sorted(self.arms, key=lambda name: name not in self.asked)
    cut = len(self.asked)
    for names in (order[:cut], order[cut:]):
      for seed, name in itertools.product(range(most), names):
        arm = self.arms[name]
        if seed < arm.seeds:
          chosen = choices[arm.search] if arm.search else {}
          fields = {**chosen, **arm.fields, 'seed': seed}
          cell = self._cell(FINAL, name, f'seed={seed}', fields, self.test)
          if name in (self.analysed or self.arms):
            cell = dataclasses.replace(cell, analyse=self.analyse)
          yield cell

  def trial(self, search: str, chosen: Fields, field: str, value: Any) -> Cell:
    """A run of a search: `field` is tried beside what is chosen already."""
    fields = {
      **self.searches[search].fields, **chosen,
      field: value, 'seed': _SEARCH_SEED,
    }  # fmt: skip
    tried = f'{field}={value:g}'
    return self._cell(SEARCH, search, tried, fields, self.validation)

  def _cell(self, phase, arm, run, fields, split) -> Cell:
    fields = {
      **self.fields, **fields, 'dataset.eval_split': split, **self.how
    }  # fmt: skip
    return Cell(self.config, phase, arm, run, fields)


@dataclasses.dataclass(frozen=True)
class Cell:
  """A run of a study.

  Attributes:
    recipe: as --config has it.
    phase: 'search' or 'final'.
    arm: or the name of the search.
    run: the seed of an arm, or the value that a search tries.
    fields: over the recipe.
    analyse: flags of the analysis of its weights; () = none.
  """

  recipe: str
  phase: str
  arm: str
  run: str
  fields: Fields
  analyse: tuple[str, ...] = ()

  @property
  def name(self) -> str:
    return f'{self.phase}/{self.arm}/{self.run}'

  @functools.cached_property
  def config(self) -> Config:
    """Its settings.

    Raises:
      ConfigError: for a wrong one.
    """
    try:
      return from_config_dict(self._values)
    except ConfigError as error:
      raise ConfigError(f'{self.name}: {error}') from error

  @functools.cached_property
  def digest(self) -> str:
    """Tells its results from those of other settings.

    A field at its default does not count, so that results outlive new fields,
    nor does one that says what its preset says.
    """
    default = default_config().to_dict()
    set_here = {
      name: value
      for name, (usual, value) in differences(default, self._values).items()
      if name not in HOW and not (usual is None and self._is_implied(name))
    }
    text = json.dumps(set_here, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]

  def _is_implied(self, name: str) -> bool:
    """Whether a field would have its value without being set."""
    values = copy.deepcopy(self._values)
    *groups, field = name.split('.')
    functools.reduce(dict.__getitem__, groups, values)[field] = None
    return from_config_dict(values) == self.config

  @property
  def flags(self) -> list[str]:
    """Of `conadv_jax.train`, but for the work directory."""
    pairs = [f'--config.{name}={text}' for name, text in self._texts.items()]
    return [f'--config={self.recipe}', *pairs]

  @functools.cached_property
  def _values(self) -> dict[str, Any]:
    return recipes.load(self.recipe, self._texts)

  @property
  def _texts(self) -> dict[str, str]:
    return {name: str(value) for name, value in self.fields.items()}


def load(text: str) -> tuple[str, Study]:
  """Name and content of the study in file `text`, or of a shipped one.

  Raises:
    ConfigError: there is none, it does not run, or it defines no STUDY.
  """
  flag = f'--study={text}'
  path = recipes.find('study', flag, text, shipped())
  study = getattr(recipes.run_file(path, flag), 'STUDY', None)
  if not isinstance(study, Study):
    raise ConfigError(f'{flag}: defines no STUDY')
  return path.stem, study


def shipped() -> dict[str, pathlib.Path]:
  """{name: file} of the studies that come with this package."""
  return recipes.shipped('studies')
