"""Image operations of AutoAugment as TensorFlow graph ops, equal to Pillow's.

Every function maps a uint8 image [H, W, C], of any H and W up to 16,384, to one
of the same shape. C is known in the graph: 3 is Pillow's mode RGB, 1 its mode
L. Arguments after the image may be tensors.

What costs time here is passes over the pixels. A table look-up takes as long as
five arithmetic passes and a `tf.where` on bytes as three, so that only the
operations that need a histogram go through a table; and broadcasting along an
innermost axis of three is slow, so that rows are handled as vectors of C * W.
"""

from __future__ import annotations

import math

import numpy as np
import tensorflow as tf

FILL = 128  # grey level of pixels that come from outside of the image

# L = (19595 R + 38470 G + 7471 B + 2**15) >> 16, Pillow's ITU-R 601-2 luma. All
# terms and the sum are exact in float32: they have at most 24 bits.
_LUMA = np.array([19595, 38470, 7471], np.float32) / 2**16
_SMOOTH_CENTER, _SMOOTH_SUM = (
  5,
  13,
)  # Pillow's SMOOTH filter; 1 around the center


def auto_contrast(image: tf.Tensor) -> tf.Tensor:
  """Stretches each channel to [0, 255]; `ImageOps.autocontrast`."""
  index = _table_index(image)
  present = _histogram(index, _channels(image)) > 0
  low = tf.argmax(present, axis=1)
  high = 255 - tf.argmax(present[:, ::-1], axis=1)
  # float64, as Pillow: it truncates values that are whole but for rounding.
  span = tf.cast(tf.maximum(high - low, 1), tf.float64)
  scale = 255.0 / span
  offset = -tf.cast(low, tf.float64) * scale
  levels = tf.range(256, dtype=tf.float64)
  table = tf.cast(levels * scale[:, None] + offset[:, None], tf.int32)
  table = tf.clip_by_value(table, 0, 255)
  # A channel of one grey level stays as it is.
  table = tf.where((high > low)[:, None], table, tf.range(256))
  return _look_up(table, index, image)


def equalize(image: tf.Tensor) -> tf.Tensor:
  """Makes each channel's histogram flat; `ImageOps.equalize`.

  With n(v) pixels of grey level v in a channel, and the brightest at v = last,
  step = (sum(n) - n(last)) // 255, and v becomes
  min(255, (step // 2 + sum_{u<v} n(u)) // step), or stays where step is 0.
  """
  index = _table_index(image)
  counts = _histogram(index, _channels(image))
  last = 255 - tf.argmax((counts > 0)[:, ::-1], axis=1)
  last_count = tf.gather(counts, last, axis=1, batch_dims=1)
  step = ((tf.reduce_sum(counts, axis=1) - last_count) // 255)[:, None]
  below = tf.cumsum(counts, axis=1, exclusive=True)
  table = tf.minimum((step // 2 + below) // tf.maximum(step, 1), 255)
  table = tf.where(step > 0, table, tf.range(256))
  return _look_up(table, index, image)


def solarize(image: tf.Tensor, threshold: tf.Tensor) -> tf.Tensor:
  """Inverts grey levels >= `threshold`, uint8; with 0, `ImageOps.invert`."""
  # 255 - v is v with all bits flipped.
  return tf.bitwise.bitwise_xor(image, _mask(image >= threshold))


def solarize_add(image: tf.Tensor, addition: tf.Tensor) -> tf.Tensor:
  """Adds `addition`, uint8, to grey levels below 128, up to 255."""
  room = tf.minimum(tf.bitwise.invert(image), addition)
  return image + tf.bitwise.bitwise_and(room, _mask(image < 128))


def posterize(image: tf.Tensor, mask: tf.Tensor) -> tf.Tensor:
  """Keeps the bits of each grey level that are set in `mask`, uint8."""
  return tf.bitwise.bitwise_and(image, mask)


def brightness(image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
  """Black blended with the image; `ImageEnhance.Brightness`."""
  pixels = _rows(image)
  return _blend(tf.zeros([]), pixels, factor, image)


def contrast(image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
  """The mean luma, rounded, blended with the image; `ImageEnhance.Contrast`.

  The TPU code means the same, but its mean is the number of pixels over 256:
  any image of 224 x 224 is blended with grey 196. We follow Pillow.
  """
  pixels = _rows(image)
  luma = pixels
  if _channels(image) == 3:
    exact = tf.linalg.matvec(tf.reshape(pixels, [-1, 3]), _LUMA)
    luma = tf.floor(exact + 0.5)
  mean = tf.reduce_mean(tf.cast(luma, tf.float64))
  return _blend(
    tf.cast(tf.floor(mean + 0.5), tf.float32), pixels, factor, image
  )


def color(image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
  """The grey image blended with the image; `ImageEnhance.Color`.

  One channel stays as it is.
  """
  if _channels(image) == 1:
    return image
  pixels = tf.reshape(_rows(image), [-1, 3])
  luma = tf.matmul(pixels, np.repeat(_LUMA[:, None], 3, axis=1))
  return _blend(tf.floor(luma + 0.5), pixels, factor, image)


def sharpness(image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
  """The smoothed image blended with the image; `ImageEnhance.Sharpness`.

  Smoothed: 3 x 3 weights, 1 around 5, divided by 13 and rounded, except for the
  outermost pixels, which stay.
  """
  (height, width), channels = _size(image), _channels(image)
  rows = _rows(image)
  padded = tf.pad(rows, [[1, 1], [channels, channels]])
  total = padded[:-2] + padded[1:-1] + padded[2:]
  left, right = total[:, : -2 * channels], total[:, 2 * channels :]
  total = left + total[:, channels:-channels] + right
  total += (_SMOOTH_CENTER - 1) * rows
  # Never a tie: a sum of whole numbers is no odd multiple of 6.5.
  smooth = tf.floor(total * (1 / _SMOOTH_SUM) + 0.5)
  inner_y = tf.cast(_inside(height, 1, height - 1), tf.float32)
  inner_x = tf.cast(_inside(width, 1, width - 1), tf.float32)
  inner = inner_y[:, None] * tf.repeat(inner_x, channels)
  smooth = rows + (smooth - rows) * inner
  return _blend(smooth, rows, factor, image)


def cutout(
  image: tf.Tensor, half_px: tf.Tensor, center: tf.Tensor
) -> tf.Tensor:
  """Fills a square with grey.

  Args:
    image: uint8 [H, W, C].
    half_px: int32; the square has sides of 2 * half_px, clipped to the image.
    center: float32 [2] in [0, 1), as fractions of height and width; the square
      spans rows floor(y * H) - half_px to floor(y * H) + half_px - 1.
  """
  (height, width), channels = _size(image), _channels(image)
  size = tf.cast(tf.stack([height, width]), tf.float32)
  y, x = tf.unstack(tf.cast(center * size, tf.int32))
  in_y = _mask(_inside(height, y - half_px, y + half_px))
  in_x = tf.repeat(_mask(_inside(width, x - half_px, x + half_px)), channels)
  mask = tf.bitwise.bitwise_and(in_y[:, None], in_x)
  rows = tf.reshape(image, [height, -1])
  difference = tf.bitwise.bitwise_xor(rows, tf.constant(FILL, tf.uint8))
  change = tf.bitwise.bitwise_and(difference, mask)
  return tf.reshape(tf.bitwise.bitwise_xor(rows, change), tf.shape(image))


def affine(image: tf.Tensor, matrix: tf.Tensor) -> tf.Tensor:
  """Nearest-neighbour affine transform in 16.16 fixed point, as Pillow's.

  `Image.transform(size, AFFINE, data, NEAREST, fillcolor=(128,) * C)`. Output
  pixel (x, y) is the input pixel (a x + b y + c, d x + e y + f) >> 16.

  Args:
    image: uint8 [H, W, C].
    matrix: float64 [6, 3], from `rotation` and its like: (a, ..., f) / 2**16 as
      linear functions of (1, W, H).
  """
  height, width = _size(image)
  size = tf.cast(tf.stack([1, width, height]), tf.float64)
  exact = tf.linalg.matvec(matrix, size)
  a, b, c, d, e, f = tf.unstack(
    tf.cast(tf.floor(exact * 2**16 + 0.5), tf.int32)
  )
  # Shifted by one, for the frame of grey around the image.
  one, bits = 1 << 16, tf.constant(16)
  x, y = tf.range(width), tf.range(height)
  from_x = tf.bitwise.right_shift((a * x + c + one) + (b * y)[:, None], bits)
  from_y = tf.bitwise.right_shift((d * x + f + one) + (e * y)[:, None], bits)
  from_x = _clip(from_x, 0, width + 1)
  from_y = _clip(from_y, 0, height + 1)
  framed = tf.pad(image, [[1, 1], [1, 1], [0, 0]], constant_values=FILL)
  # gather_nd takes two thirds of the time of gather here.
  return tf.gather_nd(
    tf.reshape(framed, [-1, _channels(image)]),
    (from_y * (width + 2) + from_x)[..., None],
  )


def rotation(degrees: float) -> np.ndarray:
  """Counter-clockwise about the centre, as `Image.rotate`; for `affine`."""
  angle = math.radians(degrees)
  cos, sin = math.cos(angle), math.sin(angle)
  linear = np.array([[cos, -sin], [sin, cos]])
  # The centre, (W / 2, H / 2), stays where it is.
  about = (np.eye(2) - linear) / 2
  return _affine_matrix(linear, np.column_stack([np.zeros(2), about]))


def shear(x: float, y: float) -> np.ndarray:
  """Output (x', y') shows the input at (x' + x y', y' + y x'); for `affine`."""
  return _affine_matrix(np.array([[1, x], [y, 1]]), np.zeros([2, 3]))


def translation(x_px: float, y_px: float) -> np.ndarray:
  """Output (x', y') shows the input at (x' + x_px, y' + y_px); for `affine`."""
  shift = np.array([[x_px, 0, 0], [y_px, 0, 0]])
  return _affine_matrix(np.eye(2), shift)


def _affine_matrix(linear: np.ndarray, shift: np.ndarray) -> np.ndarray:
  """[6, 3] from [2, 2] and [2, 3], the latter linear in (1, W, H)."""
  shift = np.array(shift, np.float64)
  shift[:, 0] += linear.sum(axis=1) / 2  # the centre of pixel 0 is at 1/2
  constant = np.pad(linear[..., None], [(0, 0), (0, 0), (0, 2)])
  return np.concatenate([constant, shift[:, None]], axis=1).reshape(6, 3)


def _blend(degenerate, pixels, factor, image: tf.Tensor) -> tf.Tensor:
  """degenerate + factor (pixels - degenerate), truncated; `Image.blend`.

  In float32 and this order, as Pillow, so that it truncates the same numbers.
  """
  mixed = degenerate + factor * (pixels - degenerate)
  return tf.reshape(
    tf.cast(_clip(mixed, 0.0, 255.0), tf.uint8), tf.shape(image)
  )


def _table_index(image: tf.Tensor) -> tf.Tensor:
  """int32 [H, C W]: 256 * channel + grey level."""
  height, width = _size(image)
  offset = tf.tile(256 * tf.range(_channels(image)), [width])
  return tf.cast(tf.reshape(image, [height, -1]), tf.int32) + offset


def _histogram(index: tf.Tensor, channels: int) -> tf.Tensor:
  """int32 [C, 256] from `_table_index`."""
  counts = tf.raw_ops.DenseBincount(
    input=tf.reshape(index, [-1]),
    size=256 * channels,
    weights=tf.zeros([0], tf.int32),
  )
  return tf.reshape(counts, [channels, 256])


def _look_up(table: tf.Tensor, index: tf.Tensor, image: tf.Tensor) -> tf.Tensor:
  """`table` int32 [C, 256] at `_table_index`, in the shape of the image."""
  flat = tf.reshape(tf.cast(table, tf.uint8), [-1])
  return tf.reshape(tf.gather_nd(flat, index[..., None]), tf.shape(image))


def _inside(count, start, stop) -> tf.Tensor:
  """bool [count]: start <= i < stop."""
  i = tf.range(count)
  return (i >= start) & (i < stop)


def _mask(condition: tf.Tensor) -> tf.Tensor:
  """uint8: 255 where true, else 0."""
  return tf.cast(condition, tf.uint8) * tf.constant(255, tf.uint8)


def _rows(image: tf.Tensor) -> tf.Tensor:
  return tf.cast(tf.reshape(image, [_size(image)[0], -1]), tf.float32)


def _size(image: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
  shape = tf.shape(image)
  return shape[0], shape[1]


def _channels(image: tf.Tensor) -> int:
  return image.shape[-1]


def _clip(values: tf.Tensor, low, high) -> tf.Tensor:
  """One pass, where `tf.clip_by_value` makes two."""
  return tf.raw_ops.ClipByValue(
    t=values, clip_value_min=low, clip_value_max=high
  )
