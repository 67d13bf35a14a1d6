"""Steps whose update was not applied: reported, counted, recorded for replay.

`workdir/bad_steps/STEP.json` holds what `train --replay=STEP` needs to repeat
the step. Numbers that are not finite are the strings 'nan', 'inf' and '-inf'.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from conadv_jax import hosts
from conadv_jax.base.errors import NonFiniteError
from conadv_jax.experiment import Run
from conadv_jax.method.staleness import Metrics
from conadv_jax.method.state import Stream, stream_key
from conadv_jax.run import workdir
from conadv_jax.run.feed import ExampleIds

# Records of a run; spikes take at most half of them. With a batch of 98,304, a
# file has 2.5 MB.
MAX_FILES = 100
SPIKE = 'spike'


class NonFiniteWatch:
  """Records steps that were not applied; ends a run after too many in a row.

  It reads the counters of the previous step, so that one step is always queued.
  All hosts make the same calls.
  """

  def __init__(
    self,
    run: Run,
    path: epath.Path,
    example_ids: ExampleIds,
    checkpoint_steps: Callable[[], Sequence[int]] = tuple,
  ):
    """Counts the records of earlier starts of the run.

    Args:
      run: what is trained.
      path: the work directory.
      example_ids: of this host; of the last three batches at least.
      checkpoint_steps: the steps with a checkpoint. Called on all hosts, at bad
        steps only.
    """
    self._run = run
    self._directory = epath.Path(path) / 'bad_steps'
    self._example_ids = example_ids
    self._checkpoint_steps = checkpoint_steps
    self._recorded = set(
      hosts.on_writer('bad_steps', lambda: _recorded(self._directory))
    )
    self._first: tuple[int, list[int]] | None = None  # of a row: step, ids
    self._last: tuple[int, Metrics] | None = None

  def check(self, step: int, values: Metrics) -> None:
    """Keeps the metrics of `step` and judges those of the previous step.

    Raises:
      NonFiniteError: after `max_nonfinite_steps` in a row.
    """
    last, self._last = self._last, (step, values)
    if last is not None:
      self._judge(*last)

  def finish(self) -> None:
    """Judges the last step.

    Raises:
      NonFiniteError: as `check` does.
    """
    if self._last is not None:
      self._judge(*self._last)
      self._last = None

  def _judge(self, step: int, values: Metrics) -> None:
    counters = ('nonfinite_streak', 'spike_streak')
    streaks = [values[name] for name in counters if name in values]
    nonfinite, *spike = map(int, jax.device_get(streaks))
    if not nonfinite:
      self._first = None
      if not any(spike):
        return
    numbers = {
      name: float(value)
      for name, value in jax.device_get(dict(values)).items()
      if np.ndim(value) == 0
    }
    reason, streak = SPIKE, sum(spike)
    if nonfinite:
      reason, streak = reason_of(numbers), nonfinite
    record = self._record(step, reason, numbers)
    self._say(record, streak, numbers)
    self._write(record)
    if nonfinite:
      self._first = self._first or (step, record['example_ids'])
      if nonfinite >= self._run.config.max_nonfinite_steps:
        raise self._error(step, nonfinite)

  def _record(
    self, step: int, reason: str, numbers: dict[str, float]
  ) -> dict[str, Any]:
    """Makes the record of a step; steps count from 1, batches from 0."""
    config = self._run.config
    ids, next_ids = global_ids(self._run, self._example_ids, (step - 1, step))
    older = [s for s in self._checkpoint_steps() if s < step]
    kept = ('loss', 'grad_norm', 'learning_rate', 'spike_limit')
    return {
      'step': step,
      'reason': reason,
      **{
        name: to_json(value)
        for name, value in numbers.items()
        if name in kept or name.startswith('loss_')
      },
      'seed': config.seed,
      'staleness_steps': config.staleness_steps,
      'attack_key': attack_key(config.seed, step - 1),
      'next_attack_key': attack_key(config.seed, step),
      'newest_checkpoint': max(older, default=None),
      'example_ids': ids.tolist(),
      'next_example_ids': next_ids.tolist(),
    }

  def _say(
    self, record: dict[str, Any], streak: int, numbers: dict[str, float]
  ) -> None:
    limit = ''
    if record['reason'] == SPIKE:
      limit = f' above {numbers["spike_limit"]:.4g}'
    hosts.say(
      f'step {record["step"]}: loss {numbers["loss"]:.4g}{limit}, gradient '
      f'norm {numbers["grad_norm"]:.4g}: {record["reason"]}, update not '
      f'applied ({streak} in a row)'
    )

  def _write(self, record: dict[str, Any]) -> None:
    step = record['step']
    limit = MAX_FILES // 2 if record['reason'] == SPIKE else MAX_FILES
    if step not in self._recorded and len(self._recorded) >= limit:
      hosts.say(
        f'step {step} is not recorded: {self._directory} holds '
        f'{len(self._recorded)} bad steps; further ones are counted only'
      )
      return
    self._recorded.add(step)

    def write() -> None:
      self._directory.mkdir(parents=True, exist_ok=True)
      workdir.write_json(path_of(self._directory.parent, step), record)

    hosts.on_writer(f'bad_steps/{step}.json', write)

  def _error(self, step: int, streak: int) -> NonFiniteError:
    first, ids = self._first
    some = ', '.join(str(i) for i in ids[:8])
    limit = self._run.config.max_nonfinite_steps
    return NonFiniteError(
      f'{streak} steps in a row, {step - streak + 1} to {step}, were not '
      f'finite (max_nonfinite_steps={limit}). Example ids of step {first}: '
      f'{some}, ...; all are in {self._directory}. See what went wrong with '
      f'python -m conadv_jax.train --workdir={self._directory.parent} '
      f'--replay={first}; lower optimizer.learning_rate or lengthen '
      'schedule.warmup_epochs, or look at these examples'
    )


def reason_of(numbers: dict[str, float]) -> str:
  """Names the number that is not finite in a step that was not applied."""
  for name, text in (('loss', 'loss'), ('grad_norm', 'gradient norm')):
    if not np.isfinite(numbers[name]):
      return f'{text} not finite'
  return 'batch statistics not finite'


def global_ids(
  run: Run, example_ids: ExampleIds, batches: Sequence[int]
) -> np.ndarray:
  """Gathers the ids of whole batches, in order of place: [len(batches), N].

  All hosts must call it, and get the same.
  """
  ids = np.array([example_ids[batch] for batch in batches], np.int32)
  places = run.local_positions().astype(np.int32)
  whole = np.empty((len(batches), run.config.batch_size), np.int32)
  gathered = (hosts.gather_arrays(ids), hosts.gather_arrays(places))
  for ids_of_host, places_of_host in zip(*gathered, strict=True):
    whole[:, places_of_host] = ids_of_host
  return whole


def attack_key(seed: int, batch: int) -> list[int]:
  """Returns the random words that the attack on `batch` starts from."""
  key = stream_key(seed, Stream.ATTACK, batch)
  return np.asarray(jax.random.key_data(key)).tolist()


def path_of(directory: epath.Path, step: int) -> epath.Path:
  """Where the record of `step` is in the work directory."""
  return directory / 'bad_steps' / f'{step}.json'


def to_json(value: Any) -> float | str:
  """Returns a number; one that is not finite as 'nan', 'inf' or '-inf'."""
  value = float(value)
  return value if np.isfinite(value) else str(value)


def _recorded(directory: epath.Path) -> list[int]:
  """Steps that have a record."""
  if not directory.exists():
    return []
  names = [path.name.removesuffix('.json') for path in directory.iterdir()]
  return sorted(int(name) for name in names if name.isdecimal())
