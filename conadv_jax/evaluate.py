"""Clean and robust accuracy of a run.

  python -m conadv_jax.evaluate --workdir=DIR [--config.eval.FIELD=VALUE ...]

Reads the newest checkpoint and evaluates every example of the eval split once:
clean, under FGSM and under PGD (`eval.attack`: all, fgsm, pgd or none), in an
L-infinity ball of `eval.epsilon` grey levels, through the batch-norm row
`eval.route`. The attack is white-box: it sees the very network that it is
measured on. Prints a table and adds it to summary.json. Several hosts take the
flags of `conadv_jax.train`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from etils import epath

from conadv_jax import cli, experiment, hosts
from conadv_jax.config import Config
from conadv_jax.run import preflight, workdir
from conadv_jax.run.evaluator import (
  Evaluator,
  eval_attack,
  weights_of,
)
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
  run = experiment.build(config)
  step, state = restore_newest(path, run)
  source = run.spec.open('eval', config.dataset)
  preflight.check_input(run, run.spec.num_train, source.num_examples)
  quarantine = workdir.quarantine(path, config)

  evaluator = Evaluator(run, source, quarantine)
  weights = weights_of(config, state)
  rows = []
  hosts.say(
    f'{config.dataset.name}, {source.num_examples} examples, step {step}, '
    f'route {config.eval.route}'
  )
  hosts.say(
    f'{"attack":<10}{"epsilon":>11}{"steps":>7}{"top1 %":>9}{"loss":>9}'
  )
  for name in ('none', *config.eval.attacks):
    attack = eval_attack(config, name) if name != 'none' else None
    row = {
      'step': step,
      'route': config.eval.route,
      'use_ema': config.eval.use_ema,
      'attack': name,
      'epsilon': attack.epsilon if attack else 0.0,
      'attack_steps': attack.steps if attack else 0,
      **evaluator(
        weights, name, before_batch=lambda: guard.enter('evaluate', step)
      ),
    }
    rows.append(row)
    hosts.say(
      f'{name:<10}{row["epsilon"]:>11g}{row["attack_steps"]:>7}'
      f'{row["top1"]:>9.2f}{row["loss"]:>9.4f}'
    )
  hosts.on_writer('summary.json', lambda: _add_to_summary(path, rows))
  return rows


# What an evaluation is of; all else in a row is its result.
_KIND = ('step', 'route', 'use_ema', 'attack', 'epsilon', 'attack_steps')


def _add_to_summary(path: epath.Path, rows: list[dict[str, Any]]) -> None:
  """Adds `rows` to `evaluations`, in place of earlier ones of the same kind."""
  summary = {}
  if (path / 'summary.json').exists():
    summary = json.loads((path / 'summary.json').read_text())

  def kind(row):
    return [row.get(name) for name in _KIND]

  new = [kind(row) for row in rows]
  old = [r for r in summary.get('evaluations', []) if kind(r) not in new]
  workdir.write_json(
    path / 'summary.json', {**summary, 'evaluations': old + rows}
  )


def console() -> None:
  """Runs the command `conadv-evaluate`."""
  cli.run(evaluate, __doc__)


if __name__ == '__main__':
  console()
