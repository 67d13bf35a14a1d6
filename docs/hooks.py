"""What the documentation site shows beyond docs/.

Pages link to each other, and to other files of the repository, by relative
paths that work on GitHub. Here README.md becomes the first page, each file that
a page links to comes along under its path, and links are written anew for the
places on the site. The notebook becomes a page, and so does each room.
"""

import functools
import json
import os
import pathlib
import posixpath
import re

ROOT = pathlib.Path(__file__).parents[1]
_PAGES = ('README.md', 'CONTRIBUTING.md', 'CHANGELOG.md', 'SECURITY.md')
LINK = re.compile(r'(!?)\[([^\]]*)\]\(([^)\s:#]+)(#[^)\s]*)?\)')
_FLAG = re.compile(r'(?<=[>\s])(--\w[^\s<]*|-m(?=\s))')
_ROOM = re.compile(r'^\| `(\w+)(/|\.py)` \| (.+) \|$', re.MULTILINE)


def place(path: str) -> str:
  """'docs/a.md' -> 'a.md': where a file of the repository is on the site."""
  return 'index.md' if path == 'README.md' else path.removeprefix('docs/')


def targets(path: str, text: str) -> list[str]:
  """The files of the repository that the page `path` links to."""
  folder = posixpath.dirname(path)
  links = [match[3] for match in LINK.finditer(text)]
  return [posixpath.normpath(posixpath.join(folder, link)) for link in links]


def relinked(path: str, text: str) -> str:
  """The page `path` with links for the site; one to a folder is its text."""
  here = posixpath.dirname(place(path))

  def link(match: re.Match) -> str:
    folder = posixpath.dirname(path)
    target = posixpath.normpath(posixpath.join(folder, match[3]))
    if (ROOT / target).is_dir():
      return f'`{match[2].strip("`")}`'
    new = posixpath.relpath(place(target), here or '.')
    return f'{match[1]}[{match[2]}]({new}{match[4] or ""})'

  return LINK.sub(link, text)


@functools.cache
def linked_files() -> set[str]:
  """All files outside of docs/ that pages link to, those pages included."""
  docs = [p.relative_to(ROOT).as_posix() for p in ROOT.glob('docs/*.md')]
  found, waiting = set(_PAGES), [*_PAGES, *docs]
  while waiting:
    page = waiting.pop()
    text = (ROOT / page).read_text(encoding='utf-8')
    for target in set(targets(page, text)) - found:
      if not target.startswith('docs/') and (ROOT / target).is_file():
        found.add(target)
        waiting += [target] if target.endswith('.md') else []
  return found


def notebook_page() -> str:
  """The tutorial as Markdown: its text and code, without results."""
  path = ROOT / 'docs' / 'tutorial.ipynb'
  cells = json.loads(path.read_text(encoding='utf-8'))['cells']
  parts = []
  for cell in cells:
    source = ''.join(cell['source'])
    is_code = cell['cell_type'] == 'code'
    parts.append(f'```python\n{source}\n```' if is_code else source)
  return '\n\n'.join(parts) + '\n\n[This page as a notebook](tutorial.ipynb)\n'


def rooms() -> dict[str, str]:
  """{room: what it is for}, from the table in docs/design.md."""
  text = (ROOT / 'docs' / 'design.md').read_text(encoding='utf-8')
  return {room: purpose for room, _, purpose in _ROOM.findall(text)}


def on_config(config):
  """Adds the pages of the API to the navigation, and where the code is."""
  config.repo_url = os.environ.get('REPOSITORY_URL')
  pages = [{room: f'api/{room}.md'} for room in rooms()]
  config.nav.append({'API': [{'Rooms': 'api/index.md'}, *pages]})
  return config


def on_files(files, config):
  """Adds what does not lie in docs/, or is made here."""
  from mkdocs.structure.files import File

  for path in sorted(linked_files()):
    file = File.generated(config, place(path), abs_src_path=str(ROOT / path))
    files.append(file)
  table = ['# API\n', '| room | what it is for |', '|---|---|']
  for room, purpose in rooms().items():
    text = f'# {room}\n\n{purpose}\n\n::: conadv_jax.{room}\n'
    files.append(File.generated(config, f'api/{room}.md', content=text))
    table.append(f'| [`{room}`]({room}.md) | {purpose} |')
  index = '\n'.join(table) + '\n'
  files.append(File.generated(config, 'api/index.md', content=index))
  page = notebook_page()
  files.append(File.generated(config, 'tutorial.md', content=page))
  return files


def on_page_markdown(markdown, page, **_):
  """Writes the links of a page anew."""
  uri = page.file.src_uri
  outside = {place(path): path for path in linked_files()}
  return relinked(outside.get(uri, f'docs/{uri}'), markdown)


def on_page_content(html, **_):
  """Keeps browsers from breaking a line after the hyphens of a flag."""
  return _FLAG.sub(r'<span class="flag">\1</span>', html)
