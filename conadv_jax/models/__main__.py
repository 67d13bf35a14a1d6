"""`python -m conadv_jax.models`: the registered networks, as a table."""

from __future__ import annotations

from conadv_jax import models
from conadv_jax.models import summary

_HEADER = (
  'model', 'side', 'parameters', 'published', 'multiply-adds', 'published',
)  # fmt: skip


def table() -> str:
  """A line per network; side of the images in pixels, 1000 classes."""
  rows = [_HEADER]
  for name, entry in models.MODELS.items():
    model = models.create(name, num_classes=1000, num_routes=1)
    size = summary.size(model, entry.resolution_px)
    published, multiply_adds = entry.parameters, entry.multiply_adds
    rows.append((
      name,
      f'{entry.resolution_px}',
      f'{size.parameters:,}',
      f'{published:,}' if published else '-',
      f'{size.multiply_adds / 1e9:.3f} G',
      f'{multiply_adds / 1e9:.3f} G' if multiply_adds else '-',
    ))  # fmt: skip
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return '\n'.join(
    '  '.join(
      cell.rjust(width) if i else cell.ljust(width)
      for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    )
    for row in rows
  )


def console() -> None:
  """Runs the command `conadv-models`."""
  print(table())


if __name__ == '__main__':
  console()
