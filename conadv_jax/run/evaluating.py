"""Evaluates the newest weights of a run, and keeps the results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from conadv_jax import cli, experiment, hosts
from conadv_jax.config import Config, Dataset
from conadv_jax.data import datasets
from conadv_jax.run import evaluations, preflight, provenance, workdir
from conadv_jax.run.evaluations import Examples
from conadv_jax.run.evaluator import weights_of
from conadv_jax.run.guard import Guard
from conadv_jax.run.reopen import parse_args, restore_newest


def evaluate(argv: Sequence[str]) -> list[dict[str, Any]]:
  """The command: returns the rows that it prints."""
  path, config = parse_args(
    cli.start_hosts(argv), ('dataset.eval_split',), attack='all'
  )
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
  quarantine = workdir.quarantine(path, config)

  def opened(dataset: Dataset) -> Examples:
    # What is evaluated may be elsewhere, and without the training images.
    spec = datasets.resolve(dataset, eval_only=True)
    examples = evaluations.examples_of(run, spec, dataset, quarantine, trained)
    preflight.check_input(run, examples.found)
    provenance.check_classes(trained, examples.found)
    return examples

  todo = [(opened(config.dataset), config.eval.attacks)]
  if part := evaluations.train_part(config):
    todo.append((opened(part), ()))
  step, state = restore_newest(path, run)
  rows = []
  for examples, attacks in todo:
    _say_examples(examples, config, step, trained)
    for row in evaluations.measured(
      config,
      examples,
      weights_of(config, state),
      step,
      attacks,
      before_batch=lambda: guard.enter('evaluate', step),
    ):
      rows.append(row)
      hosts.say(
        f'{row["attack"]:<10}{row["epsilon"]:>11g}{row["attack_steps"]:>7}'
        f'{row["top1"]:>9.2f}{row["loss"]:>9.4f}'
      )
  hosts.on_writer('summary.json', lambda: evaluations.store(path, rows, None))
  return rows


def _say_examples(
  examples: Examples, config: Config, step: int, trained: Mapping[str, Any]
) -> None:
  """Prints what is measured, and the head of the table."""
  data = examples.data
  hosts.say(
    f'{data["name"]}, {data["split"]}, {data["num_examples"]} examples, step '
    f'{step}, route {config.eval.route}'
  )
  if not provenance.is_own(trained, data):
    hosts.say('these are not the examples that the run evaluates itself')
  hosts.say(
    f'{"attack":<10}{"epsilon":>11}{"steps":>7}{"top1 %":>9}{"loss":>9}'
  )
