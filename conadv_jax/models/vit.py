"""A small vision transformer (Dosovitskiy et al. 2020, arXiv:2010.11929).

It has no batch norm, so its views share every weight and a route changes
nothing.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from conadv_jax.base.errors import ConfigError
from conadv_jax.models.network import Network
from conadv_jax.models.norm import Layout


class EncoderBlock(nn.Module):
  """Attention, then two dense layers, each added to what it is made from.

    x <- x + attention(norm(x));  x <- x + dense(gelu(dense(norm(x))))

  Attributes:
    heads: number of them; each has 1 / heads of the channels.
    dtype: of activations.
    wide: type of parameters, of layer norm and of attention weights.
  """

  heads: int
  dtype: Any
  wide: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """x: tokens [N, T, D]; returns the same shape."""
    depth = x.shape[-1]
    types = {'dtype': self.dtype, 'param_dtype': self.wide}
    norm = functools.partial(nn.LayerNorm, **types)
    dense = functools.partial(nn.Dense, **types)
    qkv = dense(3 * depth, name='qkv')(norm(name='norm1')(x))
    y = self.attention(*jnp.split(qkv, 3, -1))
    x = x + dense(depth, name='project')(y)
    y = dense(4 * depth, name='expand')(norm(name='norm2')(x))
    return x + dense(depth, name='reduce')(nn.gelu(y))

  def attention(self, *qkv: jax.Array) -> jax.Array:
    """softmax(q k / sqrt(channels of a head)) v, for each head."""
    shape = qkv[0].shape
    q, k, v = (x.reshape(*shape[:2], self.heads, -1) for x in qkv)
    scores = jnp.einsum('nqhd,nkhd->nhqk', q, k) / q.shape[-1] ** 0.5
    weights = nn.softmax(scores.astype(self.wide)).astype(self.dtype)
    return jnp.einsum('nhqk,nkhd->nqhd', weights, v).reshape(shape)


class ViT(Network, kw_only=True):
  """Vision transformer with layer norm first and the mean of all tokens.

  Attributes:
    depth: number of blocks.
    width: channels of a token, D.
    heads: of attention, in each block.
    patch_px: side of the patch that becomes a token; 4 suits images of 8 to 32
      pixels.
  """

  depth: int
  width: int
  heads: int
  patch_px: int = 4

  def features(self, x: jax.Array, layout: Layout, train: bool) -> jax.Array:
    n, height, width, channels = x.shape
    p = self.patch_px
    if height % p or width % p:
      raise ConfigError(
        f'images of {height}x{width} pixels: the sides must be multiples of '
        f'the {p} pixels of a patch'
      )
    x = x.reshape(n, height // p, p, width // p, p, channels)
    x = x.swapaxes(2, 3).reshape(n, -1, p * p * channels)
    y = nn.Dense(
      self.width, dtype=self.dtype, param_dtype=self.wide, name='patches'
    )(x)
    position_TD = self.param(
      'pos_embedding', nn.initializers.normal(0.02), y.shape[1:], self.wide
    )
    y = y + position_TD.astype(self.dtype)
    for i in range(self.depth):
      y = EncoderBlock(self.heads, self.dtype, self.wide, name=f'block{i + 1}')(
        y
      )
    return nn.LayerNorm(dtype=self.dtype, param_dtype=self.wide, name='norm')(y)


vit_tiny = functools.partial(ViT, depth=4, width=64, heads=4)
