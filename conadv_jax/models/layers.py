"""Convolutions in forms that XLA:CPU is fast at.

XLA:CPU has no good code for some convolutions: those with feature groups, those
of images about as small as the kernel, and the kernel gradients of 1x1
convolutions. Networks built for a CPU compute these as shifted products and
matmuls instead; `scripts/bench_conv.py` measures what each form gains. They are
ordinary differentiable functions, so every transformation of JAX applies.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

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

    depthwise           y = sum over taps t of w[t] * (x shifted by t)
    other groups        one convolution for each group
    1x1, small images   im2col: a matmul of all k * k * C inputs of each pixel

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
  taps = functools.partial(_taps, lhs, size, window_strides, padding)
  if inputs == 1 and feature_group_count == features == lhs.shape[-1]:
    products = map(jnp.multiply, taps(), rhs.reshape(-1, features))
    return sum(products).astype(lhs.dtype)
  if feature_group_count > 1:
    parts = (jnp.split(a, feature_group_count, -1) for a in (lhs, rhs))
    return jnp.concatenate(list(map(own, *parts)), -1)
  # Copying each input k * k times pays only beside a large matmul.
  n, *out_px, _ = jax.eval_shape(own, lhs, rhs).shape
  if size != [1, 1] and 4 * math.prod(out_px) > features:
    return own(lhs, rhs)
  columns = jnp.concatenate(list(taps()), -1)
  rows = columns.reshape(n * math.prod(out_px), columns.shape[-1])
  y = rows @ rhs.reshape(-1, features).astype(rows.dtype)
  return y.reshape(n, *out_px, features).astype(lhs.dtype)


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


def _taps(
  x: jax.Array, size: Any, strides: Any, padding: Any
) -> Iterator[jax.Array]:
  """Yields the inputs [N, H, W, C] under each tap, in float32 or wider."""
  if isinstance(padding, str):
    padding = jax.lax.padtype_to_pads(x.shape[1:3], size, strides, padding)
  wide = jnp.promote_types(x.dtype, jnp.float32)
  pads = [(*pad, 0) for pad in ((0, 0), *padding, (0, 0))]
  x = jax.lax.pad(x.astype(wide), jnp.zeros((), wide), pads)
  rows, columns = (x.shape[1 + i] - size[i] + 1 for i in (0, 1))
  for i, j in itertools.product(*map(range, size)):
    yield x[:, i : i + rows : strides[0], j : j + columns : strides[1]]
