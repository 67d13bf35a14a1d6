"""Renders the audit's report as one HTML page that loads nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from conadv_jax.audit.report import Report, Section, sections, title
from conadv_jax.base.page import page


def html(report: Report) -> str:
  """Returns the page."""
  heading = title(report)
  body = '\n'.join(map(_section, sections(report)))
  return page(heading, f'<h1>{escape(heading)}</h1>\n{body}')


def _section(section: Section) -> str:
  parts = [f'<h2>{escape(section.title)}</h2>']
  parts += [f'<p>{escape(note)}</p>' for note in section.notes]
  if section.bars:
    parts.append(_bars(section.bars))
  if section.rows:
    rows = [_row('td', map(escape, row)) for row in section.rows]
    if section.columns:
      rows.insert(0, _row('th', map(escape, section.columns)))
    parts.append(_table('' if section.columns else 'facts', rows))
  if section.lines:
    lines = escape('\n'.join(section.lines))
    parts.append(f'<pre>{lines}</pre>')
  return '\n'.join(parts)


def _bars(bars: Sequence[tuple[str, float, str]]) -> str:
  """One bar below the other; the longest has the whole width."""
  longest = max(value for _, value, _ in bars) or 1
  rows = []
  for place, (name, value, shown) in enumerate(bars):
    style = f'width: {100 * value / longest:.2f}%; background: {_color(place)}'
    bar = f'<div style="{style}"></div>'
    rows.append(_row('td', (escape(name), bar, escape(shown))))
  return _table('bars', rows)


def _color(place: int) -> str:
  """A colour for each of up to 144 bars, neighbours far apart."""
  # The golden angle spreads hues; those that come close differ in lightness.
  hue, lightness = 200 + 137.5 * place, (40, 52, 64)[place % 3]
  return f'hsl({hue % 360:g} 60% {lightness}%)'


def _table(kind: str, rows: Sequence[str]) -> str:
  return f'<table class="{kind}">\n' + '\n'.join(rows) + '\n</table>'


def _row(tag: str, cells: Iterable[str]) -> str:
  return '<tr>' + ''.join(f'<{tag}>{c}</{tag}>' for c in cells) + '</tr>'
