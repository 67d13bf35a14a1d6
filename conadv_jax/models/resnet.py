"""Residual networks; those for ImageNet with the layers and names of timm.

He et al. 2015 (arXiv:1512.03385) in the form known as v1.5: a bottleneck
strides in its 3x3 convolution. The last scale of each block starts at zero
(Goyal et al. 2017, arXiv:1706.02677), the head near zero (MLPerf). ResNet-D: He
et al. 2018 (arXiv:1812.01187).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from conadv_jax.base.errors import ConfigError
from conadv_jax.models.network import RoutedNetwork, SqueezeExcite
from conadv_jax.models.norm import Layout
from conadv_jax.models.stochastic import DropPath


def space_to_depth_conv(
  x: jax.Array,
  kernel: jax.Array,
  window_strides: tuple[int, int],
  padding: Any,
  **kwargs: Any,
) -> jax.Array:
  """The 7x7 stride-2 convolution as a 4x4 one on 2x2 pixels at a time.

  Equal to `lax.conv_general_dilated` with padding 3, but for the order of the
  sums. Three channels leave most of a matrix unit idle; twelve leave less
  (MLPerf's TPU stem). With k + 1 = 2a + p the tap k of the kernel, padded by a
  zero in front, is tap a of phase p:

    y[i] = sum_k w[k] x[2i + k - 3]
         = sum_{a, p} w[2a + p - 1] x[2 (i + a - 2) + p]

  Args:
    x: [N, H, W, C], even H and W.
    kernel: [7, 7, C, K].
  """
  assert kernel.shape[:2] == (7, 7) and window_strides == (2, 2)
  assert padding == [(3, 3), (3, 3)]
  n, h, w, c = x.shape
  x = x.reshape(n, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 2, 4, 5)
  kernel = jnp.pad(kernel, ((1, 0), (1, 0), (0, 0), (0, 0)))
  kernel = kernel.reshape(4, 2, 4, 2, c, -1).transpose(0, 2, 1, 3, 4, 5)
  return jax.lax.conv_general_dilated(
    x.reshape(n, h // 2, w // 2, 4 * c),
    kernel.reshape(4, 4, 4 * c, -1),
    (1, 1),
    ((2, 1), (2, 1)),
    **kwargs,
  )


class Block(nn.Module):
  """relu(shortcut(x) + branch(x)); the branch's last scale starts at zero.

  Attributes:
    width: channels of the 3x3 convolutions.
    bottleneck: 1x1, 3x3, 1x1 to 4 * width channels; or two 3x3.
    avg_shortcut: mean of 2x2 pixels before a 1x1 convolution without stride,
      in place of a 1x1 convolution with stride.
    se_ratio: of squeeze-excitation at the end of the branch; 0 = none.
    drop_path_rate: share of examples whose branch is dropped in training.
  """

  width: int
  stride: int
  bottleneck: bool
  avg_shortcut: bool
  se_ratio: float
  drop_path_rate: float
  conv: Callable[..., nn.Module]
  norm: Callable[..., nn.Module]

  @nn.compact
  def __call__(self, x: jax.Array, layout: Layout, train: bool) -> jax.Array:
    convs = [(self.width, 3, self.stride), (self.width, 3, 1)]
    if self.bottleneck:
      convs = [(self.width, 1, 1), convs[0], (4 * self.width, 1, 1)]
    y = x
    for i, args in enumerate(convs, start=1):
      last = i == len(convs)
      init = nn.initializers.zeros if last else nn.initializers.ones
      y = self.conv(*args, name=f'conv{i}')(y)
      y = self.norm(scale_init=init, name=f'norm{i}')(y, layout, train)
      y = y if last else nn.relu(y)
    if self.se_ratio:
      inner = max(8, int(y.shape[-1] * self.se_ratio + 4) // 8 * 8)
      y = SqueezeExcite(inner, nn.relu, self.conv, name='se')(y)
    y = DropPath(self.drop_path_rate, name='drop_path')(y, layout)
    if self.stride > 1 or x.shape[-1] != y.shape[-1]:
      x = self._shortcut(x, y.shape[-1], layout, train)
    return nn.relu(x + y)

  def _shortcut(self, x, features, layout, train):
    stride = self.stride
    if self.avg_shortcut and stride > 1:
      # Of an odd side the last pixel is alone, and its mean is itself.
      window = (stride, stride)
      x = nn.avg_pool(x, window, window, 'SAME', count_include_pad=False)
      stride = 1
    x = self.conv(features, 1, stride, name='conv_shortcut')(x)
    return self.norm(name='norm_shortcut')(x, layout, train)


class ResNet(RoutedNetwork, kw_only=True):
  """ResNet, for images from about 32 pixels, or of 8 to 32 with stem 'conv3'.

  Attributes:
    blocks: per stage.
    bottleneck: blocks of three convolutions, not two.
    width: channels of the 3x3 convolutions of the first stage; doubled in each
      later one.
    stem: 'conv7'; 'deep' for three 3x3 convolutions (ResNet-D); 'conv3' for one
      of stride 1 and no pooling (arXiv:1512.03385, section 4.2).
    shortcut: 'conv', or 'avg' for the mean before it (ResNet-D).
    se_ratio: inner width of squeeze-excitation, as a share of the channels and
      rounded to a multiple of 8; 0 = none.
    drop_path_rate: of the last block, rising linearly from 0 of the first.
    space_to_depth: compute the 7x7 stem by `space_to_depth_conv`.
    symmetric: how convolutions are padded; see `network.conv`.
  """

  blocks: tuple[int, ...]
  bottleneck: bool = False
  width: int = 64
  stem: str = 'conv7'
  shortcut: str = 'conv'
  se_ratio: float = 0.0
  drop_path_rate: float = 0.0
  space_to_depth: bool = False
  symmetric: bool = True

  def features(self, x: jax.Array, layout: Layout, train: bool) -> jax.Array:
    conv, norm = self.parts(self.symmetric)
    y = self._stem(x, conv, norm, layout, train)
    new_block = self.block_class(Block)
    index, last = 0, sum(self.blocks) - 1
    for stage, count in enumerate(self.blocks):
      for i in range(count):
        y = new_block(
          width=self.width * 2**stage,
          stride=2 if stage and not i else 1,
          bottleneck=self.bottleneck,
          avg_shortcut=self.shortcut == 'avg',
          se_ratio=self.se_ratio,
          drop_path_rate=self.drop_path_rate * index / last,
          conv=conv,
          norm=norm,
          name=f'stage{stage + 1}_block{i + 1}',
        )(y, layout, train)
        index += 1
    return y

  def _stem(self, x, conv, norm, layout, train):
    """A quarter of the side: stride 2, then the largest of 3x3, stride 2.

    Of the small networks, the whole side.
    """
    if self.stem == 'conv3':
      x = conv(self.width, 3, name='stem')(x)
      return nn.relu(norm(name='stem_norm')(x, layout, train))
    if self.stem == 'deep':
      for i, stride in enumerate((2, 1), start=1):
        x = conv(self.width // 2, 3, stride, name=f'stem{i}')(x)
        x = nn.relu(norm(name=f'stem{i}_norm')(x, layout, train))
      x = conv(self.width, 3, name='stem3')(x)
    elif self.space_to_depth:
      if x.shape[1] % 2 or x.shape[2] % 2:
        raise ConfigError(
          f'network.space_to_depth=True: images of {x.shape[1]}x{x.shape[2]} '
          'pixels; needs even sides, or set it to False'
        )
      function = space_to_depth_conv
      x = conv(self.width, 7, 2, conv_general_dilated=function, name='stem')(x)
    else:
      x = conv(self.width, 7, 2, name='stem')(x)
    x = nn.relu(norm(name='stem_norm')(x, layout, train))
    return nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))


def timm_module(path: str) -> str:
  """'stage1_block2/conv3' -> 'layer1.1.conv3': where timm has a module.

  torchvision's names of the plain networks are the same.
  """
  if block := re.match(r'stage(\d)_block(\d+)/(.*)', path):
    inner = re.sub(r'^norm(\d)', r'bn\1', block[3])
    inner = {
      'conv_shortcut': 'downsample.0',
      'norm_shortcut': 'downsample.1',
      'se/reduce': 'se.fc1',
      'se/expand': 'se.fc2',
    }.get(inner, inner)
    return f'layer{block[1]}.{int(block[2]) - 1}.{inner}'
  return {'stem': 'conv1', 'stem_norm': 'bn1', 'head': 'fc'}[path]


def timm_module_d(path: str) -> str:
  """`timm_module` of networks with the stem and shortcut of ResNet-D."""
  stem = {
    'stem1': 'conv1.0',
    'stem1_norm': 'conv1.1',
    'stem2': 'conv1.3',
    'stem2_norm': 'conv1.4',
    'stem3': 'conv1.6',
  }
  if path in stem:
    return stem[path]
  # The mean comes first in the shortcut.
  name = timm_module(path)
  name = re.sub(r'downsample\.1$', 'downsample.2', name)
  return re.sub(r'downsample\.0$', 'downsample.1', name)


# Of depth 6n + 2, with a projection in place of the padded shortcut.
_small = functools.partial(ResNet, width=16, stem='conv3', symmetric=False)
resnet8 = functools.partial(_small, blocks=(1, 1, 1))
resnet20 = functools.partial(_small, blocks=(3, 3, 3))
resnet18 = functools.partial(ResNet, blocks=(2, 2, 2, 2))
resnet18_cifar = functools.partial(resnet18, stem='conv3')
resnet34 = functools.partial(ResNet, blocks=(3, 4, 6, 3))
resnet50 = functools.partial(ResNet, blocks=(3, 4, 6, 3), bottleneck=True)
resnet101 = functools.partial(ResNet, blocks=(3, 4, 23, 3), bottleneck=True)
resnet152 = functools.partial(ResNet, blocks=(3, 8, 36, 3), bottleneck=True)
resnet200 = functools.partial(ResNet, blocks=(3, 24, 36, 3), bottleneck=True)
resnet50d = functools.partial(resnet50, stem='deep', shortcut='avg')
seresnet50 = functools.partial(resnet50, se_ratio=1 / 16)
