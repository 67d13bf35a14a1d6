"""The command `conadv_jax.study`: reads its flags and calls what they ask."""

from __future__ import annotations

import argparse
import dataclasses
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
  args, others = parser.parse_known_args(argv[1:])
  how = _how(others)
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
  if args.data_dir:
    how['dataset.data_dir'] = str(storage.expand(args.data_dir))
  study = dataclasses.replace(study, how=how)
  record = Record(path, name)
  if args.report:
    text = report.write(study, record)
  else:
    text = _run(study, record, args.processes)
  print(text, flush=True)


def _how(flags: Sequence[str]) -> dict[str, str]:
  """{field: text} of flags `--config.FIELD=TEXT` that change no result.

  Raises:
    ConfigError: for another flag.
  """
  how = {}
  for flag in flags:
    name, _, text = flag.removeprefix('--config.').partition('=')
    if flag != f'--config.{name}={text}' or name not in design.HOW:
      allowed = ', '.join(f'--config.{name}' for name in design.HOW)
      raise ConfigError(
        f'{flag}: no flag of a study, whose settings are in its file; only '
        f'where and how it runs is set here: {allowed}'
      )
    how[name] = text
  return how


def _run(study, record, processes: int) -> str:
  """Runs what is left of the study; returns its report."""
  with (
    RunLock(record.path),
    Runner(record, processes) as runner,
  ):
    try:
      choices = search.choose(study, record, runner)
      runner.run(list(study.final_cells(choices)))
    finally:  # also of what an interrupted study has so far
      text = report.write(study, record)
    return text
