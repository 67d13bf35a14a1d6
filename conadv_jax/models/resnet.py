"""Residual networks for ImageNet, with the layers and names of timm.

He et al. 2015 (arXiv:1512.03385) in the form known as v1.5: a bottleneck
strides in its 3x3 convolution. The last scale of each block starts at zero
(Goyal et al. 2017, arXiv:1706.02677), the head near zero (MLPerf). ResNet-D: He
et al. 2018 (arXiv:1812.01187). Squeeze-excitation: Hu et al. 2017
(arXiv:1709.01507).
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
from conadv_jax.models import layers
from conadv_jax.models.norm import Layout, RoutedBatchNorm
from conadv_jax.models.stochastic import DropPath

_KERNEL_INIT = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')


def conv(
  features: int,
  size: int,
  stride: int = 1,
  conv_general_dilated: Callable[..., jax.Array] = layers.conv_general_dilated,
  **kwargs: Any,
) -> nn.Conv:
  """A square convolution, padded alike on both sides as in PyTorch.

  Every convolution of this file is made here.
  """
  return nn.Conv(
    features,
    (size, size),
    (stride, stride),
    padding=size // 2,
    kernel_init=_KERNEL_INIT,
    conv_general_dilated=conv_general_dilated,
    **kwargs,
  )


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


class SqueezeExcite(nn.Module):
  """x * sigmoid(expand(relu(reduce(mean of x over pixels)))).

  The inner width is `ratio` of the channels, rounded to a multiple of 8.
  """

  ratio: float
  conv: Callable[..., nn.Module]

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    wide = jnp.promote_types(x.dtype, jnp.float32)
    channels = x.shape[-1]
    inner = max(8, int(channels * self.ratio + 4) // 8 * 8)
    y = x.mean((1, 2), keepdims=True, dtype=wide).astype(x.dtype)
    y = nn.relu(self.conv(inner, 1, use_bias=True, name='reduce')(y))
    y = self.conv(channels, 1, use_bias=True, name='expand')(y)
    return x * nn.sigmoid(y)


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
      y = SqueezeExcite(self.se_ratio, self.conv, name='se')(y)
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


class ResNet(nn.Module):
  """ResNet with four stages, for images from about 32 pixels.

  Attributes:
    blocks: per stage.
    bottleneck: blocks of three convolutions, not two.
    num_classes: K.
    num_routes: R, batch-norm rows.
    bn_axis: mesh axis over whose devices a batch-norm group lies, or None.
    width: channels of the 3x3 convolutions of the first stage; doubled in each
      later one.
    stem: 'conv7', or 'deep' for three 3x3 convolutions (ResNet-D).
    shortcut: 'conv', or 'avg' for the mean before it (ResNet-D).
    se_ratio: inner width of squeeze-excitation; 0 = none.
    drop_path_rate: of the last block, rising linearly from 0 of the first.
    space_to_depth: compute the 7x7 stem by `space_to_depth_conv`.
    remat: 'none', or 'blocks' to keep only their inputs for the backward pass.
    dtype: of activations; parameters and logits are float32 or wider.
  """

  blocks: tuple[int, int, int, int]
  bottleneck: bool
  num_classes: int
  num_routes: int
  bn_axis: str | None = None
  width: int = 64
  stem: str = 'conv7'
  shortcut: str = 'conv'
  se_ratio: float = 0.0
  drop_path_rate: float = 0.0
  space_to_depth: bool = False
  remat: str = 'none'
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
    y = self._stem(layout.fold(x), new_conv, norm, layout, train)
    new_block = Block
    if self.remat == 'blocks':
      new_block = nn.remat(Block, static_argnums=(3,))
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
          conv=new_conv,
          norm=norm,
          name=f'stage{stage + 1}_block{i + 1}',
        )(y, layout, train)
        index += 1
    y = y.astype(wide).mean((1, 2))
    logits = nn.Dense(
      self.num_classes,
      kernel_init=nn.initializers.normal(0.01),
      dtype=wide,
      param_dtype=wide,
      name='head',
    )(y)
    return layout.unfold(logits)

  def _stem(self, x, new_conv, norm, layout, train):
    """A quarter of the side: stride 2, then the largest of 3x3, stride 2."""
    if self.stem == 'deep':
      for i, stride in enumerate((2, 1), start=1):
        x = new_conv(self.width // 2, 3, stride, name=f'stem{i}')(x)
        x = nn.relu(norm(name=f'stem{i}_norm')(x, layout, train))
      x = new_conv(self.width, 3, name='stem3')(x)
    elif self.space_to_depth:
      if x.shape[1] % 2 or x.shape[2] % 2:
        raise ConfigError(
          f'network.space_to_depth=True: images of {x.shape[1]}x{x.shape[2]} '
          'pixels; needs even sides, or set it to False'
        )
      function = space_to_depth_conv
      x = new_conv(
        self.width, 7, 2, conv_general_dilated=function, name='stem'
      )(x)
    else:
      x = new_conv(self.width, 7, 2, name='stem')(x)
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


resnet18 = functools.partial(ResNet, blocks=(2, 2, 2, 2), bottleneck=False)
resnet34 = functools.partial(ResNet, blocks=(3, 4, 6, 3), bottleneck=False)
resnet50 = functools.partial(ResNet, blocks=(3, 4, 6, 3), bottleneck=True)
resnet101 = functools.partial(ResNet, blocks=(3, 4, 23, 3), bottleneck=True)
resnet152 = functools.partial(ResNet, blocks=(3, 8, 36, 3), bottleneck=True)
resnet200 = functools.partial(ResNet, blocks=(3, 24, 36, 3), bottleneck=True)
resnet50d = functools.partial(resnet50, stem='deep', shortcut='avg')
seresnet50 = functools.partial(resnet50, se_ratio=1 / 16)
