"""What a benchmark ran on."""

from __future__ import annotations

import contextlib
import os
import pathlib
import platform
from importlib import metadata
from typing import Any


def cpu_name() -> str:
  """The model of the CPU; '' where the system does not tell."""
  info = pathlib.Path('/proc/cpuinfo')
  lines = info.read_text().splitlines() if info.exists() else []
  names = [x.split(':')[1].strip() for x in lines if 'model name' in x]
  return names[0] if names else platform.processor()


def machine() -> dict[str, Any]:
  """Devices of JAX, CPU, and versions."""
  import jax  # benchmarks of the input name a CPU and need no JAX

  found = {
    'device': jax.devices()[0].device_kind,
    'devices': len(jax.devices()),
    'cpu': cpu_name(),
    'cores': os.cpu_count(),
    'python': platform.python_version(),
    'glibc_tunables': os.environ.get('GLIBC_TUNABLES', ''),
  }
  for name in ('jax', 'flax', 'torch', 'timm'):
    with contextlib.suppress(metadata.PackageNotFoundError):
      found[name] = metadata.version(name)
  return found
