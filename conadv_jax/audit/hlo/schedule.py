"""Collectives of a scheduled program, and what runs beside them.

XLA:TPU writes a collective in one of five forms:

  all-reduce                     the core waits for it
  all-reduce-start ... -done     runs beside what stands between
  call-start ... call-done       likewise, on the SparseCore; also async-start
  fusions of one chain           continuation fusion: the first fusion starts
                                 it, every following one does a part of it
                                 within its own loop, the last one ends it
  send ... recv-done             between slices: the hosts do it, over the
                                 data centre network (DCN), beside what stands
                                 between
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from conadv_jax.audit.hlo.cost import Rates, cost_by_scope, cost_of, scope_of
from conadv_jax.audit.hlo.program import (
  DCN,
  Computation,
  Instruction,
  Program,
  carried,
  executed,
  kind_of,
  starts_carried,
)


@dataclasses.dataclass(frozen=True)
class Collective:
  """One exchange between devices.

  Attributes:
    name: of the instruction, or of the one that starts it.
    kind: see `kind_of`.
    dtype: element types, joined by '+'.
    bytes: payload of one device, without padding: what it gives to the sum, the
      whole array that is gathered or scattered.
    group_size: devices that exchange; between slices, one of each slice.
    num_groups: groups that do so at the same time.
    count: times per run of the program.
    scope: the named scope that it comes from, see `scope_of`.
    is_async: whether other work runs beside it.
    was_async: whether the compiler split it into a start and a done, and then
      joined these again.
    position: its place among the instructions of its computation that take
      time, from 1.
    positions: how many those are.
    beside: (name, scope, roofline seconds) of what runs beside it.
    evidence: the instructions that start, carry and end it, abridged.
  """

  name: str
  kind: str
  dtype: str
  bytes: int
  group_size: int
  num_groups: int
  count: int
  scope: str
  is_async: bool
  was_async: bool
  position: int
  positions: int
  beside: tuple[tuple[str, str, float], ...]
  evidence: tuple[str, ...]


def collectives(program: Program, rates: Rates) -> list[Collective]:
  """Lists every collective that runs, in the order of the schedule.

  `rates` give the seconds of what runs beside it.
  """
  found, timelines = [], {}
  for computation, instruction, times in executed(program):
    exchange = _exchange(program, computation, instruction)
    if exchange is None:
      continue
    if computation.name not in timelines:
      timelines[computation.name] = _Timeline(program, computation, rates)
    timeline = timelines[computation.name]
    found.append(_collective(program, timeline, instruction, exchange, times))
  return found


def inventory(found: Iterable[Collective]) -> list[dict[str, Any]]:
  """Counts equal collectives, for a report or a golden file.

  Returns:
    Sorted rows of `kind`, `dtype`, `bytes`, `group_size`, and `count`, the
    number of those that are equal in the first four.
  """
  counts = Counter()
  for each in found:
    key = each.kind, each.dtype, each.bytes, each.group_size
    counts[key] += each.count
  names = 'kind', 'dtype', 'bytes', 'group_size', 'count'
  return [
    dict(zip(names, (*key, count), strict=True))
    for key, count in sorted(counts.items())
  ]


def overlap(program: Program, rates: Rates) -> dict[str, Any]:
  """Finds out whether the sum of gradients runs beside the attack.

  Returns:
    asynchronous: whether any of the sum runs beside other work.
    bytes: of the sum; `asynchronous_bytes` are those that do.
    adversarial_seconds: of the adversarial sub-step, at the roofline;
      `hidden_seconds` of these run beside the sum.
    verdict: a sentence.
    evidence: abridged instructions with their places in the schedule.
  """
  sums = [c for c in collectives(program, rates) if c.scope == 'gradient_sum']
  behind = [c for c in sums if c.is_async]
  attack = cost_by_scope(program, rates)['adversarial']['seconds']
  # Several exchanges may run beside an instruction, which then counts once.
  hidden = {
    name: seconds
    for each in behind
    for name, scope, seconds in each.beside
    if scope == 'adversarial'
  }
  result = {
    'asynchronous': bool(behind),
    'bytes': _bytes(sums),
    'asynchronous_bytes': _bytes(behind),
    'adversarial_seconds': attack,
    'hidden_seconds': sum(hidden.values()),
  }
  largest = sorted(sums, key=lambda c: -c.bytes)[:_SHOWN]
  return result | {
    'verdict': _verdict(result, sums),
    'evidence': [line for each in largest for line in each.evidence],
  }


# Of the largest collectives; and of the lines of one of them.
_SHOWN = 4


def _verdict(result: dict[str, Any], sums: Sequence[Collective]) -> str:
  if not sums:
    return 'no sum of gradients: nothing to exchange'
  if result['asynchronous']:
    between = [c for c in sums if c.kind.startswith(DCN)]
    behind = _bytes(c for c in between if c.is_async)
    slices = (
      f' ({behind / 1e6:.1f} of {_bytes(between) / 1e6:.1f} MB between slices)'
      if between
      else ''
    )
    return (
      f'asynchronous: {result["asynchronous_bytes"] / 1e6:.1f} of '
      f'{result["bytes"] / 1e6:.1f} MB{slices} run beside other work, '
      f'{1e6 * result["hidden_seconds"]:.0f} us of the '
      f'{1e6 * result["adversarial_seconds"]:.0f} us of the adversarial '
      'sub-step among it'
    )
  largest = max(sums, key=lambda c: c.bytes)
  why = (
    '; the compiler split it into a start and a done, and joined them again'
    if largest.was_async
    else ''
  )
  return (
    f'synchronous: position {largest.position} of {largest.positions} in the '
    f'schedule, nothing beside it{why}'
  )


def _bytes(exchanges: Iterable[Collective]) -> int:
  return sum(c.bytes * c.count for c in exchanges)


class _Timeline:
  """The instructions of one computation that take time, in their order."""

  def __init__(self, program: Program, computation: Computation, rates: Rates):
    self.computation = computation
    self.place = {name: i for i, name in enumerate(computation.instructions)}
    self.timed, self.chains = [], defaultdict(list)
    self.received = {}
    for instruction in computation.instructions.values():
      spent = cost_of(program, computation, instruction, rates)
      inner = carried(program, instruction)
      if inner is not None:
        self.chains[_chain(inner)].append(instruction)
      if spent.seconds or inner is not None:
        scope = scope_of(computation, instruction)
        self.timed.append((instruction, scope, spent.seconds))
      if instruction.opcode == 'recv':
        self.received[_rendezvous(instruction)] = instruction

  def parts(self, start: Instruction, inner: Instruction) -> list[Instruction]:
    """The instructions that start, carry and end an exchange."""
    if start.opcode == 'fusion':
      return self.chains[_chain(inner)]
    if start.opcode == 'send':
      ending = self.received[_rendezvous(start)]
    else:
      ending = start
    users = self.computation.users[ending.name]
    return [start, *(u for u in users if u.opcode.endswith('-done'))]

  def between(self, parts: Sequence[Instruction]):
    """What runs from the first to the last part of an exchange.

    Not other exchanges between slices: those share the network with it.
    Of continuation fusions, only those that carry a part of it: the others do
    not drive it.
    """
    first, last = (self.place[parts[i].name] for i in (0, -1))
    carriers = {p.name for p in parts} if len(parts) > 2 else None
    return tuple(
      (instruction.name, scope, seconds)
      for instruction, scope, seconds in self.timed
      if first < self.place[instruction.name] < last
      and (carriers is None or instruction.name in carriers)
      and instruction.opcode not in ('send', 'recv')
    )

  def position(self, instruction: Instruction) -> int:
    place = self.place[instruction.name]
    return sum(self.place[t.name] <= place for t, _, _ in self.timed)


def _collective(
  program: Program,
  timeline: _Timeline,
  instruction: Instruction,
  exchange: tuple[Computation, Instruction],
  times: int,
) -> Collective:
  home, inner = exchange
  parts = timeline.parts(instruction, inner)
  group_size, num_groups = _groups(program, inner)
  shapes = [s for o in home.operands(inner) for s in o.shapes]
  shapes = [s for s in shapes if s.bytes]
  wider = group_size if kind_of(inner) == 'all-gather' else 1
  beside = timeline.between(parts) if len(parts) > 1 else ()
  return Collective(
    name=instruction.name,
    kind=kind_of(inner),
    dtype='+'.join(sorted({s.dtype for s in shapes})),
    bytes=wider * sum(s.bytes for s in shapes),
    group_size=group_size,
    num_groups=num_groups,
    count=times,
    scope=scope_of(home, inner),
    is_async=bool(beside),
    was_async='async_collective_name=' in instruction.attributes,
    position=timeline.position(instruction),
    positions=len(timeline.timed),
    beside=beside,
    evidence=_evidence(timeline, parts, beside),
  )


def _exchange(
  program: Program, computation: Computation, instruction: Instruction
) -> tuple[Computation, Instruction] | None:
  """The collective that an instruction starts, and where it is written."""
  if kind_of(instruction):
    return computation, instruction
  if instruction.opcode in ('async-start', 'call-start'):
    return _within(program, instruction)
  inner = carried(program, instruction)
  if inner is None:
    return None
  if not starts_carried(program, instruction):
    return None
  return program.computations[instruction.called[0]], inner


def _within(
  program: Program, instruction: Instruction
) -> tuple[Computation, Instruction] | None:
  """The collective in the computations that an instruction calls."""
  for name in instruction.called:
    home = program.computations[name]
    for inner in home.instructions.values():
      if kind_of(inner):
        return home, inner
      found = _within(program, inner)
      if found:
        return found
  return None


def _chain(inner: Instruction) -> str:
  """What the parts of one exchange share.

  Exchanges that were one before the compiler took them apart share a channel,
  but not a chain.
  """
  chain = re.search(r'chain_id="(\d+)"', inner.attributes)
  channel = inner.attribute('channel_id')
  return f'{kind_of(inner)} {channel} {chain[1] if chain else ""}'


def _rendezvous(instruction: Instruction) -> str:
  """What a send to the host and the recv from it share."""
  found = re.search(r'_rendezvous="([^"]*)"', instruction.attributes)
  return found[1] if found else ''


def _groups(program: Program, inner: Instruction) -> tuple[int, int]:
  """(devices of a group, groups); `replica_groups` in any of its forms.

  A permutation is written as pairs: (2, pairs); an exchange between slices as
  slices and their devices: "{1,2}x{0:255}".
  """
  target = re.search(r'megascale_target="{(.*?)}x{(.*?)}"', inner.attributes)
  if target:
    return _count(target[1]), _count(target[2])
  pairs = inner.attribute('source_target_pairs')
  text = pairs or inner.attribute('replica_groups')
  iota = re.match(r'\[(\d+),(\d+)\]<=', text)
  if iota:
    return int(iota[2]), int(iota[1])
  groups = re.findall(r'\{([\d,]+)\}', text)
  if not groups:  # {} are all devices
    return program.num_devices, 1
  return len(groups[0].split(',')), len(groups)


def _count(ranges: str) -> int:
  """'1,2' and '0:255' -> how many these are."""
  ends = (part.split(':') for part in ranges.split(','))
  return sum(int(each[-1]) - int(each[0]) + 1 for each in ends)


def _evidence(
  timeline: _Timeline,
  parts: Sequence[Instruction],
  beside: Sequence[tuple[str, str, float]],
) -> tuple[str, ...]:
  """`[place of places] %name = f32[8], ... opcode(...)`, of a few parts."""
  lines = []
  for part in [*parts[:_SHOWN], *parts[_SHOWN:][-1:]]:
    arrays = [
      f'{s.dtype}[{",".join(map(str, s.dims))}]'
      for s in part.shapes
      if s.elements > 1 or len(part.shapes) == 1
    ]
    more = f', and {len(arrays) - 2} more' if len(arrays) > 2 else ''
    called = f', calls={part.called[0]}' if part.called else ''
    lines.append(
      f'[{timeline.position(part)} of {len(timeline.timed)}] %{part.name} = '
      f'{", ".join(arrays[:2])}{more} {part.opcode}(...){called}, '
      f'op_name="{part.op_name}"'
    )
  if beside:
    first, last = beside[0], beside[-1]
    lines.insert(
      1,
      f'beside it: {len(beside)} instructions, %{first[0]} ({first[1]}) to '
      f'%{last[0]} ({last[1]})',
    )
  return tuple(lines)
