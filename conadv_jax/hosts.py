"""Several hosts as one run: how they start, and what they tell each other.

A host is one process; on a TPU slice, one per machine. What decides which way
the program goes (settings, files, errors) travels through the key-value store
of JAX's coordinator: that needs no device, ends in bounded time, and works
between hosts that differ. Numbers that come with steps travel by the devices.

Host 0 is the writer: it alone writes files and prints progress. All hosts make
the same calls in the same order. With one host, nothing here talks to anyone.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import itertools
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax._src import cloud_tpu_init, clusters, distributed
from jax.experimental import multihost_utils

from conadv_jax.config import ConfigError

# A host may be late by as long as reading a data set into memory takes. One
# that died or failed is noticed long before that.
_WAIT_SECONDS = 3600
_POLL_SECONDS = 2
_REMIND_SECONDS = 60
_SHUTDOWN_SECONDS = 60
_FAILED = 'conadv_jax/failed/'
_calls = itertools.count()  # the same number for the same call on every host


class HostError(Exception):
  """Another host failed, or does not answer.

  Attributes:
    exit_code: of that host; 1 if it does not answer.
  """

  def __init__(self, message: str, exit_code: int = 1):
    super().__init__(message)
    self.exit_code = exit_code


# ---- Start -----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Place:
  """Which host this is, of how many, and where host 0 listens."""

  coordinator: str
  num_hosts: int
  host_index: int
  local_device_ids: Sequence[int] | None = None


def start(
  coordinator: str | None = None,
  num_hosts: int | None = None,
  host_index: int | None = None,
  start_timeout_seconds: int = 300,
) -> None:
  """Joins the other hosts; call it before anything asks for devices.

  Without arguments, hosts are found as JAX finds them: on Cloud TPU VMs, GKE,
  Slurm and Open MPI. Where there are no others, nothing happens.

  Args:
    coordinator: HOST:PORT of host 0; None is what $JAX_COORDINATOR_ADDRESS
      says. On the loopback interface, host 0 listens there only.
    num_hosts: number of hosts; 1 alone means not to look for others.
    host_index: this host, from 0.
    start_timeout_seconds: how long to wait for the others. JAX then aborts the
      process (SIGABRT); the last line printed before says what to check.

  Raises:
    ConfigError: for arguments that do not go together, a port that is taken,
      or hosts that cannot be found.
  """
  if jax.distributed.is_initialized():
    return
  if start_timeout_seconds < 1:
    raise ConfigError(
      f'--start_timeout_seconds={start_timeout_seconds}: must be 1 or more'
    )
  address = os.environ.get('JAX_COORDINATOR_ADDRESS')
  if num_hosts is not None and host_index is not None:
    coordinator = coordinator or address
  place = _explicit(coordinator, num_hosts, host_index)
  if place is None and num_hosts is None:
    place = _detected(address, start_timeout_seconds)
  if place is None or place.num_hosts == 1:
    return
  _join(place, start_timeout_seconds)
  local = jax.local_devices()
  print(
    f'{label()}{len(local)} of {jax.device_count()} devices, '
    f'{local[0].device_kind}',
    flush=True,
  )


def _explicit(
  coordinator: str | None, num_hosts: int | None, host_index: int | None
) -> _Place | None:
  """What the three flags say; None if they leave it to be found out."""
  flags = {
    '--coordinator': coordinator,
    '--num_hosts': num_hosts,
    '--host_index': host_index,
  }
  given = [name for name, value in flags.items() if value is not None]
  if num_hosts is not None and num_hosts < 1:
    raise ConfigError(f'--num_hosts={num_hosts}: must be 1 or more')
  if not given or (num_hosts == 1 and coordinator is None and not host_index):
    return None
  if len(given) < len(flags):
    missing = [name for name in flags if name not in given]
    raise ConfigError(
      f'{", ".join(given)}: {" and ".join(missing)} must be given too; or none '
      'of the three, where JAX finds the hosts by itself; or --num_hosts=1'
    )
  if not 0 <= host_index < num_hosts:
    raise ConfigError(
      f'--host_index={host_index}: must be from 0 to {num_hosts - 1}, as '
      f'--num_hosts={num_hosts}'
    )
  host, _, port = coordinator.rpartition(':')
  if not host or not port.isdecimal() or not 0 < int(port) < 65536:
    raise ConfigError(
      f'--coordinator={coordinator!r}: must be HOST:PORT of host 0, such as '
      '10.0.0.2:8476'
    )
  return _Place(coordinator, num_hosts, host_index)


def _detected(address: str | None, timeout_seconds: int) -> _Place | None:
  """What JAX finds out by itself; None where there are no other hosts."""
  on_tpu_vm = cloud_tpu_init.running_in_cloud_tpu_vm
  if on_tpu_vm and jax.config.jax_platforms == 'cpu':
    return None
  fix = (
    'say which hosts there are with --coordinator=HOST:PORT --num_hosts=N '
    '--host_index=I, or --num_hosts=1 for this one alone'
  )
  detect = clusters.ClusterEnv.auto_detect_unset_distributed_params
  try:
    found = detect(address, None, None, None, None, timeout_seconds)
  except (OSError, RuntimeError, ValueError, ImportError) as error:
    raise ConfigError(
      f'looking for other hosts failed: {error}; {fix}'
    ) from error
  if None not in found[:3]:
    return _Place(*found)
  if address:
    raise ConfigError(
      f'JAX_COORDINATOR_ADDRESS={address}: not known is how many hosts there '
      f'are and which is this one; {fix}'
    )
  if on_tpu_vm and 'TPU_SKIP_MDS_QUERY' in os.environ:
    # It is for compiling without a TPU, and hides the other hosts of a slice.
    raise ConfigError(
      'TPU_SKIP_MDS_QUERY is set on a TPU machine, which hides the other hosts '
      f'of its slice; unset it, or {fix}'
    )
  return None


def _join(place: _Place, timeout_seconds: int) -> None:
  host, _, port = place.coordinator.rpartition(':')
  if place.host_index == 0:
    _check_port_is_free(place.coordinator, int(port))
  # JAX aborts the process when time is up, so the reason must be there before.
  print(
    f'host {place.host_index} of {place.num_hosts}: waiting up to '
    f'{timeout_seconds} s for all hosts at {place.coordinator}. Should this '
    f'fail: was the same command started on all {place.num_hosts} hosts, each '
    f'with its own host index, and can they reach port {port} of {host}?',
    flush=True,
  )
  bind = place.coordinator if _is_loopback(host) else None
  try:
    jax.distributed.initialize(
      place.coordinator,
      place.num_hosts,
      place.host_index,
      local_device_ids=place.local_device_ids,
      cluster_detection_method='deactivate',
      initialization_timeout=timeout_seconds,
      shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
      coordinator_bind_address=bind,
    )
  except jax.errors.JaxRuntimeError as error:
    raise ConfigError(
      f'--coordinator={place.coordinator}: could not join: {error}'
    ) from error
  # JAX notes SIGTERM for a service of its own and drops it. Until the run
  # handles it (stop.StopRequest), the signal is to end the process as always.
  signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))


def _check_port_is_free(coordinator: str, port: int) -> None:
  """The coordinator would share the port of another run, and mix the two."""
  with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
      probe.bind(('', port))
    except OSError as error:
      raise ConfigError(
        f'--coordinator={coordinator}: port {port} of this host cannot be used '
        f'({error.strerror}); is another run using it? take another port on '
        'all hosts'
      ) from error


def _is_loopback(host: str) -> bool:
  host = host.strip('[]')
  try:
    return ipaddress.ip_address(host).is_loopback
  except ValueError:
    return host == 'localhost'


# ---- Who this is -----------------------------------------------------------


def index() -> int:
  """This host, from 0; needs no devices."""
  return distributed.global_state.process_id


def count() -> int:
  """Number of hosts; needs no devices."""
  return distributed.global_state.num_processes


def is_writer() -> bool:
  """Whether this host writes the run's files and prints its progress."""
  return index() == 0


def label() -> str:
  """'host 1 of 4: ', to begin a line with; '' for a host alone."""
  return f'host {index()} of {count()}: ' if count() > 1 else ''


def say(text: str, end: str = '\n') -> None:
  """Prints what one host says for all."""
  if is_writer():
    print(text, end=end, flush=True)


def ranges(numbers: Sequence[int]) -> str:
  """Sorted numbers in words: [0, 1, 2, 5] -> '0-2, 5'."""
  runs: list[list[int]] = []
  for number in numbers:
    if runs and number == runs[-1][1] + 1:
      runs[-1][1] = number
    else:
      runs.append([number, number])
  return ', '.join(f'{a}-{b}' if a < b else str(a) for a, b in runs)


# ---- What hosts tell each other --------------------------------------------


def on_writer(name: str, fn: Callable[[], Any]) -> Any:
  """`fn()`, called on host 0 only; its result on every host.

  So all hosts go the same way, whatever each would see of the files.

  Args:
    name: what hosts wait for, for messages.
    fn: returns what JSON can hold.

  Raises:
    ConfigError: on every host, if `fn` raises one.
    HostError: if another host failed or does not answer.
  """
  if count() == 1:
    return fn()
  key = f'conadv_jax/{next(_calls)}/{name}'
  if not is_writer():
    answer = json.loads(_receive(key, 0, name))
    if 'error' in answer:
      raise ConfigError(answer['error'])
    return answer['result']
  try:
    result = fn()
  except ConfigError as error:
    _send(key, json.dumps({'error': str(error)}))
    raise
  _send(key, json.dumps({'result': result}))
  return result


def gather(name: str, value: Any) -> list[Any] | None:
  """On host 0, `value` of every host in order; None on the others.

  Args:
    name: what host 0 waits for, for messages.
    value: what JSON can hold.

  Raises:
    HostError: if another host failed or does not answer.
  """
  if count() == 1:
    return [value]
  key = f'conadv_jax/{next(_calls)}/{name}'
  if not is_writer():
    _send(f'{key}/{index()}', json.dumps(value))
    return None
  received = [
    json.loads(_receive(f'{key}/{host}', host, name))
    for host in range(1, count())
  ]
  return [value, *received]


def gather_arrays(values: Any) -> np.ndarray:
  """[hosts, ...]: the array `values` of every host, on every host.

  By the devices; shapes must be equal.
  """
  return np.asarray(multihost_utils.process_allgather(np.asarray(values)))


def abandon(message: str, exit_code: int) -> None:
  """Tells hosts that wait for this one, in any call above, that it failed."""
  if count() > 1 and jax.distributed.is_initialized():
    failure = {'host': index(), 'message': message, 'exit_code': exit_code}
    _send(f'{_FAILED}{index()}', json.dumps(failure))


def _send(key: str, text: str) -> None:
  distributed.global_state.client.key_value_set(key, text, allow_overwrite=True)


def _receive(key: str, host: int, name: str) -> str:
  """The text that `host` sends under `key`."""
  client = distributed.global_state.client
  start = reminded = time.monotonic()
  while True:
    try:
      return client.blocking_key_value_get(key, 1000 * _POLL_SECONDS)
    except jax.errors.JaxRuntimeError as error:
      if 'DEADLINE_EXCEEDED' not in str(error):
        raise
    for _, text in client.key_value_dir_get(_FAILED):
      failure = json.loads(text)
      raise HostError(
        f'host {failure["host"]} stopped: {failure["message"]}',
        failure['exit_code'],
      )
    now = time.monotonic()
    if now - start > _WAIT_SECONDS:
      raise HostError(
        f'host {host} did not come to {name!r} in {_WAIT_SECONDS} s; look at '
        'its log'
      )
    if now - reminded > _REMIND_SECONDS:
      reminded = now
      print(
        f'{label()}waiting for host {host} to come to {name!r} since '
        f'{now - start:.0f} s',
        flush=True,
      )
