"""Steps whose update was not applied: said, counted, kept for replay."""

from __future__ import annotations

import jax
import numpy as np
from etils import epath

from conadv_jax import cli, hosts, workdir
from conadv_jax.experiment import Experiment
from conadv_jax.feed import ExampleIds
from conadv_jax.train_step import Metrics


class NonFiniteWatch:
  """Stops a run that stays non-finite, and says on which examples.

  Reads the counter of the step before, so that one step is always queued.
  """

  def __init__(
    self, run: Experiment, path: epath.Path, example_ids: ExampleIds
  ):
    self._run = run
    self._limit = run.config.max_nonfinite_steps
    self._path = path / 'nonfinite_steps.json'
    self._example_ids = example_ids
    self._last: tuple[int, Metrics] | None = None

  def check(self, step: int, values: Metrics) -> None:
    """Notes the metrics of `step`, judges those of the step before.

    Raises:
      cli.NonFiniteError: after `max_nonfinite_steps` in a row.
    """
    last, self._last = self._last, (step, values)
    if last is not None:
      self._judge(*last)

  def finish(self) -> None:
    """Judges the last step."""
    if self._last is not None:
      self._judge(*self._last)

  def _judge(self, step: int, values: Metrics) -> None:
    streak = int(jax.device_get(values['nonfinite_streak']))
    if not streak:
      return
    loss, norm = jax.device_get((values['loss'], values['grad_norm']))
    hosts.say(
      f'step {step}: loss {loss}, gradient norm {norm}: not finite, update not '
      f'applied ({streak} in a row)'
    )
    if streak < self._limit:
      return
    first_step = step - streak + 1
    examples = self._examples(range(first_step, step + 1))
    hosts.on_writer(
      self._path.name, lambda: workdir.write_json(self._path, examples)
    )
    first = ', '.join(str(i) for i in examples[str(first_step)][:8])
    raise cli.NonFiniteError(
      f'{streak} steps in a row, {first_step} to {step}, were not finite '
      f'(max_nonfinite_steps={self._limit}). Example ids of step {first_step}: '
      f'{first}, ...; all are in {self._path}. Lower optimizer.learning_rate '
      'or lengthen schedule.warmup_epochs, or look at these examples'
    )

  def _examples(self, steps: range) -> dict[str, list[int]]:
    """Ids of the whole batch of each of `steps`, in the order of its places."""
    # Steps count from 1, batches from 0.
    ids = np.array([self._example_ids[s - 1] for s in steps], np.int32)
    places = self._run.local_positions().astype(np.int32)
    whole = np.empty((len(steps), self._run.config.batch_size), np.int32)
    gathered = (hosts.gather_arrays(ids), hosts.gather_arrays(places))
    for ids_of_host, places_of_host in zip(*gathered, strict=True):
      whole[:, places_of_host] = ids_of_host
    return {str(s): row.tolist() for s, row in zip(steps, whole, strict=True)}
