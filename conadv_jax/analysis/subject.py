"""The run that is analysed: its weights, and examples to measure them on."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
from etils import epath

from conadv_jax import experiment, hosts
from conadv_jax.analysis.options import Options
from conadv_jax.analysis.surface import Surface
from conadv_jax.base.errors import ConfigError
from conadv_jax.config import Config
from conadv_jax.data import datasets
from conadv_jax.data.quarantine import Quarantine
from conadv_jax.data.sources.source import Source
from conadv_jax.data.spec import DatasetSpec
from conadv_jax.experiment import Run
from conadv_jax.method.pixels import wide_dtype
from conadv_jax.method.state import TrainState
from conadv_jax.run import equal_hosts, log, provenance, workdir
from conadv_jax.run.evaluator import Evaluator, weights_of
from conadv_jax.run.guard import Guard
from conadv_jax.run.metrics import Progress
from conadv_jax.run.reopen import open_trained, restore_newest
from conadv_jax.run.timeline import Ticker


class Lacks(ConfigError):
  """A run lacks what an analysis needs."""


class Subject:
  """A run, opened: its weights, and the examples that are asked for.

  Attributes:
    path: its work directory.
    config: its configuration, and how it is evaluated.
    options: what is asked for.
    origin: content of its config.json.
  """

  def __init__(
    self, path: epath.Path, config: Config, options: Options, guard: Guard
  ):
    self.path, self.config, self.options = path, config, options
    self.origin = workdir.read_run(path)
    self._guard = guard

  @functools.cached_property
  def run(self) -> Run:
    """The `Run` as it was trained."""
    return self._build(self.config)

  @functools.cached_property
  def trained_on(self) -> Source:
    """The examples of its training."""
    return open_trained(self.origin, self._wide)

  def begin(self, name: str, steps: int) -> None:
    """Begins the analysis `name`, of about so many steps."""
    self._guard.enter('compile')
    self._name, self._steps, self._done = name, steps, 0
    self._ticker = Ticker()

  def tick(self) -> None:
    """One more is done."""
    self._done += 1
    self._guard.enter('evaluate', self._done)
    if self._done == 1:  # which has compiled
      self._progress = Progress(1, self._steps, 1)
    if self._ticker.due():
      line = log.short_line(self._done, self._progress)
      hosts.say(f'{self._name}: {line}')

  # ---- The loss around the newest weights ------------------------------------

  def asked(self, *names: str) -> dict[str, Any]:
    """What the loss is of, and the options called `names`.

    Raises:
      ConfigError: if there is no checkpoint, or examples are of other classes.
    """
    spec, _, data = self._examples
    options, data_dir = self.options, self.config.dataset.data_dir
    return {
      'step': self._restored[0],
      'route': self.config.eval.route,
      'use_ema': self.config.eval.use_ema,
      'data': provenance.of_result(spec, data, data_dir, options.split),
      'examples': len(self._ids),
      'seed': options.seed,
      **{name: getattr(options, name) for name in names},
    }

  def surface(self, name: str, passes: int) -> Surface:
    """The loss, for the analysis `name` of so many passes over the examples."""
    self.begin(name, passes)
    return self._surface

  @functools.cached_property
  def _surface(self) -> Surface:
    _, source, _ = self._examples
    quarantine = Quarantine(max_share=self.config.dataset.max_bad_share)
    evaluator = Evaluator(self._wide, source, quarantine)
    return Surface(
      self._wide,
      self.config.eval.route,
      weights_of(self.config, self._restored[1]),
      list(evaluator.batches(self._ids)),
      self.tick,
    )

  @functools.cached_property
  def _wide(self) -> Run:
    """The run in float32, whatever it was trained in."""
    dtype = np.dtype(wide_dtype(self.config)).name
    config = dataclasses.replace(self.config, dtype=dtype)
    return self._build(config, trains=False)

  def _build(self, config: Config, *, trains: bool = True) -> Run:
    trained = self.origin.get('data', {})
    spec = datasets.recorded(config.dataset, trained)
    return experiment.build(config, spec=spec, trains=trains)

  @functools.cached_property
  def _restored(self) -> tuple[int, TrainState]:
    return restore_newest(self.path, self._wide)

  @functools.cached_property
  def _examples(self) -> tuple[DatasetSpec, Source, provenance.Data]:
    dataset, part = self.config.dataset, self.options.split
    spec = datasets.resolve(dataset, eval_only=part == 'eval')
    source = spec.open(part, dataset)
    data = provenance.of_examples(spec, dataset.data_dir, **{part: source})
    equal_hosts.check_input(self._wide, data)
    provenance.check_classes(self.origin.get('data', {}), data)
    return spec, source, data

  @functools.cached_property
  def _ids(self) -> np.ndarray:
    """Drawn by the seed; of files that are read in windows, the first ones."""
    _, source, _ = self._examples
    count = min(source.num_examples, self.options.examples)
    if source.in_windows:
      return np.arange(count)
    rng = np.random.default_rng(self.options.seed)
    return np.sort(rng.choice(source.num_examples, count, replace=False))
