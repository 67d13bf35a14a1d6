"""What kind of file something that is no JPEG, PNG or WebP seems to be."""

from __future__ import annotations

# (place, bytes there, name), the first that fits.
_MAGIC = (
  (0, b'GIF8', 'GIF'),
  (0, b'BM', 'BMP'),
  (0, b'II*\0', 'TIFF'),
  (0, b'MM\0*', 'TIFF'),
  (4, b'ftypavi', 'AVIF'),
  (4, b'ftyphei', 'HEIC'),
  (4, b'ftyphev', 'HEIC'),
  (4, b'ftypmif1', 'HEIF'),
  (4, b'ftyp', 'MP4'),
  (0, b'\0\0\0\x0cjP  ', 'JPEG 2000'),
  (0, b'\xff\x0a', 'JPEG XL'),
  (0, b'%PDF', 'PDF'),
  (0, b'PK\x03\x04', 'zip'),
  (0, b'\x1f\x8b', 'gzip'),
  (0, b'\xef\xbb\xbf', 'text'),
)
_TEXT = frozenset(b'\t\n\r' + bytes(range(32, 127)))


def name_of(start: bytes) -> str:
  """The kind of a file, for an error message.

  Args:
    start: its first bytes, 12 or more unless it is shorter.

  Returns:
    ASCII, such as 'GIF', 'HTML' or 'starts with 00ff'.
  """
  if not start:
    return 'empty'
  for place, magic, name in _MAGIC:
    if start.startswith(magic, place):
      return name
  if start.lstrip()[:5].lower() in (b'<html', b'<!doc', b'<?xml'):
    return 'HTML or XML'
  if _TEXT.issuperset(start):
    return 'text'
  return f'starts with {start[:8].hex()}'
