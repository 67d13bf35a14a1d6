"""The command `conadv_jax.study`: reads its flags and calls what they ask."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from conadv_jax.base import storage
from conadv_jax.base.errors import ConfigError
from conadv_jax.run.lock import RunLock
from conadv_jax.study import compare, design, report, search
from conadv_jax.study.record import Record
from conadv_jax.study.runner import Runner


class _Parser(argparse.ArgumentParser):
  def error(self, message: str) -> NoReturn:
    raise ConfigError(message)


def main(argv: Sequence[str]) -> None:
  """Runs a study, reports it, or compares runs.

  Raises:
    ConfigError: for wrong flags, a wrong study or a directory of another one.
    Preempted: after a signal.
  """
  parser = _Parser(prog='conadv-study', allow_abbrev=False)
  parser.add_argument('--study')
  parser.add_argument('--workdir')
  parser.add_argument('--processes', type=int, default=1)
  parser.add_argument('--data_dir', default='')
  parser.add_argument('--report', action='store_true')
  parser.add_argument('--compare', nargs='+', default=[])
  parser.add_argument('--reference', default='')
  parser.add_argument('--output')
  args = parser.parse_args(argv[1:])
  if args.compare:
    if not args.output:
      raise ConfigError('missing --output=FILE.png of --compare')
    compare.draw(args.compare, args.output, args.reference)
    return
  if not args.study:
    shipped = ', '.join(design.shipped())
    raise ConfigError(f'missing --study=NAME or FILE.py; shipped: {shipped}')
  if not args.workdir:
    raise ConfigError('missing --workdir=DIR, where the study is written')
  name, study = design.load(args.study)
  path = storage.expand(args.workdir)
  flags = []
  if args.data_dir:
    flags = [f'--config.dataset.data_dir={storage.expand(args.data_dir)}']
  record = Record(path, name)
  if args.report:
    text = report.write(study, record)
  else:
    text = _run(study, record, args.processes, flags)
  print(text, flush=True)


def _run(study, record, processes: int, flags: Sequence[str]) -> str:
  """Runs what is left of the study; returns its report."""
  with (
    RunLock(record.path),
    Runner(record, processes, flags) as runner,
  ):
    try:
      choices = search.choose(study, record, runner)
      runner.run(list(study.final_cells(choices)))
    finally:  # also of what an interrupted study has so far
      text = report.write(study, record)
    return text
