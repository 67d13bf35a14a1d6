"""The command line: flags, what they mean, and the functions they call."""

from __future__ import annotations

import argparse
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

from conadv_jax.base import errors, storage
from conadv_jax.base.errors import CommandError, ConfigError
from conadv_jax.cloud import jobs, names, supervise
from conadv_jax.cloud.machines import READY, Hosts, Machines, Request, Slice
from conadv_jax.cloud.shell import Shell

_VERBS = (
  'create', 'setup', 'run', 'status', 'logs', 'stop', 'supervise', 'delete',
)  # fmt: skip
_TIERS = ('on_demand', 'spot', 'reserved')
_DEVICES = ('tpu', 'cuda', 'cpu')


def main(
  argv: Sequence[str], sleep: Callable[[float], None] = time.sleep
) -> int:
  """Does what the arguments say; returns the exit code."""
  try:
    options, remote = _parse(argv)
    shell = Shell(dry_run=options.dry_run, sleep=sleep)
    return _do(options, _machines(options, shell), remote)
  except CommandError as error:
    print(f'error: {error}', file=sys.stderr, flush=True)
    return error.exit_code
  except KeyboardInterrupt:
    print('interrupted', file=sys.stderr, flush=True)
    return errors.INTERRUPTED


class _Parser(argparse.ArgumentParser):
  def error(self, message: str) -> NoReturn:
    raise ConfigError(f'{message}; conadv-cloud --help lists the flags')


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
  """(flags, the command after `--`), all names checked."""
  argv, remote = list(argv), []
  if '--' in argv:
    at = argv.index('--')
    argv, remote = argv[:at], argv[at + 1 :]
  parser = _Parser(add_help=False, allow_abbrev=False)
  parser.add_argument('verb', choices=_VERBS)
  for name in ('name', 'zone', 'project', 'type', 'hosts', 'runtime_version'):
    parser.add_argument(f'--{name}', default='')
  parser.add_argument('--logs', type=storage.expand)
  parser.add_argument('--job', default='train')
  parser.add_argument('--commit', default='HEAD')
  parser.add_argument('--device', choices=_DEVICES, default='tpu')
  parser.add_argument('--tier', choices=_TIERS, default='on_demand')
  for name, default in (('slices', 1), ('tries', 5), ('lines', 20)):
    parser.add_argument(f'--{name}', type=_positive, default=default)
  for name in ('simple', 'dry_run', 'keep', 'adopt', 'follow', 'detach'):
    parser.add_argument(f'--{name}', action='store_true')
  options = parser.parse_args(argv)
  _check(options, remote)
  return options, remote


def _positive(text: str) -> int:
  if not text.isdecimal() or int(text) < 1:
    raise argparse.ArgumentTypeError(f'{text!r} is no number from 1')
  return int(text)


def _check(options: argparse.Namespace, remote: Sequence[str]) -> None:
  for field in (
    'name', 'zone', 'project', 'type', 'runtime_version', 'job', 'commit',
  ):  # fmt: skip
    if value := getattr(options, field):
      names.check(field, value)
  if options.hosts:
    for field in ('name', 'zone', 'type'):
      if getattr(options, field):
        raise ConfigError(f'--{field} and --hosts: give one of them')
    if options.verb in ('create', 'delete'):
      raise ConfigError(f'{options.verb}: --hosts are machines that exist')
  else:
    for field in ('name', 'zone'):
      if not getattr(options, field):
        raise ConfigError(f'missing --{field}=..., or --hosts=A,B')
  needs = options.verb in ('run', 'supervise')
  if needs != bool(remote):
    what = 'missing' if needs else 'unexpected'
    raise ConfigError(
      f'{what} command after `--`; such as: conadv-cloud run --name=... '
      '--zone=... -- python -m conadv_jax.train --config=... --workdir=...'
    )
  for argument in remote:
    flag, _, value = argument.partition('=')
    if (path := value or argument).startswith('gs:'):
      names.check('bucket', path)
    elif flag == '--workdir' and options.verb == 'supervise' and options.name:
      raise ConfigError(
        f'workdir={value!r}: goes with the machines; use --workdir=gs://...'
      )


def _machines(options: argparse.Namespace, shell: Shell) -> Machines:
  if options.hosts:
    hosts = [names.check('hosts', name) for name in options.hosts.split(',')]
    return Hosts(shell, hosts)
  request = Request(
    name=options.name,
    zone=options.zone,
    project=options.project,
    type=options.type,
    slices=options.slices,
    tier=options.tier,
    simple=options.simple,
    runtime_version=options.runtime_version,
  )
  exists = options.verb not in ('create', 'supervise')
  return Slice(shell, request, exists=exists)


def _do(
  options: argparse.Namespace, machines: Machines, remote: list[str]
) -> int:
  logs = options.logs or f'runs/cloud/{machines.label}/{options.job}'
  logs = pathlib.Path(logs)
  match options.verb:
    case 'create':
      _create(machines)
    case 'setup':
      jobs.setup(machines, jobs.commit_of(options.commit), options.device)
    case 'run':
      begins = jobs.start(machines, options.job, remote)
      if not options.detach:
        return _follow(machines, options.job, begins, logs)
    case 'status':
      state = machines.state()
      print(f'{machines.label}: {state}')
      if state == READY:
        for worker, state in jobs.states(machines, options.job).items():
          print(f'{worker}: job {options.job}: {state}')
    case 'logs':
      if options.follow:
        begins = dict.fromkeys(machines.workers(), 1)
        return _follow(machines, options.job, begins, logs)
      print(jobs.tail(machines, options.job, options.lines), end='')
    case 'stop':
      jobs.stop(machines, options.job)
    case 'delete':
      machines.delete()
      print(f'{machines.label}: is gone')
    case 'supervise':
      if machines.rented:
        machines.creation()  # refuses at once what it could not make
      job = supervise.Job(
        options.job,
        remote,
        jobs.commit_of(options.commit),
        options.device,
        logs,
      )
      policy = supervise.Policy(options.tries, options.keep, options.adopt)
      return supervise.supervise(machines, job, policy)
  return 0


def _create(machines: Slice) -> None:
  """Asks for the slice and waits; says what is left if that is cut short."""
  refused = False
  try:
    try:
      machines.create()
    except CommandError:
      refused = True
      raise
    machines.wait()
  except (CommandError, KeyboardInterrupt):
    if not refused:
      print(
        f'{machines.label} may be left, and costs money once it is there; '
        f'{machines.how_to_delete()}'
      )
    raise


def _follow(
  machines: Machines, job: str, begins: dict, logs: pathlib.Path
) -> int:
  try:
    codes = jobs.follow(machines, job, begins, logs)
  except KeyboardInterrupt:
    print(
      f'\njob {job} goes on; conadv-cloud logs --follow shows it, stop ends it'
    )
    raise
  for worker, code in codes.items():
    if code:
      print(f'{worker.label}: exit code {code}, log in {logs}')
  return supervise.worst(list(codes.values()))
