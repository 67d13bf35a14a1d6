"""What the networks share: views folded to one axis, parts, and the head."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from conadv_jax.models import layers
from conadv_jax.models.norm import Layout, RoutedBatchNorm
from conadv_jax.models.stochastic import Dropout

# Normal, not truncated, over the fan out.
_KERNEL_INIT = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')


def conv(
  features: int,
  size: int,
  stride: int = 1,
  symmetric: bool = False,
  platform: str = '',
  **kwargs: Any,
) -> nn.Conv:
  """Returns a square convolution without bias.

  Every convolution of a network is made here.

  Args:
    features: channels of the result.
    size: side of the kernel, k.
    stride: in both directions.
    symmetric: pad by k // 2 on both sides, as PyTorch does. Else by
      TensorFlow's 'SAME', which for stride 2 pads an even side by one pixel
      more at its end than at its start.
    platform: of the devices; see `layers.convolution`.
    **kwargs: fields of `nn.Conv`.
  """
  fields = {
    'use_bias': False,
    'kernel_init': _KERNEL_INIT,
    'conv_general_dilated': layers.convolution(platform),
  }
  return nn.Conv(
    features,
    (size, size),
    (stride, stride),
    padding=size // 2 if symmetric else 'SAME',
    **fields | kwargs,
  )


class SqueezeExcite(nn.Module):
  """x * sigmoid(expand(activation(reduce(mean of x over pixels)))).

  Hu et al. 2017 (arXiv:1709.01507).

  Attributes:
    features: channels between the two convolutions.
  """

  features: int
  activation: Callable[[jax.Array], jax.Array]
  conv: Callable[..., nn.Module]

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    wide = jnp.promote_types(x.dtype, jnp.float32)
    y = x.mean((1, 2), keepdims=True, dtype=wide).astype(x.dtype)
    y = self.conv(self.features, 1, use_bias=True, name='reduce')(y)
    y = self.activation(y)
    y = self.conv(x.shape[-1], 1, use_bias=True, name='expand')(y)
    return x * nn.sigmoid(y)


class Network(nn.Module):
  """A network of one axis of examples, for views: a subclass has `features`.

  fold -> features -> mean over pixels or tokens -> dropout -> dense -> unfold

  Attributes:
    num_classes: K.
    dropout_rate: before the last layer.
    dtype: of activations; parameters and logits are float32 or wider.
    platform: of the devices that it is built for: 'cpu' changes how
      convolutions are computed, see `layers`.
  """

  num_classes: int
  dropout_rate: float = 0.0
  head_init: nn.initializers.Initializer = nn.initializers.normal(0.01)
  dtype: Any = jnp.float32
  platform: str = ''
  bn_axis: ClassVar[str | None] = None

  @property
  def wide(self) -> Any:
    """Type of parameters and logits."""
    return jnp.promote_types(self.dtype, jnp.float32)

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
    y = self.features(layout.fold(x), layout, train)
    y = y.astype(self.wide).mean(tuple(range(1, y.ndim - 1)))
    y = Dropout(self.dropout_rate, name='dropout')(y, layout)
    logits = nn.Dense(
      self.num_classes,
      kernel_init=self.head_init,
      dtype=self.wide,
      param_dtype=self.wide,
      name='head',
    )(y)
    return layout.unfold(logits)

  def features(self, x: jax.Array, layout: Layout, train: bool) -> jax.Array:
    """Images [N, H, W, C] -> features [N, ..., D]; N is `layout`'s."""
    raise NotImplementedError


class RoutedNetwork(Network):
  """A convolutional network with routed batch norm.

  Attributes:
    num_routes: R, batch-norm rows.
    bn_axis: mesh axis over whose devices a batch-norm group lies, or None.
    remat: 'none', or 'blocks' to keep only their inputs for the backward pass.
  """

  num_routes: int = 1
  bn_axis: str | None = None
  bn_momentum: float = 0.9
  bn_epsilon: float = 1e-5
  remat: str = 'none'

  def parts(
    self, symmetric: bool
  ) -> tuple[Callable[..., nn.Module], Callable[..., nn.Module]]:
    """Returns what makes convolutions (see `conv`), and batch norms."""
    new_conv = functools.partial(
      conv,
      symmetric=symmetric,
      platform=self.platform,
      dtype=self.dtype,
      param_dtype=self.wide,
    )
    norm = functools.partial(
      RoutedBatchNorm,
      num_routes=self.num_routes,
      momentum=self.bn_momentum,
      epsilon=self.bn_epsilon,
      dtype=self.dtype,
    )
    return new_conv, norm

  def block_class(self, block: type[nn.Module]) -> type[nn.Module]:
    """Returns `block`, called with (x, layout, train), under `remat`."""
    if self.remat == 'none':
      return block
    return nn.remat(block, static_argnums=(3,))
