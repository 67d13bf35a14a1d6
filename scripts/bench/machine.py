"""What a benchmark ran on."""

from __future__ import annotations

import pathlib
import platform


def cpu_name() -> str:
  """The model of the CPU; '' where the system does not tell."""
  info = pathlib.Path('/proc/cpuinfo')
  lines = info.read_text().splitlines() if info.exists() else []
  names = [x.split(':')[1].strip() for x in lines if 'model name' in x]
  return names[0] if names else platform.processor()
