"""Runs a grid of trainings that answers a question, and reports it.

  python -m conadv_jax.study --study=NAME_OR_FILE --workdir=DIR
                             [--processes=N] [--data_dir=DIR]
  python -m conadv_jax.study --study=NAME_OR_FILE --workdir=DIR --report
  python -m conadv_jax.study --compare DIR DIR ... --output=FILE.png
                             [--reference=mlperf_64k]

A study file names arms (a method, a batch size, any setting), their seeds, what
is tuned and what is compared; configs/studies/ has some. First its searches
choose settings on a validation split, then every arm is run with every seed and
measured on the test split.

DIR gets study.csv (a row per run), choices.json, study.log, report.md,
report.html and plots, and each run's work directory in cells/. Run the same
command again to resume after an interruption: runs that have a row are kept, so
DIR may lose cells/, or move. A run that failed is tried again; one whose loss
was not finite is a result.

  --processes=N   runs at a time, each on its own share of the cores; 1
  --data_dir=DIR  of the data set
  --report        draws the report again from study.csv, without a run
  --compare       draws the curves of runs beside each other
  --reference     draws a published accuracy by epoch with them, and prints how
                  far each run is from it: mlperf_64k, mlperf_40k
"""

from __future__ import annotations

from collections.abc import Sequence

from conadv_jax.base.usage import answered


def main(argv: Sequence[str]) -> None:
  """The command."""
  from conadv_jax.study import command

  command.main(argv)


def console() -> None:
  """Runs the command `conadv-study`."""
  if not answered(__doc__):
    from conadv_jax import cli

    cli.run(main)


if __name__ == '__main__':
  console()
