"""Repeat one step of a run, and see what went wrong in it.

  python -m conadv_jax.train --workdir=DIR --replay=STEP
                             [--config.dataset.data_dir=DIR ...]

Takes the newest good checkpoint before STEP, or the initial weights, and trains
up to STEP with the examples and random numbers of the run. Says whether STEP
comes out bit for bit as the run had it, which it does with the same versions
and devices, and what of it is not finite, or largest: losses and gradients by
view, parameters, perturbations, examples. Writes bad_steps/STEP_replay.json and
bad_steps/STEP.png to the work directory and changes nothing else there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from etils import epath

from conadv_jax import cli, experiment, hosts
from conadv_jax.base import storage
from conadv_jax.base.errors import ConfigError
from conadv_jax.base.usage import answered
from conadv_jax.checkpoints import checksum
from conadv_jax.data import datasets
from conadv_jax.data.quarantine import Quarantine
from conadv_jax.debug import diagnosis
from conadv_jax.experiment import Run
from conadv_jax.method import optim
from conadv_jax.method.staleness import pending_perturbation
from conadv_jax.method.state import TrainState, copied
from conadv_jax.run import (
  bad_steps,
  equal_hosts,
  feed,
  log,
  metrics,
  plots,
  workdir,
)
from conadv_jax.run.bad_steps import to_json
from conadv_jax.run.guard import Guard
from conadv_jax.run.initial import restore_before
from conadv_jax.run.reopen import open_trained, parse_args
from conadv_jax.run.timeline import Ticker

Row = dict[str, Any]

_EXAMPLES = 8  # of each view that are named
_PARAMETERS = 8  # of each view whose gradients are named


def main(argv: Sequence[str]) -> Row:
  """The command: returns what it writes to STEP_replay.json.

  Raises:
    ConfigError: if there is no such run or step, or its data is another.
    StorageError: if files of the run cannot be read, or the result written.
  """
  step, rest = _parse_step(cli.start_hosts(argv))
  path, config = parse_args(rest)
  with Guard(config.hang_timeout_seconds) as guard:
    equal_hosts.check_program(config)
    origin = workdir.read_run(path)
    run = experiment.build(
      config, spec=datasets.recorded(config.dataset, origin.get('data', {}))
    )
    if not 1 <= step <= run.steps.stop:
      raise ConfigError(
        f'replay={step}: the run in {path} has steps 1 to {run.steps.stop}'
      )
    return _Replay(path, origin, run, step, guard).report()


def _parse_step(argv: Sequence[str]) -> tuple[int, list[str]]:
  """The value of `--replay`, and the other arguments."""
  values = flags.FlagValues()
  step = flags.DEFINE_integer('replay', None, '', flag_values=values)
  rest = values(argv, known_only=True)
  if step.value is None:
    raise ConfigError('missing --replay=STEP, a step of the run')
  return step.value, rest


class _Replay:
  """One replay: brings the run to a step, and looks at it."""

  def __init__(
    self, path: epath.Path, origin: Row, run: Run, step: int, guard: Guard
  ):
    self._path, self._run, self._step = path, run, step
    self._guard = guard
    guard.enter('data')
    self._source = open_trained(origin, run)
    self._known = hosts.on_writer('what is known of the step', self._read)

  def report(self) -> Row:
    self._guard.enter('restore')
    start, state = restore_before(self._path, self._run, self._step)
    example_ids = feed.ExampleIds(start, keep=8)
    before, after, values, batch, next_batch = self._repeated(
      start, state, example_ids
    )
    ids, next_ids = bad_steps.global_ids(
      self._run, example_ids, (self._step - 1, self._step)
    )
    self._guard.enter('diagnosis', self._step)
    numbers = {
      name: float(value)
      for name, value in jax.device_get(values).items()
      if np.ndim(value) == 0
    }
    content = {
      'step': self._step,
      'from_step': start,
      'reproduced': compared(self._known, numbers, ids.tolist()),
      **{name: to_json(value) for name, value in numbers.items()},
      'example_ids': ids.tolist(),
      'next_example_ids': next_ids.tolist(),
    }
    content |= self._diagnosed(before, after, batch, ids)
    hosts.say(_table(content))
    self._write(content)
    return content

  # ---- The run, up to the step ----------------------------------------------

  def _read(self) -> Row:
    """On host 0: the record of the step, else its row of metrics.jsonl."""
    file = bad_steps.path_of(self._path, self._step)
    if file.exists():
      return json.loads(storage.read(file.read_text, file))
    rows = metrics.read_metrics(self._path)
    here = [r for r in rows if (r['step'], r['split']) == (self._step, 'train')]
    return here[0] if here else {}

  def _repeated(
    self, start: int, state: TrainState, example_ids: feed.ExampleIds
  ):
    """(state before the step, after it, its metrics, batch, next batch)."""
    run, stop = self._run, self._step
    self._guard.enter('compile')
    step_fn = run.compile_step()
    quarantine = Quarantine(max_share=run.config.dataset.max_bad_share)
    batches = feed.batches(
      run, self._source, quarantine, example_ids, start, stop - start + 1
    )
    batch = next(batches)
    state = pending_perturbation(run.config, step_fn, state, batch)
    progress = metrics.Progress(
      start, stop, run.config.batch_size, batches.wait_seconds
    )
    ticker = Ticker()
    for step in range(start + 1, stop):
      self._guard.enter('step', step)
      following = next(batches)
      state, values = step_fn(state, batch, following)
      batch = following
      jax.block_until_ready(values)
      if ticker.due():
        hosts.say(log.short_line(step, progress))
    before = copied(state)  # the step donates its state
    following = next(batches)
    after, values = step_fn(state, batch, following)
    return before, after, values, batch, following

  # ---- The diagnosis --------------------------------------------------------

  def _diagnosed(
    self,
    before: TrainState,
    after: TrainState,
    batch: Mapping[str, jax.Array],
    ids: np.ndarray,
  ) -> Row:
    found, delta = diagnosis.make_diagnosis_fn(self._run)(before, batch)
    found = jax.device_get(found)
    labels = found.pop('label').reshape(-1)
    views = [view for view, _ in self._run.config.views]
    names = [
      optim.path_name(path)
      for path, _ in jax.tree_util.tree_leaves_with_path(before.params)
    ]
    content: Row = {'views': {}}
    for i, view in enumerate(views):
      loss_N = found['loss'][..., i].reshape(-1)
      predicted_N = found['predicted'][..., i].reshape(-1)
      content['views'][view] = {
        'loss': to_json(loss_N.mean()),
        'grad_norm': to_json(found['norm'][i]),
        'gradients': _largest(names, found['norms'][i], found['nonfinite'][i]),
        'examples': [
          self._example(place, ids, labels, loss_N, predicted_N)
          for place in diagnosis.worst(loss_N, _EXAMPLES)
        ],
      }
    pending = after.perturbation
    perturbations = {
      'of_batch': delta,
      'of_next_batch': pending and pending.images,
    }
    content['perturbation'] = {
      name: _extremes(x) for name, x in perturbations.items() if x is not None
    }
    content['nonfinite_state'] = {
      name: checksum.checksums(_without_images(state))[1]
      for name, state in (('before', before), ('after', after))
    }
    content['nonfinite_statistics'] = _named(found['statistics'])
    self._draw(batch, delta, labels, found['loss'].max(-1).reshape(-1), ids)
    return content

  def _example(self, place, ids, labels, loss_N, predicted_N) -> Row:
    return {
      'id': int(ids[place]),
      'place': int(place),
      'label': int(labels[place]),
      'predicted': int(predicted_N[place]),
      'loss': to_json(loss_N[place]),
      'file': self._source.describe(int(ids[place])),
    }

  def _draw(self, batch, delta, labels, loss_N, ids) -> None:
    """Writes the picture of the worst examples, whatever the view."""
    places = diagnosis.worst(loss_N, _EXAMPLES)
    pick = diagnosis.make_images_fn(self._run)
    found = jax.device_get(pick(batch, delta, jnp.array(places, jnp.int32)))
    images = {view: found[view] for view, _ in self._run.config.views}
    captions = [
      f'{ids[i]}\nlabel {labels[i]}\nloss {loss_N[i]:.3g}' for i in places
    ]
    file = self._path / 'bad_steps' / f'{self._step}.png'
    title = f'step {self._step}: examples with the largest loss, by id'
    hosts.on_writer(
      file.name, lambda: plots.images_by_row(images, captions, title, file)
    )

  def _write(self, content: Row) -> None:
    file = self._path / 'bad_steps' / f'{self._step}_replay.json'

    def write() -> None:
      file.parent.mkdir(parents=True, exist_ok=True)
      workdir.write_json(file, content)

    hosts.on_writer(file.name, write)
    hosts.say(f'all of it: {file}, {file.parent / str(self._step)}.png')


def compared(
  known: Row, numbers: Mapping[str, float], ids: list[int]
) -> dict[str, bool]:
  """{name: whether it is as the run had it, to the bit}.

  Args:
    known: a record of `bad_steps` or a row of metrics.jsonl, which has null for
      what is not finite.
    numbers: metrics of the step, of which losses and gradient norm count.
    ids: of the examples.
  """
  result = {}
  if 'example_ids' in known:
    result['example_ids'] = known['example_ids'] == ids
  for name, value in numbers.items():
    is_kept = name.startswith('loss') or name == 'grad_norm'
    if is_kept and name in known:
      same = known[name] == to_json(value)
      is_null = known[name] is None and not np.isfinite(value)
      result[name] = same or is_null
  return result


def verdict(step: int, same: Mapping[str, bool]) -> str:
  """Says whether the step is the one that the run had, from `compared`."""
  if not same:
    return f'step {step}: the run kept no numbers of this step to compare'
  other = [name for name, is_same in same.items() if not is_same]
  if other:
    return (
      f'step {step}: NOT reproduced, {", ".join(other)} differ; use the '
      'versions and the number of devices of the run'
    )
  return (
    f'step {step}: reproduced bit for bit: {", ".join(same)} are those of the '
    'run'
  )


def _extremes(delta: jax.Array) -> Row:
  """Least and largest finite element in grey levels, and how many are not."""

  @jax.jit
  def find(x):
    finite = jnp.isfinite(x)
    least = jnp.where(finite, x, jnp.inf).min()
    largest = jnp.where(finite, x, -jnp.inf).max()
    return least, largest, diagnosis.count_nonfinite(x)

  least, largest, nonfinite = jax.device_get(find(delta))
  return {
    'min_px': to_json(least),
    'max_px': to_json(largest),
    'nonfinite': int(nonfinite),
  }


def _largest(names, norm_L, nonfinite_L) -> list[Row]:
  """The leaves with most elements that are not finite, then by their norm."""
  finite_norm = np.where(np.isfinite(norm_L), norm_L, np.inf)
  order = np.lexsort((-finite_norm, -nonfinite_L))[:_PARAMETERS]
  return [
    {
      'parameter': names[i],
      'norm': to_json(norm_L[i]),
      'nonfinite': int(nonfinite_L[i]),
    }
    for i in order
  ]


def _without_images(state: TrainState) -> TrainState:
  """`state` with no images, which `_extremes` looks at."""
  pending = state.perturbation
  return state.replace(perturbation=pending and pending.replace(images=None))


def _named(counts: Any) -> dict[str, int]:
  """{path: count} of the leaves that are not 0."""
  leaves = jax.tree_util.tree_leaves_with_path(counts)
  return {optim.path_name(path): int(x) for path, x in leaves if x}


def _table(content: Row) -> str:
  """The diagnosis in lines."""
  lines = [verdict(content['step'], content['reproduced'])]
  for view, row in content['views'].items():
    lines.append(
      f'\nview {view}: loss {_short(row["loss"])}, gradient norm '
      f'{_short(row["grad_norm"])}'
    )
    lines.append(f'  {"gradient of":<40}{"norm":>12}{"not finite":>12}')
    lines += [
      f'  {x["parameter"]:<40}{_short(x["norm"]):>12}{x["nonfinite"]:>12}'
      for x in row['gradients']
    ]
    lines.append(f'  {"example":>9}{"label":>7}{"says":>7}{"loss":>12}  file')
    lines += [
      f'  {x["id"]:>9}{x["label"]:>7}{x["predicted"]:>7}'
      f'{_short(x["loss"]):>12}  {x["file"]}'
      for x in row['examples']
    ]
  lines.append('')
  for name, x in content['perturbation'].items():
    span = f'{_short(x["min_px"])} to {_short(x["max_px"])} grey levels'
    if x['min_px'] == 'inf':  # of no number
      span = 'no number is finite'
    lines.append(f'perturbation {name}: {span}, {x["nonfinite"]} not finite')
  places = content['nonfinite_state'] | {
    'statistics': list(content['nonfinite_statistics'])
  }
  for name, found in places.items():
    lines.append(f'not finite, {name}: {", ".join(found) or "nothing"}')
  return '\n'.join(lines)


def _short(value: float | str) -> str:
  return f'{float(value):.4g}'


if __name__ == '__main__':
  if not answered(__doc__):
    cli.run(main)
