"""Clean and robust accuracy of a run.

  python -m conadv_jax.evaluate --workdir=DIR [--config.eval.FIELD=VALUE ...]

Reads the newest checkpoint and evaluates every example of the eval split once:
clean, under FGSM and under PGD (`eval.attack`: all, fgsm, pgd or none), in an
L-infinity ball of `eval.epsilon` grey levels, through the batch-norm row
`eval.route`. The attack is white-box: it sees the very network that it is
measured on. Prints a table and adds it to summary.json, each row with what it
was measured on. With --config.dataset.data_dir=DIR it measures on other
examples of the same classes. Several hosts take the flags of
`conadv_jax.train`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from conadv_jax.base.usage import answered


def evaluate(argv: Sequence[str]) -> list[dict[str, Any]]:
  """The command: returns the rows that it prints."""
  from conadv_jax.run import evaluating

  return evaluating.evaluate(argv)


def console() -> None:
  """Runs the command `conadv-evaluate`."""
  if not answered(__doc__):
    from conadv_jax import cli

    cli.run(evaluate)


if __name__ == '__main__':
  console()
