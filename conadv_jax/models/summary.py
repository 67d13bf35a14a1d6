"""Size of a network without building it: parameters and multiply-adds."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp


class Size(NamedTuple):
  """Size of a network.

  Attributes:
    parameters: number of them; batch statistics are none.
    multiply_adds: of convolutions and dense layers, forward, for one image. As
      in papers: one per tap, also where a tap lies on the padding, and nothing
      for the rest. XLA's FLOPs are twice that, less those of the padding, plus
      everything elementwise.
  """

  parameters: int
  multiply_adds: int


def size(model: nn.Module, side_px: int) -> Size:
  """The size of `model`, for a square image of 3 channels."""
  params, counts = _traced(model, (side_px, side_px, 3))
  leaves = jax.tree.leaves(params)
  return Size(sum(leaf.size for leaf in leaves), sum(counts))


def multiply_adds(
  model: nn.Module, image_shape: tuple[int, int, int]
) -> list[int]:
  """Of each convolution and dense layer of `model`, in order; see `Size`."""
  return _traced(model, image_shape)[1]


def _traced(model: nn.Module, image_shape: tuple[int, int, int]):
  """(shapes of the parameters, `multiply_adds`) of `model`."""
  counts = []

  def count(call, args, kwargs, context):
    y = call(*args, **kwargs)
    if isinstance(context.module, nn.Conv | nn.Dense):
      kernel = context.module.get_variable('params', 'kernel')
      counts.append(y.size * math.prod(kernel.shape[:-1]))
    return y

  x = jax.ShapeDtypeStruct((1, 1, 1, *image_shape), jnp.float32)
  init = functools.partial(model.init, routes=(0,), train=False)
  with nn.intercept_methods(count):
    shapes = jax.eval_shape(init, jax.random.key(0), x)
  return shapes['params'], counts
