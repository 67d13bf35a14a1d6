"""Bytes, FLOPs and roofline seconds of the instructions of a program.

A fusion reads its operands and writes its results; what it computes in between
causes no memory traffic. So an instruction of the schedule moves the bytes of
what it touches (`touched`), does the FLOPs of its convolutions and products,
and takes at least

  seconds = max(FLOPs / peak FLOP/s, HBM bytes / HBM bytes per second).

The sum over the schedule assumes that instructions run one after the other,
each at its full rate: a lower bound of a step in which nothing overlaps. It
leaves out vector arithmetic, network transfers and latencies.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import NamedTuple

from conadv_jax.audit.hlo.flops import flops_of
from conadv_jax.audit.hlo.program import (
  DCN,
  Computation,
  Instruction,
  Program,
  Shape,
  carried,
  executed,
  kind_of,
  starts_carried,
)

SCOPES = ('update', 'adversarial', 'gradient_sum', 'optimizer')
OTHER = 'other'

# Name a value, or end something that is counted where it starts.
_FREE = {
  'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'after-all',
  'opt-barrier', 'partition-id', 'replica-id', 'while', 'call', 'conditional',
  'iota',
}  # fmt: skip
# They only move what others make or read.
_MOVES = re.compile(
  r'(copy|slice|async|call)-(start|update|done)|copy|bitcast|reshape|transpose'
)
_SUMS = (
  'all-reduce', 'reduce-scatter', f'{DCN}all-reduce', f'{DCN}reduce-scatter',
)  # fmt: skip
_SLICES = ('slice', 'dynamic-slice', 'gather')


class Rates(NamedTuple):
  """Peak rates of one device."""

  flops_per_sec: float
  hbm_bytes_per_sec: float


@dataclasses.dataclass(frozen=True)
class Cost:
  """The work of an instruction, or of several.

  Attributes:
    flops: of convolutions and products.
    hbm_bytes: read from and written to HBM, padding of layouts included.
    accessed_bytes: of all memories, as in XLA's `bytes accessed`.
    seconds: at the roofline.
  """

  flops: int = 0
  hbm_bytes: int = 0
  accessed_bytes: int = 0
  seconds: float = 0.0

  def __add__(self, other: Cost) -> Cost:
    return Cost(*(a + b for a, b in zip(self.parts, other.parts, strict=True)))

  def __mul__(self, times: int) -> Cost:
    return Cost(*(times * a for a in self.parts))

  @property
  def parts(self) -> tuple[float, ...]:
    return dataclasses.astuple(self)


def cost_of(
  program: Program,
  computation: Computation,
  instruction: Instruction,
  rates: Rates,
) -> Cost:
  """Computes the cost of running an instruction once, on one device."""
  shapes = touched(program, computation, instruction)
  flops = flops_of(program, computation, instruction)
  hbm = sum(s.padded_bytes for s in shapes if s.memory_space == 0)
  return Cost(
    flops=flops,
    hbm_bytes=hbm,
    accessed_bytes=sum(s.padded_bytes for s in shapes),
    seconds=max(flops / rates.flops_per_sec, hbm / rates.hbm_bytes_per_sec),
  )


def total_cost(
  program: Program, rates: Rates, loops_once: bool = False
) -> Cost:
  """Sums the cost of the whole program, loops times their trip counts.

  With `loops_once` the body of a loop counts once, as XLA counts it.
  """
  return sum((c for _, c in _costs(program, rates, loops_once)), Cost())


def cost_by_scope(
  program: Program, rates: Rates
) -> dict[str, dict[str, float]]:
  """Splits the cost of a compiled training step over its named scopes.

  Returns:
    For each of `SCOPES`, then 'other': roofline `seconds`, `flops`, HBM `bytes`
    and `share` of the sum of seconds, from 0 to 1.
  """
  sums = dict.fromkeys((*SCOPES, OTHER), Cost())
  for scope, spent in _costs(program, rates):
    sums[scope] += spent
  seconds = sum(spent.seconds for spent in sums.values())
  return {
    scope: {
      'seconds': spent.seconds,
      'flops': spent.flops,
      'bytes': spent.hbm_bytes,
      'share': spent.seconds / seconds if seconds else 0.0,
    }
    for scope, spent in sums.items()
  }


def scope_of(computation: Computation, instruction: Instruction) -> str:
  """Returns the member of `SCOPES` that an instruction comes from, or 'other'.

  A copy without a name, such as one that fetches an operand ahead of time,
  belongs to the first scope that reads it. XLA splits a sum over several slices
  into sums within them and between them, which lose its name. These count as
  the sum of gradients, the only one that a step takes over all devices.
  """
  if not instruction.op_name and computation.spans_slices:
    if kind_of(instruction) in _SUMS or instruction.opcode == 'recv':
      return 'gradient_sum'
  seen = set()
  while instruction.name not in seen:
    seen.add(instruction.name)
    scope = scope_of_name(instruction.op_name)
    if scope != OTHER or not _is_move(instruction):
      return scope
    users = computation.users[instruction.name]
    if not users:
      return OTHER
    instruction = users[0]
  return OTHER


def scope_of_name(op_name: str) -> str:
  """Returns the member of `SCOPES` on a path of named scopes, or 'other'.

  Transformations wrap parts of the path: transpose(jvp(update)) is in 'update',
  and so is update/transpose(jvp()).
  """
  for part in op_name.split('/'):
    inner = part.rstrip(')').rpartition('(')[2]
    if inner in SCOPES:
      return inner
  return OTHER


def touched(
  program: Program, computation: Computation, instruction: Instruction
) -> list[Shape]:
  """Lists the arrays, or parts of them, that an instruction reads and writes.

  Of an operand that is only sliced, the slices count. An update of a part of an
  array in place (dynamic-update-slice) reads and writes that part. The work of
  an asynchronous pair counts where it starts.
  """
  opcode = instruction.opcode
  if opcode in _FREE or opcode.endswith(('-done', '-update')):
    return []
  if instruction.attribute('custom_call_target') == '"ConcatBitcast"':
    return []  # names neighbouring buffers as one
  operands = computation.operands(instruction)
  if opcode == 'fusion':
    return list(_touched_by_fusion(program, instruction))
  if opcode == 'copy-start':
    return list(instruction.shapes[:2])
  if opcode == 'slice-start':
    done = computation.users[instruction.name][0].shapes[0]
    source = operands[0].shapes[0]
    return [dataclasses.replace(source, dims=done.dims), done]
  if opcode in _SLICES:
    indices = [s for o in operands[1:] for s in o.shapes]
    return [*instruction.shapes, *instruction.shapes, *indices]
  if opcode == 'dynamic-update-slice':
    return [*operands[1].shapes] * 2
  read = [s for o in operands for s in o.shapes]
  if opcode.endswith('-start'):
    return read + read  # a collective: as much as it reads, it writes
  return [*read, *instruction.shapes]


def _costs(
  program: Program, rates: Rates, loops_once: bool = False
) -> Iterator[tuple[str, Cost]]:
  """Scope and cost of everything that runs."""
  for computation, instruction, times in executed(program, loops_once):
    spent = cost_of(program, computation, instruction, rates)
    if not any(spent.parts):
      continue
    part = None if instruction.op_name else carried(program, instruction)
    scope = (
      scope_of_name(part.op_name)
      if part
      else scope_of(computation, instruction)
    )
    yield scope, spent * times


def _is_move(instruction: Instruction) -> bool:
  if instruction.attribute('custom_call_target') == '"ConcatBitcast"':
    return True
  return bool(
    _MOVES.fullmatch(instruction.opcode)
    or instruction.opcode == 'get-tuple-element'
  )


# ---- Bytes of fusions ------------------------------------------------------


def _touched_by_fusion(
  program: Program, fusion: Instruction
) -> Iterator[Shape]:
  inner = program.computations[fusion.called[0]]
  results = [inner.root] * len(fusion.shapes)
  if inner.root.opcode == 'tuple':
    results = inner.operands(inner.root)
  part = carried(program, fusion)
  if part and inner.root.opcode == 'custom-call':
    if starts_carried(program, fusion):
      yield from 2 * part.shapes
    return
  updates = []
  for result, shape in zip(results, fusion.shapes, strict=True):
    source = _behind_bitcasts(inner, result)
    if source.opcode == 'parameter' or source is part:
      continue  # handed through
    if source.opcode == 'dynamic-update-slice':
      updates.append(source)
      shape = _part(shape, inner.operands(source)[1])
    yield shape
  for parameter in inner.instructions.values():
    if parameter.opcode == 'parameter':
      yield from _read_of(inner, parameter, updates)


def _read_of(
  inner: Computation, parameter: Instruction, updates: list[Instruction]
) -> Iterator[Shape]:
  """What a fusion reads of one of its operands."""
  users, names = _users_behind_bitcasts(inner, parameter)
  parts = []
  for user in users:
    if user.opcode == 'tuple' or kind_of(user):
      continue  # handed through
    if user in updates and user.operands[0] in names:
      parts.append(_part(parameter.shapes[0], inner.operands(user)[1]))
    elif user.opcode in _SLICES and user.operands[0] in names:
      parts.append(_part(parameter.shapes[0], user))
    else:
      yield from parameter.shapes
      return
  yield from parts


def _part(whole: Shape, part: Instruction) -> Shape:
  """The part of an array, in that array's memory."""
  return dataclasses.replace(part.shapes[0], memory_space=whole.memory_space)


def _behind_bitcasts(inner: Computation, result: Instruction) -> Instruction:
  while result.opcode == 'bitcast':
    result = inner.operands(result)[0]
  return result


def _users_behind_bitcasts(inner: Computation, value: Instruction):
  """What reads a value, under whatever name; and its names."""
  names, users, left = set(), [], [value]
  while left:
    value = left.pop()
    names.add(value.name)
    for user in inner.users[value.name]:
      (left if user.opcode == 'bitcast' else users).append(user)
  return users, names
