"""Convolutions that are not slow on a CPU.

XLA:CPU lacks good code for some convolutions: those with feature groups,
depthwise ones above all, in every direction, and kernel gradients of 1x1
convolutions (`scripts/bench_conv.py` prints the figures). Here they are shifted
products, one convolution per group, and a matmul. Elsewhere than on a CPU, and
for all other convolutions, everything is `jax.lax`'s own.

A convolution and its two gradients are the trilinear form <conv(x, w), g> with
one argument left out. So they are three primitives that are each other's
transposes, and derivatives of every order, forward and reverse, stay among
them; `jax.custom_vjp` would have no forward mode.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType

_NHWC = ('NHWC', 'HWIO', 'NHWC')
_CHUNK_BYTES = 2**20  # of what one step of a scan makes: stays in the cache


@dataclasses.dataclass(frozen=True)
class _Spec:
  """What is static about a convolution of NHWC images with a HWIO kernel."""

  x: jax.ShapeDtypeStruct
  w: jax.ShapeDtypeStruct
  strides: tuple[int, int]
  padding: tuple[tuple[int, int], ...]
  groups: int
  precision: Any

  def __call__(self, x: jax.Array, w: jax.Array) -> jax.Array:
    """The convolution as `jax.lax` has it."""
    return jax.lax.conv_general_dilated(
      x,
      w,
      self.strides,
      self.padding,
      dimension_numbers=_NHWC,
      feature_group_count=self.groups,
      precision=self.precision,
    )

  @property
  def is_depthwise(self) -> bool:
    return self.w.shape[2] == 1

  @property
  def is_pointwise(self) -> bool:
    return self.w.shape[:2] == (1, 1) and not any(sum(self.padding, ()))

  @property
  def wide(self) -> Any:
    """Type of sums."""
    return jnp.promote_types(self.x.dtype, jnp.float32)


def conv_general_dilated(
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
  """`jax.lax.conv_general_dilated`, for `nn.Conv(conv_general_dilated=...)`.

  Takes a faster way on a CPU where the convolution is of NHWC images with a
  HWIO kernel in a floating type, has no dilation, and either has feature
  groups, or is 1x1 without padding. Only the order of sums differs; those of
  bfloat16 are in float32. Under `jax.vmap`, and for sizes that are not known
  yet (`jax.export.symbolic_shape`), the way is that of `jax.lax`.
  """
  precision = kwargs.pop('precision', None)
  dilations = {*(lhs_dilation or ()), *(rhs_dilation or ())}
  if dilations <= {1} and set(kwargs.values()) <= {None, 1}:
    spec = _spec(
      lhs,
      rhs,
      window_strides,
      padding,
      dimension_numbers,
      feature_group_count,
      precision,
    )
    if spec is not None:
      return _forward_p.bind(lhs, rhs, spec=spec)
  return jax.lax.conv_general_dilated(
    lhs,
    rhs,
    window_strides,
    padding,
    lhs_dilation,
    rhs_dilation,
    dimension_numbers,
    feature_group_count,
    precision=precision,
    **kwargs,
  )


def _spec(x, w, strides, padding, numbers, groups, precision) -> _Spec | None:
  """The convolution, if there is a faster way for it.

  Not for dense ones larger than 1x1: im2col columns and a matmul take as long
  as XLA:CPU or longer.
  """
  numbers_of = functools.partial(
    jax.lax.conv_dimension_numbers, x.shape, w.shape
  )
  if (
    x.ndim != 4
    or any(map(jax.export.is_symbolic_dim, x.shape))
    or numbers_of(numbers) != numbers_of(_NHWC)
    or not jnp.issubdtype(x.dtype, jnp.floating)
  ):
    return None
  if isinstance(padding, str):
    padding = jax.lax.padtype_to_pads(
      x.shape[1:3], w.shape[:2], strides, padding
    )
  spec = _Spec(
    jax.ShapeDtypeStruct(x.shape, x.dtype),
    jax.ShapeDtypeStruct(w.shape, w.dtype),
    tuple(strides),
    tuple(map(tuple, padding)),
    groups,
    precision,
  )
  y = jax.eval_shape(spec, x, w)  # raises where the shapes do not fit
  return spec if y.size and (groups > 1 or spec.is_pointwise) else None


# ---- jax.lax's own ---------------------------------------------------------


def _kernel_gradient(x: jax.Array, g: jax.Array, spec: _Spec) -> jax.Array:
  transposed = jax.linear_transpose(lambda w: spec(x, w), spec.w)
  return transposed(g)[0]


def _input_gradient(w: jax.Array, g: jax.Array, spec: _Spec) -> jax.Array:
  transposed = jax.linear_transpose(lambda x: spec(x, w), spec.x)
  return transposed(g)[0]


# ---- On a CPU --------------------------------------------------------------


def _cpu_forward(x: jax.Array, w: jax.Array, spec: _Spec) -> jax.Array:
  if spec.is_depthwise:
    return _depthwise_forward(x, w, spec)
  return _by_group(x, w, spec)


def _cpu_kernel_gradient(x: jax.Array, g: jax.Array, spec: _Spec) -> jax.Array:
  if spec.is_depthwise:
    return _depthwise_kernel_gradient(x, g, spec)
  if spec.groups > 1:
    by_group = functools.partial(_by_group, x, spec=spec)
    return jax.linear_transpose(by_group, spec.w)(g)[0]
  dw = jnp.einsum(
    'nhwi,nhwo->io',
    x[:, :: spec.strides[0], :: spec.strides[1]],
    g,
    precision=spec.precision,
    preferred_element_type=spec.wide,
  )
  return dw.reshape(spec.w.shape).astype(spec.w.dtype)


def _cpu_input_gradient(w: jax.Array, g: jax.Array, spec: _Spec) -> jax.Array:
  if spec.is_depthwise:
    return _depthwise_input_gradient(w, g, spec)
  by_group = functools.partial(_by_group, w=w, spec=spec)
  return jax.linear_transpose(by_group, spec.x)(g)[0]


def _by_group(x: jax.Array, w: jax.Array, spec: _Spec) -> jax.Array:
  """Every group as a convolution of its own."""
  one = dataclasses.replace(spec, groups=1)
  xs, ws = (jnp.split(a, spec.groups, -1) for a in (x, w))
  return jnp.concatenate(list(map(one, xs, ws)), -1)


# A depthwise convolution with M kernels per channel c, of taps t = (i, j),
#
#   y[n, p, c, m] = sum_t w[t, c, m] x[n, stride * p + t - low, c],
#
# is a multiply-add of whole images for each tap; so are its gradients.


def _depthwise_forward(x: jax.Array, w: jax.Array, spec: _Spec) -> jax.Array:
  w_TF = w.reshape(-1, w.shape[-1]).astype(spec.wide)

  def forward(x):
    taps = _taps(_repeat(x, spec), spec.padding, spec.strides, (1, 1), spec)
    return sum(map(jnp.multiply, taps, w_TF)).astype(spec.x.dtype)

  _, chunks = _chunks(x)
  return _unchunk(jax.lax.map(forward, *chunks), x)


def _depthwise_input_gradient(
  w: jax.Array, g: jax.Array, spec: _Spec
) -> jax.Array:
  """A convolution of g, dilated by the stride, with the flipped kernel."""
  w_TF = w.reshape(-1, w.shape[-1])[::-1].astype(spec.wide)
  padding = []
  for axis, ((low, _), stride) in enumerate(
    zip(spec.padding, spec.strides, strict=True)
  ):
    dilated = (g.shape[1 + axis] - 1) * stride + 1
    high = spec.x.shape[1 + axis] + low - dilated
    padding.append((spec.w.shape[axis] - 1 - low, high))

  def gradient(g):
    taps = _taps(g, padding, (1, 1), spec.strides, spec)
    dx = sum(map(jnp.multiply, taps, w_TF))
    dx = dx.reshape(*dx.shape[:-1], spec.groups, -1).sum(-1)
    return dx.astype(spec.x.dtype)

  _, chunks = _chunks(g)
  return _unchunk(jax.lax.map(gradient, *chunks), g)


def _depthwise_kernel_gradient(
  x: jax.Array, g: jax.Array, spec: _Spec
) -> jax.Array:
  blocks, chunks = _chunks(x, g)

  def add(dw, xg):
    x, g = xg
    taps = _taps(_repeat(x, spec), spec.padding, spec.strides, (1, 1), spec)
    products = (tap * g.astype(spec.wide) for tap in taps)
    sums = [p.reshape(blocks, -1, p.shape[-1]).sum(1) for p in products]
    return dw + jnp.stack(sums, 1).reshape(dw.shape), None

  zeros = jnp.zeros((blocks, *spec.w.shape), spec.wide)
  dw, _ = jax.lax.scan(add, zeros, chunks)
  return dw.sum(0).astype(spec.w.dtype)


def _repeat(x: jax.Array, spec: _Spec) -> jax.Array:
  """Each channel as often as it has kernels: [..., C] -> [..., C * M]."""
  times = spec.w.shape[-1] // spec.groups
  return x if times == 1 else jnp.repeat(x, times, -1)


def _taps(
  x: jax.Array,
  padding: Any,
  strides: tuple[int, int],
  dilation: tuple[int, int],
  spec: _Spec,
) -> Iterator[jax.Array]:
  """What each tap of the kernel sees of x [n, H, W, C], padded and dilated."""
  config = [(*pad, d - 1) for pad, d in zip(padding, dilation, strict=True)]
  zero = jnp.zeros((), spec.wide)
  none = (0, 0, 0)
  x = jax.lax.pad(x.astype(spec.wide), zero, (none, *config, none))
  rows, columns = (x.shape[1 + i] - spec.w.shape[i] + 1 for i in (0, 1))
  for i, j in itertools.product(*map(range, spec.w.shape[:2])):
    yield x[:, i : i + rows : strides[0], j : j + columns : strides[1]]


# Images are taken by a scan, as many at a time as the cache holds. N is sharded
# over devices in contiguous blocks, if it is. A chunk has images of every
# block, and nothing is summed over blocks in the scan: so the partitioner finds
# nothing to exchange there.


def _blocks(images: jax.Array) -> int:
  """Into how many blocks N may be sharded."""
  mesh = jax.typeof(images).sharding.mesh
  kinds = zip(mesh.axis_sizes, mesh.axis_types, strict=True)
  devices = math.prod(n for n, kind in kinds if kind == AxisType.Auto)
  return math.gcd(len(images), devices)


def _chunks(*images: jax.Array) -> tuple[int, list[jax.Array]]:
  """Number of blocks, [N, ...] -> [chunks, N / chunks, ...] of each argument.

  Within a chunk as within N, images of a block are neighbours.
  """
  blocks = _blocks(images[0])
  size = len(images[0]) // blocks
  image_bytes = max(x.size // len(x) * x.dtype.itemsize for x in images)
  most = max(1, _CHUNK_BYTES // image_bytes)
  each = next(n for n in range(min(size, most), 0, -1) if size % n == 0)

  def split(x):
    chunks = x.reshape(blocks, -1, each, *x.shape[1:]).swapaxes(0, 1)
    return chunks.reshape(-1, blocks * each, *x.shape[1:])

  return blocks, list(map(split, images))


def _unchunk(chunks: jax.Array, images: jax.Array) -> jax.Array:
  """[chunks, N / chunks, ...] -> [N, ...], the order of `images`."""
  count, _, *rest = chunks.shape
  x = chunks.reshape(count, _blocks(images), -1, *rest).swapaxes(0, 1)
  return x.reshape(-1, *rest)


# ---- Primitives ------------------------------------------------------------


def _primitive(
  own: Callable[..., jax.Array], cpu: Callable[..., jax.Array]
) -> Primitive:
  """A function of two arrays and `spec`: `cpu` on CPUs, `own` elsewhere."""
  primitive = Primitive('conv_general_dilated')

  def abstract(a, b, *, spec):
    return jax.make_jaxpr(functools.partial(own, spec=spec))(a, b).out_avals[0]

  def batched(args, axes, *, spec):
    fn = jax.vmap(functools.partial(own, spec=spec), axes)
    return fn(*args), 0

  primitive.def_abstract_eval(abstract)
  primitive.def_impl(jax.jit(primitive.bind, static_argnames='spec'))
  batching.primitive_batchers[primitive] = batched
  for fn, platform in ((own, None), (cpu, 'cpu')):
    lowered = mlir.lower_fun(fn, multiple_results=False)
    mlir.register_lowering(primitive, lowered, platform)
  return primitive


def _forward(x: jax.Array, w: jax.Array, spec: _Spec) -> jax.Array:
  return spec(x, w)


_forward_p = _primitive(_forward, _cpu_forward)
_kernel_gradient_p = _primitive(_kernel_gradient, _cpu_kernel_gradient)
_input_gradient_p = _primitive(_input_gradient, _cpu_input_gradient)

# Bilinear: a rule gets the cotangent and both arguments, the one that it is for
# without a value.
ad.defbilinear(
  _forward_p,
  lambda g, _, w, spec: _input_gradient_p.bind(w, g, spec=spec),
  lambda g, x, _, spec: _kernel_gradient_p.bind(x, g, spec=spec),
)
ad.defbilinear(
  _kernel_gradient_p,
  lambda w, _, g, spec: _input_gradient_p.bind(w, g, spec=spec),
  lambda w, x, _, spec: _forward_p.bind(x, w, spec=spec),
)
ad.defbilinear(
  _input_gradient_p,
  lambda x, _, g, spec: _kernel_gradient_p.bind(x, g, spec=spec),
  lambda x, w, _, spec: _forward_p.bind(x, w, spec=spec),
)
