"""Runs as processes that may die: several hosts on one machine, or one.

Importing TensorFlow and JAX takes longer than a small run. A server of Python's
`multiprocessing` does it once and forks a process for each host.
"""

from __future__ import annotations

import atexit
import functools
import gc
import hashlib
import importlib
import json
import multiprocessing
import os
import pathlib
import runpy
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from unittest import mock

import numpy as np

from conadv_jax.base.errors import StorageError

ROOT = pathlib.Path(__file__).resolve().parents[1]
TINY = str(pathlib.Path(__file__).resolve())  # this file, as a program
_PYTHONPATH = f'{ROOT}{os.pathsep}{ROOT / "tests"}'
_PRELOAD = (
  'tensorflow',
  'sklearn.datasets',
  'helpers',
  'conadv_jax.train',
  'conadv_jax.evaluate',
  'pytest',
)


def free_port() -> int:
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    return probe.getsockname()[1]


def variables(devices: int) -> dict[str, str]:
  """Those of a process that has so many CPU devices."""
  return {
    'JAX_PLATFORMS': 'cpu',
    'JAX_NUM_CPU_DEVICES': str(devices),
    'JAX_CPU_COLLECTIVES_IMPLEMENTATION': 'gloo',
    'PYTHONPATH': _PYTHONPATH,
  }


def start(
  arguments: Sequence[str],
  log: pathlib.Path,
  environment: Mapping[str, str] | None = None,
  devices: int = 1,
) -> multiprocessing.Process:
  """Starts `python ARGUMENTS`, which prints to `log`, with CPU devices."""
  own = os.environ | variables(devices) | dict(environment or {})
  log.write_bytes(b'')  # there from the start, for who waits for a line
  job = (list(arguments), str(log), own)
  process = _server().Process(target=_run, args=job)
  process.start()
  return process


def run(*args, **options) -> int:
  """As `start`: the exit code, or minus the signal that killed it."""
  process = start(*args, **options)
  process.join()
  return process.exitcode


def compile_cache(directory: os.PathLike | str) -> dict[str, str]:
  """Variables by which a process keeps all that it compiles there."""
  return {
    'JAX_COMPILATION_CACHE_DIR': str(directory),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
  }


class Hosts:
  """Processes of one run on the loopback interface, each with a log file.

  Leaving the context kills those that still run.
  """

  def __init__(
    self,
    logs: pathlib.Path,
    count: int,
    arguments: Sequence[str],
    *,
    devices_per_host: int = 1,
    of_host: Mapping[int, Sequence[str]] | None = None,
    environment: Mapping[str, str] | None = None,
    environment_of_host: Mapping[int, Mapping[str, str]] | None = None,
    present: Sequence[int] | None = None,
  ):
    """Starts `python ARGUMENTS` on every host.

    Args:
      logs: directory for the logs, made if need be.
      count: hosts of the run.
      arguments: of Python, without those that say which host it is.
      devices_per_host: CPU devices of each process.
      of_host: further arguments of some hosts.
      environment: variables of all hosts, and
      environment_of_host: of some.
      present: the hosts to start; None is all.
    """
    logs.mkdir(parents=True, exist_ok=True)
    self.port = free_port()
    self._logs = [logs / f'host{host}.log' for host in range(count)]
    self._processes = {}
    for host in range(count) if present is None else present:
      own = (of_host or {}).get(host, ())
      self._processes[host] = start(
        [*arguments, *own, *self._flags(host, count)],
        self._logs[host],
        {**(environment or {}), **(environment_of_host or {}).get(host, {})},
        devices_per_host,
      )

  def __enter__(self) -> Hosts:
    return self

  def __exit__(self, *_) -> None:
    for process in self._processes.values():
      process.kill()
      process.join()

  def log(self, host: int) -> str:
    return self._logs[host].read_text(errors='replace')

  def wait_for(
    self, host: int, text: str, timeout_seconds: float = 240
  ) -> None:
    """Returns when `text` is in the log of `host`."""
    deadline = time.monotonic() + timeout_seconds
    while text not in self.log(host):
      ended = not self._processes[host].is_alive()
      assert not ended or text in self.log(host), self._tails(f'no {text!r}')
      assert time.monotonic() < deadline, self._tails(f'no {text!r} in time')
      time.sleep(0.05)

  def send(self, host: int, number: signal.Signals) -> None:
    assert self._processes[host].is_alive(), self._tails(f'{host} has ended')
    os.kill(self._processes[host].pid, number)

  def ends_with(
    self,
    code: int,
    timeout_seconds: float = 240,
    hosts: Sequence[int] | None = None,
  ) -> None:
    """Waits for the end of `hosts`, or all, which must be with `code`."""
    deadline = time.monotonic() + timeout_seconds
    codes = {}
    for host in self._processes if hosts is None else hosts:
      process = self._processes[host]
      process.join(max(0.1, deadline - time.monotonic()))
      running = process.is_alive()
      codes[host] = 'still running' if running else process.exitcode
    assert set(codes.values()) == {code}, self._tails(f'exit codes {codes}')

  def _flags(self, host: int, count: int) -> list[str]:
    return [
      f'--coordinator=127.0.0.1:{self.port}',
      f'--num_hosts={count}',
      f'--host_index={host}',
    ]

  def _tails(self, reason: str) -> str:
    """`reason` and the ends of all logs, for the message of a failure."""
    tails = [
      f'---- host {host}\n{self.log(host)[-3000:]}' for host in self._processes
    ]
    return '\n'.join([reason, *tails])


def rows(workdir: pathlib.Path) -> list[dict]:
  """The log of a run, without what depends on the clock."""
  from conadv_jax.run import metrics

  return [
    {name: v for name, v in row.items() if name not in metrics.TIMINGS}
    for row in metrics.read_metrics(workdir)
  ]


def hashes(workdir: pathlib.Path) -> dict[str, str]:
  """{leaf: SHA-256} of the state that a run has saved last."""
  import jax

  from conadv_jax import experiment
  from conadv_jax.checkpoints.checkpoint import Checkpoints
  from conadv_jax.config import from_config_dict
  from conadv_jax.run.workdir import read_config

  config = from_config_dict(read_config(str(workdir)))
  checkpoints = Checkpoints(workdir, read_only=True)
  _, state, _ = checkpoints.restore(experiment.build(config).abstract_state())
  checkpoints.close()
  return {
    jax.tree_util.keystr(path): hashlib.sha256(np.asarray(leaf)).hexdigest()
    for path, leaf in jax.tree_util.tree_leaves_with_path(state)
  }


def recorded_ids(directory: pathlib.Path, hosts: int, size: int) -> np.ndarray:
  """Example ids [steps, size] of the global batches that `main` recorded."""
  rows = [rows_of_ids(directory, host) for host in range(hosts)]
  whole = np.full((len(rows[0]), size), -1)
  for of_host in rows:
    places = of_host[0]['places']
    assert (whole[:, places] == -1).all(), 'a place is fed by two hosts'
    whole[:, places] = [row['ids'] for row in of_host]
  return whole


def rows_of_ids(directory: pathlib.Path, host: int = 0) -> list[dict]:
  """What `host` recorded: `batch`, its number, `places` and `ids`."""
  lines = (directory / f'ids{host}.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


@functools.cache
def _server() -> multiprocessing.context.ForkServerContext:
  context = multiprocessing.get_context('forkserver')
  context.set_forkserver_preload(list(_PRELOAD))
  # Python and JAX warn of a fork while TensorFlow has threads, which do nothing
  # yet.
  quiet = 'ignore::DeprecationWarning,ignore::RuntimeWarning'
  variables = {'PYTHONPATH': _PYTHONPATH, 'PYTHONWARNINGS': quiet}
  with mock.patch.dict(os.environ, variables):
    forkserver.ensure_running()
  return context


def _run(arguments: list[str], log: str, environment: dict[str, str]) -> None:
  """In the process that was forked: does what `python ARGUMENTS` does."""
  gc.freeze()  # what the server has loaded is no garbage
  import jax

  from conadv_jax.base import faults

  os.chdir(ROOT)
  output = os.open(log, os.O_WRONLY)
  for number in (1, 2):
    os.dup2(output, number)
  os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
  if environment['PYTHONPATH'] != _PYTHONPATH:  # other code than is loaded
    os.execve(sys.executable, [sys.executable, *arguments], environment)
  sys.stdout.reconfigure(line_buffering=True)
  os.environ.clear()
  os.environ |= environment
  importlib.reload(faults)  # its plan is in a variable
  for name, text in environment.items():
    if name.startswith('JAX_') and hasattr(jax.config, name.lower()):
      before = getattr(jax.config, name.lower())
      if isinstance(before, bool | int | float):
        text = type(before)(json.loads(text))
      jax.config.update(name.lower(), text)
  try:
    if arguments[0] == '-c':
      code, sys.argv = arguments[1], ['-c', *arguments[2:]]
      exec(compile(code, '<string>', 'exec'), {'__name__': '__main__'})
    else:
      sys.argv = arguments
      runpy.run_path(arguments[0], run_name='__main__')
  finally:
    atexit._run_exitfuncs()


def main() -> None:
  """A command of the package for networks that compile fast: TINY.

  `train` and `evaluate` as first argument. The network of the tests has the
  name `tiny`; RECORD_IDS is a directory for the ids that a host feeds;
  FAKE_VERSION, 'package=version', is what the host claims to have installed;
  INPUT_FAILS_AT is the number of the batch at which its storage fails;
  CLOCK, two numbers of seconds, is how wrong its clock is in even and odd ones.
  """
  import importlib.metadata

  import helpers

  from conadv_jax import cli, evaluate, hosts, models, train
  from conadv_jax.run import feed

  models.MODELS['tiny'] = models.Entry(helpers.TinyNet, 4)
  if fake := os.environ.get('FAKE_VERSION'):
    package, version = fake.split('=')
    real = importlib.metadata.version
    importlib.metadata.version = lambda name: (
      version if name == package else real(name)
    )
  if directory := os.environ.get('RECORD_IDS'):
    _record_ids(feed, hosts, pathlib.Path(directory))
  if number := os.environ.get('INPUT_FAILS_AT'):
    _fail_at(feed, int(number))
  if offsets := os.environ.get('CLOCK'):
    _shift_clock([float(text) for text in offsets.split(',')])
  command = sys.argv.pop(1)
  mains = {'train': train.main, 'evaluate': evaluate.evaluate}
  cli.run(mains[command])


def _fail_at(feed, number: int) -> None:
  """Batch `number` cannot be read, as if it were of files."""

  put = feed.Run.put_batch
  left = iter(range(number))

  def put_or_fail(run, batch):
    if next(left, None) is None:
      raise StorageError('shard-00007: cannot be read')
    return put(run, batch)

  feed.Run.put_batch = put_or_fail


def _shift_clock(offsets: Sequence[float]) -> None:
  right = time.time
  time.time = lambda: right() + offsets[int(time.monotonic()) % len(offsets)]


def _record_ids(feed, hosts, directory: pathlib.Path) -> None:
  """Adds a line for each batch to ids{host}.jsonl: number, places and ids."""
  batches_of, add = feed.batches, feed.ExampleIds.add
  places = []

  def batches(run, *args):
    places[:] = run.local_positions().tolist()
    return batches_of(run, *args)

  def add_and_write(self, ids):
    row = {'batch': self._next, 'places': places, 'ids': ids.tolist()}
    with (directory / f'ids{hosts.index()}.jsonl').open('a') as file:
      file.write(json.dumps(row) + '\n')
    add(self, ids)

  feed.batches, feed.ExampleIds.add = batches, add_and_write


if __name__ == '__main__':
  main()
