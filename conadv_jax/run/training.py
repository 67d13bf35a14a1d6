"""The training loop: from a configuration to a finished work directory."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import time
from typing import Any

import jax
from etils import epath

from conadv_jax import experiment, hosts
from conadv_jax.checkpoints import checksum
from conadv_jax.checkpoints.checkpoint import Checkpoints
from conadv_jax.config import Config, describe
from conadv_jax.data.quarantine import Quarantine
from conadv_jax.data.sources.source import Source
from conadv_jax.experiment import Run
from conadv_jax.hosts.stop import Stopped, StopRequest
from conadv_jax.method import optim
from conadv_jax.method.staleness import (
  make_attack_stats_fn,
  pending_perturbation,
)
from conadv_jax.method.state import TrainState
from conadv_jax.run import (
  bad_steps,
  compile_cache,
  equal_hosts,
  evaluations,
  feed,
  initial,
  log,
  metrics,
  provenance,
  summary,
  workdir,
)
from conadv_jax.run.evaluator import Evaluator, weights_of
from conadv_jax.run.guard import Guard
from conadv_jax.run.hooks import Hook, every, is_due
from conadv_jax.run.lock import RunLock
from conadv_jax.run.timeline import Ticker, Timeline
from conadv_jax.run.tracing import Tracer


def train(
  config: Config,
  directory: str,
  stop_request: StopRequest | None = None,
  timeline: Timeline | None = None,
) -> dict[str, Any]:
  """Trains `config` in the work directory; returns the run's summary.

  Args:
    config: of the run.
    directory: the work directory.
    stop_request: of a caller that handles signals already.
    timeline: of a command that has begun before this call.

  Raises:
    ConfigError: for a wrong setting, missing data, a directory of another run
      or in use, or hosts that differ.
    Preempted: when asked to stop; the state is saved.
    NonFiniteError: after `max_nonfinite_steps` such steps in a row.
    StorageError: if the state cannot be saved, or no checkpoint is good.
    Exception: what the input raised, after the state was saved.
  """
  with contextlib.ExitStack() as stack:
    signals = stop_request or stack.enter_context(StopRequest())
    guard = Guard(config.hang_timeout_seconds, signals, timeline)
    stack.enter_context(guard)
    guard.nothing_to_save()
    workdir.path_of(directory)  # Refused before the data is looked at.
    guard.enter('build')
    equal_hosts.check_program(config)
    compile_cache.use(config)
    run = experiment.build(config)
    hosts.say(f'{describe(config)}\n{log.opening(run)}')

    guard.enter('data')
    path, data, source, eval_source = _open(run, directory, guard, stack)
    quarantine, examples, on_train = _evaluated(run, path, eval_source, data)

    guard.enter('restore')
    checkpoints = _checkpoints(path, config, stack)
    if checkpoints.latest_step() == run.steps.stop:
      if done := summary.finished(path, run.steps.stop):
        _say_done(path, config, done)
        return done
    feed.prepare_for(source, config)
    start, state, weights = _restored(run, checkpoints)
    now = guard.timeline.began
    began = workdir.write_config(path, run, data, start, now, weights)
    writer = metrics.make_writer(path, start, config.wandb_project)
    stack.callback(writer.close)
    stack.push(guard.verdict)  # first: the others would wait for a lost host
    loop = _Loop(
      run, path, guard, checkpoints, writer, examples.evaluator, quarantine,
      began,
    )  # fmt: skip
    state = loop.train(source, start, state)
    guard.nothing_to_save('all steps are done and saved, the evaluation is not')
    return summary.write_results(
      run, path, examples, on_train, state, writer, guard, loop.progress
    )


def _open(
  run: Run, directory: str, guard: Guard, stack: contextlib.ExitStack
) -> tuple[epath.Path, provenance.Data, Source, Source]:
  """The work directory, locked until `stack` ends, and its examples."""
  dataset = run.config.dataset
  source = run.spec.open('train', dataset)
  eval_source = run.spec.open('eval', dataset)
  data = provenance.of_examples(
    run.spec, dataset.data_dir, train=source, eval=eval_source
  )
  equal_hosts.check_input(run, data)
  data['splits'] = dict(run.spec.splits)
  path = workdir.prepare(directory, run, data)
  lock = stack.enter_context(RunLock(path))
  guard.before_leaving(lock.release)
  return path, data, source, eval_source


def _evaluated(
  run: Run, path: epath.Path, source: Source, data: provenance.Data
) -> tuple[Quarantine, evaluations.Examples, evaluations.Examples | None]:
  """The eval split, `source`, and examples of `eval.train_split`, if any."""
  quarantine = workdir.quarantine(path, run.config)
  evaluator = Evaluator(run, source, quarantine)
  own = provenance.of_result(run.spec, data, run.config.dataset.data_dir)
  examples, on_train = evaluations.Examples(evaluator, own, data), None
  if part := evaluations.train_part(run.config):
    spec = dataclasses.replace(run.spec, eval_split=part.eval_split)
    on_train = evaluations.examples_of(run, spec, part, quarantine, data)
  return quarantine, examples, on_train


def _checkpoints(
  path: epath.Path, config: Config, stack: contextlib.ExitStack
) -> Checkpoints:
  """Those of the run, closed at the end of `stack`."""
  keep, strict = config.checkpoint.keep, config.checkpoint.strict
  checkpoints = Checkpoints(path, keep, strict=strict)
  stack.callback(checkpoints.close)
  return checkpoints


def _say_done(path: epath.Path, config: Config, done: dict[str, Any]) -> None:
  hosts.say(f'nothing left to train\n{summary.describe(done, path)}')
  if ignored := workdir.not_applied(path, config):
    hosts.say(
      'not applied, as the run is finished:\n  '
      + '\n  '.join(ignored)
      + '\nmeasure with other settings of eval by\n'
      f'  python -m conadv_jax.evaluate --workdir={path} --config.eval...'
    )


@dataclasses.dataclass
class _Loop:
  """The steps of a run, and what is done between them."""

  run: Run
  path: epath.Path
  guard: Guard
  checkpoints: Checkpoints
  writer: metrics.Writer
  evaluator: Evaluator
  quarantine: Quarantine
  began: float  # when the first start did, in seconds since the epoch

  def train(self, source: Source, start: int, state: TrainState) -> TrainState:
    """Trains from step `start` to the last one; returns its state, saved."""
    run, guard, stop = self.run, self.guard, self.run.steps.stop
    tracer = Tracer(run.config, self.path, start)
    self.writer.settings(start, run.config)
    ids = feed.ExampleIds(start, keep=run.config.max_nonfinite_steps + 8)
    guard.enter('compile')
    first = feed.started(
      run, source, self.quarantine, ids, start, stop - start + 1
    )
    step_fn = _compile(run)
    guard.enter('warm_up')
    self._batches, batch = first.result()
    batches = self._batches
    hosts.say(f'first batch of the input: {batches.wait_seconds:.1f} s')
    state = pending_perturbation(run.config, step_fn, state, batch)
    steps_saved = self.checkpoints.steps
    watch = bad_steps.NonFiniteWatch(run, self.path, ids, steps_saved)
    self.progress = metrics.Progress(
      start, stop, run.config.batch_size, batches.wait_seconds
    )
    if not gc.isenabled():  # as the command has it
      gc.freeze()
      gc.enable()
    self._ticker = Ticker()
    hooks = self._hooks(start)
    stopped = None
    guard.start_steps(run.mesh, lambda: batches.failure is not None)
    try:
      if self._lacks_evaluation(start):
        self._evaluate(start, state)
      for step in range(start + 1, stop + 1):
        if self.checkpoints.poll():
          self._save(step - 1, state)
        guard.enter('input', step)
        next_batch = next(batches)
        tracer.before(step, state)
        guard.enter('step', step)
        state, values = step_fn(state, batch, next_batch)
        batch = next_batch
        watch.check(step, values)
        for hook in hooks:
          hook(step, state, batch, values)
    except Stopped as reason:
      stopped = reason
    tracer.close()
    watch.finish()
    step = int(jax.device_get(state.step))
    self._save(step, state, wait=True)
    if stopped:
      saved = f'saved step {step} of {stop}'
      raise guard.error_of(stopped, saved, batches.failure)
    return state

  # ---- Every n steps -------------------------------------------------------

  def _hooks(self, start: int) -> list[Hook]:
    """What is done between steps, in order; the end saves and evaluates."""
    config, stop = self.run.config, self.run.steps.stop
    ages = config.is_adversarial and config.staleness_steps
    stats = config.attack_stats_every_steps if ages else 0
    saves, tests = config.checkpoint.every_steps, config.eval.every_steps
    shown = start + 1 if self.guard.timeline.wanted else None
    return [
      every(0, self._say_timeline, also_at=shown),
      every(config.log_every_steps, self._log, also_at=stop),
      every(1, self._say_sometimes),
      every(stats, self._paused(self._log_attack)),
      every(saves, self._paused(self._save), before=stop),
      every(tests, self._paused(self._evaluate), before=stop),
    ]

  def _paused(self, hook: Hook) -> Hook:
    """`hook`, whose time does not count as training."""

    def paused(step, state, *rest):
      jax.block_until_ready(state)
      with self.progress.paused():
        hook(step, state, *rest)

    return paused

  def _log(self, step, state, _, values) -> None:
    jax.block_until_ready(state)
    row = log.readable(values, optim.kernel_names(state.params))
    before = self.writer.seconds_before
    row |= log.rates(
      step, self.progress, self._batches, before, self.began, self.quarantine
    )
    if self._mfu_percent:
      row['mfu_percent'] = self._mfu_percent * row['images_per_sec']
    self.writer.write(step, 'train', row)
    hosts.say(log.line(self.run, step, row, self.progress))
    self._ticker.heard()

  def _say_timeline(self, _, state, *__) -> None:
    jax.block_until_ready(state)
    hosts.say(self.guard.timeline.table())

  def _say_sometimes(self, step, *_) -> None:
    """Tells that the run is alive, without a wait for this step."""
    if self._ticker.due():
      hosts.say(log.short_line(step, self.progress))

  @functools.cached_property
  def _mfu_percent(self) -> float | None:
    return log.mfu_percent(self.run)

  def _log_attack(self, step, state, batch, _) -> None:
    row = jax.device_get(self._attack_stats_fn(state, batch))
    self.writer.write(step, 'attack', row)

  @functools.cached_property
  def _attack_stats_fn(self):
    return jax.jit(make_attack_stats_fn(self.run.setup))

  def _save(self, step, state, *_, wait: bool = False) -> None:
    """Starts a save; with `wait`, returns when it is on disk."""
    self.guard.enter('save', step)
    self.writer.flush()
    save = self.checkpoints.save_now if wait else self.checkpoints.save
    config = self.run.config
    facts = {'seed': config.seed, 'batch_size': config.batch_size}
    for name in ('nonfinite_steps', 'nonfinite_streak'):
      facts[name] = int(jax.device_get(getattr(state, name)))
    save(step, state, facts)

  def _evaluate(self, step, state, *_) -> None:
    weights = weights_of(self.run.config, state)
    row = self.evaluator(
      weights, before_batch=lambda: self.guard.enter('evaluate', step)
    )
    self.writer.write(step, 'test', row)

  def _lacks_evaluation(self, step: int) -> bool:
    """Whether a signal has kept the evaluation at `step` from its end."""
    due = step > 0 and is_due(step, self.run.config.eval.every_steps)
    return due and not metrics.has_row(self.path, step, 'test')


def _restored(
  run: Run, checkpoints: Checkpoints
) -> tuple[int, TrainState, dict[str, Any]]:
  """Step and state of the newest good checkpoint, or 0 and a new state.

  Beside a new state, what identifies the weights of `init_from`.
  """
  restored = checkpoints.restore(run.abstract_state())
  if restored is None:
    state, weights = initial.first_state(run)
    # Compiled now, not in the seconds that a preempted run has for its save.
    checksum.checksums(state.replace(perturbation=None))
    return 0, state, weights
  step, state, _ = restored
  workdir.check_not_past(run, step)
  hosts.say(f'resumed at step {step}')
  return step, state, {}


def _compile(run: Run):
  start = time.monotonic()
  hosts.say('compiling the training step ...', end=' ')
  step_fn = run.compile_step()
  hosts.say(f'{time.monotonic() - start:.1f} s')
  return step_fn
