"""What the pages name exists: links, files, modules, tests, rooms, recipes."""

import ast
import functools
import importlib.util
import pathlib
import re

import pytest
from test_architecture import ROOMS

import conadv_jax
from scripts import update_tables

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted(
  path.relative_to(ROOT).as_posix()
  for pattern in ('*.md', 'docs/*.md', 'scripts/*.md')
  for path in ROOT.glob(pattern)
)
# Of links to headings in GitHub's form.
_NOT_IN_ANCHORS = re.compile(r'[^\w\- ]')


@functools.cache
def text(page):
  return (ROOT / page).read_text(encoding='utf-8')


def headings(page):
  """The anchors of a page's headings, as GitHub makes them."""
  titles = re.findall(r'^#+ (.+)$', text(page), re.MULTILINE)
  return {
    _NOT_IN_ANCHORS.sub('', title.lower()).replace(' ', '-') for title in titles
  }


def broken_links(page, content):
  """Relative links of a page that lead nowhere."""
  for link in re.findall(r'\]\(([^)\s]+)\)', content):
    target, _, anchor = link.partition('#')
    if re.match('[a-z]+:', target):
      continue
    path = (ROOT / page).parent / target if target else ROOT / page
    if not path.exists():
      yield link
    elif anchor and anchor not in headings(
      path.resolve().relative_to(ROOT).as_posix()
    ):
      yield link


def missing_paths(content):
  """Files and folders of the project that are named and are not there."""
  folders = 'conadv_jax|tests|scripts|configs|examples|docs|results'
  for path in re.findall(rf'(?<![\w/.-])((?:{folders})/[\w./-]*\w)', content):
    # An --output may be the start of several names.
    if not (ROOT / path).exists() and not any(ROOT.glob(f'{path}.*')):
      yield path


def missing_modules(content):
  """Modules after `python -m` or named with dots that are not there."""
  for name in re.findall(r'\bconadv_jax(?:\.\w+)+', content):
    parts = name.split('.')
    # The last part of `conadv_jax.config.METHODS` is something in a module.
    is_command = f'-m {name}' in content
    if not any(map(find, {name, name if is_command else '.'.join(parts[:-1])})):
      yield name


def find(module):
  try:
    return importlib.util.find_spec(module)
  except ModuleNotFoundError:
    return None


def missing_tests(content):
  """Files `test_x.py`, and parts of names of tests in them, that are not there.

  The notation is `test_x.py`: `part_of_a_name`, `another`.
  """
  cells = re.findall(r'`(test_\w+\.py)`(?:: ((?:`\w+`(?:, )?)+))?', content)
  for name, parts in cells:
    files = list((ROOT / 'tests').rglob(name))
    if not files:
      yield name
      continue
    found = re.findall(r'def (test_\w+)', files[0].read_text('utf-8'))
    for part in re.findall(r'`(\w+)`', parts):
      if not any(part in test for test in found):
        yield f'{name}: {part}'


def missing_recipes(content):
  """Names after `--config=` for which there is no recipe."""
  for name in re.findall(r'--config=([\w./]+)', content):
    stem = pathlib.Path(name).stem
    if stem.isupper() or '...' in name:
      continue  # a placeholder
    if not (ROOT / 'configs' / f'{stem}.py').exists():
      yield name


def wrong_commands(content):
  """Commands `python scripts/x.py ...` whose flags are not those of the script.

  That is, flags that it lacks, and flags that it needs.
  """
  command = r'python ((?:scripts|examples)/\w+\.py)((?:\\\n|[^`\n])*)'
  for script, arguments in re.findall(command, content):
    if not (ROOT / script).exists():
      continue  # `missing_paths` says so
    given = set(re.findall(r'(?<!\S)--\w+', arguments))
    known, needed = flags(script)
    wrong = (given - known if known else set()) | (needed - given)
    if wrong:
      yield f'{script}: {", ".join(sorted(wrong))}'


def flags(script):
  """(all flags of a script, those that it needs), by its source.

  The first is empty if they are not written out.
  """
  known, needed = set(), set()
  for call in ast.walk(ast.parse(text(script))):
    name = getattr(getattr(call, 'func', None), 'attr', '')
    if not isinstance(call, ast.Call) or name != 'add_argument':
      continue
    if not isinstance(call.args[0], ast.Constant):
      return set(), needed
    known.add(call.args[0].value)
    if any(k.arg == 'required' and k.value.value for k in call.keywords):
      needed.add(call.args[0].value)
  return known, needed


@pytest.mark.parametrize('page', PAGES)
def test_everything_a_page_names_exists(page):
  content = text(page)
  missing = [
    *broken_links(page, content),
    *missing_paths(content),
    *missing_modules(content),
    *missing_tests(content),
    *missing_recipes(content),
    *wrong_commands(content),
  ]
  assert not missing


@pytest.mark.parametrize(
  'content, missing',
  [
    ('[a](docs/gone.md)', 'docs/gone.md'),
    ('[a](docs/design.md#gone)', 'docs/design.md#gone'),
    ('[a](#gone)', '#gone'),
  ],
)
def test_broken_links_are_found(content, missing):
  assert missing in list(broken_links('README.md', content))


@pytest.mark.parametrize(
  'finder, content, missing',
  [
    (missing_paths, 'see `conadv_jax/gone.py`.', 'conadv_jax/gone.py'),
    (missing_paths, 'python scripts/gone.py --x', 'scripts/gone.py'),
    (missing_modules, 'python -m conadv_jax.gone', 'conadv_jax.gone'),
    (missing_modules, '`conadv_jax.gone.f`', 'conadv_jax.gone.f'),
    (missing_tests, '`test_gone.py`', 'test_gone.py'),
    (missing_tests, '`test_docs.py`: `gone`', 'test_docs.py: gone'),
    (missing_recipes, '--config=gone:seed=1', 'gone'),
    (missing_recipes, '--config=configs/gone.py', 'configs/gone.py'),
    (
      wrong_commands,
      '`python scripts/make_fake_imagenet.py`',
      'scripts/make_fake_imagenet.py: --data_dir',
    ),
    (
      wrong_commands,
      'python scripts/prepare_tfds.py --name=x \\\n  --gone=1',
      'scripts/prepare_tfds.py: --gone',
    ),
  ],
)
def test_what_is_missing_is_found(finder, content, missing):
  assert list(finder(content)) == [missing]


def test_the_tables_of_the_pages_are_those_of_the_results():
  assert len(update_tables.PAGES) == 3
  for path in update_tables.PAGES:
    page = path.read_text(encoding='utf-8')
    new = update_tables.updated(page)
    assert new == page, 'run python scripts/update_tables.py'


def test_a_table_that_is_out_of_date_is_made_again():
  page = text('docs/performance.md')
  old = page.replace('| baseline | 5.40 |', '| baseline | 5.41 |')
  assert old != page and update_tables.updated(old) == page


def test_readme_lists_the_rooms_in_order():
  layout = text('README.md').partition('## Layout')[2].partition('```text')[2]
  lines = layout.partition('```')[0].splitlines()
  left = ' '.join(re.split('  +', line)[0] for line in lines)
  assert re.findall(r'(\w+)(?:/|\.py)', left) == list(ROOMS)


def test_design_has_the_table_of_rooms():
  rows = re.findall(
    r'^\| `(\w+)(?:/|\.py)` \| (.+) \|$', text('docs/design.md'), re.MULTILINE
  )
  assert rows == list(ROOMS.items())


def test_the_citation_names_this_version():
  assert f'\nversion: {conadv_jax.__version__}\n' in text('CITATION.cff')
