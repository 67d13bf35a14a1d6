"""Several hosts as one run: which this is, and what they tell each other.

A host is one process; on a TPU slice, one per machine. What decides which way
the program goes (settings, files, errors) travels through the key-value store
of JAX's coordinator: that needs no device, ends in bounded time, and works
between hosts that differ. Numbers that come with steps travel by the devices.

Host 0 is the writer: it alone writes files and prints progress. All hosts make
the same calls in the same order. With one host, nothing here talks to anyone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any, NoReturn

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils

from conadv_jax.base.errors import ConfigError, HostError

# A host may be late by as long as reading a data set into memory takes. One
# that died or failed is noticed long before that.
_WAIT_SECONDS = 3600
_POLL_SECONDS = 2
_REMIND_SECONDS = 60
_ANNOUNCE_SECONDS = 5
_LINGER_SECONDS = 10
_FAILED = 'conadv_jax/failed'
_LEAVING = 'conadv_jax/leaving/'
_BEATS = 'conadv_jax/beats/'
_calls = itertools.count()  # the same number for the same call on every host


@dataclasses.dataclass
class Known:
  """What this process knows of the others: `known`, which `join` sets.

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


known = Known()


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
  """Silence after which a host is taken for lost, as given to `join.start`."""
  return known.peer_timeout_seconds


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
  if known.failure is None:
    try:
      found = json.loads(client.key_value_try_get(_FAILED))
    except jax.errors.JaxRuntimeError as error:
      if 'NOT_FOUND' not in str(error):
        raise
      return None
    if found['host'] == index():
      return None
    message = f'host {found["host"]} stopped: {found["message"]}'
    known.failure = HostError(message, found['exit_code'])
  return known.failure


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
