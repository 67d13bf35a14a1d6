"""What is used of JAX though it is not public: here, and nowhere else.

* The key-value store of JAX's coordinator. `multihost_utils` and orbax pass
  arrays between devices, or only wait for each other; the store needs no
  device, takes a time limit, and works between hosts that differ.
* Index and number of hosts. `jax.process_index` starts the devices, which
  waits for all hosts, and messages are needed before and while it does.
* The search for other hosts. `jax.distributed.initialize()` refuses a process
  that has used JAX, also one that is alone, and does not tell an address whose
  port could be checked.

`tests/hosts/test_private.py` fails if JAX no longer has one of these.
"""

from __future__ import annotations

from collections.abc import Sequence

from jax._src import cloud_tpu_init, clusters, distributed, hardware_utils

# Has `process_id`, `num_processes`, `coordinator_address` and `client`, the
# client of the key-value store; the last two are None for a host alone.
state = distributed.global_state


def detect(
  coordinator: str | None, timeout_seconds: int
) -> tuple[str | None, int | None, int | None, Sequence[int] | None]:
  """What the environment says of a cluster; None for what it does not say.

  Returns:
    The coordinator's HOST:PORT, the number of hosts, the index of this one, and
    the local devices that it is to use.
  """
  find = clusters.ClusterEnv.auto_detect_unset_distributed_params
  return find(coordinator, None, None, None, None, timeout_seconds)


def on_tpu_vm() -> bool:
  """Whether this machine has TPUs, with libtpu or without."""
  # JAX's own variable is False where libtpu is missing.
  chips, _ = hardware_utils.num_available_tpu_chips_and_device_id()
  return chips > 0 or cloud_tpu_init.running_in_cloud_tpu_vm
