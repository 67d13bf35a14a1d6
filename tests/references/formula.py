"""Weights and images by a formula, so that no file is needed to share them."""

import re
import zlib

import numpy as np

# Scales that end (or nearly end) a residual branch are small, so that sums over
# up to 66 blocks stay of order one.
_BRANCH_END = re.compile(
  r'layer\d+\.\d+\.bn[23]\.weight|blocks\.\d+\.[1-9]\d*\.bn[23]\.weight'
)


def uniform(name, shape):
  """Numbers of mean 0 and variance 1, float64, the same ones everywhere.

  From the bits of Philox, which NumPy keeps as they are, while the streams of
  its distributions may change between versions.
  """
  bits = np.random.Philox(key=zlib.crc32(name.encode()))
  bits = bits.random_raw(int(np.prod(shape, dtype=np.int64)))
  return ((bits >> 11) * 2.0**-52 - 1).reshape(shape) * np.sqrt(3.0)


def value(name, shape):
  """Weights for a name of timm's, float32."""
  if name.endswith('num_batches_tracked'):
    return np.zeros(shape, np.int64)
  noise = uniform(name, shape)
  if len(shape) >= 2:
    noise = noise * np.sqrt(2 / np.prod(shape[1:]))
  elif name.endswith('running_var'):
    noise = 1 + 0.3 * noise
  elif name.endswith('.weight'):
    noise = (0.4 if _BRANCH_END.search(name) else 1) * (1 + 0.2 * noise)
  else:
    noise = 0.2 * noise
  return noise.astype(np.float32)


def state_dict(shapes):
  """{name: shape} -> {name: array}."""
  return {name: value(name, tuple(shape)) for name, shape in shapes.items()}


def images(count, side_px):
  """[count, side_px, side_px, 3] float32, normalised."""
  shape = (count, side_px, side_px, 3)
  return uniform('images', shape).astype(np.float32)
