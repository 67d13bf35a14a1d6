"""Help and version, before a command imports JAX, which takes seconds."""

from __future__ import annotations

import sys
from importlib import metadata


def answered(usage: str) -> bool:
  """Returns whether the arguments ask for help or the version; prints it.

  Args:
    usage: what `--help` prints.
  """
  arguments = set(sys.argv[1:])
  if {'-h', '--help'} & arguments:
    print(usage)
  elif '--version' in arguments:
    print(f'conadv_jax {metadata.version("conadv_jax")}')
  else:
    return False
  return True
