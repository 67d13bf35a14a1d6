"""A page of HTML that loads nothing but the pictures beside it."""

from __future__ import annotations

from html import escape

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222;
  margin: 2rem auto; padding: 0 1rem; background: #fff }
h2 { margin: 2rem 0 .5rem; font-size: 1.15rem }
img { max-width: 100% }
table { border-collapse: collapse; display: block; overflow-x: auto }
th, td { padding: .2rem .7rem; border-bottom: 1px solid #ddd; text-align: right;
  white-space: nowrap }
th:first-child, td:first-child, .facts td { text-align: left }
.facts td { white-space: normal }
.bars td { border: 0; padding: .1rem .7rem }
.bars td:nth-child(2) { width: 28rem }
.bars div { height: 1rem }
pre { background: #f5f5f5; padding: .7rem; overflow-x: auto; font-size: 12px }
"""


def page(title: str, body: str, width_rem: int = 60) -> str:
  """Returns the page with `body`, which is HTML; `title` is text."""
  return (
    '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f'<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n'
    f'<body style="max-width: {width_rem}rem">\n{body}\n</body>\n</html>\n'
  )
