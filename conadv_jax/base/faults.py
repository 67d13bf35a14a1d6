"""Faults on purpose, so that tests can show what a run survives.

The program marks places by `point(name, step)`. $CONADV_FAULTS says what goes
wrong there: ACTION[*TIMES]@NAME[:STEP], several with commas between, such as
`kill@checkpoint/before_commit:20` or `oserror*2@storage`. Without the variable
a call returns at once.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import signal
import time

_SIGNALS = {
  'kill': signal.SIGKILL,
  'term': signal.SIGTERM,
  'int': signal.SIGINT,
  'stop': signal.SIGSTOP,
}
_ERRORS = {'oserror': errno.EIO, 'nospace': errno.ENOSPC}
_ACTIONS = (*_SIGNALS, *_ERRORS, 'hang')


@dataclasses.dataclass
class _Fault:
  action: str
  name: str
  step: int | None  # None is every step
  times: int  # left


def _parse(text: str) -> list[_Fault]:
  faults = []
  for item in filter(None, text.split(',')):
    what, _, where = item.partition('@')
    action, _, times = what.partition('*')
    name, _, step = where.partition(':')
    if action not in _ACTIONS or not name:
      raise ValueError(
        f'CONADV_FAULTS: {item!r} is not ACTION[*TIMES]@NAME[:STEP] with one '
        f'of {", ".join(_ACTIONS)}'
      )
    faults.append(
      _Fault(action, name, int(step) if step else None, int(times or 1))
    )
  return faults


_faults = _parse(os.environ.get('CONADV_FAULTS', ''))


def point(name: str, step: int | None = None) -> None:
  """Here `name` may go wrong, at `step` of the run if there is one.

  Raises:
    OSError: if $CONADV_FAULTS asks for it.
  """
  if _faults:
    for fault in _faults:
      if fault.name == name and fault.step in (None, step) and fault.times:
        fault.times -= 1
        _happen(fault)


def _happen(fault: _Fault) -> None:
  if fault.action in _SIGNALS:
    os.kill(os.getpid(), _SIGNALS[fault.action])
  elif fault.action == 'hang':
    while True:
      time.sleep(1)
  else:
    number = _ERRORS[fault.action]
    raise OSError(number, os.strerror(number), fault.name)
