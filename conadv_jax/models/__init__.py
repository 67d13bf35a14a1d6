"""Networks by name, behind one seam: `apply_fn`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from conadv_jax.config import unknown
from conadv_jax.models import resnet

Variables = dict[str, Any]
# (variables, images [G, V, b, H, W, C], routes of length V, train)
#   -> (logits [G, V, b, K], batch_stats)
ApplyFn = Callable[
  [Variables, jax.Array, tuple[int, ...], bool], tuple[jax.Array, Any]
]

MODELS = {
  'resnet8': resnet.resnet8,
  'resnet20': resnet.resnet20,
}


def create(name: str, **kwargs: Any) -> nn.Module:
  """The network called `name`.

  Raises:
    ConfigError: if there is none of that name.
  """
  if name not in MODELS:
    raise unknown('model', name, MODELS)
  return MODELS[name](**kwargs)


def make_apply_fn(model: nn.Module) -> ApplyFn:
  """`apply_fn` of a Linen module.

  Train mode returns the moved batch statistics; whoever must not move them
  drops them. Evaluation mode returns them as they came.
  """

  def apply_fn(variables, x, routes, train):
    if not train:
      return model.apply(variables, x, routes, False), variables['batch_stats']
    logits, updates = model.apply(
      variables, x, routes, True, mutable=['batch_stats']
    )
    return logits, updates['batch_stats']

  return apply_fn
