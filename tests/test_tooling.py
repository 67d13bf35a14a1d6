"""The set-up: Python is found, the lock fits setup.py, `make` sets up first."""

import ast
import importlib.metadata
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
# The lock of each DEVICE of the Makefile.
LOCKS = {
  'cpu': ROOT / 'requirements.lock',
  'tpu': ROOT / 'requirements-tpu.lock',
  'cuda': ROOT / 'requirements-cuda.lock',
}
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


# ---- requirements*.lock -----------------------------------------------------


def locked(device: str) -> dict[str, set[str]]:
  """{name: its lines} of a lock: a version, and for which machines it is."""
  pins = {}
  for line in LOCKS[device].read_text().splitlines():
    if line and not line.lstrip().startswith('#'):
      pins.setdefault(canonicalize_name(Requirement(line).name), set()).add(
        line
      )
  return pins


def for_this_python(device: str) -> dict[str, str]:
  """{name: version} of a lock, on this machine."""
  pins = {}
  for name, lines in locked(device).items():
    for pin in map(Requirement, lines):
      (spec,) = pin.specifier
      assert spec.operator == '==', pin
      if pin.marker is None or pin.marker.evaluate():
        assert pins.setdefault(name, spec.version) == spec.version
  return pins


def metadata(monkeypatch) -> dict:
  """The arguments of `setup` in setup.py."""
  call = {}
  monkeypatch.setattr(setuptools, 'setup', call.update)
  monkeypatch.chdir(ROOT)
  runpy.run_path('setup.py')
  return call


def declared(monkeypatch, device: str) -> list[Requirement]:
  """What setup.py asks for, with the extras that the lock has."""
  call = metadata(monkeypatch)
  extras = call['extras_require']
  extra = [] if device == 'cpu' else extras[device]
  return [
    Requirement(x) for x in call['install_requires'] + extras['dev'] + extra
  ]


@pytest.mark.parametrize('device', LOCKS)
def test_lock_pins_all_that_setup_asks_for(monkeypatch, device):
  for need in declared(monkeypatch, device):
    lines = locked(device).get(canonicalize_name(need.name), ())
    assert lines, f'{need.name} is not in the lock: run `make lock`'
    for (spec,) in (Requirement(line).specifier for line in lines):
      fits = spec.version in need.specifier
      assert fits, f'{need} but {spec.version}: run `make lock`'


@pytest.mark.parametrize('device', LOCKS)
def test_lock_names_no_place(device):
  # A path or an index address would work on one machine only.
  text = LOCKS[device].read_text()
  assert not re.search(r'://|index|find-links|file:|\s[/~]', text)
  command = text.splitlines()[1]
  assert 'uv pip compile' in command
  assert (f'--extra {device} ' in command) == (device != 'cpu')
  assert command.endswith(f' -o {LOCKS[device].name}')


@pytest.mark.parametrize('device', ['tpu', 'cuda'])
def test_locks_have_the_same_versions(device):
  ours, cpu = locked(device), locked('cpu')
  assert ours | cpu == ours, 'run `make lock`'


@pytest.mark.parametrize(
  ('device', 'extra', 'names'),
  [
    ('tpu', 'tpu', {'libtpu'}),
    ('cuda', 'cuda12', {'jax-cuda12-plugin'}),
  ],
)
def test_lock_has_what_jax_wants_there(monkeypatch, device, extra, names):
  """As the jax that is installed says it, which is that of the lock."""
  asked = {
    extra for need in declared(monkeypatch, device) for extra in need.extras
  }
  assert asked >= {extra}
  pins = for_this_python(device)
  if pins['jax'] != importlib.metadata.version('jax'):
    pytest.skip('the jax that is installed is not that of the lock')
  needs = [
    need
    for need in map(Requirement, importlib.metadata.requires('jax'))
    if need.marker is not None and need.marker.evaluate({'extra': extra})
  ]
  assert {need.name for need in needs} >= names
  for need in needs:
    assert pins[canonicalize_name(need.name)] in need.specifier, need


def test_the_plugin_of_cuda_is_as_old_as_jax():
  pins = locked('cuda')
  versions = {line.replace('jax==', '') for line in pins['jax']}
  assert len(versions) > 1  # by Python
  for name in 'jax-cuda12-plugin', 'jax-cuda12-pjrt':
    assert {line.replace(f'{name}==', '') for line in pins[name]} == versions


INSTALLERS = [
  '.ci/run', 'conadv_jax/cloud/worker.sh', 'examples/Dockerfile',
  *(f'.github/workflows/{x}.yml' for x in ('docs', 'lint', 'newest', 'tests')),
]  # fmt: skip


@pytest.mark.parametrize('path', INSTALLERS)
def test_what_a_script_installs_has_a_version(path):
  """From a lock, with a lock beside it, from this folder, or NAME==VERSION."""
  text = (ROOT / path).read_text(encoding='utf-8').replace('\\\n', ' ')
  for line in text.splitlines():
    _, found, arguments = line.partition('pip install ')
    words = iter(re.split(r'&&|;', arguments)[0].split() if found else ())
    constrained = '-c requirements.lock' in arguments
    for word in words:
      if word in ('-r', '-c', '--python', '--target', '-e'):
        argument = next(words).strip('"\'')
        if word in ('-r', '-c'):
          assert argument == '$lock' or (ROOT / argument).exists(), line
        elif word == '-e' and '--no-deps' not in arguments:
          assert constrained, line
      elif not word.startswith('-'):
        pinned = '==' in word or word == '"$uv"'
        name = canonicalize_name(word)
        assert pinned or constrained and name in locked('cpu'), line


# ---- Shell scripts ----------------------------------------------------------

SHELL_SCRIPTS = [
  *(ROOT / 'conadv_jax' / 'cloud').glob('*.sh'),
  *(ROOT / 'examples').glob('*.sh'),
  *(ROOT / 'scripts').glob('*.sh'),
  ROOT / '.ci' / 'run',
]
SHELLCHECK = shutil.which(
  'shellcheck',
  path=os.pathsep.join([os.path.dirname(sys.executable), os.environ['PATH']]),
)


@pytest.mark.skipif(SHELLCHECK is None, reason='shellcheck is not installed')
@pytest.mark.parametrize('script', SHELL_SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script):
  result = run(SHELLCHECK, script, path=os.environ['PATH'])
  assert result.returncode == 0, result.stdout


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
  for path in (ROOT / 'Makefile', ROOT / 'setup.py', *LOCKS.values()):
    shutil.copy(path, folder)
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


@pytest.fixture
def installed(checkout):
  """Makes .venv look installed for a device; returns the stamp."""

  def install(device=None, place=None):
    (checkout / '.venv' / 'bin').mkdir(parents=True)
    (checkout / '.venv' / 'bin' / 'python').symlink_to(sys.executable)
    if device:
      (checkout / '.venv' / '.device').write_text(f'{device}\n')
    stamp = checkout / '.venv' / '.installed'
    stamp.write_text(f'{place or checkout.resolve()}\n')
    return stamp

  return install


def planned(checkout, *arguments, **env):
  """What `make setup` would do, in words of the shell."""
  make = ('make', '-C', checkout, '-n', 'setup', *arguments)
  result = run(*make, path=os.environ['PATH'], **env)
  assert result.returncode == 0, result.stderr
  return result.stdout


@needs_make
def test_finished_setup_is_not_repeated(checkout, installed):
  stamp = installed()
  assert 'Setting up' not in planned(checkout)
  newer = stamp.stat().st_mtime + 10
  os.utime(checkout / 'requirements-tpu.lock', (newer, newer))
  assert 'Setting up' not in planned(checkout)
  os.utime(checkout / 'requirements.lock', (newer, newer))
  assert 'Setting up' in planned(checkout)


@needs_make
def test_moved_checkout_is_set_up_again(checkout, installed):
  installed(place='/somewhere/else')
  assert 'Setting up' in planned(checkout)


@needs_make
@pytest.mark.parametrize('device', LOCKS)
def test_a_device_has_its_lock(checkout, device):
  name = LOCKS[device].name
  for plan in (
    planned(checkout, f'DEVICE={device}'), planned(checkout, DEVICE=device)
  ):  # fmt: skip
    assert plan.count(f'-r {name}') == 2  # by uv, or by pip
    assert f'echo {device} > .venv/.device' in plan
    others = {lock.name for lock in LOCKS.values()} - {name}
    assert not others & set(plan.split())


@needs_make
def test_the_device_stays_until_another_is_asked_for(checkout, installed):
  stamp = installed('tpu')
  assert 'Setting up' not in planned(checkout)
  assert 'Setting up' not in planned(checkout, 'DEVICE=tpu')
  plan = planned(checkout, 'DEVICE=cpu')
  assert '-r requirements.lock' in plan
  assert 'venv --clear .venv' in plan  # libtpu goes
  stamp.unlink()  # interrupted
  plan = planned(checkout)
  assert '-r requirements-tpu.lock' in plan
  assert '--clear' not in plan


@needs_make
def test_a_venv_of_no_device_is_for_the_cpu(checkout, installed):
  installed()
  assert 'Setting up' not in planned(checkout, 'DEVICE=cpu')
  assert '--clear' in planned(checkout, 'DEVICE=cuda')


@needs_make
@pytest.mark.parametrize('device', ['gpu', 'TPU', 'cpu tpu'])
def test_an_unknown_device_is_an_error(checkout, installed, device):
  installed('tpu')
  make = ('make', '-C', checkout, 'setup', f'DEVICE={device}')
  result = run(*make, path=os.environ['PATH'])
  assert result.returncode != 0
  assert f'DEVICE={device}: must be cpu, tpu or cuda' in result.stderr
  assert (checkout / '.venv' / '.installed').exists()


@needs_make
def test_make_lock_makes_every_lock(checkout, installed):
  installed()
  make = ('make', '-C', checkout, '-n', 'lock', 'LOCK_ARGS=--upgrade')
  plan = run(*make, path=os.environ['PATH']).stdout
  assert '--extra dev setup.py -o requirements.lock --upgrade' in plan
  assert 'for device in tpu cuda' in plan
