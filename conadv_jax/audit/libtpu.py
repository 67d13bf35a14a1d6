"""libtpu as a compiler: the devices of a slice, without the hardware."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping

import jax
from jax.experimental import topologies

from conadv_jax.base.errors import ConfigError
from conadv_jax.devices.topology import Topology

# What libtpu needs in a process that compiles but runs nothing. With
# TPU_SKIP_MDS_QUERY, `jax.distributed.initialize` no longer finds its cluster,
# and ALLOW_MULTIPLE_LIBTPU_LOAD lets two processes take the same chips: neither
# may reach a process that trains. Without the other two it prints errors where
# there is no TPU; what it compiles for does not depend on them.
AOT_ENVIRONMENT: Mapping[str, str] = {
  'TPU_SKIP_MDS_QUERY': '1',
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  'TPU_WORKER_HOSTNAMES': 'localhost',
  'TPU_HOST_BOUNDS': '1,1,1',
}


def prepare_process() -> None:
  """Sets AOT_ENVIRONMENT in a command that only compiles, before libtpu loads.

  It does not set JAX_PLATFORMS: with 'cpu', an audit on a TPU machine leaves
  the chips alone.
  """
  os.environ.update(AOT_ENVIRONMENT)


def require_libtpu() -> None:
  """Raises ConfigError if libtpu is not installed."""
  installed = importlib.util.find_spec('libtpu') is not None
  if not installed and 'TPU_LIBRARY_PATH' not in os.environ:
    raise ConfigError(
      "compiling for TPUs needs libtpu (no TPU): pip install -e '.[tpu]'"
    )


def load_devices(topology: Topology) -> list[jax.Device]:
  """Returns the devices of `topology` to compile for; none needs to exist.

  On v4 it asks for the megacore, as JAX does: two TensorCores are one device.
  It passes `wrap`, since the compiler otherwise assumes that no dimension is a
  ring and arranges all-reduces for that (seen on v3 and TPU7x with libtpu
  0.0.42; the operations, their sizes and groups are the same).

  Raises:
    ConfigError: if libtpu is not installed.
  """
  require_libtpu()
  megacore = topology.generation.name == 'v4'
  wrap = (*topology.wrap, False)[:3]
  return topologies.get_topology_desc(
    platform='tpu',
    topology_name=topology.name,
    chip_config_name='megacore' if megacore else 'default',
    chips_per_host_bounds=topology.host_bounds,
    num_slices=topology.slices,
    wrap=wrap,
  ).devices
