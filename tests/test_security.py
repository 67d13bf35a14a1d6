"""No code in data, no shell, no credentials in what a run writes or says."""

from __future__ import annotations

import ast
import json
import pathlib
import re

import multihost
import pytest

from conadv_jax import cli, experiment
from conadv_jax.base import errors
from conadv_jax.base.errors import ConfigError
from conadv_jax.config import describe, from_config_dict
from conadv_jax.run import equal_hosts, metrics, workdir
from conadv_jax.run.lock import RunLock
from configs import digits

ROOT = pathlib.Path(__file__).resolve().parents[1]
SOURCES = {
  path.relative_to(ROOT).as_posix(): path.read_text(encoding='utf-8')
  for folder in ('conadv_jax', 'scripts', 'configs')
  for path in sorted((ROOT / folder).rglob('*.py'))
}

# ---- Forms of code that executes data, or passes it to a shell --------------

MODULES = {
  'pickle', '_pickle', 'cPickle', 'cloudpickle', 'dill', 'marshal', 'shelve',
  'joblib', 'jsonpickle', 'code', 'codeop', 'telnetlib', 'ftplib',
}  # fmt: skip
BUILTINS = {'eval', 'exec', 'compile', '__import__'}
CALLS = {
  'os.system', 'os.popen', 'subprocess.getoutput',
  'subprocess.getstatusoutput', 'tempfile.mktemp', 'torch.load',
  'yaml.load', 'yaml.load_all', 'yaml.unsafe_load', 'yaml.full_load',
  'yaml.Loader', 'yaml.UnsafeLoader', 'pandas.read_pickle', 'pd.read_pickle',
  'ssl._create_unverified_context', 'shutil.unpack_archive',
  'importlib.import_module', 'runpy.run_path', 'runpy.run_module',
}  # fmt: skip
# (argument, what it must not be)
ARGUMENTS = {'allow_pickle': True, 'shell': True, 'verify': False}


def forbidden(source):
  """What `source` must not have, in words; names are followed to imports."""
  tree = ast.parse(source)
  names = imported_names(tree)
  for node in ast.walk(tree):
    if isinstance(node, ast.Import | ast.ImportFrom):
      for name in names_of(node):
        if MODULES & set(name.split('.')):
          yield f'line {node.lineno}: imports {name}'
    is_read = isinstance(getattr(node, 'ctx', None), ast.Load)
    if isinstance(node, ast.Name) and node.id in BUILTINS and is_read:
      yield f'line {node.lineno}: names {node.id}'
    if isinstance(node, ast.Attribute | ast.Name):
      if (name := full_name(node, names)) in CALLS:
        yield f'line {node.lineno}: names {name}'
    if isinstance(node, ast.Call):
      yield from forbidden_arguments(node)


def forbidden_arguments(call):
  for keyword in call.keywords:
    refused = ARGUMENTS.get(keyword.arg)
    harmless = ast.unparse(keyword.value) == str(not refused)
    if refused is not None and not harmless:
      yield f'line {call.lineno}: {keyword.arg}={ast.unparse(keyword.value)}'
    if keyword.arg is None and ast.unparse(call.func).endswith('np.load'):
      yield f'line {call.lineno}: np.load(**...)'


def names_of(node):
  prefix = f'{node.module}.' if isinstance(node, ast.ImportFrom) else ''
  return [prefix + alias.name for alias in node.names]


def imported_names(tree):
  """{name in the file: what it stands for}."""
  names = {}
  for node in ast.walk(tree):
    if isinstance(node, ast.Import | ast.ImportFrom):
      for alias, name in zip(node.names, names_of(node), strict=True):
        names[alias.asname or alias.name] = name
  return names


def full_name(node, names):
  """'x.y' for an attribute of an imported x; '' for what is not one."""
  text = ast.unparse(node)
  first, dot, rest = text.partition('.')
  return names[first] + dot + rest if first in names else ''


@pytest.mark.parametrize('path', SOURCES)
def test_no_source_executes_data(path):
  assert not list(forbidden(SOURCES[path]))


@pytest.mark.parametrize(
  'source',
  [
    'import pickle',
    'from pickle import loads',
    'import cloudpickle as c',
    'def f():\n  import dill',
    'import marshal',
    'import shelve',
    'import numpy as np\nnp.load(path, allow_pickle=True)',
    'import numpy as np\nnp.load(path, allow_pickle=flag)',
    'import numpy as np\nnp.load(path, **options)',
    'import torch\ntorch.load(path)',
    'from torch import load\nload(path)',
    'import torch as t\nt.load(path)',
    'eval(text)',
    'exec(text)',
    'f = eval',
    'compile(text, "x", "exec")',
    '__import__(name)',
    'import yaml\nyaml.load(text)',
    'import yaml\nyaml.safe_load(text, Loader=yaml.Loader)',
    'import os\nos.system(command)',
    'import os as o\no.popen(command)',
    'from os import system\nsystem(command)',
    'import subprocess\nsubprocess.run(command, shell=True)',
    'import subprocess\nsubprocess.run(command, shell=flag)',
    'from subprocess import getoutput\ngetoutput(command)',
    'import tempfile\ntempfile.mktemp()',
    'import requests\nrequests.get(url, verify=False)',
    'import requests\nrequests.get(url, verify=flag)',
    'import ssl\nssl._create_unverified_context()',
    'import importlib\nimportlib.import_module(name)',
  ],
)
def test_each_forbidden_form_is_found(source):
  assert list(forbidden(source))


@pytest.mark.parametrize(
  'source',
  [
    'import re\nre.compile(text)',
    'import jax\njax.eval_shape(f)',
    'step.lower(state).compile()',
    'import yaml\nyaml.safe_load(text)',
    'import numpy as np\nnp.load(path, allow_pickle=False)',
    'import subprocess\nsubprocess.run([command], shell=False)',
    'import requests\nrequests.get(url, verify=True)',
    'from conadv_jax import evaluate\nevaluate.evaluate()',
    'import json\njson.load(file)',
    'class Config:\n  eval: Eval',
  ],
)
def test_harmless_forms_are_not(source):
  assert not list(forbidden(source))


# ---- The environment --------------------------------------------------------

# Variables that the package may read. None is a credential.
VARIABLES = {
  'CONADV_FAULTS', 'JAX_COORDINATOR_ADDRESS', 'TFDS_DATA_DIR',
  'TPU_LIBRARY_PATH', 'TPU_SKIP_MDS_QUERY', 'XLA_FLAGS', 'LIBTPU_INIT_ARGS',
  'TF_CPP_MIN_LOG_LEVEL', 'XDG_CACHE_HOME',
}  # fmt: skip
# Where a variable's name is a variable of Python, the names that it takes.
LISTS = {'conadv_jax/run/equal_hosts.py': equal_hosts._ENVIRONMENT}


def reads_of_environment(path, source):
  """What `source` may not do with the environment, in words."""
  tree = ast.parse(source)
  parents = {
    child: node
    for node in ast.walk(tree)
    for child in ast.iter_child_nodes(node)
  }
  names = imported_names(tree)
  for node in ast.walk(tree):
    if not isinstance(node, ast.Attribute | ast.Name):
      continue
    name = full_name(node, names)
    if name in ('os.environb', 'os.getenv', 'os.getenvb'):
      yield f'line {node.lineno}: {name}; use os.environ'
    if name == 'os.environ':
      key = key_of(node, parents)
      if key == 'written' or key in VARIABLES:
        continue
      if key == 'name' and set(LISTS.get(path, ['?'])) <= VARIABLES:
        continue
      yield f'line {node.lineno}: {ast.unparse(parents[node])}'


def key_of(node, parents):
  """The variable that is read of os.environ; 'written', 'name', or ''."""
  parent = parents[node]
  if isinstance(parent, ast.Attribute):
    call = parents[parent]
    if parent.attr in ('update', 'setdefault'):
      return 'written'
    key = call.args[0] if parent.attr == 'get' else None
  elif isinstance(parent, ast.Subscript):
    if isinstance(parent.ctx, ast.Store):
      return 'written'
    key = parent.slice
  elif isinstance(parent, ast.Compare):
    key = parent.left
  else:
    key = None
  if isinstance(key, ast.Constant):
    return key.value
  return 'name' if isinstance(key, ast.Name) else ''


@pytest.mark.parametrize(
  'path', [path for path in SOURCES if path.startswith('conadv_jax/')]
)
def test_only_harmless_variables_are_read(path):
  assert not list(reads_of_environment(path, SOURCES[path]))


@pytest.mark.parametrize(
  'source',
  [
    'print(os.environ)',
    'print(dict(os.environ))',
    'x = os.environ | {}',
    'run(env=os.environ)',
    'os.environ.items()',
    'os.environ.copy()',
    'os.environ["AWS_SECRET_ACCESS_KEY"]',
    'os.environ.get("GOOGLE_APPLICATION_CREDENTIALS")',
    '"HF_TOKEN" in os.environ',
    'for name in names:\n  os.environ.get(name)',
    'os.getenv("HF_TOKEN")',
    'from os import environ\nenviron["HF_TOKEN"]',
    'from os import environ as e\nprint(e)',
  ],
)
def test_each_other_use_of_the_environment_is_found(source):
  assert list(reads_of_environment('conadv_jax/x.py', f'import os\n{source}'))


@pytest.mark.parametrize(
  'source',
  [
    'os.environ.get("XLA_FLAGS", "")',
    'os.environ["TFDS_DATA_DIR"]',
    '"TPU_LIBRARY_PATH" in os.environ',
    'os.environ["ANY"] = "1"',
    'os.environ.update(ANY)',
    'os.environ.setdefault("ANY", "1")',
  ],
)
def test_writing_it_and_reading_of_the_list_is_not(source):
  assert not list(
    reads_of_environment('conadv_jax/x.py', f'import os\n{source}')
  )


# ---- Credentials ------------------------------------------------------------

SECRETS = {
  'GOOGLE_APPLICATION_CREDENTIALS': '/home/hidden1/key.json',
  'AWS_SECRET_ACCESS_KEY': 'hidden2',
  'HF_TOKEN': 'hidden3',
}
SIGNED = 'gs://bucket/x?X-Goog-Signature=hidden4'
PASSWORD = 'https://user:hidden5@host/x'


def settings(**fields):
  values = digits.get_config('batch_size=64')
  values.bn_group_size = 8
  values.update_from_flattened_dict(fields)
  return from_config_dict(values)


def written(directory):
  return b''.join(
    path.read_bytes() for path in directory.rglob('*') if path.is_file()
  )


@pytest.mark.parametrize('url', [SIGNED, PASSWORD])
def test_a_data_dir_with_a_credential_is_refused_without_saying_it(url):
  with pytest.raises(ConfigError, match='^dataset.data_dir=') as info:
    settings(**{'dataset.data_dir': url})
  assert 'application-default credentials' in str(info.value)
  assert 'hidden' not in str(info.value)


@pytest.mark.parametrize('url', [SIGNED, PASSWORD])
def test_a_workdir_with_a_credential_is_refused_without_saying_it(url):
  run = experiment.build(settings())
  for call in (
    lambda: workdir.prepare(url, run, {}),
    lambda: workdir.read_config(url),
  ):
    with pytest.raises(ConfigError, match='^workdir=') as info:
      call()
    assert 'hidden' not in str(info.value)


def test_a_command_with_a_credential_ends_without_saying_it(capsys):
  with pytest.raises(SystemExit) as info:
    cli.run(lambda argv: settings(**{'dataset.data_dir': SIGNED}))
  assert info.value.code == errors.USAGE
  said = capsys.readouterr()
  assert 'gs://bucket/x?...' in said.err
  assert 'hidden' not in said.err + said.out


def test_a_work_directory_holds_no_environment(tmp_path, monkeypatch, capsys):
  for name, value in SECRETS.items():
    monkeypatch.setenv(name, value)
  monkeypatch.setattr('sys.argv', ['train', '--workdir=a', '--token=hidden6'])
  run = experiment.build(settings())
  path = workdir.prepare(str(tmp_path), run, {'version': '1'})
  with RunLock(path):
    workdir.write_config(path, run, {'version': '1'})
    writer = metrics.make_writer(path, 0)
    writer.write(1, 'train', {'loss': 0.5})
    writer.close()
    print(describe(run.config))
    facts = json.dumps(equal_hosts.program(run.config))
    found = written(tmp_path)
  said = capsys.readouterr()
  assert b'"loss"' in found and b'batch_size' in found and b'--workdir' in found
  assert b'hidden' not in found
  assert 'hidden' not in said.out + said.err + facts


@pytest.mark.slow
def test_a_whole_run_writes_and_says_no_credential(tmp_path):
  code = multihost.run(
    [
      multihost.TINY,
      'train',
      '--config=configs/digits.py:batch_size=64,method=conadv',
      f'--workdir={tmp_path / "run"}',
      '--config.model=tiny',
      '--config.bn_group_size=8',
      '--config.max_steps=3',
      '--config.checkpoint.every_steps=2',
      '--config.eval.attack=none',
      '--config.plots=False',
    ],
    tmp_path / 'log',
    SECRETS | {'CONADV_FAULTS': 'oserror@storage/write'},
  )
  assert code == 0
  found = written(tmp_path)
  assert b'step 3/3' in found and b'"top1"' in found and b'again in' in found
  assert b'hidden' not in found


# ---- What SECURITY.md says --------------------------------------------------


def test_security_md_invents_no_address():
  text = (ROOT / 'SECURITY.md').read_text(encoding='utf-8')
  assert not re.search(r'[\w.]+@[\w.]+\.\w+|https?://', text)
  assert '*Report a vulnerability*' in text
