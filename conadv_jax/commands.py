"""How a command starts: help and version come before JAX is imported."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any


def run(main: Callable[[Sequence[str]], Any] | str, usage: str) -> None:
  """Answers `--help` and `--version`, or runs `main(argv)` by `cli.run`.

  Importing JAX takes seconds. So a command imports its modules in `main`, or
  gives `main` by name.

  Args:
    main: the command, or 'module:function'.
    usage: what `--help` prints.
  """
  if answered(usage):
    return
  from conadv_jax import cli

  if isinstance(main, str):
    module, _, name = main.partition(':')
    main = getattr(importlib.import_module(module), name)
  cli.run(main)


def answered(usage: str) -> bool:
  """Whether the arguments ask for `usage` or the version, which it prints."""
  arguments = set(sys.argv[1:])
  if {'-h', '--help'} & arguments:
    print(usage)
  elif '--version' in arguments:
    print(f'conadv_jax {metadata.version("conadv_jax")}')
  else:
    return False
  return True
