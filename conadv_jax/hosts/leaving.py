"""How a host ends without the others: it tells them, and does not wait."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Collection
from typing import Any, NoReturn

import jax

from conadv_jax import hosts
from conadv_jax.hosts import private

_ANNOUNCE_SECONDS = 5
_LINGER_SECONDS = 10
_LEAVING = 'conadv_jax/leaving/'


def abandon(message: str, exit_code: int) -> None:
  """Tells the other hosts that this one failed; only the first failure counts.

  They end with `exit_code`, as soon as they wait for a message or their
  watchdog reads it. The call takes at most 5 s, even if host 0 does not answer.
  """
  if hosts.count() > 1 and jax.distributed.is_initialized():
    failure = {'host': hosts.index(), 'message': message}
    text = json.dumps(failure | {'exit_code': exit_code})
    within(_ANNOUNCE_SECONDS, lambda: hosts.send(hosts.FAILED, text, False))


def leave(exit_code: int, lost: Collection[int] = ()) -> NoReturn:
  """Ends this process at once, after `abandon`, without waiting for hosts.

  A normal exit of JAX waits for all hosts, which may be waiting for this one.
  Only host 0 stays for up to 10 s, until the others have left: they read of the
  failure from its store, and JAX aborts them when host 0 is gone.

  Args:
    exit_code: of the process.
    lost: hosts that need not be waited for.
  """
  within(1, lambda: (sys.stdout.flush(), sys.stderr.flush()))
  if hosts.count() > 1 and hosts.is_writer():
    others = set(range(1, hosts.count())) - set(lost)
    within(_LINGER_SECONDS, lambda: _wait_for(others))
  elif hosts.count() > 1 and 0 not in lost:
    within(1, lambda: hosts.send(f'{_LEAVING}{hosts.index()}', ''))
  os._exit(exit_code)


def within(seconds: float, fn: Callable[[], Any]) -> None:
  """Calls `fn` for at most `seconds`; errors of the coordinator are dropped.

  A call to a coordinator that does not answer has no time limit of its own.
  """

  def call() -> None:
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      fn()

  thread = threading.Thread(target=call, daemon=True)
  thread.start()
  thread.join(seconds)


def _wait_for(others: set[int]) -> None:
  """Returns when `others` are leaving."""
  while others - {
    int(key.rpartition('/')[2])
    for key, _ in private.state.client.key_value_dir_get(_LEAVING)
  }:
    time.sleep(0.1)
