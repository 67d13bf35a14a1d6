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
from typing import NamedTuple

import flax.linen as nn
import jax

from conadv_jax.models.network import RoutedNetwork, SqueezeExcite
from conadv_jax.models.norm import Layout
from conadv_jax.models.stochastic import DropPath

# Over the fan out, as in TensorFlow: of a depthwise kernel, one output per
# filter, that is what Linen calls its fan in.
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
    y = SqueezeExcite(max(1, channels // 4), nn.swish, self.conv, name='se')(y)
    y = self.conv(self.features, 1, name='conv_project')(y)
    y = self.norm(name='norm_project')(y, layout, train)
    if self.stride > 1 or channels != self.features:
      return y
    return x + DropPath(self.drop_path_rate, name='drop_path')(y, layout)


class EfficientNet(RoutedNetwork):
  """EfficientNet, for images from about 32 pixels.

  Batch norm is TensorFlow's with bn_momentum=0.99 and bn_epsilon=1e-3.

  Attributes:
    width_factor: of all channels; see `scaled_features`.
    depth_factor: of the blocks of each stage; see `scaled_repeats`.
    drop_path_rate: of block i of n it is this * i / n, from i = 0.
    stages: before scaling.
  """

  width_factor: float = 1.0
  depth_factor: float = 1.0
  dropout_rate: float = 0.2
  drop_path_rate: float = 0.2
  stages: tuple[Stage, ...] = STAGES
  head_init: nn.initializers.Initializer = _HEAD_INIT
  bn_momentum: float = 0.99
  bn_epsilon: float = 1e-3

  def features(self, x: jax.Array, layout: Layout, train: bool) -> jax.Array:
    conv, norm = self.parts(symmetric=False)
    features = scaled_features(32, self.width_factor)
    y = conv(features, 3, 2, name='stem')(x)
    y = nn.swish(norm(name='stem_norm')(y, layout, train))
    y = self._blocks(y, conv, norm, layout, train)
    features = scaled_features(1280, self.width_factor)
    y = conv(features, 1, name='head_conv')(y)
    return nn.swish(norm(name='head_norm')(y, layout, train))

  def _blocks(self, y, conv, norm, layout, train):
    new_block = self.block_class(MBConv)
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
          conv=conv,
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
