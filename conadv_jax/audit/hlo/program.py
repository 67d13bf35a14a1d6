"""Reads the text of a compiled XLA program, `compiled.as_text()`.

The text is XLA's printed form of HLO, of any backend. Programs for TPUs, and
most others, are scheduled (`is_scheduled=true`): the order of the instructions
of a computation is the order in which they start. Needs no JAX.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

from conadv_jax.base.errors import ConfigError

COLLECTIVES = (
  'all-reduce',
  'all-gather',
  'reduce-scatter',
  'all-to-all',
  'ragged-all-to-all',
  'collective-permute',
  'collective-broadcast',
)
# Before the kind of one between slices, over the data centre network.
DCN = 'dcn-'

_BITS = {
  'pred': 8,
  'token': 0,
  'opaque': 0,
  'bf16': 16,
  'c64': 64,
  'c128': 128,
}
_SHAPE = re.compile(r'(\w+)\[([^\]]*)\](?:\{([^{}]*)\})?')
_TILE = re.compile(r'T\(([\d,]*)\)')
_SPACE = re.compile(r'S\((\d+)\)')
_HEAD = re.compile(r'\s*(ROOT )?%?([\w.\-]+) = ')
_OPCODE = re.compile(r'\s*([\w\-]+)\(')
_OPERAND = re.compile(r'%([\w.\-]+)')
_COMPUTATION = re.compile(r'(ENTRY )?%?([\w.\-]+) \(.*\{$')
_CALLED = re.compile(
  r'\b(?:calls|to_apply|condition|body|true_computation|false_computation'
  r'|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.\-]+)'
)
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Shape:
  """An array: `bf16[8,128]{1,0:T(8,128)(2,1)S(1)}`.

  Attributes:
    dtype: XLA's name of the element type.
    dims: sizes, as the program counts them.
    minor_to_major: order of the dimensions in memory, fastest first; empty
      where the text does not say.
    tile: the outermost tile of the layout; empty for none.
    memory_space: 0 is the main memory (HBM on a TPU); on TPUs 1 is the vector
      memory on the chip, others are smaller still.
  """

  dtype: str
  dims: tuple[int, ...]
  minor_to_major: tuple[int, ...] = ()
  tile: tuple[int, ...] = ()
  memory_space: int = 0

  @property
  def elements(self) -> int:
    return math.prod(self.dims)

  @property
  def bytes(self) -> int:
    """Of the elements alone."""
    return -(-self.elements * bits(self.dtype) // 8)

  @property
  def padded_bytes(self) -> int:
    """With the padding of the layout: whole tiles, as they lie in memory."""
    order = self.minor_to_major or tuple(reversed(range(len(self.dims))))
    sizes = [self.dims[i] for i in reversed(order)]
    sizes = [1] * (len(self.tile) - len(sizes)) + sizes
    first = len(sizes) - len(self.tile)
    for i, tile in enumerate(self.tile):
      sizes[first + i] = -(-sizes[first + i] // tile) * tile
    return -(-math.prod(sizes) * bits(self.dtype) // 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation.

  Attributes:
    name: without the percent sign.
    opcode: such as `fusion` or `all-reduce-start`.
    shapes: arrays of the result, tuples flattened.
    operands: names of instructions of the same computation.
    called: names of computations: of a fusion, a loop, a reduction.
    op_name: the path of JAX operation and named scopes that it comes from.
    attributes: what follows the operands, as it stands.
    literal: what stands between the parentheses.
    is_root: whether it is the result of its computation.
  """

  name: str
  opcode: str
  shapes: tuple[Shape, ...]
  operands: tuple[str, ...]
  called: tuple[str, ...]
  op_name: str
  attributes: str
  literal: str
  is_root: bool

  def attribute(self, name: str) -> str:
    """Value of `name=value`, braces included; '' if there is none."""
    found = re.search(rf'\b{name}=', self.attributes)
    if not found:
      return ''
    start = found.end()
    if self.attributes[start : start + 1] == '{':
      return self.attributes[start : _closing(self.attributes, start) + 1]
    value = re.compile(r'\[[^\]]*\](?:<=\[[^\]]*\](?:T\([\d,]*\))?)?|[^,\s]*')
    return value.match(self.attributes, start)[0]


@dataclasses.dataclass(frozen=True)
class Computation:
  """Instructions by name, in the order of the text."""

  name: str
  instructions: Mapping[str, Instruction]

  @property
  def root(self) -> Instruction:
    for instruction in reversed(self.instructions.values()):
      if instruction.is_root:
        return instruction
    return next(reversed(self.instructions.values()))

  @functools.cached_property
  def users(self) -> Mapping[str, tuple[Instruction, ...]]:
    """Instructions that read each name, in the order of the text."""
    users = {name: [] for name in self.instructions}
    for instruction in self.instructions.values():
      for name in dict.fromkeys(instruction.operands):
        users[name].append(instruction)
    return {name: tuple(found) for name, found in users.items()}

  @functools.cached_property
  def spans_slices(self) -> bool:
    """Whether it exchanges anything between slices."""
    return any(kind_of(i).startswith(DCN) for i in self.instructions.values())

  def operands(self, instruction: Instruction) -> list[Instruction]:
    return [self.instructions[name] for name in instruction.operands]


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled program.

  Attributes:
    name: of the module.
    computations: by name.
    entry: the computation that runs.
    is_scheduled: whether the order of instructions is the schedule.
    num_devices: over which it is partitioned or replicated.
  """

  name: str
  computations: Mapping[str, Computation]
  entry: Computation
  is_scheduled: bool
  num_devices: int


def parse(text: str) -> Program:
  """Text of a compiled program -> `Program`.

  Raises:
    ConfigError: if the text is not the printed form of an HLO module.
  """
  header = re.match(r'\s*HloModule ([\w.\-]+)(.*)', text)
  if not header:
    raise ConfigError(
      f'text={text[:40]!r}: no HLO module; use compiled.as_text()'
    )
  computations, entry, current = {}, None, None
  for line in text.splitlines():
    if current is None:
      start = _COMPUTATION.match(line)
      if start:
        current = start[2], {}, bool(start[1])
    elif line.startswith('}'):
      name, instructions, is_entry = current
      computations[name] = Computation(name, instructions)
      entry = computations[name] if is_entry else entry
      current = None
    else:
      instruction = _parse_instruction(line)
      if instruction:
        current[1][instruction.name] = instruction
  if entry is None:
    raise ConfigError(
      f'text of {header[1]!r}: no ENTRY computation; is it cut short?'
    )
  return Program(
    name=header[1],
    computations=computations,
    entry=entry,
    is_scheduled='is_scheduled=true' in header[2],
    num_devices=math.prod(
      int(n)
      for n in re.findall(
        r'\b(?:num_partitions|replica_count)=(\d+)', header[2]
      )
    ),
  )


def executed(
  program: Program, loops_once: bool = False
) -> Iterator[tuple[Computation, Instruction, int]]:
  """(computation, instruction, times per run) of what runs on its own.

  That is the entry, the bodies and conditions of loops, times their trip count
  unless `loops_once`, calls, and every branch of a conditional; not what is
  inside of fusions, reductions and collectives.
  """
  yield from _executed(program, program.entry, 1, loops_once)


def trip_count(program: Program, loop: Instruction) -> int:
  """How often a `while` runs its body; 1 where that is not found.

  XLA:CPU notes it beside the loop. XLA:TPU does not: there it is the constant
  that the counter, which starts at 0, is compared with.
  """
  noted = _TRIPS.search(loop.attributes)
  if noted:
    return int(noted[1])
  condition = program.computations.get(loop.attribute('condition').strip('%'))
  if condition is None:
    return 1
  root = condition.root
  bounds = [
    operand.literal
    for operand in condition.operands(root)
    if operand.opcode == 'constant'
  ]
  less = root.opcode == 'compare' and root.attribute('direction') == 'LT'
  return int(bounds[0]) if less and len(bounds) == 1 else 1


def _executed(
  program: Program, computation: Computation, times: int, loops_once: bool
):
  for instruction in computation.instructions.values():
    yield computation, instruction, times
    if instruction.opcode in ('while', 'call', 'conditional'):
      inner = times * (1 if loops_once else trip_count(program, instruction))
      for name in instruction.called:
        called = program.computations[name]
        yield from _executed(program, called, inner, loops_once)


def kind_of(instruction: Instruction) -> str:
  """The member of `COLLECTIVES` that it starts, or ''.

  Exchanges between slices go through the hosts: the first of them is a `send`
  to the host, and its kind one of `COLLECTIVES` behind `DCN`.
  """
  if instruction.opcode == 'send':
    kind = re.search(r'megascale_transfer_type="(\w+)"', instruction.attributes)
    return DCN + kind[1].lower().replace('_', '-') if kind else ''
  kind = instruction.opcode.removesuffix('-start')
  return kind if kind in COLLECTIVES else ''


def carried(program: Program, instruction: Instruction) -> Instruction | None:
  """The collective that a fusion carries a part of beside its own work."""
  if instruction.opcode != 'fusion':
    return None
  inner = program.computations[instruction.called[0]].instructions
  return next((i for i in inner.values() if kind_of(i)), None)


def starts_carried(program: Program, fusion: Instruction) -> bool:
  """Whether a fusion is the first of those that carry a collective."""
  root = program.computations[fusion.called[0]].root
  return root.attribute('custom_call_target') == '"AsyncCollectiveStart"'


@functools.cache
def bits(dtype: str) -> int:
  """Bits of an element of XLA's type `dtype`: 4 of s4, 8 of pred and f8e4m3."""
  if dtype in _BITS:
    return _BITS[dtype]
  number = re.match(r'[a-z]+(\d+)', dtype)
  if not number:
    raise ConfigError(f'dtype={dtype!r}: not an element type of XLA')
  return int(number[1])


def _parse_instruction(line: str) -> Instruction | None:
  head = _HEAD.match(line)
  if not head:
    return None
  end = _end_of_shape(line, head.end())
  opcode = _OPCODE.match(line, end)
  close = _closing(line, opcode.end() - 1)
  literal, attributes = line[opcode.end() : close], line[close + 1 :]
  op_name = _OP_NAME.search(attributes)
  called = [
    name.strip(' %')
    for group in _CALLED.findall(attributes)
    for name in group.strip('{}').split(',')
  ]
  return Instruction(
    name=head[2],
    opcode=opcode[1],
    shapes=parse_shapes(line[head.end() : end]),
    operands=tuple(_OPERAND.findall(literal)),
    called=tuple(called),
    op_name=op_name[1].replace("\\'", "'") if op_name else '',
    attributes=attributes,
    literal=literal,
    is_root=bool(head[1]),
  )


@functools.lru_cache(maxsize=4096)
def parse_shapes(text: str) -> tuple[Shape, ...]:
  """`f32[2]{0}` or `(f32[2]{0}, (s32[], token[]))` -> its arrays, in order."""
  return tuple(_shape(*found) for found in _SHAPE.findall(text))


def _shape(dtype: str, dims: str, layout: str) -> Shape:
  order, _, tiling = layout.partition(':')
  tile, space = _TILE.search(tiling), _SPACE.search(tiling)
  return Shape(
    dtype=dtype,
    # A bounded dynamic size is printed as <=8.
    dims=tuple(int(n.strip('<= ')) for n in dims.split(',') if n.strip()),
    minor_to_major=tuple(int(n) for n in order.split(',') if n.strip()),
    tile=tuple(int(n) for n in tile[1].split(',') if n) if tile else (),
    memory_space=int(space[1]) if space else 0,
  )


def _end_of_shape(line: str, start: int) -> int:
  if line[start] == '(':
    return _closing(line, start) + 1
  return line.index(' ', start)


def _closing(text: str, start: int) -> int:
  """Place of the bracket that closes the one at `start`, strings aside."""
  closing = {'(': ')', '{': '}', '[': ']'}
  opened, closed = text[start], closing[text[start]]
  depth, i = 0, start
  pattern = re.compile(
    '[' + re.escape(opened + closed) + r']|"(?:[^"\\]|\\.)*"'
  )
  while True:
    found = pattern.search(text, i)
    if not found:
      return len(text) - 1
    depth += {opened: 1, closed: -1}.get(found[0], 0)
    i = found.end()
    if depth == 0:
      return found.start()
