"""Encoded or decoded images to square uint8 crops, inside a tf.data graph.

An *image* below is either a string scalar, the bytes of a JPEG, PNG or WebP
file, or a uint8 [H, W, 3] tensor, what `decode` made of such bytes. Both give
the same crops, bit for bit. Of a JPEG, only the window that is needed is
decoded.

The pixels are those of PIL's `convert('RGB')`, with one exception: 16-bit grey
PNGs give their high byte, where PIL saturates nearly all of them to white.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import tensorflow as tf

from conadv_jax.data.images import kinds, webp

# Checked before anything is decoded. ImageNet's largest image has about 20 MP.
MAX_PIXELS = 64_000_000
# The most that a JPEG header can hold; bounds the memory of thin PNGs too.
MAX_SIDE_PX = 65_535

_SIZE_ERROR = (
  f'only images of 1 to {MAX_SIDE_PX} pixels a side and at most {MAX_PIXELS} in'
  ' all are decoded; the header claims height and width'
)

_JPEG_MAGIC = b'\xff\xd8\xff'
_JPEG_END = b'\xff\xd9'
_PNG_MAGIC = b'\x89PNG\r\n\x1a\n'
# Height and width of a PNG are in the first 24, too.
_HEADER_BYTES = webp.HEADER_BYTES
# A start of image, then the marker that says: CMYK, inverted.
_START_WITH_ADOBE = b'\xff\xd8\xff\xee\x00\x0eAdobe\x00\x64' + b'\0' * 5
# libjpeg interpolates chroma from one more sample, two pixels wide, on either
# side. Unless these are decoded too, the window's border columns are wrong.
_CHROMA_MARGIN_PX = 2
# Others are up to eight grey levels from PIL's.
_DCT = 'INTEGER_ACCURATE'

# Each with the name of its kernel in TensorFlow's op.
_KERNELS = {'bilinear': 'triangle', 'bicubic': 'keyscubic'}
INTERPOLATIONS = tuple(_KERNELS)


def random_resized_crops(
  image: tf.Tensor,
  seeds: Sequence[tf.Tensor],
  size_px: int,
  interpolation: str = 'bicubic',
  antialias: bool = True,
) -> tf.Tensor:
  """Inception crops: one random window for each seed, resized to a square.

  A window has an aspect ratio uniform in [3/4, 4/3], a height uniform in what
  leaves it 0.08 to 1 of the image's area, and a uniform place. After ten
  failures it is the whole image. These are the windows of
  `tf.image.stateless_sample_distorted_bounding_box`; torchvision's differ, as
  it draws the area uniformly and the logarithm of the aspect ratio.

  Args:
    image: string scalar or uint8 [H, W, 3].
    seeds: K tensors, each int32 or int64 [2]. The image is decoded once, in the
      bounding box of the windows; each crop is that of its seed alone.
    size_px: side of the crops.
    interpolation: one of `INTERPOLATIONS`.
    antialias: whether the kernel widens where a window is shrunk, as in PIL.

  Returns:
    uint8 [K, size_px, size_px, 3].

  Raises:
    tf.errors.InvalidArgumentError: in the graph; see `decode`.
  """
  image, shape = _inspect(image)
  windows = [_random_window(shape, seed) for seed in seeds]
  crops = _crop(image, shape, windows)
  return tf.stack(
    [resize(crop, size_px, interpolation, antialias) for crop in crops]
  )


def center_crop(
  image: tf.Tensor,
  size_px: int,
  crop_ratio: float = 0.875,
  interpolation: str = 'bicubic',
  antialias: bool = True,
) -> tf.Tensor:
  """The central square of side floor(crop_ratio * min(H, W)), resized.

  Args:
    image: string scalar or uint8 [H, W, 3].
    size_px: side of the crop.
    crop_ratio: in (0, 1].
    interpolation: one of `INTERPOLATIONS`.
    antialias: as in `random_resized_crops`.

  Returns:
    uint8 [size_px, size_px, 3].

  Raises:
    tf.errors.InvalidArgumentError: in the graph; see `decode`.
  """
  image, shape = _inspect(image)
  shorter = tf.cast(tf.reduce_min(shape), tf.float32)
  side = tf.maximum(tf.cast(crop_ratio * shorter, tf.int32), 1)
  # An odd remainder goes to the top and left, as in the TPU ResNet code.
  corner = (shape - side + 1) // 2
  window = tf.concat([corner, side[None], side[None]], 0)
  (crop,) = _crop(image, shape, [window])
  return resize(crop, size_px, interpolation, antialias)


def decode(data: tf.Tensor) -> tf.Tensor:
  """The whole image, uint8 [H, W, 3], of the bytes of a JPEG, PNG or WebP file.

  Grey images get three equal channels, CMYK and YCCK become RGB, alpha is
  dropped. Of an animated file, this is the first frame.

  Args:
    data: string scalar.

  Raises:
    tf.errors.InvalidArgumentError: in the graph, if the bytes are neither JPEG,
      PNG nor WebP, if the header claims more than `MAX_PIXELS` or a side beyond
      `MAX_SIDE_PX` (nothing is decoded then), or if the file is truncated or
      otherwise not decodable. A JPEG whose truncated or damaged data still end
      in the end-of-image marker decodes, as it does in PIL.
  """
  data, shape = _inspect(data)
  (pixels,) = _crop(data, shape, [tf.concat([[0, 0], shape], 0)])
  return pixels


def _inspect(image: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
  """The image, not to be decoded before it passed the checks, and its size.

  Returns:
    The image and int32 [2], its height and width.
  """
  if image.dtype == tf.uint8:
    image = tf.ensure_shape(image, [None, None, 3])
    return image, tf.shape(image)[:2]
  header = tf.strings.substr(image, 0, _HEADER_BYTES)
  shape = tf.switch_case(
    tf.where(_is_jpeg(header), 0, tf.where(_is_png(header), 1, 2)),
    [
      lambda: tf.image.extract_jpeg_shape(image),
      lambda: _png_shape(header),
      lambda: tf.cond(
        _is_webp(header),
        lambda: _webp_shape(header),
        lambda: _fail_unknown(header),
      ),
    ],
  )
  image = tf.cond(
    shape[2] == 4, lambda: _with_adobe_marker(image), lambda: image
  )
  shape = shape[:2]
  height, width = tf.unstack(tf.cast(shape, tf.int64))
  accepted = tf.debugging.Assert(
    (tf.reduce_min(shape) > 0)
    & (tf.reduce_max(shape) <= MAX_SIDE_PX)
    & (height * width <= MAX_PIXELS),
    [_SIZE_ERROR, shape],
  )
  with tf.control_dependencies(_ops(accepted)):
    return tf.identity(image), tf.identity(shape)


def _ops(assertion: tf.Operation | None) -> list[tf.Operation]:
  """What to wait for: nothing when executed eagerly."""
  return [] if assertion is None else [assertion]


def _in_python(
  function: Callable[[bytes], object], data: tf.Tensor, dtype: tf.DType
) -> tf.Tensor:
  # Of a vector, elements are bytes; a scalar is an array where TF is eager.
  return tf.numpy_function(lambda x: function(x[0]), [data[None]], dtype)


def _is_jpeg(data: tf.Tensor) -> tf.Tensor:
  return tf.strings.substr(data, 0, len(_JPEG_MAGIC)) == _JPEG_MAGIC


def _is_png(data: tf.Tensor) -> tf.Tensor:
  return tf.strings.substr(data, 0, len(_PNG_MAGIC)) == _PNG_MAGIC


def _is_webp(header: tf.Tensor) -> tf.Tensor:
  riff, name = (tf.strings.substr(header + b'\0' * 12, at, 4) for at in (0, 8))
  return (riff == b'RIFF') & (name == b'WEBP')


def _fail_unknown(header: tf.Tensor) -> tf.Tensor:
  """Fails; stands for a shape."""
  # In ASCII: an error whose text is not UTF-8 cannot be raised in Python.
  kind = _in_python(kinds.name_of, header, tf.string)
  said = 'neither JPEG, PNG nor WebP, which alone are read, but this:'
  failure = tf.debugging.Assert(False, [said, kind])
  with tf.control_dependencies(_ops(failure)):
    return tf.zeros([3], tf.int32)


def _png_shape(header: tf.Tensor) -> tf.Tensor:
  """int32 [3]: height, width, 3; zeros where the header is cut off."""
  sides = tf.strings.substr(header + b'\0' * _HEADER_BYTES, 16, 8)
  width, height = tf.unstack(
    tf.io.decode_raw(sides, tf.int32, little_endian=False), 2
  )
  return tf.stack([height, width, 3])


def _webp_shape(header: tf.Tensor) -> tf.Tensor:
  """int32 [3]: as `webp.shape_of`."""
  return tf.ensure_shape(_in_python(webp.shape_of, header, tf.int32), [3])


def _decode_webp(data: tf.Tensor) -> tf.Tensor:
  """uint8 [H, W, 3]; fails if there is nothing to decode."""
  pixels = _in_python(webp.pixels_of, data, tf.uint8)
  decoded = tf.debugging.Assert(
    tf.size(pixels) > 0, ['Invalid WebP data: cut or damaged']
  )
  with tf.control_dependencies(_ops(decoded)):
    return tf.ensure_shape(pixels, [None, None, 3])


def _with_adobe_marker(data: tf.Tensor) -> tf.Tensor:
  """Makes inversion the default of a four-channel JPEG, as it is in PIL.

  A marker of the file's own comes later and overrides this one.
  """
  return _START_WITH_ADOBE + tf.strings.substr(data, 2, -1)


def _random_window(shape: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
  """int32 [4]: top, left, height and width of one Inception crop."""
  begin, size, _ = tf.image.stateless_sample_distorted_bounding_box(
    tf.concat([shape, [3]], 0),
    tf.zeros([1, 0, 4]),
    seed,
    min_object_covered=0.0,
    aspect_ratio_range=(3 / 4, 4 / 3),
    area_range=(0.08, 1.0),
    max_attempts=10,
    use_image_if_no_bounding_boxes=True,
  )
  # For the whole image, the op gives a size of -1.
  size = tf.where(size[:2] < 0, shape, size[:2])
  return tf.concat([begin[:2], size], 0)


def _crop(
  image: tf.Tensor, shape: tf.Tensor, windows: Sequence[tf.Tensor]
) -> list[tf.Tensor]:
  """The pixels of each window, uint8 [h, w, 3], of one decode.

  Args:
    image: string scalar or uint8 [H, W, 3].
    shape: int32 [2], H and W.
    windows: int32 [4] each: top, left, height and width.
  """
  origin = tf.constant([0, 0])
  if image.dtype == tf.string:
    stacked = tf.stack(windows)
    ends = tf.reduce_max(stacked[:, :2] + stacked[:, 2:], 0)
    margin = tf.constant([0, _CHROMA_MARGIN_PX])
    origin = tf.maximum(tf.reduce_min(stacked[:, :2], 0) - margin, 0)
    ends = tf.minimum(ends + margin, shape)
    image = _decode_window(image, tf.concat([origin, ends - origin], 0))
  return [
    _slice(image, tf.concat([window[:2] - origin, window[2:]], 0))
    for window in windows
  ]


def _decode_window(data: tf.Tensor, window: tf.Tensor) -> tf.Tensor:
  """Decodes one window of an image that `_inspect` accepted.

  The columns of the window next to its sides may differ from those of the whole
  image; see _CHROMA_MARGIN_PX.
  """

  def fused():
    return tf.io.decode_and_crop_jpeg(data, window, channels=3, dct_method=_DCT)

  def whole_jpeg():
    pixels = tf.io.decode_jpeg(data, channels=3, dct_method=_DCT)
    return _slice(pixels, window)

  def other():
    pixels = tf.cond(
      _is_png(data),
      lambda: tf.io.decode_png(data, channels=3),
      lambda: _decode_webp(data),
    )
    return _slice(pixels, window)

  # The fused op is content with half a file if the window lies within it.
  is_complete = tf.strings.substr(data, -2, 2) == _JPEG_END
  branch = tf.where(_is_jpeg(data), tf.where(is_complete, 0, 1), 2)
  pixels = tf.switch_case(branch, [fused, whole_jpeg, other])
  return tf.ensure_shape(pixels, [None, None, 3])


def _slice(pixels: tf.Tensor, window: tf.Tensor) -> tf.Tensor:
  top, left, height, width = tf.unstack(window)
  return pixels[top : top + height, left : left + width]


def resize(
  image: tf.Tensor,
  size_px: int,
  interpolation: str = 'bicubic',
  antialias: bool = True,
) -> tf.Tensor:
  """Resizes to a square, as PIL does: along x, to bytes, then along y.

  Bicubic is the Keys kernel with a = -1/2. With `antialias`, less than two in a
  thousand numbers of a photo differ from PIL's, by one grey level. (From
  version 13, PIL goes along y first if that is shrunk far more than x.)
  `tf.image.resize` does not clip between the axes, and is then many levels away
  next to clipped overshoot. Without `antialias`, this is `tf.image.resize`,
  rounded: the fastest, but not PIL's at all.

  Args:
    image: uint8 [h, w, 3].
    size_px: side of the result.
    interpolation: one of `INTERPOLATIONS`.
    antialias: whether the kernel widens by h / size_px and w / size_px where
      that is above 1.

  Returns:
    uint8 [size_px, size_px, 3].

  Raises:
    ValueError: unknown `interpolation`.
  """
  if interpolation not in INTERPOLATIONS:
    raise ValueError(
      f'interpolation={interpolation!r}: choose from {INTERPOLATIONS}'
    )
  if not antialias:
    pixels = tf.image.resize(image, [size_px, size_px], interpolation)
    return tf.ensure_shape(_to_bytes(pixels), [size_px, size_px, 3])
  kernel = _KERNELS[interpolation]
  height, width = tf.unstack(tf.shape(image)[:2])
  # [h, (w, c)] -> [(w, c), h] -> [x, (c, h)] -> [h, (x, c)] -> [y, (x, c)]
  by_column = tf.transpose(tf.reshape(image, [height, width * 3]))
  x = _resize_rows(tf.reshape(by_column, [width, 3 * height]), size_px, kernel)
  by_row = tf.transpose(tf.reshape(x, [size_px * 3, height]))
  return tf.reshape(
    _resize_rows(by_row, size_px, kernel), [size_px, size_px, 3]
  )


def _resize_rows(rows: tf.Tensor, size_px: int, kernel: str) -> tf.Tensor:
  """Resamples uint8 [n, m] along its first axis, to uint8 [size_px, m].

  The rows are the channels of a single column, so that the op adds up vectors
  of m numbers. Columns of three channels it adds up number by number.
  """
  count = tf.cast(tf.shape(rows)[0], tf.float32)
  values = tf.raw_ops.ScaleAndTranslate(
    images=rows[None, :, None],
    size=[size_px, 1],
    scale=tf.stack([size_px / count, 1.0]),
    translation=[0.0, 0.0],
    kernel_type=kernel,
    antialias=True,
  )
  return _to_bytes(values[0, :, 0])


def _to_bytes(values: tf.Tensor) -> tf.Tensor:
  """Clips to [0, 255] and rounds half up: float32 to uint8."""
  clipped = tf.quantization.fake_quant_with_min_max_args(values, 0.0, 255.0)
  return tf.cast(clipped, tf.uint8)
