"""The audit's report as one HTML page that needs nothing else."""

from __future__ import annotations

import html as html_lib
from collections.abc import Sequence

from conadv_jax.audit.report import (
  Bars,
  Report,
  Section,
  number,
  sections,
  title,
)

# Colours that stay apart for colour-blind eyes (Okabe and Ito 2008).
_COLOURS = (
  '#0072b2', '#e69f00', '#009e73', '#cc79a7', '#56b4e9', '#d55e00', '#f0e442',
  '#999999',
)  # fmt: skip
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; color: #222;
  margin: 2rem auto; padding: 0 1rem; background: #fff }
h2 { margin: 2rem 0 .5rem; font-size: 1.15rem }
table { border-collapse: collapse; display: block; overflow-x: auto }
th, td { padding: .2rem .7rem; border-bottom: 1px solid #ddd; text-align: right;
  white-space: nowrap }
th:first-child, td:first-child, .facts td { text-align: left }
.facts td { white-space: normal }
pre { background: #f5f5f5; padding: .7rem; overflow-x: auto; font-size: 12px }
svg { display: block; margin: .7rem 0; max-width: 100%; height: auto }
text { font: 12px system-ui, sans-serif; fill: #222 }
"""

_WIDTH_PX = 720
_NAME_PX = 170
_ROW_PX = 22
_BAR_PX = _WIDTH_PX - _NAME_PX - 90


def html(report: Report) -> str:
  """The report as a page; bars are SVG, nothing is loaded."""
  heading = html_lib.escape(title(report))
  body = '\n'.join(_section(section) for section in sections(report))
  return (
    '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f'<title>{heading}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n'
    f'<h1>{heading}</h1>\n{body}\n</body>\n</html>\n'
  )


def _section(section: Section) -> str:
  parts = [f'<h2>{html_lib.escape(section.title)}</h2>']
  parts += [f'<p>{html_lib.escape(note)}</p>' for note in section.notes]
  if section.bars and section.bars.values:
    draw = _separate if section.bars.limit is None else _stacked
    parts.append(draw(section.title, section.bars))
  if section.rows:
    parts.append(_table(section))
  if section.lines:
    parts.append(f'<pre>{html_lib.escape(chr(10).join(section.lines))}</pre>')
  return '\n'.join(parts)


def _table(section: Section) -> str:
  rows = [_row('td', row) for row in section.rows]
  if section.columns:
    rows.insert(0, _row('th', section.columns))
  kind = '' if section.columns else ' class="facts"'
  return f'<table{kind}>\n' + '\n'.join(rows) + '\n</table>'


def _row(tag: str, cells: Sequence[str]) -> str:
  return (
    '<tr>'
    + ''.join(f'<{tag}>{html_lib.escape(cell)}</{tag}>' for cell in cells)
    + '</tr>'
  )


def _separate(label: str, bars: Bars) -> str:
  """A bar under another, the longest over the whole width."""
  longest = max(value for _, value in bars.values) or 1
  shapes = []
  for i, (name, value) in enumerate(bars.values):
    y, width = i * _ROW_PX, _BAR_PX * value / longest
    shapes += [
      _text(0, y + 15, name),
      _rect(_NAME_PX, y + 3, width, _COLOURS[0], name),
      _text(_NAME_PX + width + 6, y + 15, f'{number(value)} {bars.unit}'),
    ]
  return _svg(label, len(bars.values) * _ROW_PX, shapes)


def _stacked(label: str, bars: Bars) -> str:
  """One bar of all parts, a mark at the limit, and what the colours mean."""
  total = sum(value for _, value in bars.values)
  scale = (_WIDTH_PX - 20) / max(total, bars.limit)
  shapes, x = [], 0.0
  for i, (name, value) in enumerate(bars.values):
    shown = f'{name}: {number(value)} {bars.unit}'
    colour = _COLOURS[i % len(_COLOURS)]
    y = 44 + _ROW_PX * (1 + i // 3)
    column = i % 3 * _WIDTH_PX // 3
    shapes += [
      _rect(x, 22, scale * value, colour, shown),
      _rect(column, y - 12, 12, colour, shown, height=12),
      _text(column + 18, y - 2, shown),
    ]
    x += scale * value
  mark = scale * bars.limit
  line = f'x1="{mark:.1f}" x2="{mark:.1f}" y1="16" y2="44"'
  limit = html_lib.escape(f'limit {number(bars.limit)} {bars.unit}')
  shapes += [
    f'<line {line} stroke="#c00" stroke-width="2"/>',
    f'<text x="{mark:.1f}" y="12" text-anchor="end">{limit}</text>',
  ]
  return _svg(label, 50 + _ROW_PX * -(-len(bars.values) // 3), shapes)


def _rect(
  x: float, y: float, width: float, colour: str, name: str, height: int = 16
) -> str:
  return (
    f'<rect x="{x:.1f}" y="{y}" width="{max(width, 0.5):.1f}" '
    f'height="{height}" fill="{colour}">'
    f'<title>{html_lib.escape(name)}</title></rect>'
  )


def _text(x: float, y: float, content: str) -> str:
  return f'<text x="{x:.1f}" y="{y}">{html_lib.escape(content)}</text>'


def _svg(label: str, height_px: int, shapes: Sequence[str]) -> str:
  return (
    f'<svg viewBox="0 0 {_WIDTH_PX} {height_px}" width="{_WIDTH_PX}" '
    f'height="{height_px}" role="img" aria-label="{html_lib.escape(label)}">'
    + ''.join(shapes)
    + '</svg>'
  )
