"""The set-up: Python is found, the lock fits setup.py, `make` sets up first."""

import ast
import importlib.util
import os
import pathlib
import re
import runpy
import shutil
import subprocess
import sys
import zipfile

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import conadv_jax

ROOT = pathlib.Path(__file__).parents[1]
LOCK = ROOT / 'requirements.lock'
FIND_PYTHON = ROOT / 'scripts' / 'find_python.sh'
PYTHON_NAMES = (
  'python3.11',
  'python3.12',
  'python3.13',
  'python3',
  'python',
)

needs_make = pytest.mark.skipif(
  shutil.which('make') is None, reason='make is not installed'
)


def write_command(path: pathlib.Path, line: str) -> None:
  path.write_text(f'#!/bin/sh\n{line}\n')
  path.chmod(0o755)


def run(*args, path: str, **env: str) -> subprocess.CompletedProcess:
  return subprocess.run(
    args,
    env={'PATH': path, **env},
    capture_output=True,
    text=True,
    timeout=60,
    check=False,
  )


def find_python(path: pathlib.Path, **env: str) -> subprocess.CompletedProcess:
  return run('/bin/sh', str(FIND_PYTHON), path=str(path), **env)


# ---- scripts/find_python.sh -------------------------------------------------


def test_find_python_explains_what_is_missing(tmp_path):
  write_command(tmp_path / 'python3', "echo 'bad is Python 3.10.9'")
  result = find_python(tmp_path)
  assert result.returncode == 1
  assert result.stdout == ''
  assert 'python3.11: not found' in result.stderr
  assert 'python3: is Python 3.10.9' in result.stderr
  assert 'apt install python3.11-venv' in result.stderr


def test_find_python_skips_a_shim_that_fails(tmp_path):
  write_command(tmp_path / 'python3.11', 'exit 127')
  write_command(tmp_path / 'python3', f'exec "{sys.executable}" "$@"')
  result = find_python(tmp_path)
  assert result.returncode == 0, result.stderr
  assert result.stdout.strip() == sys.executable


def test_find_python_tries_the_given_one_first(tmp_path):
  for name in PYTHON_NAMES:
    write_command(tmp_path / name, "echo 'ok /from/path'")
  folder = tmp_path / 'with space'
  folder.mkdir()
  write_command(folder / 'mine', "echo 'ok /mine'")
  assert find_python(tmp_path, PYTHON=f'{folder}/mine').stdout == '/mine\n'
  result = find_python(tmp_path, PYTHON=f'{folder}/none')
  assert result.stdout == '/from/path\n'
  assert 'none: not found; trying others' in result.stderr


# ---- requirements.lock ------------------------------------------------------


def locked() -> list[Requirement]:
  lines = LOCK.read_text().splitlines()
  return [Requirement(x) for x in lines if x and not x.lstrip().startswith('#')]


def metadata(monkeypatch) -> dict:
  """The arguments of `setup` in setup.py."""
  call = {}
  monkeypatch.setattr(setuptools, 'setup', call.update)
  monkeypatch.chdir(ROOT)
  runpy.run_path('setup.py')
  return call


def declared(monkeypatch) -> list[Requirement]:
  """What setup.py asks for, the dev extra included."""
  call = metadata(monkeypatch)
  return [
    Requirement(x)
    for x in call['install_requires'] + call['extras_require']['dev']
  ]


def test_lock_pins_all_that_setup_asks_for(monkeypatch):
  pins = {}
  for pin in locked():
    (spec,) = pin.specifier
    assert spec.operator == '==', pin
    pins.setdefault(canonicalize_name(pin.name), []).append(spec.version)
  for need in declared(monkeypatch):
    versions = pins.get(canonicalize_name(need.name), [])
    assert versions, f'{need.name} is not in the lock: run `make lock`'
    for version in versions:
      assert version in need.specifier, f'{need} but {version}: run `make lock`'


def test_lock_names_no_place():
  # A path or an index address would work on one machine only.
  text = LOCK.read_text()
  assert not re.search(r'://|index|find-links|file:|\s[/~]', text)
  assert 'uv pip compile' in text.splitlines()[1]


# ---- The package ------------------------------------------------------------


def test_the_version_has_one_source(monkeypatch):
  assert metadata(monkeypatch)['version'] == conadv_jax.__version__


def test_every_command_is_a_module_that_runs(monkeypatch):
  scripts = metadata(monkeypatch)['entry_points']['console_scripts']
  assert len(scripts) >= 6
  for script in scripts:
    command, target = script.split(' = ')
    name, function = target.split(':')
    assert callable(getattr(importlib.import_module(name), function))
    room = {'conadv-analyse': 'analysis'}.get(command)
    module = f'conadv_jax.{room or command.removeprefix("conadv-")}'
    assert name.removesuffix('.__main__') == module
    path = pathlib.Path(importlib.util.find_spec(name).origin)
    assert f"if __name__ == '__main__':\n  {function}()" in path.read_text()


@pytest.mark.slow
def test_a_wheel_trains_a_shipped_recipe_in_another_folder(tmp_path):
  source = tmp_path / 'source'
  for name in ('conadv_jax', 'configs'):
    ignored = shutil.ignore_patterns('__pycache__')
    shutil.copytree(ROOT / name, source / name, ignore=ignored)
  for name in ('setup.py', 'pyproject.toml', 'README.md'):
    shutil.copy(ROOT / name, source)
  python = [sys.executable, '-m']
  build = ['pip', 'wheel', '-q', '--no-deps', '--no-build-isolation']
  subprocess.run([*python, *build, '-w', tmp_path, source], check=True)
  (wheel,) = tmp_path.glob('*.whl')
  with zipfile.ZipFile(wheel) as archive:
    archive.extractall(tmp_path / 'installed')
  assert (tmp_path / 'installed/conadv_jax/py.typed').exists()
  recipe = '--config=digits:method=conadv,batch_size=64'
  done = subprocess.run(
    [
      *python,
      'conadv_jax.train',
      recipe,
      '--workdir=w',
      '--config.max_steps=1',
    ],
    cwd=tmp_path,
    env=os.environ
    | {'PYTHONPATH': str(tmp_path / 'installed'), 'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  assert (tmp_path / 'w/summary.json').exists()


# ---- Scripts ----------------------------------------------------------------

SCRIPTS = sorted((ROOT / 'scripts').glob('*.py'))
# Arguments of scripts that are no paths.
NO_PATHS = {
  'axes', 'balanced', 'batch_size', 'batch_sizes', 'check', 'compile_peer',
  'count', 'devices', 'dtype', 'file_format', 'folder', 'memory_batches',
  'methods', 'microbatches', 'model', 'name', 'no_peer', 'num_eval',
  'num_shards', 'num_train', 'optimizer', 'policy', 'quick', 'repeats',
  'resolution', 'resolutions', 'resume', 'root', 'seconds', 'seed', 'seeds',
  'staleness', 'task', 'tolerance',
}  # fmt: skip


@pytest.mark.parametrize('script', SCRIPTS, ids=lambda path: path.stem)
def test_a_script_has_help_refuses_other_flags_and_expands_homes(script):
  calls = [
    (node, ast.unparse(node.func))
    for node in ast.walk(ast.parse(script.read_text(encoding='utf-8')))
    if isinstance(node, ast.Call)
  ]
  names = [name for _, name in calls]
  assert 'argparse.ArgumentParser' in names
  assert 'parser.parse_args' in names
  for call, name in calls:
    if name == 'parser.add_argument':
      flag = call.args[0].value.lstrip('-')
      kinds = [ast.unparse(k.value) for k in call.keywords if k.arg == 'type']
      expands = kinds in (['os.path.expanduser'], ['storage.expand'])
      assert expands != (flag in NO_PATHS), flag


# ---- Makefile ---------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path) -> pathlib.Path:
  """The files that make needs, in a folder without .venv."""
  folder = tmp_path / 'a b'
  (folder / 'scripts').mkdir(parents=True)
  for name in ('Makefile', 'requirements.lock', 'setup.py'):
    shutil.copy(ROOT / name, folder)
  shutil.copy(FIND_PYTHON, folder / 'scripts')
  return folder


@needs_make
def test_train_sets_up_first(checkout):
  result = run('make', '-C', checkout, '-n', 'train', path=os.environ['PATH'])
  assert result.returncode == 0, result.stderr
  setup = result.stdout.index('Setting up .venv')
  assert setup < result.stdout.index('scripts/quickstart.py')


@needs_make
def test_failed_setup_is_not_taken_for_done(checkout, tmp_path):
  shims = tmp_path / 'shims'
  shims.mkdir()
  for name in PYTHON_NAMES:
    write_command(shims / name, 'exit 127')
  path = f'{shims}{os.pathsep}{os.environ["PATH"]}'
  result = run('make', '-C', checkout, 'setup', path=path)
  assert result.returncode != 0
  assert 'found no Python that fits' in result.stderr
  assert not (checkout / '.venv' / '.installed').exists()


@needs_make
def test_finished_setup_is_not_repeated(checkout):
  (checkout / '.venv' / 'bin').mkdir(parents=True)
  (checkout / '.venv' / 'bin' / 'python').symlink_to(sys.executable)
  stamp = checkout / '.venv' / '.installed'
  stamp.write_text(f'{checkout.resolve()}\n')
  make = ('make', '-C', checkout, '-n', 'setup')
  path = os.environ['PATH']
  assert 'Setting up' not in run(*make, path=path).stdout
  newer = stamp.stat().st_mtime + 10
  os.utime(checkout / 'requirements.lock', (newer, newer))
  assert 'Setting up' in run(*make, path=path).stdout


@needs_make
def test_moved_checkout_is_set_up_again(checkout):
  (checkout / '.venv' / 'bin').mkdir(parents=True)
  (checkout / '.venv' / 'bin' / 'python').symlink_to(sys.executable)
  (checkout / '.venv' / '.installed').write_text('/somewhere/else\n')
  result = run('make', '-C', checkout, '-n', 'setup', path=os.environ['PATH'])
  assert 'Setting up' in result.stdout
