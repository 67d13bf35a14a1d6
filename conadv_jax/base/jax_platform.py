"""Which devices JAX looks for, decided before it does."""

from __future__ import annotations

import glob
import importlib.util
import os

import jax

# Files of TPUs, and of GPUs from NVIDIA and AMD, also in Docker and WSL. JAX
# looks for the chips that it knows; a newer TPU has a file here all the same.
DEVICE_FILES = (
  '/dev/accel*', '/dev/vfio/[0-9]*', '/dev/nvidia[0-9]*', '/dev/nvidiactl',
  '/dev/kfd', '/dev/dxg',
)  # fmt: skip


def choose() -> None:
  """Has JAX take the CPU where libtpu is installed, but there is no TPU.

  There JAX would load libtpu, which prints errors, before it takes the CPU.
  Call it before anything asks for devices. It leaves the choice to the user, as
  JAX_PLATFORMS says it ('' is JAX's own), to JAX where that has seen a TPU, and
  to JAX as well where there is any other accelerator.
  """
  if jax.config.jax_platforms is None and _has_libtpu() and not _devices():
    jax.config.update('jax_platforms', 'cpu')


def _has_libtpu() -> bool:
  return (
    'TPU_LIBRARY_PATH' in os.environ
    or importlib.util.find_spec('libtpu') is not None
  )


def _devices() -> list[str]:
  return [path for pattern in DEVICE_FILES for path in glob.glob(pattern)]
