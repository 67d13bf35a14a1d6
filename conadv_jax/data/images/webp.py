"""WebP files, decoded by PIL: TensorFlow's op aborts on an animated one."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

HEADER_BYTES = 30  # they hold the size


def shape_of(start: bytes) -> np.ndarray:
  """int32 [3]: height, width and 3; zeros where the header is cut or unknown.

  Args:
    start: the first `HEADER_BYTES` of a file, or all of a shorter one.
  """
  start, height, width = start.ljust(HEADER_BYTES, b'\0'), 0, 0

  def number(first, stop):
    return int.from_bytes(start[first:stop], 'little')

  chunk = start[12:16]
  if chunk == b'VP8X':
    width, height = 1 + number(24, 27), 1 + number(27, 30)
  elif chunk == b'VP8L':
    bits = number(21, 25)
    width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
  elif chunk == b'VP8 ':
    width, height = number(26, 28) & 0x3FFF, number(28, 30) & 0x3FFF
  return np.array([height, width, 3], np.int32)


def pixels_of(data: bytes) -> np.ndarray:
  """uint8 [H, W, 3] of the first frame; empty if it cannot be decoded."""
  try:
    with Image.open(io.BytesIO(data), formats=['WEBP']) as image:
      return np.asarray(image.convert('RGB'))
  except OSError:
    return np.zeros([0, 0, 3], np.uint8)
