"""The mesh: which device and which host takes which part of a batch."""

import collections
import types

import jax
import numpy as np
import pytest

from conadv_jax.audit import libtpu
from conadv_jax.base.errors import ConfigError
from conadv_jax.devices import mesh, topology

BATCH = 16


@pytest.mark.parametrize(
  ('batch_size', 'group_size', 'count', 'shape'),
  (
    (16, 2, 8, (8, 1)),
    (16, 1, 8, (8, 1)),
    (16, 4, 8, (4, 2)),
    (16, 8, 8, (2, 4)),
    (16, 16, 8, (1, 8)),
    (16, 16, 1, (1, 1)),
  ),
)
def test_groups_go_to_devices_and_large_groups_span_them(
  batch_size, group_size, count, shape
):
  made = mesh.make_mesh(batch_size, group_size, jax.devices()[:count])
  assert (made.shape['data'], made.shape['bn']) == shape
  assert mesh.bn_axis(made) == ('bn' if shape[1] > 1 else None)


@pytest.mark.parametrize(
  ('batch_size', 'nearest'), ((18, 16), (23, 24), (30, 32), (3, 8))
)
def test_a_batch_that_does_not_divide_names_the_nearest(batch_size, nearest):
  with pytest.raises(
    ConfigError, match=f'batch_size={batch_size}: .* 8 devices; '
  ) as error:
    mesh.make_mesh(batch_size, 1, jax.devices())
  assert str(error.value).endswith(f'nearest: batch_size={nearest}')
  mesh.make_mesh(nearest, 1, jax.devices())


def test_the_nearest_batch_divides_into_groups_too():
  with pytest.raises(ConfigError, match='nearest: batch_size=384'):
    mesh.make_mesh(320, 64, jax.devices()[:3])
  mesh.make_mesh(384, 64, jax.devices()[:3])


def test_groups_that_do_not_divide_name_the_examples_per_device():
  with pytest.raises(
    ConfigError,
    match=r'bn_group_size=4: 6 groups .* 8 devices; .* divides 3 examples',
  ):
    mesh.make_mesh(24, 4, jax.devices())
  assert mesh.bn_axis(mesh.make_mesh(24, 3, jax.devices())) is None


@pytest.mark.tpu_aot
@pytest.mark.parametrize('span', (1, 2, 4, 8, 16))
@pytest.mark.parametrize(
  ('name', 'slices'),
  (('v3:4x4', 1), ('v3:16x32', 1), ('v5e:8x8', 2), ('v5p:4x4x4', 1)),
)
def test_hosts_of_tpu_slices_feed_rows_of_whole_groups(
  monkeypatch, name, slices, span
):
  for key, value in libtpu.AOT_ENVIRONMENT.items():
    monkeypatch.setenv(key, value)
  devices = libtpu.load_devices(topology.parse(name, slices))
  made = mesh.make_mesh(2 * len(devices), 2 * span, devices)
  assert made.devices.shape == (len(devices) // span, span)
  assert set(made.devices.flat) == set(devices)
  hosts = collections.defaultdict(list)
  for place, device in np.ndenumerate(made.devices):
    hosts[device.process_index].append(place)
  for places in hosts.values():
    rows, columns = map(set, zip(*places, strict=True))
    assert len(rows) * len(columns) == len(places)
  # A slice's devices are neighbours along `data`, and no group spans slices.
  row_slices = [{mesh.slice_of(d) for d in row} for row in made.devices]
  assert all(len(found) == 1 for found in row_slices)
  in_order = [min(found) for found in row_slices]
  assert in_order == sorted(in_order)


@pytest.mark.tpu_aot
def test_a_group_may_not_span_slices(monkeypatch):
  for key, value in libtpu.AOT_ENVIRONMENT.items():
    monkeypatch.setenv(key, value)
  devices = libtpu.load_devices(topology.parse('v5e:2x2', 2))
  with pytest.raises(
    ConfigError,
    match='bn_group_size: 1 batch-norm groups .* smaller',
  ):
    mesh.make_mesh(64, 64, devices)


@pytest.mark.parametrize('group_size', (2, 4, 8, 16))
def test_one_host_feeds_every_position_in_order(group_size):
  made = mesh.make_mesh(BATCH, group_size, jax.devices())
  positions = mesh.local_positions(
    mesh.batch_sharding(made), BATCH // group_size, group_size
  )
  np.testing.assert_array_equal(
    positions, np.arange(BATCH).reshape(-1, group_size)
  )


def positions_of_host(made, devices, group_size):
  """`local_positions` of a host that has only `devices` of the mesh."""
  sharding = mesh.batch_sharding(made)

  def indices(shape):
    every = sharding.devices_indices_map(shape)
    return {device: every[device] for device in devices}

  host = types.SimpleNamespace(addressable_devices_indices_map=indices)
  return mesh.local_positions(host, BATCH // group_size, group_size)


@pytest.mark.parametrize('group_size', (2, 4, 8, 16))
@pytest.mark.parametrize('hosts', (2, 4))
def test_hosts_share_the_positions_among_them(group_size, hosts):
  made = mesh.make_mesh(BATCH, group_size, jax.devices())
  shares = [
    positions_of_host(made, devices, group_size)
    for devices in np.split(made.devices.reshape(-1), hosts)
  ]
  assert {share.size for share in shares} == {BATCH // hosts}
  union = np.sort(np.concatenate([share.reshape(-1) for share in shares]))
  np.testing.assert_array_equal(union, np.arange(BATCH))
  # A device's examples are those of its host: a group larger than a host's
  # share is cut along the group, else hosts have whole groups.
  for share in shares:
    assert share.shape[1] == min(group_size, BATCH // hosts)


def test_a_host_must_have_a_rectangle_of_the_batch():
  made = mesh.make_mesh(BATCH, 8, jax.devices())  # 2 groups x 4 devices
  grid = made.devices
  with pytest.raises(ValueError, match='whole rows of groups'):
    positions_of_host(made, [grid[0, 0], grid[0, 1], grid[1, 2], grid[1, 3]], 8)
