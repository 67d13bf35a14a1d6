"""Jobs on workers: the code installed, a command started, followed, stopped.

A job outlives the connection that started it; worker.sh says how.
"""

from __future__ import annotations

import pathlib
import tempfile
from collections.abc import Mapping, Sequence

from conadv_jax.base.errors import CloudError, ConfigError
from conadv_jax.cloud.machines import READY, Machines, Worker
from conadv_jax.cloud.shell import Result, Shell

_POLL_SECONDS = 15
# How many polls in a row may fail to reach a worker whose state is READY.
_SILENT_POLLS = 8
# From the first worker that fails to the end of the others: they need 60 to
# notice, and save first.
_GRACE_SECONDS = 300
_SSH_TRIALS = 10

_SCRIPT = pathlib.Path(__file__).with_name('worker.sh')


def _script(*arguments: str) -> list[str]:
  return ['sh', f'conadv/{_SCRIPT.name}', *arguments]


def _each(
  machines: Machines, workers: Sequence[Worker], remote: Sequence[str]
) -> list[Result]:
  commands = [machines.ssh(worker, remote) for worker in workers]
  return machines.shell.run_all(commands)


def _check(
  workers: Sequence[Worker], results: Sequence[Result], what: str
) -> None:
  """Raises CloudError that names the workers whose result is a failure."""
  failed = [
    f'{worker.label}: {result.reason}'
    for worker, result in zip(workers, results, strict=True)
    if result.code
  ]
  if failed:
    more = f' (and {len(failed) - 3} more)' if len(failed) > 3 else ''
    raise CloudError(f'{what}: {"; ".join(failed[:3])}{more}', retry=True)


# ---- Installing --------------------------------------------------------------


def commit_of(name: str) -> str:
  """Resolves the commit `name` of this checkout; warns of what is not in it.

  Raises:
    ConfigError: if there is no such commit.
  """
  git = ['git', '-C', str(_root())]
  shell = Shell()  # also in a dry run, which shows the commit
  found = shell.run([*git, 'rev-parse', '--verify', f'{name}^{{commit}}'])
  if found.code:
    raise ConfigError(
      f'commit={name!r}: not in the checkout {_root()}: {found.reason}'
    )
  if shell.run([*git, 'status', '--porcelain', '-uno']).out:
    print('warning: changes that are not committed stay here')
  return found.out.decode().strip()


def setup(machines: Machines, commit: str, device: str) -> None:
  """Copies the checkout at `commit` to every worker and installs it there.

  A worker that has it is left as it is.

  Raises:
    CloudError: if that fails on a worker.
  """
  shell, workers = machines.shell, machines.workers()
  _await_ssh(machines, workers[0])
  count = f'{len(workers)} worker{"s" * (len(workers) > 1)}'
  print(f'installing {commit[:12]} on {count} (minutes) ...', flush=True)
  with tempfile.TemporaryDirectory() as directory:
    archive = f'{directory}/{commit}.tar.gz'
    tree = f'{directory}/tree'
    # A clone of one commit: a run finds out its commit from .git.
    for command in (
      ['git', 'init', '-q', tree],
      ['git', '-C', tree, 'fetch', '-q', '--depth=1', f'file://{_root()}',
       commit],
      ['git', '-C', tree, 'checkout', '-q', 'FETCH_HEAD'],
      ['tar', '-czf', archive, '-C', tree, '.'],
    ):  # fmt: skip
      result = shell.run(command)
      if result.code:
        raise CloudError(f'{command[0]}: {result.reason}')
    _check(
      workers,
      _each(machines, workers, ['mkdir', '-p', 'conadv/jobs']),
      'cannot make ~/conadv',
    )
    files = [archive, str(_SCRIPT)]
    copies = [machines.copy(w, files, 'conadv/') for w in workers]
    _check(workers, shell.run_all(copies), 'cannot copy the code')
  installed = _each(machines, workers, _script('install', commit, device))
  _check(workers, installed, 'cannot install')


def _root() -> pathlib.Path:
  return pathlib.Path(__file__).parents[2]


def _await_ssh(machines: Machines, worker: Worker) -> None:
  """Waits for the first worker alone: gcloud makes and spreads keys then."""
  for trial in range(_SSH_TRIALS):
    (result,) = _each(machines, [worker], ['true'])
    if result.code == 0:
      return
    if trial + 1 < _SSH_TRIALS:
      machines.shell.sleep(_POLL_SECONDS)
  _check([worker], [result], 'cannot be reached by ssh')


# ---- Running -----------------------------------------------------------------


def start(
  machines: Machines, job: str, command: Sequence[str]
) -> dict[Worker, int]:
  """Starts `command` on every worker.

  `{index}`, `{hosts}` and `{host0}` in its arguments stand for the worker's
  index, the number of workers and the first one's address.

  Returns:
    For each worker, where in the job's log its new part begins, from 1.

  Raises:
    CloudError: if it cannot start on a worker, or runs there already.
  """
  workers = machines.workers()
  host0 = workers[0].node.rpartition('@')[2]
  commands = []
  for index, worker in enumerate(workers):
    words = {'{index}': index, '{hosts}': len(workers), '{host0}': host0}
    arguments = list(command)
    for word, value in words.items():
      arguments = [a.replace(word, str(value)) for a in arguments]
    commands.append(machines.ssh(worker, _script('start', job, *arguments)))
  results = machines.shell.run_all(commands, b'1')
  try:
    _check(workers, results, f'job {job} cannot start')
  except CloudError:
    begun = [w for w, r in zip(workers, results, strict=True) if not r.code]
    if begun:  # alone they would wait for the others
      _each(machines, begun, _script('stop', job))
    raise
  return {
    worker: int(result.out)
    for worker, result in zip(workers, results, strict=True)
  }


def follow(
  machines: Machines,
  job: str,
  begins: Mapping[Worker, int],
  logs: pathlib.Path,
) -> dict[Worker, int]:
  """Waits for the end of a job on all workers; returns their exit codes.

  Appends what each writes to a file of its own in `logs`, and prints what the
  first one writes. Once a worker has failed, it stops those that go on for
  much longer.

  Raises:
    CloudError: if a worker is lost.
  """
  begin, codes = dict(begins), {}
  silent = failed_seconds = 0
  while True:
    waiting = [worker for worker in begin if worker not in codes]
    polls = [_script('poll', job, str(begin[worker])) for worker in waiting]
    results = machines.shell.run_all(
      [machines.ssh(*pair) for pair in zip(waiting, polls, strict=True)],
      b'ended 0\n',
    )
    for worker, result in zip(waiting, results, strict=True):
      state, _, text = result.out.partition(b'\n')
      if result.code == 0 and state:
        _keep(worker, text, logs, shown=worker == next(iter(begin)))
        begin[worker] += len(text)
        if not text and state != b'running':
          codes[worker] = _code(worker, job, state)
    if len(codes) == len(begin):
      return codes
    silent = silent + 1 if any(r.code for r in results) else 0
    if silent:
      _check_there(machines, waiting, results, silent > _SILENT_POLLS)
    machines.shell.sleep(_POLL_SECONDS)
    if any(codes.values()):
      failed_seconds += _POLL_SECONDS
      if failed_seconds == _GRACE_SECONDS:
        stop(machines, job)


def _code(worker: Worker, job: str, state: bytes) -> int:
  word, _, code = state.decode().partition(' ')
  if word == 'ended':
    return int(code)
  raise CloudError(
    f'{worker.label}: job {job} is gone without an exit code', retry=True
  )


def _keep(
  worker: Worker, text: bytes, logs: pathlib.Path, *, shown: bool
) -> None:
  if text:
    logs.mkdir(parents=True, exist_ok=True)
    with open(logs / f'{worker.label}.log', 'ab') as file:
      file.write(text)
    if shown:
      print(text.decode('utf-8', 'replace'), end='', flush=True)


def _check_there(
  machines: Machines, workers: Sequence[Worker],
  results: Sequence[Result], gave_up: bool,
) -> None:  # fmt: skip
  """Raises CloudError if the machines are gone, or silent for too long."""
  state = machines.state()
  if state != READY:
    raise CloudError(f'{machines.label}: is {state}', retry=True)
  if gave_up:
    _check(workers, results, 'cannot be reached by ssh')


def stop(machines: Machines, job: str) -> None:
  """Sends SIGTERM to the job on every worker: it saves and ends with 42."""
  _each(machines, machines.workers(), _script('stop', job))


def states(machines: Machines, job: str) -> dict[str, str]:
  """Of the job on each worker: none, running, 'ended CODE', lost."""
  workers = machines.workers()
  results = _each(machines, workers, _script('poll', job, '1000000000000'))
  return {
    worker.label: result.reason if result.code else result.out.decode().strip()
    for worker, result in zip(workers, results, strict=True)
  }


def tail(machines: Machines, job: str, lines: int) -> str:
  """The last `lines` of the job's log on every worker, under their labels."""
  workers = machines.workers()
  results = _each(machines, workers, _script('tail', job, str(lines)))
  _check(workers, results, 'no log')
  return '\n'.join(
    f'==> {worker.label} <==\n{result.out.decode("utf-8", "replace")}'
    for worker, result in zip(workers, results, strict=True)
  )
