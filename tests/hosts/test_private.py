"""JAX still has what `hosts/private.py` uses of it."""

import inspect

import jax
import pytest
from jax._src import cloud_tpu_init, clusters, hardware_utils
from jax._src.lib import _jax

from conadv_jax.hosts import private

CHANGED = f'JAX {jax.__version__} has no {{}}: see conadv_jax/hosts/private.py'


@pytest.mark.parametrize(
  'name', ['process_id', 'num_processes', 'coordinator_address', 'client']
)
def test_the_state_of_the_coordinator_has_its_fields(name):
  assert hasattr(private.state, name), CHANGED.format(name)


@pytest.mark.parametrize(
  'name, arguments',
  [
    ('key_value_set', 'key, value, allow_overwrite'),
    ('key_value_try_get', 'key'),
    ('blocking_key_value_get', 'key, timeout_in_ms'),
    ('key_value_dir_get', 'key'),
  ],
)
def test_the_store_has_its_calls(name, arguments):
  call = getattr(_jax.DistributedRuntimeClient, name, None)
  assert call is not None, CHANGED.format(name)
  for argument in arguments.split(', '):
    assert argument in call.__doc__, CHANGED.format(f'{name}({arguments})')


def test_the_search_for_hosts_takes_its_arguments():
  find = clusters.ClusterEnv.auto_detect_unset_distributed_params
  assert list(inspect.signature(find).parameters) == [
    'coordinator_address', 'num_processes', 'process_id', 'local_device_ids',
    'cluster_detection_method', 'initialization_timeout',
  ], CHANGED.format('such a search')  # fmt: skip


def test_a_tpu_machine_can_be_told(monkeypatch):
  find = 'num_available_tpu_chips_and_device_id'
  chips, _ = getattr(hardware_utils, find)()
  assert isinstance(chips, int)
  assert isinstance(cloud_tpu_init.running_in_cloud_tpu_vm, bool)
  # Without libtpu JAX does not call it one.
  monkeypatch.setattr(cloud_tpu_init, 'running_in_cloud_tpu_vm', False)
  for chips in 0, 4:
    monkeypatch.setattr(hardware_utils, find, lambda n=chips: (n, None))
    assert private.on_tpu_vm() == (chips > 0)


def test_a_process_that_joined_nobody_is_host_0_of_1():
  state = private.state
  assert (state.process_id, state.num_processes) == (0, 1)
  assert state.client is None and state.coordinator_address is None
