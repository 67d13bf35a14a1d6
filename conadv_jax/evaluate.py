"""Clean and robust accuracy of a run, or of weights in a file.

  python -m conadv_jax.evaluate --workdir=DIR [--config.eval.FIELD=VALUE ...]
  python -m conadv_jax.evaluate --config=RECIPE --weights=FILE.safetensors
                                --output=FILE.json [--config.FIELD=VALUE ...]

Evaluates every example of the eval split once, through the batch-norm row
`eval.route`: clean, and under `eval.attack` (all, which is FGSM and PGD, none,
or names in ATTACKS) in a ball of `eval.epsilon` grey levels in `eval.norm`,
with `eval.attack_steps` steps and `eval.restarts` restarts. The attacks are
white-box: they see the very network that they are measured on. Of a run, takes
the newest checkpoint.

Prints a table: top-1 with its 95 % interval, top-5, loss, and the calibration
error. Adds it to summary.json, or to FILE.json, each row with what it was
measured on. docs/evaluate.md defines every number.

  --epsilons=0,1,2,4,8    each attack at these radii, drawn in plots/
  --per_class             accuracy of each class, the worst first, as CSV
  --autoattack=standard   AutoAttack, by its own package; or some of its attacks
  --set=NAME              another test set of ImageNet: v2, a, r, sketch, real,
                          or c (mCE); clean images, unless eval.attack is set

With --config.dataset.data_dir=DIR or --config.dataset.eval_split=SPLIT it
measures on other examples of the same classes. Several hosts take the flags of
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
