"""Prepares pixels for the network: types, normalisation, adversarial views."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from conadv_jax.config import Config
from conadv_jax.data.datasets import DatasetSpec

# `clean` and `aa` as far as the run needs them, uint8 [G, b, H, W, C], and
# `label`, int32 [G, b].
Batch = Mapping[str, jax.Array]


def wide_dtype(config: Config) -> Any:
  """Returns the type of pixels, loss and parameters: float32 or float64."""
  return jnp.promote_types(config.dtype, jnp.float32)


def normalize(spec: DatasetSpec, pixels: jax.Array) -> jax.Array:
  """Computes (pixels - mean) / std per channel; all in grey levels of 255."""
  mean = jnp.array(spec.mean, pixels.dtype)
  return (pixels - mean) / jnp.array(spec.std, pixels.dtype)


def perturbed(image: jax.Array, delta: jax.Array) -> jax.Array:
  """Computes clip(image + delta, 0, 255) in the type of `image`."""
  return jnp.clip(image + delta.astype(image.dtype), 0, 255)


def trained_views(
  config: Config, batch: Batch, delta: jax.Array | None
) -> dict[str, jax.Array]:
  """Makes the images that the network is trained on, by view.

  Args:
    config: names the views, and the one that `delta` belongs to.
    batch: uint8 images [G, b, H, W, C].
    delta: perturbation in grey levels [G, b, H, W, C]; None without `adv`.

  Returns:
    {view: float [G, b, H, W, C]} in grey levels, in the order of the views.
  """
  wide = wide_dtype(config)
  return {
    view: perturbed(batch[config.attacked].astype(wide), delta)
    if view == 'adv'
    else batch[view].astype(wide)
    for view, _ in config.views
  }
