"""Every command of the pages is run by a test, or says what it needs.

Blocks of commands are marked `sh`. One that begins with `# needs: ...` asks for
hardware, data or an account: its commands are read as far as to where the work
would begin. All others run here, made small, or in the test that TESTED names.
"""

import itertools
import os
import re
import shlex
import subprocess
import sys

import pytest
from test_docs import PAGES, ROOT, text, wrong_commands

from conadv_jax import train
from conadv_jax.audit import command as audit
from conadv_jax.audit import libtpu
from conadv_jax.base.errors import ConfigError
from conadv_jax.cloud import command as cloud
from conadv_jax.run import evaluating, training

PROGRAMS = (
  'UPDATE_GOLDEN=1|conadv-\\w+|python3?|pip|make|mkdocs|pre-commit|sudo|export|'
  'docker|xpk|sbatch|apt|gcloud'
)
# What a page leaves to its reader.
PLACEHOLDERS = (
  (r'[ ,]\.\.\.(?= |$)', ''),
  (r'--config=\.\.\.', '--config=digits:method=conadv,batch_size=640'),
  (r' --workdir=(DIR|\.\.\.)', ' --workdir=runs/my_run'),
  (r'--compare (RUN|runs/one runs/two) ', '--compare runs/my_run '),
  (r'=SLICE', '=v3-1024'),
  (r'=STEP', '=1'),
  (r'/tmp/', ''),
)
# Commands that run here, and what makes them small.
SMALL = {
  r'-m conadv_jax\.train .*(replay|list)': '',
  r'-m conadv_jax\.train ': '--config.max_steps=2',
  r'-m conadv_jax\.evaluate .*my_run': '--config.dataset.eval_split=test[:40]'
  ' --config.eval.attack_steps=2 --config.eval.restarts=2',
  r'-m conadv_jax\.analysis ': '--examples=64 --eigenvalues=2 --probes=2'
  ' --ascent_steps=1 --points=3 --grid=3 --at=1',
  r'-m conadv_jax\.study --study': '--report',
  r'-m conadv_jax\.(models$|export |preflight |study --compare)': '',
  r'examples/conadv_minimal': '--epochs=1',
  r'scripts/make_fake_imagenet': '--num_train=32 --num_eval=16',
  r'scripts/bench_reliability': '--model=resnet8 --repeats=1',
  r'scripts/bench_input': '--quick',
  r'scripts/bench_conv': '--quick',
}
# Those that another test or a workflow runs: where, and words that say so. Of
# what only installs or formats: where it is defined.
TESTED = {
  'make (setup|train|test)': ('.github/workflows/tests.yml', r'make \1'),
  'make lint': ('.github/workflows/lint.yml', 'make lint'),
  'make lock': ('.github/workflows/newest.yml', 'make lock'),
  'make format': ('Makefile', '\nformat: $(STAMP)'),
  "mkdocs|pip install -e '.\\[docs]'": ('.github/workflows/docs.yml', 'mkdocs'),
  r"pip install -e '\.\[(?:\w+,)?(\w+)\]'": ('setup.py', r"'\1': ["),
  'pip install [.]': ('tests/test_tooling.py', 'a_wheel_trains'),
  'pip install pre-commit': ('tests/test_site.py', 'pre-commit-config'),
  'UPDATE_GOLDEN': ('tests/test_golden.py', 'UPDATE_GOLDEN'),
  r'conadv-cloud \w+$': ('tests/cloud/test_cloud.py', 'from_creation_to_del'),
  r'python -m conadv_jax\.audit': (
    'tests/audit/test_audit_tpu.py',
    'the_command_',
  ),
  r'python -m conadv_jax\.(?!models)\w+$': (
    'tests/test_architecture.py',
    'help_and_version_come',
  ),
  '.*evaluate.*--autoattack': ('tests/run/test_attacked.py', 'autoattack_agr'),
  '.*scripts/(prepare_(imagenet|cifar|fashion_mnist))': (
    r'tests/data/test_\1.py',
    r'\1',
  ),
  '.*scripts/prepare_tfds': ('tests/data/test_prepare_tfds.py', 'main()'),
  r'.*scripts/(bench_step|bench_scaling)\.py': (
    r'tests/test_\1.py',
    'it_runs_',
  ),
  '.*scripts/update_tables': ('tests/test_docs.py', 'update_tables.updated'),
}
# Of a shell itself; and of others: in a text, their name says what they need.
SHELL = r'export |\. \.venv'
FOREIGN = 'sbatch |apt |gcloud '
BLOCK = re.compile(r'^( *)```(\w*)\n(.*?)^ *```$', re.MULTILINE | re.DOTALL)


def commands(content):
  """Yields (a command of a page, whether it says that it needs something)."""
  for _, kind, block in BLOCK.findall(content):
    assert kind in ('sh', 'text', 'diff'), f'a block of {kind!r}: {block}'
    if kind == 'sh':
      needs = block.lstrip().startswith('# needs: ')
      lines = re.sub(r'\\\n|(?<!\S)#.*', ' ', block).splitlines()
      parts = [part for line in lines for part in line.split(' && ')]
      yield from ((part, needs) for part in parts if part.strip())
  spans = re.findall('`([^`]+)`', BLOCK.sub('', content))
  spans = (span for span in spans if re.match(rf'({PROGRAMS})\s', span))
  yield from ((span, bool(re.match(FOREIGN, span))) for span in spans)


def filled(command):
  """The command without what a page leaves to its reader."""
  command = ' '.join(command.split())
  for pattern, value in PLACEHOLDERS:
    command = re.sub(pattern, value, command)
  return command


def runs_here(command):
  """What makes it small; None if it does not run here."""
  if not command.startswith('python '):
    return None
  return next((v for k, v in SMALL.items() if re.search(k, command)), None)


def runs_elsewhere(command):
  """Whether TESTED has it, and its words are where it says."""
  for pattern, (file, words) in TESTED.items():
    if match := re.match(pattern, command):
      return match.expand(words) in text(match.expand(file))
  return False


def unexplained(content):
  """Commands of a page that no test runs and that do not say what they need."""
  for command, needs in commands(content):
    command = filled(command)
    known = runs_elsewhere(command) or re.match(SHELL, command)
    if not needs and not known and runs_here(command) is None:
      yield command


class Begins(Exception):
  """The work would begin."""


def begin(*_, **__):
  raise Begins


def read(command):
  """Has a command read up to where its work begins."""
  ours = {'train': train.main, 'audit': audit.audit}
  ours['evaluate'] = evaluating.evaluate
  name = re.search(
    rf'(?:^| )python -m conadv_jax\.({"|".join(ours)}) (?=--)', command
  )
  # Not the flags of a host, which would start it, nor a run that is not there.
  if name and not re.search('host0|=runs/my_run .*autoattack', command):
    argv = shlex.split(command.partition(name[0])[2])
    with pytest.raises(Begins):
      ours[name[1]]([name[1], *argv])
  if command.startswith('conadv-cloud '):
    verb, *flags = shlex.split(command)[1:]
    assert cloud.main([verb, '--dry_run', *flags]) == 0
  assert not list(wrong_commands(command))
  subprocess.run(['sh', '-n'], input=command, text=True, check=True)


@pytest.fixture
def _begins(monkeypatch):
  monkeypatch.setattr(training, 'train', begin)
  monkeypatch.setattr(evaluating, '_Evaluation', begin)
  monkeypatch.setattr(libtpu, 'prepare_process', begin)


@pytest.mark.usefixtures('_begins')
@pytest.mark.parametrize('page', PAGES)
def test_a_command_runs_in_a_test_or_says_what_it_needs(page):
  assert not list(unexplained(text(page)))
  for command, needs in commands(text(page)):
    if needs:
      read(filled(command))


@pytest.mark.parametrize(
  'content',
  [
    '`python scripts/new.py --x=1`',
    '```sh\npython -m conadv_jax.evaluate --weights=x\n```',
    '```sh\nmake train && docker x\n```',
    '```sh\nconadv-cloud run --hosts=a -- true\n```',
  ],
)
def test_a_command_that_nothing_runs_is_found(content):
  assert len(list(unexplained(content))) == 1


@pytest.mark.usefixtures('_begins')
@pytest.mark.parametrize(
  'command, error',
  [
    ('python -m conadv_jax.train --config=digits', ConfigError),
    ('conadv-cloud run -- python -m conadv_jax.train --x=1', ConfigError),
    ('python -m conadv_jax.audit --config=digits --topology=v9', ConfigError),
    ('python scripts/prepare_imagenet.py --gone=1', AssertionError),
    ('conadv-cloud run --hosts=a', AssertionError),
    ("gcloud 'x", subprocess.CalledProcessError),
  ],
)
def test_a_wrong_command_is_found(command, error):
  with pytest.raises(error):
    read(command)


# ---- Small ones run ----------------------------------------------------------

# What a preflight says of a machine with much else to do.
TOO_BUSY = (
  '✗ input     no answer in 20 s; check dataset.data_dir, and that this host'
  ' may read there'
)


def small_commands():
  """Those that run here, once each; README's come first."""
  pages = sorted(PAGES, key=lambda page: page != 'README.md')
  found = {}
  for command, needs in itertools.chain(*(commands(text(p)) for p in pages)):
    command = filled(command)
    if not needs and not runs_elsewhere(command):
      if (small := runs_here(command)) is not None:
        # Once, whatever its output.
        key = re.sub(r'--output=\S+', '', command)
        found.setdefault(key, f'{command} {small}'.strip())
  return list(found.values())


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A folder with the scripts of a checkout, and the run of README in it."""
  path = tmp_path_factory.mktemp('checkout')
  for name in ('scripts', 'examples', 'configs'):
    (path / name).symlink_to(ROOT / name)
  run(small_commands()[0], path)
  return path


def run(command, folder):
  done = subprocess.run(
    [sys.executable, *shlex.split(command)[1:]],
    cwd=folder,
    env=os.environ | {'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
    check=False,
  )
  if re.findall('✗.*', done.stdout) == [TOO_BUSY]:
    pytest.skip('other programs keep this machine busy')
  assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize('command', small_commands(), ids=lambda c: c[:60])
def test_a_command_runs(command, folder):
  run(command, folder)
