"""The command: what is there already, then a table and files for each."""

from __future__ import annotations

import time
from collections.abc import Sequence

from etils import epath

from conadv_jax import cli, hosts
from conadv_jax.analysis import (
  curvature,
  landscape,
  noise,
  plots,
  results,
  sharpness,
  staleness,
)
from conadv_jax.analysis.options import parse
from conadv_jax.analysis.results import Found
from conadv_jax.analysis.subject import Lacks, Subject
from conadv_jax.base import storage
from conadv_jax.run import equal_hosts
from conadv_jax.run.guard import Guard
from conadv_jax.run.reopen import parse_args

# Each has `asked(subject)`, what its result depends on, `measure(subject)`, and
# a function of its name in `plots`.
ANALYSES = {
  'curvature': curvature,
  'sharpness': sharpness,
  'landscape': landscape,
  'staleness': staleness,
  'noise': noise,
}
_NOTE = """
With batch norm, compare networks by sharpness_adaptive alone: curvature, plain
sharpness and weight_norm change when weights are rescaled, which leaves the
network the same."""


def analyse(argv: Sequence[str]) -> dict[str, Found]:
  """Runs the command; returns what it prints, by analysis.

  Raises:
    ConfigError: for a wrong flag, no run or checkpoint, other examples, or
      files of other settings; nothing is computed then.
  """
  options, rest = parse(cli.start_hosts(argv))
  path, config = parse_args(rest)
  with Guard(config.hang_timeout_seconds) as guard:
    equal_hosts.check_program(config)
    subject = Subject(path, config, options, guard)
    output = path / 'analysis'
    if options.output:
      output = storage.expand(options.output)
    asked = _asked(subject)
    files = {name: output / f'{name}.json' for name in asked}
    known = {name: results.known(files[name], asked[name]) for name in asked}
    for name, found in known.items():
      hosts.say(f'\n{name}{": is there already" if found else " ..."}')
      if found is None:
        start = time.monotonic()
        found = ANALYSES[name].measure(subject)
        seconds = time.monotonic() - start
        found = results.write(files[name], asked[name], found, seconds)
        _draw(subject, name, found, files[name].with_suffix('.png'))
      known[name] = found
      hosts.say(f'{results.table(found)}\n{files[name]}, {name}.png')
    if known.keys() & {'curvature', 'sharpness'}:
      hosts.say(_NOTE)
    return known


def _asked(subject: Subject) -> dict[str, dict]:
  """What is to be measured, by analysis."""
  asked = {}
  for name in subject.options.names:
    try:
      asked[name] = ANALYSES[name].asked(subject)
    except Lacks as error:
      if subject.options.what != 'all':
        raise
      hosts.say(f'left out: {error}')
  return asked


def _draw(subject: Subject, name: str, found: Found, path: epath.Path) -> None:
  config = subject.config
  title = f'{config.model}, {config.method}, batch {config.batch_size}: {name}'

  hosts.on_writer(
    path.name, lambda: getattr(plots, name)(found.curves, title, path)
  )
