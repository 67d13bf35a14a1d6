"""The gradient noise scale, from gradients that a step has anyway."""

from __future__ import annotations

import jax

from conadv_jax.base.fields import check
from conadv_jax.config import Config
from conadv_jax.devices.mesh import Mesh


def parts(config: Config, mesh: Mesh) -> int:
  """Counts the parts of a batch that have a gradient of their own."""
  return config.microbatches * mesh.size


def check_parts(config: Config, mesh: Mesh) -> None:
  """Raises ConfigError if `noise_scale` is asked of what cannot tell it."""
  if not config.noise_scale:
    return
  fix = (
    'the gradient of a batch is computed as a whole; use several devices, or '
    'microbatches=2'
  )
  check(parts(config, mesh) > 1, 'noise_scale', True, fix)
  fix = (
    f'method {config.method!r} mixes gradients of two batches, whose noise is '
    'less; set it to False'
  )
  check(config.ascent != 'lookahead', 'noise_scale', True, fix)
  fix = (
    f'batch-norm groups of {config.bn_group_size} span devices, so that their '
    'gradients are not those of parts; use a smaller bn_group_size'
  )
  check(mesh.shape['bn'] == 1, 'noise_scale', True, fix)


def estimates(
  batch_size: int, count: int, part_square: jax.Array, square: jax.Array
) -> dict[str, jax.Array]:
  """Estimates gradient and noise from squared norms at two batch sizes.

  With |g_B|^2 of the batch of B and the mean |g_b|^2 over its parts of b,

    noise_square = (B |g_B|^2 - b |g_b|^2) / (B - b)         of |G|^2
    noise_trace  = (|g_b|^2 - |g_B|^2) / (1 / b - 1 / B)     of tr(Sigma)
    noise_scale  = noise_trace / noise_square

  where G and Sigma are mean and covariance of the gradient of one example, with
  all its views. Batches far below tr(Sigma) / |G|^2 are mostly noise, and
  larger ones pay (McCandlish et al. 2018, arXiv:1812.06162, appendix A.1). The
  first two are unbiased, the ratio is not: average both over steps first.

  Args:
    batch_size: B.
    count: of parts, B / b.
    part_square: mean squared norm of the gradients of parts.
    square: squared norm of the gradient of the batch.
  """
  part = batch_size / count
  trace = (part_square - square) / (1 / part - 1 / batch_size)
  square = (batch_size * square - part * part_square) / (batch_size - part)
  return {
    'noise_square': square,
    'noise_trace': trace,
    'noise_scale': trace / square,
  }
