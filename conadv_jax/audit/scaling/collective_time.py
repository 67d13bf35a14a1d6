"""Models the time of an all-reduce on a slice: latency and bandwidth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from conadv_jax.devices.topology import Topology


class CollectiveTime(NamedTuple):
  """Seconds of a collective, by what they are spent on."""

  latency_seconds: float
  bandwidth_seconds: float

  @property
  def seconds(self) -> float:
    return self.latency_seconds + self.bandwidth_seconds


def ring_all_reduce(
  num_bytes: float,
  shape: Sequence[int],
  wrap: Sequence[bool],
  link_bytes_per_sec: float,
  hop_seconds: float,
) -> CollectiveTime:
  """Times a reduce-scatter and all-gather over N chips of a mesh or torus.

    bandwidth  2 (N - 1) / N * bytes / (links out of a chip * link rate)
    latency    2 * sum over dimensions of the hops to the farthest chip

  All dimensions work at once, each on its part of the array. A ring of n chips
  sends both ways: two links, floor(n / 2) hops. An open line has one link at
  its ends, and n - 1 hops. No algorithm is faster; the model assumes that one
  reaches this rate on every shape.

  The all-gather is that of jax-ml.github.io/scaling-book/sharding, except that
  the book takes the maximum of latency and bandwidth, and this takes the sum.

  Args:
    num_bytes: of the array on each chip.
    shape: chips along each dimension.
    wrap: whether a dimension is a ring.
    link_bytes_per_sec: between neighbours, one direction.
    hop_seconds: alpha, from one chip to the next.
  """
  chips = math.prod(shape)
  dimensions = [(n, w) for n, w in zip(shape, wrap, strict=True) if n > 1]
  if not dimensions:
    return CollectiveTime(0.0, 0.0)
  links = sum(2 if w else 1 for _, w in dimensions)
  hops = sum(n // 2 if w else n - 1 for n, w in dimensions)
  sent_bytes = 2 * (chips - 1) / chips * num_bytes
  return CollectiveTime(
    2 * hops * hop_seconds, sent_bytes / (links * link_bytes_per_sec)
  )


def all_reduce(num_bytes: float, topology: Topology) -> CollectiveTime:
  """Times an all-reduce over all devices, of `num_bytes` on each.

  Within a slice over ICI (`ring_all_reduce`). Between k slices each host sums
  its 1 / hosts of the array with its peers, directly, over DCN:
  2 (k - 1) / k * bytes / hosts / rate, and two latencies. The sum
  within a chip is free.
  """
  generation, slices = topology.generation, topology.slices
  ici = ring_all_reduce(
    num_bytes,
    topology.shape,
    topology.wrap,
    generation.ici_link_bytes_per_sec,
    generation.ici_hop_seconds,
  )
  if slices == 1:
    return ici
  host_bytes = num_bytes / (topology.hosts // slices)
  sent_bytes = 2 * (slices - 1) / slices * host_bytes
  return CollectiveTime(
    ici.latency_seconds + 2 * generation.dcn_latency_seconds,
    ici.bandwidth_seconds + sent_bytes / generation.dcn_bytes_per_sec_per_host,
  )


def group_all_reduce(
  num_bytes: float, topology: Topology, devices: int
) -> CollectiveTime:
  """Times all-reduces over groups of `devices`, blocks without rings.

  All groups work at once. A group larger than a slice is all of `topology`.
  """
  generation = topology.generation
  if devices * topology.slices > topology.devices:
    return all_reduce(num_bytes, topology)
  shape = _block(
    math.ceil(devices / generation.devices_per_chip), generation.rank
  )
  return ring_all_reduce(
    num_bytes,
    shape,
    (False,) * generation.rank,
    generation.ici_link_bytes_per_sec,
    generation.ici_hop_seconds,
  )


def _block(chips: int, rank: int) -> tuple[int, ...]:
  """Sides of a block of `chips`, as equal as its prime factors allow."""
  sides = [1] * rank
  divisor, factors = 2, []
  while chips > 1:
    while chips % divisor == 0:
      factors.append(divisor)
      chips //= divisor
    divisor += 1
  for factor in reversed(factors):
    sides[sides.index(min(sides))] *= factor
  return tuple(sides)
