"""Residual networks for images of 8 to 32 pixels (He et al. 2015)."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from conadv_jax.models import layers
from conadv_jax.models.norm import Layout, RoutedBatchNorm

_KERNEL_INIT = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')


class BasicBlock(nn.Module):
  """Two 3x3 convolutions and a shortcut; the last scale starts at zero."""

  features: int
  stride: int
  conv: Any
  norm: Any

  @nn.compact
  def __call__(self, x: jax.Array, layout: Layout, train: bool) -> jax.Array:
    strides = (self.stride, self.stride)
    y = self.conv(self.features, (3, 3), strides, name='conv1')(x)
    y = nn.relu(self.norm(name='norm1')(y, layout, train))
    y = self.conv(self.features, (3, 3), name='conv2')(y)
    zeros = nn.initializers.zeros
    y = self.norm(scale_init=zeros, name='norm2')(y, layout, train)
    if x.shape != y.shape:
      x = self.conv(self.features, (1, 1), strides, name='conv_shortcut')(x)
      x = self.norm(name='norm_shortcut')(x, layout, train)
    return nn.relu(x + y)


class SmallResNet(nn.Module):
  """ResNet of depth 6n + 2 with three stages, strides 1, 2, 2.

  arXiv:1512.03385, section 4.2; deviations: projections in place of padded
  shortcuts, zero-initialised last scale of each block (arXiv:1706.02677).

  Attributes:
    blocks_per_stage: n.
    num_classes: K.
    num_routes: R, batch-norm rows.
    bn_axis: mesh axis over whose devices a batch-norm group lies, or None.
    width: channels of the first stage; doubled in each later one.
    dtype: of activations; parameters and logits are float32 or wider.
  """

  blocks_per_stage: int
  num_classes: int
  num_routes: int
  bn_axis: str | None = None
  width: int = 16
  bn_momentum: float = 0.9
  bn_epsilon: float = 1e-5
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    routes: tuple[int, ...],
    train: bool,
    examples: jax.Array | None = None,
  ) -> jax.Array:
    """x: normalised images [G, V, b, H, W, C] -> logits [G, V, b, K]."""
    layout = Layout(x.shape[0], routes, self.bn_axis, examples)
    wide = jnp.promote_types(self.dtype, jnp.float32)
    conv = functools.partial(
      nn.Conv,
      use_bias=False,
      padding='SAME',
      kernel_init=_KERNEL_INIT,
      conv_general_dilated=layers.conv_general_dilated,
      dtype=self.dtype,
      param_dtype=wide,
    )
    norm = functools.partial(
      RoutedBatchNorm,
      num_routes=self.num_routes,
      momentum=self.bn_momentum,
      epsilon=self.bn_epsilon,
      dtype=self.dtype,
    )
    y = conv(self.width, (3, 3), name='stem')(layout.fold(x))
    y = nn.relu(norm(name='stem_norm')(y, layout, train))
    for stage in range(3):
      for block in range(self.blocks_per_stage):
        y = BasicBlock(
          features=self.width * 2**stage,
          stride=2 if stage and not block else 1,
          conv=conv,
          norm=norm,
          name=f'stage{stage + 1}_block{block + 1}',
        )(y, layout, train)
    y = y.astype(wide).mean((1, 2))
    logits = nn.Dense(
      self.num_classes,
      kernel_init=nn.initializers.normal(0.01),
      dtype=wide,
      param_dtype=wide,
      name='head',
    )(y)
    return layout.unfold(logits)


resnet8 = functools.partial(SmallResNet, blocks_per_stage=1)
resnet20 = functools.partial(SmallResNet, blocks_per_stage=3)
