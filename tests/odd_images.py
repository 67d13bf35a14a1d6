"""Image files as ImageNet and worse sources have them, made in memory."""

from __future__ import annotations

import functools
import gzip
import io
import struct
import warnings
import zlib

import numpy as np
from PIL import Image
from sklearn import datasets as sklearn_datasets

_PNG_MAGIC = b'\x89PNG\r\n\x1a\n'


@functools.cache
def photo(height_px: int = 94, width_px: int = 125) -> Image.Image:
  """A sample photograph of scikit-learn, resized."""
  pixels = sklearn_datasets.load_sample_image('china.jpg')
  return Image.fromarray(pixels).resize((width_px, height_px), Image.BICUBIC)


def encode(image: Image.Image, file_format: str = 'JPEG', **options) -> bytes:
  """The bytes of a file that PIL writes."""
  buffer = io.BytesIO()
  image.save(buffer, file_format, **options)
  return buffer.getvalue()


def pil_pixels(data: bytes) -> np.ndarray:
  """The judge: uint8 [H, W, 3] as PIL decodes it."""
  with warnings.catch_warnings():
    # Alpha is what we mean to drop.
    warnings.filterwarnings('ignore', 'Palette images with Transparency')
    return np.asarray(Image.open(io.BytesIO(data)).convert('RGB'))


@functools.cache
def good() -> dict[str, bytes]:
  """Odd files that decode to the pixels of PIL."""
  rgb = photo()
  alpha = Image.fromarray(noise(94, 125, 1)[..., 0])
  cmyk = encode(rgb.convert('CMYK'), quality=95)
  jpeg = encode(rgb)
  return {
    'CMYK JPEG': cmyk,
    'CMYK JPEG without Adobe marker': cmyk.replace(b'Adobe', b'Bdobe'),
    'YCCK JPEG': _set_adobe_transform(cmyk, 2),
    'greyscale JPEG': encode(rgb.convert('L')),
    'progressive JPEG': encode(rgb, progressive=True),
    'JPEG, bytes after its end': jpeg + b'\0\xff' * 500,
    'two JPEGs in one file': jpeg + encode(photo(20, 20)),
    'truncated JPEG with an end marker': jpeg[: len(jpeg) // 2] + b'\xff\xd9',
    'PNG': encode(rgb, 'PNG'),
    'PNG, bytes after its end': encode(rgb, 'PNG') + b'\xff\xd9',
    'RGBA PNG': encode(_with_alpha(rgb, alpha), 'PNG'),
    'grey PNG': encode(rgb.convert('L'), 'PNG'),
    'grey PNG with alpha': encode(_with_alpha(rgb.convert('L'), alpha), 'PNG'),
    'palette PNG': encode(rgb.quantize(40), 'PNG'),
    'palette PNG with transparency': encode(
      rgb.quantize(40), 'PNG', transparency=bytes(range(40))
    ),
    '1-bit PNG': encode(rgb.convert('1'), 'PNG'),
    '16-bit RGB PNG': png16(noise(9, 7, 3, np.uint16)),
    '16-bit RGBA PNG': png16(noise(9, 7, 4, np.uint16)),
    'WebP': encode(rgb, 'WEBP'),
    'WebP, bytes after its end': encode(rgb, 'WEBP') + b'\xff\xd9',
    'lossless WebP': encode(rgb, 'WEBP', lossless=True),
    'grey WebP': encode(rgb.convert('L'), 'WEBP'),
    'RGBA WebP': encode(_with_alpha(rgb, alpha), 'WEBP'),
    'RGBA lossless WebP': encode(
      _with_alpha(rgb, alpha), 'WEBP', lossless=True, exact=True
    ),
    'WebP with metadata': encode(rgb, 'WEBP', exif=b'Exif\0\0' + bytes(20)),
    'animated WebP': encode(
      rgb, 'WEBP', save_all=True, append_images=[rgb.rotate(90)]
    ),
    '1x16383 WebP': encode(photo(1, 16_383), 'WEBP'),
    '16383x1 WebP': encode(photo(16_383, 1), 'WEBP'),
    '1x16383 lossless WebP': encode(photo(1, 16_383), 'WEBP', lossless=True),
    '16383x1 lossless WebP': encode(photo(16_383, 1), 'WEBP', lossless=True),
    '1x1 WebP': encode(photo(1, 1), 'WEBP'),
    '1x1 lossless WebP': encode(photo(1, 1), 'WEBP', lossless=True),
    '1x1 JPEG': encode(photo(1, 1)),
    '1x1 PNG': encode(photo(1, 1), 'PNG'),
    '1x20000 JPEG': encode(photo(1, 20_000)),
    '20000x1 JPEG': encode(photo(20_000, 1)),
  }


@functools.cache
def bad() -> dict[str, tuple[bytes, str]]:
  """Files that do not decode, each with a pattern of the error message."""
  rgb = photo()
  jpeg, png = encode(rgb), encode(rgb, 'PNG')
  progressive = encode(rgb, progressive=True)
  webp = encode(rgb, 'WEBP')
  lossless, animated, extended = (
    good()[f'{kind} WebP'] for kind in ('lossless', 'animated', 'RGBA')
  )
  magic = 'neither JPEG, PNG nor WebP'
  size, truncated = 'pixels a side', 'Invalid'
  return {
    'empty': (b'', magic),
    'text': (b'<html>404 Not Found</html>', magic),
    'gzip-compressed JPEG': (gzip.compress(jpeg, mtime=0), magic),
    'GIF': (encode(rgb, 'GIF'), magic),
    'BMP': (encode(rgb, 'BMP'), magic),
    'RIFF that is no WebP': (webp.replace(b'WEBP', b'WAVE'), magic),
    'TIFF': (encode(rgb, 'TIFF'), magic),
    'JPEG magic alone': (jpeg[:3], truncated),
    'PNG magic alone': (png[:8], size),
    'PNG cut in its header': (png[:20], size),
    'JPEG cut in its header': (jpeg[:100], truncated),
    'JPEG cut in the middle': (jpeg[: len(jpeg) // 2], truncated),
    'JPEG without its last byte': (jpeg[:-1], truncated),
    'JPEG without end marker': (jpeg[:-2], truncated),
    'progressive JPEG, cut': (progressive[: len(jpeg) // 2], truncated),
    'PNG cut in the middle': (png[: len(png) // 2], truncated),
    'PNG without its last byte': (png[:-1], truncated),
    'PNG, wrong checksum': (_flip(png, len(png) // 2), truncated),
    'JPEG that claims 65535x65535': (
      set_jpeg_size(jpeg, 65_535, 65_535), truncated
    ),
    'JPEG that claims 65500x65500': (set_jpeg_size(jpeg, 65_500, 65_500), size),
    'JPEG that claims no rows': (set_jpeg_size(jpeg, 0, 125), truncated),
    'PNG that claims 65535x65535': (set_png_size(png, 65_535, 65_535), size),
    'PNG that claims a long row': (set_png_size(png, 1, 70_000), size),
    'PNG that claims no rows': (set_png_size(png, 0, 125), size),
    'PNG that claims a row more': (set_png_size(png, 95, 125), truncated),
    'WebP magic alone': (webp[:12], size),
    'WebP cut in its header': (webp[:25], size),
    'WebP of an unknown kind': (webp.replace(b'VP8 ', b'VP9 '), size),
    'WebP cut in the middle': (webp[: len(webp) // 2], truncated),
    'WebP without its last byte': (webp[:-1], truncated),
    'lossless WebP, cut': (lossless[: len(lossless) // 2], truncated),
    'animated WebP, cut': (animated[: len(animated) // 4], truncated),
    'lossless WebP, damaged': (
      lossless[:30] + bytes(99) + lossless[129:], truncated
    ),
    'WebP that claims 16383x16383': (
      webp[:26] + b'\xff\x3f\xff\x3f' + webp[30:], size
    ),
    'lossless WebP that claims 16384x16384': (
      lossless[:21] + b'\xff\xff\xff\x0f' + lossless[25:], size
    ),
    'animated WebP that claims 16777216x16777216': (
      animated[:24] + b'\xff' * 6 + animated[30:], size
    ),
    'WebP that claims a row more': (
      extended[:27] + b'\x5e' + extended[28:], truncated
    ),
  }  # fmt: skip


def noise(
  height_px: int, width_px: int, channels: int, dtype=np.uint8
) -> np.ndarray:
  """[H, W, C] of random numbers, always the same."""
  return np.random.default_rng(0).integers(
    np.iinfo(dtype).max + 1, size=(height_px, width_px, channels), dtype=dtype
  )


def png16(pixels: np.ndarray) -> bytes:
  """A PNG of uint16 [H, W, C]; PIL writes none with more than one channel."""
  height, width, channels = pixels.shape
  colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
  header = struct.pack('>IIBBBBB', width, height, 16, colour_type, 0, 0, 0)
  rows = b''.join(b'\0' + row.astype('>u2').tobytes() for row in pixels)
  chunks = ((b'IHDR', header), (b'IDAT', zlib.compress(rows)), (b'IEND', b''))
  return _PNG_MAGIC + b''.join(_png_chunk(*chunk) for chunk in chunks)


def set_jpeg_size(data: bytes, height_px: int, width_px: int) -> bytes:
  """A baseline JPEG whose header claims another size."""
  at = data.index(b'\xff\xc0') + 5
  return data[:at] + struct.pack('>HH', height_px, width_px) + data[at + 4 :]


def set_jpeg_sampling(data: bytes, horizontal: int, vertical: int) -> bytes:
  """Claims other sampling factors: scrambled, but a valid input."""
  at = max(data.find(b'\xff\xc0'), data.find(b'\xff\xc2')) + 11
  return data[:at] + bytes([horizontal << 4 | vertical]) + data[at + 1 :]


def set_png_size(data: bytes, height_px: int, width_px: int) -> bytes:
  """A PNG whose header claims another size, with its checksum right."""
  fields = struct.pack('>II', width_px, height_px) + data[24:29]
  return data[:8] + _png_chunk(b'IHDR', fields) + data[33:]


def _png_chunk(name: bytes, content: bytes) -> bytes:
  checksum = struct.pack('>I', zlib.crc32(name + content))
  return struct.pack('>I', len(content)) + name + content + checksum


def _set_adobe_transform(data: bytes, transform: int) -> bytes:
  at = data.index(b'Adobe') + 11
  return data[:at] + bytes([transform]) + data[at + 1 :]


def _with_alpha(image: Image.Image, alpha: Image.Image) -> Image.Image:
  image = image.copy()
  image.putalpha(alpha)
  return image


def _flip(data: bytes, at: int) -> bytes:
  return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
