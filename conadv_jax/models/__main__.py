"""`python -m conadv_jax.models`: the registered networks, as a table."""

from __future__ import annotations

from collections.abc import Iterator

from conadv_jax import models
from conadv_jax.base import jax_platform
from conadv_jax.base.usage import answered
from conadv_jax.models import summary

_HEADER = (
  'model', 'side', 'parameters', 'published', 'multiply-adds', 'published',
)  # fmt: skip
_WIDTHS = (max(map(len, models.MODELS)), 4, 11, 11, 13, 9)


def lines() -> Iterator[str]:
  """A line per network; side of the images in pixels, 1000 classes."""
  yield _line(_HEADER)
  for name, entry in models.MODELS.items():
    model = models.create(name, num_classes=1000, num_routes=1)
    size = summary.size(model, entry.resolution_px)
    published, multiply_adds = entry.parameters, entry.multiply_adds
    yield _line((
      name,
      f'{entry.resolution_px}',
      f'{size.parameters:,}',
      f'{published:,}' if published else '-',
      f'{size.multiply_adds / 1e9:.3f} G',
      f'{multiply_adds / 1e9:.3f} G' if multiply_adds else '-',
    ))  # fmt: skip


def _line(cells: tuple[str, ...]) -> str:
  return '  '.join(
    cell.rjust(width) if i else cell.ljust(width)
    for i, (cell, width) in enumerate(zip(cells, _WIDTHS, strict=True))
  )


def console() -> None:
  """Runs the command `conadv-models`."""
  if not answered(__doc__):
    jax_platform.choose()
    for line in lines():
      print(line, flush=True)


if __name__ == '__main__':
  console()
