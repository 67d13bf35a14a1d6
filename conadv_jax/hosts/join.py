"""How the hosts of a run find each other, and what ends one that cannot."""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import os
import signal
import socket
import threading
from collections.abc import Iterator, Sequence

import jax

from conadv_jax import hosts
from conadv_jax.base import errors
from conadv_jax.base.errors import ConfigError
from conadv_jax.hosts import private

_SHUTDOWN_SECONDS = 60
# JAX aborts a process that it takes for cut off, without naming the host that
# is lost. What of ours can name it must come first.
_JAX_LATER_SECONDS = 30
_peer_timeout_seconds = 60


@dataclasses.dataclass(frozen=True)
class _Place:
  """Which host this is, of how many, and where host 0 listens."""

  coordinator: str
  num_hosts: int
  host_index: int
  local_device_ids: Sequence[int] | None = None


def peer_timeout_seconds() -> int:
  """Silence after which a host is taken for lost, as given to `start`."""
  return _peer_timeout_seconds


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
      ends with `errors.HOST` and a message that says what to check.
    peer_timeout_seconds: silence after which a host is taken for lost.

  Raises:
    ConfigError: for arguments that do not go together, a port that is taken,
      or hosts that cannot be found.
  """
  global _peer_timeout_seconds
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
  _peer_timeout_seconds = peer_timeout_seconds
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
    f'{hosts.label()}{len(local)} of {jax.device_count()} devices, '
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
  on_tpu_vm = private.on_tpu_vm()
  if on_tpu_vm and jax.config.jax_platforms == 'cpu':
    return None
  fix = (
    'say which hosts there are with --coordinator=HOST:PORT --num_hosts=N '
    '--host_index=I, or --num_hosts=1 for this one alone'
  )
  try:
    found = private.detect(address, timeout_seconds)
  except (OSError, RuntimeError, ValueError, ImportError) as error:
    raise ConfigError(
      f'looking for other hosts failed: {error}; {fix}'
    ) from error
  if None not in found[:3]:
    return _Place(*found)
  if address:
    raise ConfigError(
      f'JAX_COORDINATOR_ADDRESS={address}: it is not known how many hosts '
      f'there are and which one this is; {fix}'
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
  label = f'host {place.host_index} of {place.num_hosts}: '
  check = (
    f'was the same command started on all {place.num_hosts} hosts, each with '
    f'its own host index, and can they reach port {port} of {host}?'
  )
  print(
    f'{label}waiting up to {timeout_seconds} s for all hosts at '
    f'{place.coordinator}. Should this fail: {check}',
    flush=True,
  )
  late = (
    f'{label}error: not all hosts came to {place.coordinator} in '
    f'{timeout_seconds} s; those that did have said so in their logs; {check}'
  )
  try:
    with ended_after(timeout_seconds, late):
      jax.distributed.initialize(
        place.coordinator,
        place.num_hosts,
        place.host_index,
        local_device_ids=place.local_device_ids,
        cluster_detection_method='deactivate',
        initialization_timeout=timeout_seconds + _JAX_LATER_SECONDS,
        heartbeat_timeout_seconds=_peer_timeout_seconds + _JAX_LATER_SECONDS,
        shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
        coordinator_bind_address=(
          place.coordinator if _is_loopback(host) else None
        ),
      )
  except jax.errors.JaxRuntimeError as error:
    raise ConfigError(
      f'--coordinator={place.coordinator}: could not join: {error}'
    ) from error
  # JAX notes SIGTERM for a service of its own and drops it. Until the run
  # handles it (stop.StopRequest), the signal is to end the process as always.
  signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))


@contextlib.contextmanager
def ended_after(seconds: float, message: str) -> Iterator[None]:
  """In this context the process ends with `errors.HOST` after `seconds`."""

  def end() -> None:
    os.write(2, f'{message}\n'.encode())
    os._exit(errors.HOST)

  timer = threading.Timer(seconds, end)
  timer.daemon = True
  timer.start()
  try:
    yield
  finally:
    timer.cancel()


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
