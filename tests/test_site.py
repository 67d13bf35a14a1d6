"""What users of the project meet first: site, tutorial, messages, workflows."""

import ast
import functools
import importlib.util
import itertools
import json
import os
import pathlib
import posixpath
import re
import subprocess
import sys

import pytest
import yaml

import conadv_jax
from conadv_jax.base import errors
from conadv_jax.config import default_config, flatten

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / 'docs'
WORKFLOWS = sorted((ROOT / '.github' / 'workflows').glob('*.yml'))
# Of the settings' form in the pages: `group.field` or --config.group.field.
_SETTING = re.compile(r'(?:`|--config\.)([a-z_]+\.[a-z_]+)(?:=[\w.:]+)?[` ]')


def text(path):
  return (ROOT / path).read_text(encoding='utf-8')


@functools.cache
def hooks():
  spec = importlib.util.spec_from_file_location('hooks', DOCS / 'hooks.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


# ---- The site --------------------------------------------------------------


def pages():
  """Pages of the repository that are pages of the site."""
  docs = {path.relative_to(ROOT).as_posix() for path in DOCS.glob('*.md')}
  return docs | {p for p in hooks().linked_files() if p.endswith('.md')}


def places():
  """All files of the site, but for what mkdocs adds."""
  docs = {p.relative_to(ROOT).as_posix() for p in DOCS.iterdir()}
  files = {hooks().place(path) for path in docs | hooks().linked_files()}
  return files | {'tutorial.md'}


def dead_links(path, content):
  """Links of a page, as the site has it, that lead to no file of the site."""
  folder = posixpath.dirname(hooks().place(path))
  for match in hooks().LINK.finditer(hooks().relinked(path, content)):
    target = posixpath.normpath(posixpath.join(folder, match[3]))
    if target not in places():
      yield match[3]


def test_every_link_leads_to_a_file_of_the_site():
  found = {page: list(dead_links(page, text(page))) for page in pages()}
  assert not {page: links for page, links in found.items() if links}
  assert len(found) > 15


@pytest.mark.parametrize(
  'page, link, on_the_site',
  [
    ('README.md', '[a](docs/tpu.md#on-tpus)', '[a](tpu.md#on-tpus)'),
    ('README.md', '![a](docs/step.svg)', '![a](step.svg)'),
    ('README.md', '[configs/](configs)', '`configs/`'),
    ('docs/tpu.md', '[a](../README.md#x)', '[a](index.md#x)'),
    ('docs/tpu.md', '[a](../results/x.json)', '[a](results/x.json)'),
    ('scripts/a.md', '[a](../docs/tpu.md)', '[a](../tpu.md)'),
    ('README.md', '[a](https://b.c/d#e)', '[a](https://b.c/d#e)'),
    ('README.md', '[a](#results)', '[a](#results)'),
  ],
)
def test_links_are_written_for_the_site(page, link, on_the_site):
  assert hooks().relinked(page, link) == on_the_site


def test_a_dead_link_is_found():
  assert list(dead_links('docs/tpu.md', '[a](gone.md)')) == ['gone.md']


def test_the_navigation_has_every_page_of_docs():
  nav = text('mkdocs.yml').partition('\nnav:')[2]
  listed = re.findall(r': ([\w.]+\.md)$', nav, re.MULTILINE)
  there = {path.name for path in DOCS.glob('*.md')} | {'tutorial.md'}
  assert there <= set(listed), f'add {there - set(listed)} to nav in mkdocs.yml'
  assert set(listed) <= places()
  assert len(listed) == len(set(listed))


def test_every_room_has_a_page():
  assert {'method', 'train', 'audit'} <= set(hooks().rooms())


# ---- The tutorial ----------------------------------------------------------


def cells():
  return json.loads(text('docs/tutorial.ipynb'))['cells']


def test_the_tutorial_is_stored_without_results():
  code = [cell for cell in cells() if cell['cell_type'] == 'code']
  assert len(code) > 5
  assert not any(cell['outputs'] or cell['execution_count'] for cell in code)


def test_the_page_of_the_tutorial_has_its_cells():
  page = hooks().notebook_page()
  assert page.startswith('# ')
  assert all(''.join(cell['source'])[:40] in page for cell in cells()[1:-1])
  assert not list(dead_links('docs/tutorial.ipynb', page))


@pytest.mark.slow
def test_the_tutorial_runs(tmp_path):
  code = [''.join(c['source']) for c in cells() if c['cell_type'] == 'code']
  done = subprocess.run(
    [sys.executable, '-c', '\n\n'.join(code)],
    cwd=tmp_path,
    # Compiled as users compile: the flags of the tests make steps slow.
    env=os.environ
    | {'PYTHONPATH': str(ROOT), 'MPLBACKEND': 'Agg', 'JAX_PLATFORMS': 'cpu'}
    | {'XLA_FLAGS': ''},
    capture_output=True,
    text=True,
    timeout=1500,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  runs = tmp_path / 'runs' / 'tutorial'
  for tau in (0, 1, 4):
    summary = json.loads((runs / f'tau{tau}' / 'summary.json').read_text())
    assert summary['staleness_steps'] == tau and summary['top1'] > 90
  assert (runs / 'digits.stablehlo').exists()


# ---- Troubleshooting -------------------------------------------------------


def troubles():
  """Rows of the tables of symptoms."""
  for line in text('docs/troubleshooting.md').splitlines():
    parts = line.strip('| ').split(' | ')
    if len(parts) == 3 and parts[0] not in ('symptom', '---|---|---'):
      yield parts


@functools.cache
def literals():
  """All strings of the package, with … for what an f-string fills in."""
  found = []
  for path in sorted((ROOT / 'conadv_jax').rglob('*.py')):
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
      if isinstance(node, ast.JoinedStr):
        parts = [getattr(part, 'value', None) for part in node.values]
        found.append(''.join(p if isinstance(p, str) else '…' for p in parts))
      elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        found.append(node.value)
  return '\0'.join(found)


def unknown_messages(symptom):
  """Messages of ours in a symptom that the package does not have."""
  for message in re.findall('`([^`]+)`', symptom):
    parts = [re.escape(part.strip()) for part in message.split('…')]
    # What an f-string fills in may hold text of the message itself.
    if not re.search('[^\0]*'.join(parts), literals()):
      yield message


def test_messages_of_the_page_are_those_of_the_package():
  rows = list(troubles())
  assert len(rows) > 50
  unknown = [list(unknown_messages(symptom)) for symptom, *_ in rows]
  assert not list(itertools.chain(*unknown))


def test_a_message_that_nothing_prints_is_found():
  assert list(unknown_messages('`the moon is … full`'))
  assert not list(unknown_messages('`not read with …`'))


def unknown_settings(content):
  known = flatten(default_config().to_dict())
  groups = {name.split('.')[0] for name in known if '.' in name}
  for name in _SETTING.findall(content):
    if name.split('.')[0] in groups and name not in known:
      yield name


@pytest.mark.parametrize('page', ['docs/troubleshooting.md', 'README.md'])
def test_settings_of_a_page_exist(page):
  assert not list(unknown_settings(text(page)))


def test_a_setting_that_does_not_exist_is_found():
  content = '`optimizer.speed=9` or --config.attack.gone=1 '
  assert list(unknown_settings(content)) == ['optimizer.speed', 'attack.gone']


def test_the_page_has_every_exit_code():
  codes = {
    value for value in vars(errors).values() if isinstance(value, int)
  } - {0}
  page = text('docs/troubleshooting.md')
  found = re.findall(r'\((\d+)\)|codes? (\d+)(?: and (\d+))?', page)
  named = {int(code) for codes in found for code in codes if code}
  assert codes <= named


# ---- Workflows and hooks of git --------------------------------------------


def ruff_of_the_lock():
  return re.search(r'^ruff==([\d.]+)$', text('requirements.lock'), re.M)[1]


@pytest.mark.parametrize('path', ['.pre-commit-config.yaml', 'setup.py'])
def test_ruff_is_that_of_the_lock(path):
  pins = set(re.findall(r'ruff==([\d.]+)', text(path)))
  assert pins == {ruff_of_the_lock()}


def workflow(path):
  return yaml.safe_load(path.read_text(encoding='utf-8'))


def writes(permissions):
  return {name for name, level in permissions.items() if level != 'read'}


@pytest.mark.parametrize('path', WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_may_only_read_and_names_versions(path):
  content = workflow(path)
  assert content['permissions'] == {'contents': 'read'}
  targets = set(re.findall(r'^(\w+):', text('Makefile'), re.MULTILINE))
  for name, job in content['jobs'].items():
    may_write = writes(job.get('permissions', {}))
    assert may_write <= ({'pages', 'id-token'} if name == 'publish' else set())
    assert job['timeout-minutes'] and re.search(r'-[\d.]+$', job['runs-on'])
    for step in job['steps']:
      if 'uses' in step:
        assert re.fullmatch(r'actions/[\w-]+@v\d+', step['uses'])
      if step.get('uses', '').startswith('actions/checkout'):
        assert step['with']['persist-credentials'] is False
      # What an event says must not become a part of a command.
      assert '${{' not in step.get('run', '')
      assert set(re.findall(r'\bmake (\w+)', step.get('run', ''))) <= targets


def test_workflows_cover_the_pythons_of_setup():
  (tests,) = [path for path in WORKFLOWS if path.stem == 'tests']
  pythons = workflow(tests)['jobs']['test']['strategy']['matrix']['python']
  classified = re.findall(r"Python :: (3\.\d+)'", text('setup.py'))
  assert pythons == classified and len(pythons) > 2


def test_issue_forms_are_complete():
  forms = sorted((ROOT / '.github' / 'ISSUE_TEMPLATE').glob('*.yml'))
  for form in map(workflow, [f for f in forms if f.stem != 'config']):
    assert form['name'] and form['description']
    kinds = {part['type'] for part in form['body']}
    assert kinds <= {'markdown', 'textarea', 'input'}
    ids = [part['id'] for part in form['body'] if part['type'] != 'markdown']
    assert len(ids) == len(set(ids))


def test_the_changelog_has_this_version():
  headings = re.findall(r'^## ([\d.]+)', text('CHANGELOG.md'), re.MULTILINE)
  assert headings[0] == conadv_jax.__version__
