"""The command: every check on every host, then a line for each on host 0."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
import threading
import time
from collections.abc import Sequence
from concurrent import futures
from typing import Any

from conadv_jax import cli, hosts
from conadv_jax.base import errors
from conadv_jax.base.errors import CommandError, ConfigError
from conadv_jax.hosts import join, leaving
from conadv_jax.preflight import checks
from conadv_jax.preflight.checks import Check, Skipped, Subject
from conadv_jax.run import equal_hosts, feed, workdir

OK, FAILED, SKIPPED = '✓', '✗', '–'
_START_SECONDS = 30  # for the hosts to meet
_CHECKS_SECONDS = 48  # for all checks of a host; one alone may take less
_END_SECONDS = 58
_SKEW_SECONDS = 2
_SHOWN = 4  # different lines of one check

Row = dict[str, Any]


@dataclasses.dataclass
class Line:
  """What came of a check on one host."""

  name: str
  mark: str
  text: str


def preflight(argv: Sequence[str]) -> None:
  """Runs the command.

  Raises:
    ConfigError: for a wrong flag of this command, or hosts that cannot be
      found. Whatever else is wrong is a line, and exit code 2.
  """
  parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
  parser.add_argument('--step_seconds')
  options, rest = parser.parse_known_args(argv[1:])
  seconds = _step_seconds(options.step_seconds)
  feed.prepare()  # takes seconds, in which the hosts meet
  start = f'--start_timeout_seconds={_START_SECONDS}'
  rest = cli.start_hosts([argv[0], start, *rest])
  late = (
    f'{hosts.label()}error: the checks of all hosts did not end in '
    f'{_END_SECONDS} s; look at the logs of the hosts'
  )
  with join.ended_after(_END_SECONDS, late):
    failed = check_all(Subject(rest, seconds))
  if failed:
    text = f'{failed} check{"s" * (failed > 1)} failed'
    print(f'{hosts.label()}{text}', file=sys.stderr, flush=True)
    # At once: the thread of a check that hangs may be in a library.
    leaving.leave(errors.USAGE)


def check_all(subject: Subject) -> int:
  """Makes all checks, with the other hosts; prints the result on host 0.

  Returns:
    How many failed, on every host.
  """
  hosts.say(f'hosts: {hosts.count()}; checking, in under a minute ...')
  end = time.monotonic() + _CHECKS_SECONDS
  lines = [
    line_of(check, subject, end)
    for check in checks.CHECKS
    if hosts.is_writer() or not check.of_writer
  ]
  if hosts.count() > 1:
    lines += _between_hosts(subject, end)
  rows = hosts.gather('lines', [vars(line) for line in lines])

  def judge() -> int:
    merged = merge([[Line(**line) for line in row] for row in rows])
    for line in merged:
      hosts.say(f'{line.mark} {line.name:<9} {line.text}')
    return len({line.name for line in merged if line.mark == FAILED})

  failed = hosts.on_writer('the result', judge)
  if subject.token:  # all hosts have looked for it
    mine = checks.token_path(subject.path, hosts.index())
    with contextlib.suppress(OSError):
      mine.unlink()
  return failed


def line_of(check: Check, subject: Subject, end: float) -> Line:
  """Makes `check`, until `time.monotonic()` is `end`, or a second longer."""
  future: futures.Future[str] = futures.Future()

  def call() -> None:
    try:
      future.set_result(check.find(subject))
    except Exception as error:  # noqa: BLE001, it is told of below
      future.set_exception(error)

  seconds = min(check.seconds, max(1, end - time.monotonic()))
  threading.Thread(target=call, daemon=True).start()
  futures.wait([future], seconds)
  if not future.done():
    text = f'no answer in {seconds:.0f} s; {check.remedy}'
    return Line(check.name, FAILED, text)
  try:
    return Line(check.name, OK, future.result())
  except Skipped as reason:
    return Line(check.name, SKIPPED, f'not checked: {reason}')
  except CommandError as error:
    return Line(check.name, FAILED, str(error))
  except Exception as error:  # noqa: BLE001, of a library
    text = errors.redact(f'{type(error).__name__}: {error}')
    return Line(check.name, FAILED, f'{text}; {check.remedy}')


def merge(rows: Sequence[Sequence[Line]]) -> list[Line]:
  """Lines of all hosts -> those to print: one where hosts found the same."""
  merged = []
  for name in dict.fromkeys(line.name for row in rows for line in row):
    found: dict[tuple[str, str], list[int]] = {}
    for host, row in enumerate(rows):
      for line in row:
        if line.name == name:
          found.setdefault((line.mark, line.text), []).append(host)
    # What failed comes first, so that it is not what is left out.
    parts = sorted(found.items(), key=lambda part: part[0][0] != FAILED)
    for (mark, text), where in parts[:_SHOWN]:
      of = f'host{"s" * (len(where) > 1)} {hosts.ranges(where)}: '
      merged.append(Line(name, mark, f'{of if len(parts) > 1 else ""}{text}'))
    if rest := [host for _, where in parts[_SHOWN:] for host in where]:
      marks = {mark for (mark, _), _ in parts[_SHOWN:]}
      mark = FAILED if FAILED in marks else OK
      text = f'and other results on {len(rest)} more hosts, see their logs'
      merged.append(Line(name, mark, text))
  return merged


# ---- What hosts find out together ------------------------------------------


def _between_hosts(subject: Subject, end: float) -> list[Line]:
  """The directory is shared; programs are equal, and clocks about so."""
  tokens = hosts.gather('tokens', subject.token)
  tokens = hosts.on_writer('all tokens', lambda: tokens)
  found = [Check('shared', lambda s: _shared(s, tokens), 12, _SHARE)]
  facts = hosts.gather('facts', subject.facts)
  before = time.time()
  hosts.on_writer('a common moment', lambda: None)
  clocks = hosts.gather('clocks', time.time())
  after = time.time()
  if hosts.is_writer():
    found += [
      Check('hosts', lambda _: same(facts), 5, ''),
      Check('clocks', lambda _: close(clocks, before, after), 5, ''),
    ]
  return [line_of(check, subject, end) for check in found]


_SHARE = (
  'use a directory that all hosts share: a bucket (gs://...) or a network file '
  'system'
)


def _shared(subject: Subject, tokens: Sequence[str]) -> str:
  """Looks for the files of all hosts."""
  subject.needs('path')

  def sees(host: int) -> bool:
    path = checks.token_path(subject.path, host)
    return workdir.comes_to_hold(path, tokens[host])

  writers = [host for host, token in enumerate(tokens) if token]
  with futures.ThreadPoolExecutor(32) as pool:
    seen = list(pool.map(sees, writers))
  unseen = [host for host, ok in zip(writers, seen, strict=True) if not ok]
  if unseen:
    raise ConfigError(
      f'what host{"s" * (len(unseen) > 1)} {hosts.ranges(unseen)} wrote in '
      f'{subject.path} is not seen here; {_SHARE}'
    )
  return f'sees the files of {len(writers)} hosts'


def same(facts: Sequence[dict[str, Any] | None]) -> str:
  """Compares configuration, code, versions, devices and data of all hosts."""
  if without := [host for host, found in enumerate(facts) if not found]:
    where = f'host{"s" * (len(without) > 1)} {hosts.ranges(without)}'
    raise Skipped(f'needs a good configuration and devices on {where}')
  equal_hosts.check_same(facts)
  return 'configuration, code, versions, devices and data are the same'


def close(clocks: Sequence[float], before: float, after: float) -> str:
  """Compares the clocks, read by all hosts between two moments of host 0."""
  skews = {
    host: max(before - clock, clock - after, 0)
    for host, clock in enumerate(clocks)
  }
  worst = max(skews, key=skews.get)
  if skews[worst] > _SKEW_SECONDS:
    far = sorted(host for host in skews if skews[host] > _SKEW_SECONDS)
    raise ConfigError(
      f'host{"s" * (len(far) > 1)} {hosts.ranges(far)}: up to '
      f'{skews[worst]:,.0f} s from host 0, so that logs cannot be compared and '
      'a bucket may refuse credentials; start chrony or ntpd on all hosts'
    )
  return f'within {skews[worst] + after - before:.1f} s'


def _step_seconds(text: str | None) -> float | None:
  """The value of --step_seconds."""
  if text is None:
    return None
  try:
    seconds = float(text)
  except ValueError:
    seconds = 0.0
  if not 0 < seconds < float('inf'):
    raise ConfigError(
      f'--step_seconds={text!r}: must be a number above 0, such as 0.2'
    )
  return seconds
