"""What the source must keep to: import order, sharding, TensorFlow, length."""

import ast
import json
import os
import pathlib
import subprocess
import sys

import pytest

import conadv_jax

PACKAGE = pathlib.Path(conadv_jax.__file__).parent
# The rooms, in order: a module imports only from its own room and those above.
# README.md and docs/design.md list the same rooms; a test compares them.
ROOMS = {
  'base': 'errors with their exit codes, storage retries, faults on purpose',
  'methods': 'METHODS and ATTACKS: presets as data',
  'config': 'one frozen Config: every field with default, rule and comment',
  'devices': 'mesh, sums over devices, sharded optimizer, compiler flags',
  'models': 'networks by name, routed and grouped batch norm',
  'data': 'sources, images, order of examples; the only room with TensorFlow',
  'hosts': 'several processes as one run: messages, watchdog, signals',
  'method': 'the method: step, staleness, attack, gradients, optimizer',
  'experiment': '`Run`: everything static of a run, built once',
  'checkpoints': 'save, restore, manifest, checksums',
  'cli': 'command lines, and how a command ends',
  'run': 'the training loop; work directory, metrics, evaluator, summary',
  'debug': 'replay of a bad step',
  'analysis': 'curvature, sharpness, landscape, staleness (command)',
  'supervise': 'start a run again (command)',
  'evaluate': 'clean and robust accuracy (command)',
  'train': 'train one configuration (command)',
  'study': 'grids of runs that answer a question (command)',
  'export': "a run's network for timm or serving (command)",
  'audit': 'the step, compiled for a TPU slice (command)',
  'preflight': 'can a run start on these hosts? (command)',
  'cloud': 'rent machines, set them up, run on them (command)',
}
ORDER = tuple(ROOMS)
# These are narrower than their place in the order allows.
MAY_IMPORT = {
  'data': {'base', 'methods', 'config'},
  'models': {'base', 'methods', 'config'},
}
SHARDING = {'Mesh', 'NamedSharding', 'PartitionSpec', 'make_mesh', 'P'}
MAX_LINES = 60  # of a function
MAX_FILE_LINES = 450

SOURCES = {
  path.relative_to(PACKAGE.parent).with_suffix('').as_posix(): path.read_text(
    encoding='utf-8'
  )
  for path in sorted(PACKAGE.rglob('*.py'))
}


def component(module):
  """'conadv_jax/data/sampler' or 'conadv_jax.data.sampler' -> 'data'."""
  parts = module.replace('/', '.').split('.')
  return parts[1] if len(parts) > 1 else '__init__'


def imported(source):
  """Dotted names that `source` imports, also inside of functions.

  `from a import b` gives a.b: of this package, b is a module or the name of
  something in one, and both are of the same component.
  """
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, 'relative imports hide what is imported'
      yield from (f'{node.module}.{alias.name}' for alias in node.names)


def order_violations(module, source):
  """Messages about the imports of `module` from this package."""
  importer = component(module)
  if importer not in (*ORDER, '__init__'):
    yield f'{module} is new: add {importer!r} to ORDER in this file'
    return
  for name in imported(source):
    if name.split('.')[0] != 'conadv_jax':
      continue
    target = component(name)
    if importer == '__init__':
      yield f'{module} imports {name}: importing the package loads nothing'
    elif target not in ORDER:
      yield f'{module} imports {name}: add {target!r} to ORDER in this file'
    elif target != importer:
      above = ORDER[: ORDER.index(importer)]
      if target not in MAY_IMPORT.get(importer, above):
        yield f'{module} imports {name}, which is not above it'


def tensorflow_violations(module, source):
  if component(module) == 'data':
    return
  for name in imported(source):
    if is_tensorflow(name):
      yield f'{module} imports {name}: only conadv_jax.data may'


def is_tensorflow(name):
  return name.split('.')[0] in ('tensorflow', 'tensorflow_datasets')


def sharding_violations(module, source):
  """Everything of jax that makes a mesh or a sharding, by its own name."""
  if component(module) == 'devices':
    return
  for name in imported(source):
    if name.split('.')[0] == 'jax' and name.split('.')[-1] in SHARDING:
      yield f'{module} imports {name}'
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Attribute):
      name = ast.unparse(node)
      # `jax.sharding.Mesh` may be the type of an argument.
      if name.startswith('jax.') and node.attr in SHARDING - {'Mesh'}:
        yield f'{module} names {name}'
    elif isinstance(node, ast.Call):
      name = ast.unparse(node.func)
      if name.split('.')[-1] in SHARDING - {'make_mesh', 'P'}:
        yield f'{module} calls {name}'


def banned_violations(module, source):
  banned = {'pickle', 'cloudpickle', 'dill', 'pmap'}
  for name in imported(source):
    if banned & set(name.split('.')):
      yield f'{module} imports {name}'
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Attribute) and node.attr == 'pmap':
      yield f'{module} uses {ast.unparse(node)}'


def name_violations(module, source):
  """Modules of this package under another name, or hidden by a variable."""
  tree = ast.parse(source)
  modules = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.Import | ast.ImportFrom):
      parent = f'{node.module}.' if isinstance(node, ast.ImportFrom) else ''
      for alias in node.names:
        name = (parent + alias.name).replace('.', '/')
        if name in SOURCES or f'{name}/__init__' in SOURCES:
          modules.add(alias.asname or alias.name)
          if alias.asname:
            yield f'{module} imports {name} as {alias.asname}'
  for node in ast.walk(tree):
    bound = node.arg if isinstance(node, ast.arg) else None
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
      bound = node.id
    if bound in modules:
      yield f'{module}:{node.lineno}: a variable hides the module {bound}'


def length_violations(module, source):
  if (lines := len(source.splitlines())) > MAX_FILE_LINES:
    yield f'{module} has {lines} lines'
  functions = ast.FunctionDef | ast.AsyncFunctionDef
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, functions):
      lines = node.end_lineno - node.lineno + 1
      if lines > MAX_LINES:
        yield f'{module}: {node.name} has {lines} lines'


CHECKS = [
  order_violations,
  tensorflow_violations,
  sharding_violations,
  banned_violations,
  name_violations,
  length_violations,
]


@pytest.mark.parametrize('check', CHECKS, ids=lambda check: check.__name__)
def test_the_package_has_none_of_the(check):
  found = [m for name, source in SOURCES.items() for m in check(name, source)]
  assert not found, '\n'.join(found)


LONG = 'def f():\n' + '  x = 1\n' * 60


@pytest.mark.parametrize(
  'check, module, source',
  [
    (order_violations, 'devices/mesh', 'from conadv_jax import method'),
    (order_violations, 'devices/mesh', 'import conadv_jax.method.state'),
    (order_violations, 'base/faults', 'from conadv_jax.config import Config'),
    (
      order_violations,
      'method/attack',
      'def f():\n  from conadv_jax import train',
    ),
    (order_violations, 'data/sampler', 'from conadv_jax import devices'),
    (order_violations, 'models/norm', 'from conadv_jax.data import datasets'),
    (order_violations, 'config', 'from conadv_jax import helpers'),
    (order_violations, 'brand_new', ''),
    (order_violations, '__init__', 'from conadv_jax import config'),
    (tensorflow_violations, 'train', 'import tensorflow as tf'),
    (tensorflow_violations, 'train', 'from tensorflow.io import gfile'),
    (
      tensorflow_violations,
      'method/state',
      'def f():\n  import tensorflow_datasets',
    ),
    (tensorflow_violations, 'export', 'import tensorflow as tf'),
    (tensorflow_violations, 'export', 'def f():\n  import tensorflow as tf'),
    (
      sharding_violations,
      'method/state',
      'from jax.sharding import NamedSharding',
    ),
    (sharding_violations, 'method/state', 'from jax import P'),
    (
      sharding_violations,
      'method/state',
      'import jax\njax.make_mesh((1,), "x")',
    ),
    (sharding_violations, 'method/state', 'jax.sharding.PartitionSpec("data")'),
    (
      sharding_violations,
      'method/state',
      'jax.sharding.Mesh(devices, ("data",))',
    ),
    (banned_violations, 'method/state', 'import pickle'),
    (banned_violations, 'data/cache', 'from pickle import dumps'),
    (banned_violations, 'method/state', 'from jax import pmap'),
    (banned_violations, 'method/state', 'jax.pmap(f)'),
    (length_violations, 'method/state', LONG),
    (length_violations, 'train', LONG),
    (length_violations, 'train', '\n' * 451),
    (
      name_violations,
      'train',
      'from conadv_jax.devices import mesh as mesh_lib',
    ),
    (
      name_violations,
      'train',
      'from conadv_jax.devices import mesh\ndef f(mesh): pass',
    ),
    (
      name_violations,
      'train',
      'from conadv_jax import config\ndef f():\n  config = 1',
    ),
  ],
)
def test_the_checks_find_what_they_look_for(check, module, source):
  assert list(check(f'conadv_jax/{module}', source))


@pytest.mark.parametrize(
  'check, module, source',
  [
    (order_violations, 'method/attack', 'from conadv_jax.config import Attack'),
    (order_violations, 'data/sampler', 'from conadv_jax.data import datasets'),
    (order_violations, 'train', 'import conadv_jax.evaluate'),
    (tensorflow_violations, 'data/pipeline', 'import tensorflow as tf'),
    (sharding_violations, 'experiment', 'mesh: jax.sharding.Mesh'),
    (sharding_violations, 'experiment', 'mesh = make_mesh(64, 8)'),
    (
      sharding_violations,
      'devices/mesh',
      'from jax.sharding import NamedSharding',
    ),
    (name_violations, 'train', 'from conadv_jax.config import Config as C'),
    (name_violations, 'train', 'import numpy as np\nmesh = np'),
    (length_violations, 'method/state', LONG.replace('  x = 1\n', '', 1)),
  ],
)
def test_the_checks_let_pass_what_is_allowed(check, module, source):
  assert not list(check(f'conadv_jax/{module}', source))


def test_a_new_module_is_told_where_to_go():
  (message,) = order_violations('conadv_jax/brand_new', '')
  assert "add 'brand_new' to ORDER" in message


def loaded_by(code, *arguments, **variables):
  """(exit status, error text, packages that are loaded in the end)."""
  code = (
    'import atexit, json, sys\n'
    'names = lambda: sorted({m.split(".")[0] for m in sys.modules})\n'
    'atexit.register(lambda: print("\\n" + json.dumps(names())))\n' + code
  )
  process = subprocess.run(
    [sys.executable, '-c', code, *arguments],
    env=os.environ | {'PYTHONPATH': str(PACKAGE.parent)} | variables,
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )
  loaded = set(json.loads(process.stdout.splitlines()[-1]))
  return process.returncode, process.stderr, loaded


def test_the_step_loads_neither_tensorflow_nor_plotting():
  status, error, loaded = loaded_by('import conadv_jax.experiment')
  assert status == 0, error
  assert {'jax', 'flax', 'optax', 'conadv_jax'} <= loaded
  assert not loaded & {'tensorflow', 'tensorflow_datasets', 'matplotlib'}


@pytest.mark.parametrize('flag', ['--help', '--version'])
@pytest.mark.parametrize(
  'command',
  [
    'train',
    'evaluate',
    'export.__main__',
    'audit.__main__',
    'supervise',
    'analysis.__main__',
    'preflight.__main__',
    'cloud.__main__',
  ],  # fmt: skip
)
def test_help_and_version_come_before_the_imports(command, flag):
  code = f'from conadv_jax.{command} import console; console()'
  status, error, loaded = loaded_by(code, flag)
  assert status == 0, error
  assert not loaded & {'jax', 'numpy', 'flax', 'tensorflow', 'ml_collections'}


@pytest.mark.parametrize(
  'command, arguments, message',
  [
    ('train', ['--config=digits', '--workdir=x', '--config.foo=1'], "'foo'"),
    (
      'train',
      ['--config=digits', '--workdir=x', '--config.seed=-1'],
      'seed=-1',
    ),
    ('train', ['--workdir=/none/such', '--replay=3'], 'no run'),
    ('evaluate', ['--workdir=/none/such'], 'no run'),
    ('analysis.__main__', ['--workdir=/none/such'], 'no run'),
  ],
)
@pytest.mark.slow
def test_what_cannot_start_says_so_before_it_looks_for_devices(
  command, arguments, message
):
  code = f'from conadv_jax.{command} import console; console()'
  status, error, loaded = loaded_by(code, *arguments, JAX_PLATFORMS='no_such')
  assert (status, message in error) == (2, True), error
  assert not loaded & {'tensorflow', 'tensorflow_datasets', 'matplotlib'}
