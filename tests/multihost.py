"""Several hosts on one machine: processes that train together, for tests."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

import numpy as np

from conadv_jax.base.errors import StorageError

ROOT = pathlib.Path(__file__).resolve().parents[1]
TINY = str(pathlib.Path(__file__).resolve())  # this file, as a program


def free_port() -> int:
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    return probe.getsockname()[1]


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
    start: Sequence[int] | None = None,
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
      start: the hosts to start; None is all.
    """
    logs.mkdir(parents=True, exist_ok=True)
    self.port = free_port()
    self._logs = [logs / f'host{host}.log' for host in range(count)]
    self._processes: dict[int, subprocess.Popen] = {}
    for host in range(count) if start is None else start:
      command = [
        sys.executable,
        *arguments,
        *(of_host or {}).get(host, ()),
        *self._flags(host, count),
      ]
      variables = _environment(devices_per_host)
      variables |= environment or {}
      variables |= (environment_of_host or {}).get(host, {})
      with self._logs[host].open('w') as log:
        self._processes[host] = subprocess.Popen(
          command,
          cwd=ROOT,
          env=variables,
          stdin=subprocess.DEVNULL,
          stdout=log,
          stderr=subprocess.STDOUT,
        )

  def __enter__(self) -> Hosts:
    return self

  def __exit__(self, *_) -> None:
    for process in self._processes.values():
      if process.poll() is None:
        process.kill()
      process.wait()

  def log(self, host: int) -> str:
    return self._logs[host].read_text(errors='replace')

  def wait_for(
    self, host: int, text: str, timeout_seconds: float = 240
  ) -> None:
    """Returns when `text` is in the log of `host`."""
    deadline = time.monotonic() + timeout_seconds
    while text not in self.log(host):
      ended = self._processes[host].poll() is not None
      assert not ended or text in self.log(host), self._tails(f'no {text!r}')
      assert time.monotonic() < deadline, self._tails(f'no {text!r} in time')
      time.sleep(0.05)

  def send(self, host: int, number: signal.Signals) -> None:
    self._processes[host].send_signal(number)

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
      try:
        codes[host] = process.wait(max(0.1, deadline - time.monotonic()))
      except subprocess.TimeoutExpired:
        codes[host] = 'still running'
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


def _environment(devices_per_host: int) -> dict[str, str]:
  """CPU devices and gloo; flags of the compiler are those of the tests."""
  return os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'JAX_NUM_CPU_DEVICES': str(devices_per_host),
    'JAX_CPU_COLLECTIVES_IMPLEMENTATION': 'gloo',
    'PYTHONPATH': f'{ROOT}{os.pathsep}{ROOT / "tests"}',
    'PYTHONUNBUFFERED': '1',
  }


def recorded_ids(directory: pathlib.Path, hosts: int, size: int) -> np.ndarray:
  """Example ids [steps, size] of the global batches that `main` recorded."""
  rows = []
  for host in range(hosts):
    record = json.loads((directory / f'ids{host}.json').read_text())
    rows.append((np.array(record['places']), np.array(record['ids'])))
  whole = np.full((len(rows[0][1]), size), -1)
  for places, ids in rows:
    assert (whole[:, places] == -1).all(), 'a place is fed by two hosts'
    whole[:, places] = ids
  return whole


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
  cli.run(mains[command], '')


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
  """Writes ids{host}.json: the `places` of the host, and `ids` of each step."""
  batches_of, add = feed.batches, feed.ExampleIds.add
  record = {'places': None, 'ids': []}

  def batches(run, *args):
    record['places'] = run.local_positions().tolist()
    return batches_of(run, *args)

  def add_and_write(self, ids):
    add(self, ids)
    record['ids'].append(ids.tolist())
    path = directory / f'ids{hosts.index()}.json'
    path.write_text(json.dumps(record))

  feed.batches, feed.ExampleIds.add = batches, add_and_write


if __name__ == '__main__':
  main()
