"""EfficientNet-B0 to B8 (Tan and Le 2019, arXiv:1905.11946).

The layers of TensorFlow's implementation, which timm calls
`tf_efficientnet_b*`: 'SAME' padding, so that a convolution of stride 2 pads an
even side by one pixel more at its end than at its start.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from conadv_jax.models import layers
from conadv_jax.models.norm import Layout, RoutedBatchNorm
from conadv_jax.models.stochastic import Dropout, DropPath

# TensorFlow's own: a normal distribution, not truncated, over the fan out. That
# of a depthwise kernel, one output per filter, is what Linen calls its fan in.
_CONV_INIT = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')
_DEPTHWISE_INIT = nn.initializers.variance_scaling(2.0, 'fan_in', 'normal')
# Uniform within 1 / sqrt(K) of 0 for K classes.
_HEAD_INIT = nn.initializers.variance_scaling(1 / 3, 'fan_out', 'uniform')


class Stage(NamedTuple):
  """Blocks of one width; `stride` is that of the first, 1 in the others."""

  repeats: int
  features: int
  kernel_size: int
  stride: int
  expand_ratio: int


# Of B0, table 1 of the paper.
STAGES = (
  Stage(1, 16, 3, 1, 1),
  Stage(2, 24, 3, 2, 6),
  Stage(2, 40, 5, 2, 6),
  Stage(3, 80, 3, 2, 6),
  Stage(3, 112, 5, 1, 6),
  Stage(4, 192, 5, 2, 6),
  Stage(1, 320, 3, 1, 6),
)


def scaled_features(features: int, factor: float) -> int:
  """features * factor as a multiple of 8, not below 90 % of it."""
  exact = features * factor
  rounded = max(8, int(exact + 4) // 8 * 8)
  return rounded + 8 if rounded < 0.9 * exact else rounded


def scaled_repeats(repeats: int, factor: float) -> int:
  """repeats * factor, rounded up."""
  return math.ceil(repeats * factor)


def conv(features: int, size: int, stride: int = 1, **kwargs: Any) -> nn.Conv:
  """A square convolution with TensorFlow's 'SAME' padding.

  Every convolution of this file is made here.
  """
  kwargs = {'kernel_init': _CONV_INIT} | kwargs
  return nn.Conv(
    features,
    (size, size),
    (stride, stride),
    padding='SAME',
    conv_general_dilated=layers.conv_general_dilated,
    **kwargs,
  )


class SqueezeExcite(nn.Module):
  """x * sigmoid(expand(swish(reduce(mean of x over pixels)))).

  Attributes:
    features: channels between the two.
  """

  features: int
  conv: Callable[..., nn.Module]

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    wide = jnp.promote_types(x.dtype, jnp.float32)
    y = x.mean((1, 2), keepdims=True, dtype=wide).astype(x.dtype)
    y = self.conv(self.features, 1, use_bias=True, name='reduce')(y)
    y = self.conv(x.shape[-1], 1, use_bias=True, name='expand')(nn.swish(y))
    return x * nn.sigmoid(y)


class MBConv(nn.Module):
  """Expand (1x1), depthwise, squeeze-excitation, project (1x1); plus x.

  Swish after the first two, nothing after the last. No expansion where
  `expand_ratio` is 1; no shortcut where the shape changes. Squeeze-excitation
  has a quarter of the channels of x, not of the expanded ones.

  Attributes:
    features: channels of the result.
    drop_path_rate: share of examples whose branch is dropped in training.
  """

  features: int
  kernel_size: int
  stride: int
  expand_ratio: int
  drop_path_rate: float
  conv: Callable[..., nn.Module]
  norm: Callable[..., nn.Module]

  @nn.compact
  def __call__(self, x: jax.Array, layout: Layout, train: bool) -> jax.Array:
    channels = x.shape[-1]
    inner = channels * self.expand_ratio
    y = x
    if self.expand_ratio > 1:
      y = self.conv(inner, 1, name='conv_expand')(y)
      y = nn.swish(self.norm(name='norm_expand')(y, layout, train))
    y = self.conv(
      inner,
      self.kernel_size,
      self.stride,
      feature_group_count=inner,
      kernel_init=_DEPTHWISE_INIT,
      name='conv_depthwise',
    )(y)
    y = nn.swish(self.norm(name='norm_depthwise')(y, layout, train))
    y = SqueezeExcite(max(1, channels // 4), self.conv, name='se')(y)
    y = self.conv(self.features, 1, name='conv_project')(y)
    y = self.norm(name='norm_project')(y, layout, train)
    if self.stride > 1 or channels != self.features:
      return y
    return x + DropPath(self.drop_path_rate, name='drop_path')(y, layout)


class EfficientNet(nn.Module):
  """EfficientNet, for images from about 32 pixels.

  Batch norm is TensorFlow's with bn_momentum=0.99 and bn_epsilon=1e-3.

  Attributes:
    num_classes: K.
    num_routes: R, batch-norm rows.
    bn_axis: mesh axis over whose devices a batch-norm group lies, or None.
    width_factor: of all channels; see `scaled_features`.
    depth_factor: of the blocks of each stage; see `scaled_repeats`.
    dropout_rate: before the last layer.
    drop_path_rate: of block i of n it is this * i / n, from i = 0.
    stages: before scaling.
    remat: 'none', or 'blocks' to keep only their inputs for the backward pass.
    dtype: of activations; parameters and logits are float32 or wider.
  """

  num_classes: int
  num_routes: int
  bn_axis: str | None = None
  width_factor: float = 1.0
  depth_factor: float = 1.0
  dropout_rate: float = 0.2
  drop_path_rate: float = 0.2
  stages: tuple[Stage, ...] = STAGES
  remat: str = 'none'
  bn_momentum: float = 0.99
  bn_epsilon: float = 1e-3
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    routes: tuple[int, ...],
    train: bool,
    examples: jax.Array | None = None,
  ) -> jax.Array:
    """x: normalised images [G, V, b, H, W, 3] -> logits [G, V, b, K]."""
    layout = Layout(x.shape[0], routes, self.bn_axis, examples)
    wide = jnp.promote_types(self.dtype, jnp.float32)
    new_conv = functools.partial(
      conv, use_bias=False, dtype=self.dtype, param_dtype=wide
    )
    norm = functools.partial(
      RoutedBatchNorm,
      num_routes=self.num_routes,
      momentum=self.bn_momentum,
      epsilon=self.bn_epsilon,
      dtype=self.dtype,
    )
    features = scaled_features(32, self.width_factor)
    y = new_conv(features, 3, 2, name='stem')(layout.fold(x))
    y = nn.swish(norm(name='stem_norm')(y, layout, train))
    y = self._blocks(y, new_conv, norm, layout, train)
    features = scaled_features(1280, self.width_factor)
    y = new_conv(features, 1, name='head_conv')(y)
    y = nn.swish(norm(name='head_norm')(y, layout, train))
    y = y.astype(wide).mean((1, 2))
    y = Dropout(self.dropout_rate, name='dropout')(y, layout)
    logits = nn.Dense(
      self.num_classes,
      kernel_init=_HEAD_INIT,
      dtype=wide,
      param_dtype=wide,
      name='head',
    )(y)
    return layout.unfold(logits)

  def _blocks(self, y, new_conv, norm, layout, train):
    new_block = MBConv
    if self.remat == 'blocks':
      new_block = nn.remat(MBConv, static_argnums=(3,))
    counts = [scaled_repeats(s.repeats, self.depth_factor) for s in self.stages]
    index = 0
    for number, (stage, count) in enumerate(
      zip(self.stages, counts, strict=True), start=1
    ):
      for i in range(count):
        y = new_block(
          features=scaled_features(stage.features, self.width_factor),
          kernel_size=stage.kernel_size,
          stride=1 if i else stage.stride,
          expand_ratio=stage.expand_ratio,
          drop_path_rate=self.drop_path_rate * index / sum(counts),
          conv=new_conv,
          norm=norm,
          name=f'stage{number}_block{i + 1}',
        )(y, layout, train)
        index += 1
    return y


def timm_module(path: str) -> str:
  """'stage2_block1/conv_expand' -> 'blocks.1.0.conv_pw': timm's module."""
  block = re.match(r'stage(\d)_block(\d+)/(.*)', path)
  if not block:
    return {
      'stem': 'conv_stem',
      'stem_norm': 'bn1',
      'head_conv': 'conv_head',
      'head_norm': 'bn2',
      'head': 'classifier',
    }[path]
  modules = {
    'conv_expand': 'conv_pw',
    'norm_expand': 'bn1',
    'conv_depthwise': 'conv_dw',
    'norm_depthwise': 'bn2',
    'se/reduce': 'se.conv_reduce',
    'se/expand': 'se.conv_expand',
    'conv_project': 'conv_pwl',
    'norm_project': 'bn3',
  }
  if block[1] == '1':  # does not expand, and counts its layers differently
    modules |= {
      'norm_depthwise': 'bn1',
      'conv_project': 'conv_pw',
      'norm_project': 'bn2',
    }
  return f'blocks.{int(block[1]) - 1}.{int(block[2]) - 1}.{modules[block[3]]}'


def _variant(width_factor: float, depth_factor: float, dropout_rate: float):
  return functools.partial(
    EfficientNet,
    width_factor=width_factor,
    depth_factor=depth_factor,
    dropout_rate=dropout_rate,
  )


efficientnet_b0 = _variant(1.0, 1.0, 0.2)
efficientnet_b1 = _variant(1.0, 1.1, 0.2)
efficientnet_b2 = _variant(1.1, 1.2, 0.3)
efficientnet_b3 = _variant(1.2, 1.4, 0.3)
efficientnet_b4 = _variant(1.4, 1.8, 0.4)
efficientnet_b5 = _variant(1.6, 2.2, 0.4)
efficientnet_b6 = _variant(1.8, 2.6, 0.5)
efficientnet_b7 = _variant(2.0, 3.1, 0.5)
efficientnet_b8 = _variant(2.2, 3.6, 0.5)
