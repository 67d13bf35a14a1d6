"""Convolutions in forms that XLA:CPU is fast at.

XLA:CPU has no good code for some convolutions: those with feature groups, those
of images about as small as the kernel, and the kernel gradients of 1x1
convolutions. Networks built for a CPU compute these as shifted products and
matmuls instead; `scripts/bench_conv.py` measures what each form gains. They are
ordinary differentiable functions, so every transformation of JAX applies.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

_Axes = tuple['_Axis', '_Axis']
_NHWC = ('NHWC', 'HWIO', 'NHWC')


def convolution(platform: str) -> Callable[..., jax.Array]:
  """Returns what `nn.Conv(conv_general_dilated=...)` takes on `platform`.

  That is `jax.lax.conv_general_dilated` itself, except on 'cpu'.
  """
  return conv_on_cpu if platform == 'cpu' else jax.lax.conv_general_dilated


def conv_on_cpu(
  lhs: jax.Array,
  rhs: jax.Array,
  window_strides: Any,
  padding: Any,
  lhs_dilation: Any = None,
  rhs_dilation: Any = None,
  dimension_numbers: Any = None,
  feature_group_count: int = 1,
  **kwargs: Any,
) -> jax.Array:
  """Computes `jax.lax.conv_general_dilated`, with sums in another order.

  Takes a faster form for NHWC images of a known side and HWIO kernels in a
  floating type, without dilation or further options:

    depthwise     y = sum over rows i and columns j of w[i, j] * (x shifted)
    other groups  one convolution for each group
    few pixels    a matmul of all pixels of an image at once with a matrix that
                  has a kernel for each pair of an input and an output pixel
    1x1, small    im2col: a matmul of all k * k * C inputs of each pixel

  Sums of bfloat16 are in float32, as in XLA's own.
  """
  own = functools.partial(
    jax.lax.conv_general_dilated,
    window_strides=window_strides,
    padding=padding,
    lhs_dilation=lhs_dilation,
    rhs_dilation=rhs_dilation,
    dimension_numbers=dimension_numbers,
    **kwargs,
  )
  dilations = {*(lhs_dilation or ()), *(rhs_dilation or ())}
  options = any(kwargs.values()) or not dilations <= {1}
  if options or not _are_images(lhs, rhs, dimension_numbers):
    return own(lhs, rhs, feature_group_count=feature_group_count)
  *size, inputs, features = rhs.shape
  n, *side, channels = lhs.shape
  if isinstance(padding, str):
    padding = jax.lax.padtype_to_pads(side, size, window_strides, padding)
  axes = tuple(map(_Axis, side, size, window_strides, padding))
  depthwise = inputs == 1 and feature_group_count == features == channels
  if feature_group_count > 1 and not depthwise:
    parts = (jnp.split(a, feature_group_count, -1) for a in (lhs, rhs))
    return jnp.concatenate(list(map(own, *parts)), -1)
  form = _depthwise if depthwise else _matmul_form(n, features, axes)
  if form is None:
    return own(lhs, rhs)
  x = lhs.astype(jnp.promote_types(lhs.dtype, jnp.float32))
  y = form(x, rhs.astype(x.dtype), axes).astype(lhs.dtype)
  return y.reshape(n, *(axis.outputs for axis in axes), features)


def _are_images(x: jax.Array, w: jax.Array, numbers: Any) -> bool:
  """Whether `x` is NHWC of known H and W, `w` HWIO, and both are floating."""
  numbers_of = functools.partial(
    jax.lax.conv_dimension_numbers, x.shape, w.shape
  )
  return (
    x.ndim == 4
    and not any(map(jax.export.is_symbolic_dim, x.shape[1:]))
    and numbers_of(numbers) == numbers_of(_NHWC)
    and jnp.issubdtype(x.dtype, jnp.floating)
  )


class _Axis(NamedTuple):
  """A kernel along one axis of images, in pixels."""

  side: int
  size: int
  stride: int
  pads: tuple[int, int]

  @property
  def outputs(self) -> int:
    return (self.side + sum(self.pads) - self.size) // self.stride + 1

  def tap(self, x: jax.Array, axis: int, i: int) -> jax.Array:
    """The inputs under tap `i` of all outputs: [.., outputs, ..]."""
    x = _padded(x, axis, self.pads)
    stop = i + (self.outputs - 1) * self.stride + 1
    return jax.lax.slice_in_dim(x, i, stop, self.stride, axis)

  def spread(self, w: jax.Array, axis: int) -> jax.Array:
    """What each output takes of each input: [.., side, .., outputs, F]."""
    firsts = [out * self.stride - self.pads[0] for out in range(self.outputs)]
    kernels = [
      _padded(w, axis, (first, self.side - self.size - first))
      for first in firsts
    ]
    return jnp.stack(kernels, -2)


def _padded(x: jax.Array, axis: int, pads: tuple[int, int]) -> jax.Array:
  """`x` with zeros before and after; negative `pads` take away instead."""
  config = [(0, 0, 0)] * x.ndim
  config[axis] = (*pads, 0)
  return jax.lax.pad(x, jnp.zeros((), x.dtype), config)


def _depthwise(x: jax.Array, w: jax.Array, axes: _Axes) -> jax.Array:
  """y = sum_i (sum_j w[i, j] * x shifted by j) shifted by i.

  The gradient of the pixels has a padded array for each shift, which XLA
  writes to memory: one axis at a time there are 2 k and not k * k.
  """
  rows, columns = axes
  shifted = [columns.tap(x, 2, j) for j in range(columns.size)]
  sums = [sum(map(jnp.multiply, shifted, row[:, 0])) for row in w]
  return sum(rows.tap(row, 1, i) for i, row in enumerate(sums))


def _matmul_form(
  n: Any, features: int, axes: _Axes
) -> Callable[..., jax.Array] | None:
  """The matmul that pays, or None."""
  inputs, taps, outputs = (
    math.prod(getattr(axis, field) for axis in axes)
    for field in ('side', 'size', 'outputs')
  )
  # Its matrix should not be larger than the kernel, or else than the columns.
  if inputs <= taps and (
    inputs * outputs <= taps
    or (not jax.export.is_symbolic_dim(n) and inputs * features <= n * taps)
  ):
    return _all_pixels
  # Copying each input k * k times pays only beside a large matmul.
  return _im2col if taps == 1 or 4 * outputs <= features else None


def _all_pixels(x: jax.Array, w: jax.Array, axes: _Axes) -> jax.Array:
  """x [N, H * W * C] @ matrix [H * W * C, H' * W' * F]."""
  for i, axis in enumerate(axes):
    w = axis.spread(w, i)
  rows = x.reshape(x.shape[0], -1)
  return rows @ w.reshape(rows.shape[1], -1)


def _im2col(x: jax.Array, w: jax.Array, axes: _Axes) -> jax.Array:
  """columns [N * H' * W', k * k * C] @ kernel [k * k * C, F]."""
  rows, columns = axes
  strips = (rows.tap(x, 1, i) for i in range(rows.size))
  taps = [columns.tap(s, 2, j) for s in strips for j in range(columns.size)]
  patches = jnp.concatenate(taps, -1)
  return patches.reshape(-1, patches.shape[-1]) @ w.reshape(-1, w.shape[-1])
