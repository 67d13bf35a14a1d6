"""Evaluates the newest weights of a run, and keeps the results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from etils import epath

from conadv_jax import cli, experiment, hosts
from conadv_jax.config import Config
from conadv_jax.data import datasets
from conadv_jax.run import evaluations, preflight, provenance, workdir
from conadv_jax.run.evaluator import Evaluator, weights_of
from conadv_jax.run.guard import Guard
from conadv_jax.run.reopen import parse_args, restore_newest


def evaluate(argv: Sequence[str]) -> list[dict[str, Any]]:
  """The command: returns the rows that it prints."""
  path, config = parse_args(cli.start_hosts(argv), attack='all')
  with Guard(config.hang_timeout_seconds) as guard:
    return _evaluate(path, config, guard)


def _evaluate(
  path: epath.Path, config: Config, guard: Guard
) -> list[dict[str, Any]]:
  preflight.check_program(config)
  trained = workdir.read_run(path).get('data', {})
  run = experiment.build(
    config, spec=datasets.recorded(config.dataset, trained)
  )
  # What is evaluated may be elsewhere, and without the training images.
  spec = datasets.resolve(config.dataset, eval_only=True)
  source = spec.open('eval', config.dataset)
  data_dir = config.dataset.data_dir
  data = provenance.of_examples(spec, data_dir, eval=source)
  preflight.check_input(run, data)
  provenance.check_classes(trained, data)
  step, state = restore_newest(path, run)

  evaluator = Evaluator(run, source, workdir.quarantine(path, config))
  hosts.say(
    f'{config.dataset.name}, {source.num_examples} examples, step {step}, '
    f'route {config.eval.route}'
  )
  measured_on = provenance.of_result(spec, data, data_dir)
  if not provenance.is_own(trained, measured_on):
    hosts.say('these are not the examples that the run evaluates itself')
  hosts.say(
    f'{"attack":<10}{"epsilon":>11}{"steps":>7}{"top1 %":>9}{"loss":>9}'
  )
  rows = []
  for row in evaluations.measured(
    config,
    evaluator,
    weights_of(config, state),
    step,
    measured_on,
    before_batch=lambda: guard.enter('evaluate', step),
  ):
    rows.append(row)
    hosts.say(
      f'{row["attack"]:<10}{row["epsilon"]:>11g}{row["attack_steps"]:>7}'
      f'{row["top1"]:>9.2f}{row["loss"]:>9.4f}'
    )
  hosts.on_writer('summary.json', lambda: evaluations.store(path, rows, None))
  return rows
