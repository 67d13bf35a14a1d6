"""FLOPs of the convolutions and products of a compiled program."""

from __future__ import annotations

import functools
import re

from conadv_jax.audit.hlo.program import Computation, Instruction, Program

_WINDOW = re.compile(r'(\w+)=([\dx_\-]+)')


def flops_of(
  program: Program, computation: Computation, instruction: Instruction
) -> int:
  """Counts the FLOPs of the convolutions and products in an instruction."""
  if instruction.opcode == 'convolution':
    return _convolution_flops(computation, instruction)
  if instruction.opcode == 'dot':
    return _dot_flops(computation, instruction)
  if instruction.opcode != 'fusion':
    return 0
  return sum(
    flops_of(program, inner, part)
    for inner in (program.computations[name] for name in instruction.called)
    for part in inner.instructions.values()
  )


def _dot_flops(computation: Computation, dot: Instruction) -> int:
  """2 * output elements * contracted elements."""
  lhs = computation.operands(dot)[0].shapes[0]
  contracted = 1
  for axis in re.findall(r'\d+', dot.attribute('lhs_contracting_dims')):
    contracted *= lhs.dims[int(axis)]
  return 2 * dot.shapes[0].elements * contracted


def _convolution_flops(computation: Computation, conv: Instruction) -> int:
  """2 * batch * output features * input features of the kernel * positions.

  Positions are the pairs of an output and a kernel element, per dimension, for
  which there is an input: neither padding nor the holes of a dilated input
  are multiplied, as XLA counts it. With feature groups the kernel has fewer
  input features; with batch groups (kernel gradients of grouped convolutions)
  the output has a smaller batch.
  """
  lhs, rhs = (o.shapes[0] for o in computation.operands(conv))
  lhs_dims, rest = conv.attribute('dim_labels').split('_')
  rhs_dims, out_dims = rest.split('->')
  out = conv.shapes[0]
  fmas = out.dims[out_dims.index('b')] * out.dims[out_dims.index('f')]
  fmas *= rhs.dims[rhs_dims.index('i')]
  window = dict(_WINDOW.findall(conv.attribute('window')))
  rank = len(out_dims) - 2
  pads = window.get('pad', 'x'.join(['0_0'] * rank)).split('x')
  for i in range(rank):
    fmas *= _positions(
      lhs.dims[lhs_dims.index(str(i))],
      out.dims[out_dims.index(str(i))],
      rhs.dims[rhs_dims.index(str(i))],
      _per_axis(window, 'stride', i),
      int(pads[i].split('_')[0]),
      _per_axis(window, 'lhs_dilate', i),
      _per_axis(window, 'rhs_dilate', i),
    )
  return 2 * fmas


def _per_axis(window: dict[str, str], key: str, axis: int) -> int:
  return int(window[key].split('x')[axis]) if key in window else 1


@functools.cache
def _positions(
  inputs: int,
  outputs: int,
  kernel: int,
  stride: int,
  pad_low: int,
  lhs_dilate: int,
  rhs_dilate: int,
) -> int:
  """Pairs of output and kernel element that meet an input, of one dimension."""
  last = (inputs - 1) * lhs_dilate
  count = 0
  for tap in range(kernel):
    for output in range(outputs):
      place = output * stride + tap * rhs_dilate - pad_low
      count += 0 <= place <= last and place % lhs_dilate == 0
  return count
