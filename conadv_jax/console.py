"""The commands `conadv-train` and so on, as `python -m conadv_jax.train`."""

from __future__ import annotations

import pathlib
import runpy
import sys


def main() -> None:
  """Runs the module that the command is named after."""
  command = pathlib.Path(sys.argv[0]).stem.removeprefix('conadv-')
  runpy.run_module(f'conadv_jax.{command}', run_name='__main__', alter_sys=True)
