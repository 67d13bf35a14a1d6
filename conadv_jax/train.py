"""Train one configuration.

  python -m conadv_jax.train --config=configs/NAME.py[:k=v,...] --workdir=DIR
                             [--config.FIELD=VALUE ...]

Of several hosts, each runs this command. JAX finds them on Cloud TPU VMs, GKE,
Slurm and Open MPI; elsewhere add --coordinator=HOST:PORT of host 0,
--num_hosts=N and --host_index=I, from 0. The work directory must be shared.

The work directory gets config.json, metrics.jsonl, TensorBoard events,
checkpoints/, plots/ and, at the end, summary.json. The same command again
resumes where the run stopped. Ctrl-C or SIGTERM saves and exits with 42;
2 means a wrong setting, 4 that the loss stopped being finite; 6 a hang, 7 that
storage failed, 8 that another host was lost.

  --supervise    starts the run again after 42, 6 and 8 (conadv_jax.supervise)
  --replay=STEP  repeats a step of the run in DIR, without --config, and shows
                 what was wrong in it (conadv_jax.replay)
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from conadv_jax import cli, experiment, hosts, supervise
from conadv_jax.base import faults
from conadv_jax.base.errors import ConfigError, HostError, Preempted
from conadv_jax.checkpoints import checksum
from conadv_jax.checkpoints.checkpoint import Checkpoints
from conadv_jax.config import Config, describe, from_config_dict
from conadv_jax.data.prefetch import Prefetcher
from conadv_jax.data.quarantine import Quarantine
from conadv_jax.debug import replay
from conadv_jax.experiment import Run
from conadv_jax.hosts.stop import Agreement, Stopped, StopRequest
from conadv_jax.hosts.watchdog import Watchdog
from conadv_jax.method import optim
from conadv_jax.method.state import TrainState
from conadv_jax.method.step import (
  Metrics,
  make_attack_stats_fn,
  pending_perturbation,
)
from conadv_jax.run import bad_steps, feed, metrics, preflight, workdir
from conadv_jax.run import summary as finish
from conadv_jax.run.evaluator import Evaluator, weights_of
from conadv_jax.run.lock import RunLock

NOTHING_TO_SAVE = 'no step was taken since the last checkpoint'


def train(
  config: Config, directory: str, stop_request: StopRequest | None = None
) -> dict[str, Any]:
  """Trains `config` in the work directory; returns the run's summary.

  Args:
    config: of the run.
    directory: the work directory.
    stop_request: of a caller that handles signals already.

  Raises:
    ConfigError: for a wrong setting, missing data, a directory of another run
      or in use, or hosts that differ.
    Preempted: when asked to stop; the state is saved.
    NonFiniteError: after `max_nonfinite_steps` such steps in a row.
    StorageError: if the state cannot be saved, or no checkpoint is good.
    Exception: what the input raised, after the state was saved.
  """
  with contextlib.ExitStack() as stack:
    stop_request = stop_request or stack.enter_context(StopRequest())
    setup = stack.enter_context(contextlib.ExitStack())
    setup.enter_context(stop_request.leaving_at_once(NOTHING_TO_SAVE))
    watchdog = stack.enter_context(Watchdog(config.hang_timeout_seconds))

    # ---- 1. Everything static ----------------------------------------------
    preflight.check_program(config)
    run = experiment.build(config)
    hosts.say(describe(config))
    hosts.say(_describe(run))

    # ---- 2. Data -----------------------------------------------------------
    watchdog.phase('data', limited=False)
    source = run.spec.open('train', config.dataset)
    eval_source = run.spec.open('eval', config.dataset)
    preflight.check_input(run, source.num_examples, eval_source.num_examples)
    data = feed.identity(run, source, eval_source)
    path = workdir.prepare(directory, run, data)
    run_lock = stack.enter_context(RunLock(path))
    setup.enter_context(
      stop_request.leaving_at_once(NOTHING_TO_SAVE, run_lock.release)
    )
    workdir.write_config(path, run, data)
    quarantine = workdir.quarantine(path, config)
    evaluator = Evaluator(run, eval_source, quarantine)

    # ---- 3. State: restored or new -----------------------------------------
    watchdog.phase('restore')
    checkpoints = Checkpoints(
      path, config.checkpoint.keep, strict=config.checkpoint.strict
    )
    stack.callback(checkpoints.close)
    stop = run.steps.stop
    if checkpoints.latest_step() == stop and (
      summary := workdir.finished(path)
    ):
      hosts.say('nothing left to train\n' + finish.describe(summary, path))
      return summary
    start, state = _restored(run, checkpoints) or (0, _new_state(run))
    writer = metrics.make_writer(path, start)
    stack.callback(writer.close)

    # ---- 4. The step, compiled once, and the perturbation that it needs ----
    watchdog.phase('compile', limited=False)
    step_fn = _compile(run)
    example_ids = feed.ExampleIds(start, keep=config.max_nonfinite_steps + 8)
    batches = feed.batches(
      run, source, quarantine, example_ids, start, stop - start + 1
    )
    batch = next(batches)
    hosts.say(f'first batch of the input: {batches.wait_seconds:.1f} s')
    state = pending_perturbation(config, step_fn, state, batch)
    attack_stats_fn = _attack_stats_fn(run)

    # ---- 5. Steps ----------------------------------------------------------
    progress = metrics.Progress(
      start, stop, config.batch_size, batches.wait_seconds
    )
    watch = bad_steps.NonFiniteWatch(run, path, example_ids, checkpoints.steps)
    agreed_stop = Agreement(stop_request, run.mesh)
    stopped = None
    setup.close()
    stack.push(watchdog.verdict)

    def evaluate_at(step: int) -> None:
      def before_batch() -> None:
        watchdog.phase('evaluate', step)
        faults.point('train/evaluate', step)
        agreed_stop.check()

      weights = weights_of(config, state)
      row = evaluator(weights, before_batch=before_batch)
      writer.write(step, 'test', row)

    try:
      if _is_missing_evaluation(run, path, start):
        evaluate_at(start)  # a signal had kept it from its end
      for step in range(start + 1, stop + 1):
        agreed_stop.check(input_failed=batches.failure is not None)
        if checkpoints.poll():
          checkpoints.save(step - 1, state, _facts(run, state))
        watchdog.phase('input', step)
        faults.point('train/input', step)
        next_batch = next(batches)
        watchdog.phase('step', step)
        faults.point('train/step', step)
        state, values = step_fn(state, batch, next_batch)
        batch = next_batch
        watch.check(step, values)
        if step % config.log_every_steps == 0 or step == stop:
          jax.block_until_ready(state)
          row = _readable(values, optim.kernel_names(state.params))
          row |= _rates(step, progress, batches, writer, quarantine)
          writer.write(step, 'train', row)
          hosts.say(_progress_line(run, step, row, progress))
        if not any(_due(step, every) for every in _pauses(run)):
          continue
        jax.block_until_ready(state)
        with progress.paused():
          if attack_stats_fn and _due(step, config.attack_stats_every_steps):
            row = jax.device_get(attack_stats_fn(state, batch))
            writer.write(step, 'attack', row)
          if step < stop and _due(step, config.checkpoint.every_steps):
            watchdog.phase('save', step)
            writer.flush()
            checkpoints.save(step, state, _facts(run, state))
          if step < stop and _due(step, config.eval.every_steps):
            evaluate_at(step)
    except Stopped as reason:
      stopped = reason
    watch.finish()

    # ---- 6. The end: save, evaluate, summarise, draw -----------------------
    step = int(jax.device_get(state.step))
    watchdog.phase('save', step)
    writer.flush()
    checkpoints.save_now(step, state, _facts(run, state))
    if stopped:
      raise _ended_early(stopped, batches, f'saved step {step} of {stop}')
    stack.enter_context(
      stop_request.leaving_at_once(
        'all steps are done and saved, the evaluation is not',
        run_lock.release,
      )
    )
    return finish.write_results(
      run, path, state, evaluator, writer, watchdog, progress
    )


def _restored(
  run: Run, checkpoints: Checkpoints
) -> tuple[int, TrainState] | None:
  """Step and state of the newest good checkpoint; None if there is none."""
  faults.point('train/restore')
  restored = checkpoints.restore(run.abstract_state())
  if restored is None:
    return None
  step, state, _ = restored
  if step > run.steps.stop:
    raise ConfigError(
      f'max_steps={run.config.max_steps}: the run is already at step {step}; '
      'use another --workdir, or more steps'
    )
  hosts.say(f'resumed at step {step}')
  return step, state


def _new_state(run: Run) -> TrainState:
  state = run.init_state()
  # Compiled now, not in the seconds that a preempted run has for its save.
  checksum.checksums(state.replace(perturbation=None))
  return state


def _facts(run: Run, state: TrainState) -> dict[str, int]:
  """What a checkpoint's manifest says of its state."""
  return {
    'seed': run.config.seed,
    'batch_size': run.config.batch_size,
    'nonfinite_steps': int(jax.device_get(state.nonfinite_steps)),
    'nonfinite_streak': int(jax.device_get(state.nonfinite_streak)),
  }


def _pauses(run: Run) -> tuple[int, ...]:
  """Intervals, in steps, of what is done between steps."""
  config = run.config
  return (
    config.attack_stats_every_steps if config.staleness_steps else 0,
    config.eval.every_steps,
    config.checkpoint.every_steps,
  )


def _is_missing_evaluation(run: Run, path: epath.Path, step: int) -> bool:
  """Whether `step` should have one that metrics.jsonl does not hold."""
  if not step or not _due(step, run.config.eval.every_steps):
    return False
  return hosts.on_writer(
    'metrics.jsonl',
    lambda: all(
      (row['step'], row['split']) != (step, 'test')
      for row in metrics.read_metrics(path)
    ),
  )


def _due(step: int, every_steps: int) -> bool:
  return every_steps > 0 and step % every_steps == 0


def _ended_early(
  stopped: Stopped, batches: Prefetcher, saved: str
) -> Exception:
  """What ends a run that has saved its state, on each host."""
  if stopped.signal:
    return Preempted(
      f'{stopped.signal.name}: {saved}; run the same command again to go on'
    )
  hosts.say(f'{saved}, as the input failed')
  own = batches.failure
  told = own and [f'{hosts.label()}{own}', cli.exit_code(own)]
  message, code = hosts.first('the failed input', told)
  return own or HostError(message, code)


def _compile(run: Run):
  start = time.monotonic()
  hosts.say('compiling the training step ...', end=' ')
  faults.point('train/compile')
  step_fn = run.compile_step()
  hosts.say(f'{time.monotonic() - start:.1f} s')
  return step_fn


def _attack_stats_fn(run: Run):
  config = run.config
  if not config.staleness_steps or not config.attack_stats_every_steps:
    return None
  return jax.jit(make_attack_stats_fn(config, run.spec, run.apply_fn, run.mesh))


def _readable(values: Metrics, kernels: Sequence[str]) -> dict[str, Any]:
  """Device metrics -> numbers; trust ratios -> the extreme ones by name."""
  values = dict(jax.device_get(values))
  ratios = values.pop('trust_ratios', None)
  if ratios is not None:
    for name, index in (('min', np.argmin(ratios)), ('max', np.argmax(ratios))):
      values[f'trust_ratio_{name}'] = ratios[index]
      values[f'trust_ratio_{name}_layer'] = kernels[index]
  return values


def _rates(
  step: int,
  progress: metrics.Progress,
  batches: Prefetcher,
  writer: metrics.Writer,
  quarantine: Quarantine,
) -> dict[str, Any]:
  """Speed, the host that waits longest, and the bad examples of all hosts."""
  rates = progress.report(step, batches.wait_seconds)
  rates['seconds'] = writer.seconds_before + progress.seconds
  of_host = np.array([rates['input_wait_percent'], len(quarantine)], np.float32)
  waits, counts = hosts.gather_arrays(of_host).T
  return rates | {
    'input_wait_percent': waits.max(),
    'bad_examples': int(counts.sum()),
  }


def _progress_line(
  run: Run, step: int, row: dict[str, Any], progress: metrics.Progress
) -> str:
  accuracy = ' '.join(
    f'{view} {row[f"top1_{view}"]:.1f} %' for view, _ in run.config.views
  )
  return (
    f'step {step}/{run.steps.stop}  loss {row["loss"]:.4f}  {accuracy}  '
    f'lr {row["learning_rate"]:.3g}  {row["images_per_sec"]:.0f} images/s  '
    f'input wait {row["input_wait_percent"]:.0f} %  ETA {progress.eta()}'
  )


def _describe(run: Run) -> str:
  shapes = run.abstract_state()
  count = sum(leaf.size for leaf in jax.tree.leaves(shapes.params))
  config = run.config
  views = ', '.join(f'{view} (route {r})' for view, r in config.views)
  return (
    f'\n{config.model}: {count:,} parameters; views: {views}; '
    f'{run.groups} batch-norm groups of {config.bn_group_size}\n'
    f'{run.spec.num_train:,} training examples, {run.steps.total} steps of '
    f'{config.batch_size} = {config.epochs:g} epochs, warm-up '
    f'{run.steps.warmup} steps; stops at step {run.steps.stop}\n'
    f'{run.mesh.size} x {jax.devices()[0].device_kind}'
  )


def main(argv: Sequence[str]) -> None:
  if '--supervise' in argv:
    os.execv(
      sys.executable, [sys.executable, '-m', supervise.__name__, *argv[1:]]
    )
  if any(argument.startswith('--replay') for argument in argv):
    replay.main(argv)
    return
  with StopRequest() as stop_request:
    with stop_request.leaving_at_once(NOTHING_TO_SAVE):
      values, directory = cli.parse_config_file(cli.start_hosts(argv))
      config = from_config_dict(values)
    train(config, directory, stop_request)


if __name__ == '__main__':
  cli.run(main, __doc__)
