"""Several hosts as one run: which one this is, and the messages between them.

A host is one process; on a TPU slice, one per machine. What decides the course
of the program (settings, files, errors) travels through the key-value store of
JAX's coordinator: it needs no device, ends in bounded time, and works between
hosts that differ. Numbers of training steps travel by the devices.

Host 0 is the writer: it alone writes files and prints progress. All hosts make
the same calls in the same order. With one host, nothing is sent.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from conadv_jax.base.errors import ConfigError, HostError
from conadv_jax.hosts import private

# A host may be late by as long as reading a data set into memory takes. One
# that died or failed is noticed long before that.
_WAIT_SECONDS = 3600
_POLL_SECONDS = 2
_REMIND_SECONDS = 60
FAILED = 'conadv_jax/failed'  # the key of the first failure: `leaving.abandon`
_calls = itertools.count()  # the same number for the same call on every host


# ---- Who this is -----------------------------------------------------------


def index() -> int:
  """This host, from 0; needs no devices."""
  return private.state.process_id


def count() -> int:
  """The number of hosts; needs no devices."""
  return private.state.num_processes


def coordinator() -> str:
  """HOST:PORT where host 0 listens; '' for a host alone."""
  return private.state.coordinator_address or ''


def is_writer() -> bool:
  """Whether this host writes the run's files and prints its progress."""
  return index() == 0


def label() -> str:
  """'host 1 of 4: ', to begin a line with; '' for a host alone."""
  return f'host {index()} of {count()}: ' if count() > 1 else ''


def say(text: str, end: str = '\n') -> None:
  """Prints `text` on host 0 only, for all hosts."""
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


# ---- Messages --------------------------------------------------------------


def on_writer(name: str, fn: Callable[[], Any]) -> Any:
  """`fn()`, called on host 0 only; its result on every host.

  So all hosts take the same branch, whatever each would see of the files.

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
    send(key, json.dumps({'error': str(error)}))
    raise
  send(key, json.dumps({'result': result}))
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
    send(f'{key}/{index()}', json.dumps(value))
    return None
  received = [
    json.loads(_receive(f'{key}/{host}', host, name))
    for host in range(1, count())
  ]
  return [value, *received]


def first(name: str, value: Any) -> Any:
  """The first non-empty `value` among the hosts, on every host; else its own.

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

  It travels by the devices; shapes must be equal.
  """
  return np.asarray(multihost_utils.process_allgather(np.asarray(values)))


def failure() -> HostError | None:
  """What another host announced by `leaving.abandon`; None if all is well.

  Raises:
    jax.errors.JaxRuntimeError: if the coordinator does not answer.
  """
  try:
    found = json.loads(private.state.client.key_value_try_get(FAILED))
  except jax.errors.JaxRuntimeError as error:
    if 'NOT_FOUND' not in str(error):
      raise
    return None
  if found['host'] == index():
    return None
  message = f'host {found["host"]} stopped: {found["message"]}'
  return HostError(message, found['exit_code'])


def silent_coordinator() -> str:
  """The beginning of a message about host 0."""
  return f'host 0 at {coordinator()} does not answer'


def send(key: str, text: str, overwrite: bool = True) -> None:
  """Puts `text` into the store, where all hosts can read it.

  Raises:
    jax.errors.JaxRuntimeError: if the coordinator does not answer, or if the
      key is there and not to be overwritten.
  """
  private.state.client.key_value_set(key, text, allow_overwrite=overwrite)


def _receive(key: str, host: int, name: str) -> str:
  """The text that `host` sends under `key`."""
  start = reminded = time.monotonic()
  while True:
    try:
      return private.state.client.blocking_key_value_get(
        key, 1000 * _POLL_SECONDS
      )
    except jax.errors.JaxRuntimeError as error:
      if 'DEADLINE_EXCEEDED' not in str(error):
        raise HostError(f'{silent_coordinator()}: {error}') from error
    if (failed := failure()) is not None:
      raise failed
    now = time.monotonic()
    if now - start > _WAIT_SECONDS:
      raise HostError(
        f'host {host} did not reach {name!r} in {_WAIT_SECONDS} s; look at '
        'its log'
      )
    if now - reminded > _REMIND_SECONDS:
      reminded = now
      print(
        f'{label()}waiting for host {host} to reach {name!r} for '
        f'{now - start:.0f} s',
        flush=True,
      )
