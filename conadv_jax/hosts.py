"""Several hosts as one run: how they start, and what they tell each other.

A host is one process; on a TPU slice, one per machine. What decides which way
the program goes (settings, files, errors) travels through the key-value store
of JAX's coordinator: that needs no device, ends in bounded time, and works
between hosts that differ. Numbers that come with steps travel by the devices.

Host 0 is the writer: it alone writes files and prints progress. All hosts make
the same calls in the same order. With one host, nothing here talks to anyone.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import ipaddress
import itertools
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NoReturn

import jax
import numpy as np
from jax._src import cloud_tpu_init, clusters, distributed
from jax.experimental import multihost_utils

from conadv_jax import exits
from conadv_jax.config import ConfigError

# A host may be late by as long as reading a data set into memory takes. One
# that died or failed is noticed long before that.
_WAIT_SECONDS = 3600
_POLL_SECONDS = 2
_REMIND_SECONDS = 60
_SHUTDOWN_SECONDS = 60
_ANNOUNCE_SECONDS = 5
_LINGER_SECONDS = 10
# JAX ends a process that it takes for cut off, without a word about which host
# is lost. The watchdog, which knows, must come first.
_JAX_LATER_SECONDS = 30
_FAILED = 'conadv_jax/failed'
_LEAVING = 'conadv_jax/leaving/'
_BEATS = 'conadv_jax/beats/'
_calls = itertools.count()  # the same number for the same call on every host


class HostError(Exception):
  """Another host failed, or does not answer.

  Attributes:
    exit_code: of that host; `exits.HOST` if it does not answer.
  """

  def __init__(self, message: str, exit_code: int = exits.HOST):
    super().__init__(message)
    self.exit_code = exit_code


@dataclasses.dataclass
class _Known:
  """What this process knows of the others.

  Attributes:
    peer_timeout_seconds: silence after which a host is taken for lost.
    lost: a message, if an abort of JAX now would mean that a host is lost.
    failure: what another host announced before it ended.
    abort_handler: a function of C, which must stay as long as the process.
  """

  peer_timeout_seconds: int = 60
  lost: Callable[[], str | None] = lambda: None
  failure: HostError | None = None
  abort_handler: Any = None


_known = _Known()


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
  peer_timeout_seconds: int = 60,
) -> None:
  """Joins the other hosts; call it before anything asks for devices.

  Without arguments, hosts are found as JAX finds them: on Cloud TPU VMs, GKE,
  Slurm and Open MPI. Where there are no others, nothing happens.

  Args:
    coordinator: HOST:PORT of host 0; None is what $JAX_COORDINATOR_ADDRESS
      says. On the loopback interface, host 0 listens there only.
    num_hosts: number of hosts; 1 alone means not to look for others.
    host_index: this host, from 0.
    start_timeout_seconds: how long to wait for the others. Then the process
      ends with `exits.HOST`, after messages that say which hosts are missing,
      as far as host 0 is there to tell, and what to check.
    peer_timeout_seconds: silence after which a host is taken for lost.

  Raises:
    ConfigError: for arguments that do not go together, a port that is taken,
      or hosts that cannot be found.
  """
  if jax.distributed.is_initialized():
    return
  for name, seconds in (
    ('start', start_timeout_seconds),
    ('peer', peer_timeout_seconds),
  ):
    if seconds < 1:
      raise ConfigError(
        f'--{name}_timeout_seconds={seconds}: must be 1 or more'
      )
  _known.peer_timeout_seconds = peer_timeout_seconds
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
  check = (
    f'was the same command started on all {place.num_hosts} hosts, each with '
    f'its own host index, and can they reach port {port} of {host}?'
  )
  print(
    f'host {place.host_index} of {place.num_hosts}: waiting up to '
    f'{timeout_seconds} s for all hosts at {place.coordinator}. Should this '
    f'fail: {check}',
    flush=True,
  )
  _known.lost = lambda: (
    f'not all hosts came to {place.coordinator} in {timeout_seconds} s; the '
    'message of JAX above has the numbers of those that are missing, under '
    f'"timed out task names", if this host reached host 0: {check}'
  )
  _hook_into_abort(f'host {place.host_index} of {place.num_hosts}: ')
  bind = place.coordinator if _is_loopback(host) else None
  try:
    with _missing_hosts_are_named(timeout_seconds):
      jax.distributed.initialize(
        place.coordinator,
        place.num_hosts,
        place.host_index,
        local_device_ids=place.local_device_ids,
        cluster_detection_method='deactivate',
        # Later than the service, which can name the missing hosts.
        initialization_timeout=timeout_seconds + 5,
        heartbeat_timeout_seconds=(
          _known.peer_timeout_seconds + _JAX_LATER_SECONDS
        ),
        shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
        coordinator_bind_address=bind,
      )
  except jax.errors.JaxRuntimeError as error:
    raise ConfigError(
      f'--coordinator={place.coordinator}: could not join: {error}'
    ) from error
  _known.lost = _lost_coordinator
  # JAX notes SIGTERM for a service of its own and drops it. Until the run
  # handles it (stop.StopRequest), the signal is to end the process as always.
  signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))


@contextlib.contextmanager
def _missing_hosts_are_named(timeout_seconds: int) -> Iterator[None]:
  """The service of JAX then tells all that came which hosts did not.

  It has a limit of its own for that, an hour, which JAX has no argument for.
  """
  library, name = distributed._jax, 'get_distributed_runtime_service'
  original = getattr(library, name)
  limited = functools.partial(
    original, cluster_register_timeout=timeout_seconds
  )
  setattr(library, name, limited)
  try:
    yield
  finally:
    setattr(library, name, original)


def _hook_into_abort(label: str) -> None:
  """Ends the process with our message and exit code where JAX aborts it.

  The moment host 0 is gone, a thread of JAX calls abort(). A handler of Python
  would run too late for that, in the main thread; this one runs in the thread
  that calls. Any other abort goes on as if it were not there.
  """
  libc = ctypes.CDLL(None)
  libc.signal.restype = ctypes.c_void_p
  libc.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)

  @ctypes.CFUNCTYPE(None, ctypes.c_int)
  def handle(_):
    failure = _known.failure
    if failure is None and (message := _known.lost()) is not None:
      failure = HostError(message)
    if failure is not None:
      os.write(2, f'{label}error: {failure}\n'.encode())
      os._exit(failure.exit_code)
    libc.signal(signal.SIGABRT, before)

  _known.abort_handler = handle
  before = libc.signal(
    signal.SIGABRT, ctypes.cast(handle, ctypes.c_void_p).value
  )


def _lost_coordinator() -> str | None:
  """The message if nobody listens at host 0 any more."""
  host, _, port = coordinator().rpartition(':')
  try:
    with socket.create_connection((host.strip('[]'), int(port)), timeout=2):
      return None
  except OSError as error:
    return f'{silent_coordinator()}: {error.strerror or error}'


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


def coordinator() -> str:
  """HOST:PORT where host 0 listens; '' for a host alone."""
  return distributed.global_state.coordinator_address or ''


def peer_timeout_seconds() -> int:
  """Silence after which a host is taken for lost, as given to `start`."""
  return _known.peer_timeout_seconds


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


def first(name: str, value: Any) -> Any:
  """The first host's `value` that is not empty, on every host; else its own.

  Args:
    name: what hosts wait for, for messages.
    value: what JSON can hold.

  Raises:
    HostError: if another host failed or does not answer.
  """
  values = gather(name, value)
  return on_writer(name, lambda: next(filter(None, values), value))


def gather_arrays(values: Any) -> np.ndarray:
  """[hosts, ...]: the array `values` of every host, on every host.

  By the devices; shapes must be equal.
  """
  return np.asarray(multihost_utils.process_allgather(np.asarray(values)))


# ---- Failures --------------------------------------------------------------


def abandon(message: str, exit_code: int) -> None:
  """Tells the other hosts that this one failed; the first to say so counts.

  They end with `exit_code`: from the calls above, or by their watchdog. It
  takes at most 5 s, even if host 0 does not answer.
  """
  if count() > 1 and jax.distributed.is_initialized():
    failure = {'host': index(), 'message': message, 'exit_code': exit_code}
    text = json.dumps(failure)
    within(_ANNOUNCE_SECONDS, lambda: _send(_FAILED, text, overwrite=False))


def leave(exit_code: int, lost: Collection[int] = ()) -> NoReturn:
  """Ends this process at once, after `abandon`, without waiting for hosts.

  At a normal end JAX waits for hosts, which may be waiting for this one. Only
  host 0 stays for up to 10 s, until the others leave, too: they hear of the
  failure through this process.

  Args:
    exit_code: of the process.
    lost: hosts that need not be waited for.
  """
  within(1, lambda: (sys.stdout.flush(), sys.stderr.flush()))
  if count() > 1 and is_writer():
    others = set(range(1, count())) - set(lost)
    within(_LINGER_SECONDS, lambda: _until_leaving(others))
  elif count() > 1 and 0 not in lost:
    within(1, lambda: _send(f'{_LEAVING}{index()}', ''))
  os._exit(exit_code)


def _until_leaving(others: set[int]) -> None:
  client = distributed.global_state.client
  while others - {
    int(key.rpartition('/')[2]) for key, _ in client.key_value_dir_get(_LEAVING)
  }:
    time.sleep(0.1)


def within(seconds: float, fn: Callable[[], Any]) -> None:
  """Calls `fn` for at most `seconds`; what the coordinator refuses is dropped.

  A call to a coordinator that does not answer has no limit of its own.
  """

  def call() -> None:
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      fn()

  thread = threading.Thread(target=call, daemon=True)
  thread.start()
  thread.join(seconds)


def failure() -> HostError | None:
  """What another host announced by `abandon`; None if all is well.

  Raises:
    jax.errors.JaxRuntimeError: if the coordinator does not answer.
  """
  client = distributed.global_state.client
  if _known.failure is None:
    try:
      found = json.loads(client.key_value_try_get(_FAILED))
    except jax.errors.JaxRuntimeError as error:
      if 'NOT_FOUND' not in str(error):
        raise
      return None
    if found['host'] == index():
      return None
    message = f'host {found["host"]} stopped: {found["message"]}'
    _known.failure = HostError(message, found['exit_code'])
  return _known.failure


def silent_coordinator() -> str:
  """The beginning of a message."""
  return f'host 0 at {coordinator()} does not answer'


# ---- Signs of life ---------------------------------------------------------


def beat(value: Any) -> None:
  """Publishes `value`, what JSON can hold, as this host's sign of life.

  Raises:
    jax.errors.JaxRuntimeError: if the coordinator does not answer.
  """
  _send(f'{_BEATS}{index()}', json.dumps(value))


def beats() -> dict[int, Any]:
  """The newest sign of life of every host that gave one.

  Raises:
    jax.errors.JaxRuntimeError: if the coordinator does not answer.
  """
  pairs = distributed.global_state.client.key_value_dir_get(_BEATS)
  return {int(key.rpartition('/')[2]): json.loads(text) for key, text in pairs}


def _send(key: str, text: str, overwrite: bool = True) -> None:
  distributed.global_state.client.key_value_set(
    key, text, allow_overwrite=overwrite
  )


def _receive(key: str, host: int, name: str) -> str:
  """The text that `host` sends under `key`."""
  client = distributed.global_state.client
  start = reminded = time.monotonic()
  while True:
    try:
      return client.blocking_key_value_get(key, 1000 * _POLL_SECONDS)
    except jax.errors.JaxRuntimeError as error:
      if 'DEADLINE_EXCEEDED' not in str(error):
        raise HostError(f'{silent_coordinator()}: {error}') from error
    if (failed := failure()) is not None:
      raise failed
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
