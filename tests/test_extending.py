"""The diffs of docs/extending.md apply, and what they add trains."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGE = (ROOT / 'docs' / 'extending.md').read_text(encoding='utf-8')
TITLES = re.findall(r'^## (.*)$', PAGE, re.MULTILINE)

# In one process, as importing takes longer than these steps, and without plots.
PROGRAM = """
import json, sys
sys.path.insert(0, '.')
import helpers
from conadv_jax import evaluate, models, train
models.MODELS['tiny'] = models.Entry(helpers.TinyNet, 4)
flags = [
  '--workdir=run', '--config.bn_group_size=8', '--config.log_every_steps=1',
  '--config.checkpoint.every_steps=1', '--config.eval.every_steps=0',
  '--config.eval.attack_steps=2', '--config.model=tiny', '--config.plots=False',
  *sys.argv[1:],
]
if not any(flag.startswith('--config=') for flag in flags):
  flags.append('--config=digits:method=conadv')
flags.append('--config.batch_size=64')
for steps in (2, 3):
  train.main(['train', *flags, f'--config.max_steps={steps}'])
print(json.dumps(evaluate.evaluate(['evaluate', '--workdir=run'])))
"""


def section(title):
  """(the diff, the flags to try it with) under a heading."""
  text = PAGE.split(f'## {title}\n')[1].split('\n## ')[0]
  diff = re.search(r'```diff\n(.*?\n)```', text, re.DOTALL)[1]
  flags = re.search(r'Try it with `(.*?)`', text)[1]
  return diff, flags.split()


def added(diff):
  return [
    line
    for line in diff.splitlines()
    if line.startswith('+') and not line.startswith('+++')
  ]


def test_there_are_six():
  assert len(TITLES) == 6


@pytest.mark.parametrize('title', TITLES)
def test_an_extension_is_small_and_in_the_style_of_the_project(title):
  diff, _ = section(title)
  assert len(added(diff)) < 40
  assert 1 <= diff.count('diff --git') <= 2
  assert all(len(line) <= 81 for line in added(diff))


@pytest.mark.parametrize('title', TITLES)
def test_an_extension_applies(title, tmp_path):
  copy(tmp_path)
  apply(section(title)[0], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize('title', TITLES)
def test_an_extension_trains_resumes_and_evaluates(title, tmp_path):
  diff, flags = section(title)
  copy(tmp_path)
  apply(diff, tmp_path)
  paths = {'PYTHONPATH': str(ROOT / 'tests')}
  process = subprocess.run(
    [sys.executable, '-c', PROGRAM, *flags],
    cwd=tmp_path,
    capture_output=True,
    text=True,
    timeout=900,
    check=False,
    env=os.environ | {'JAX_PLATFORMS': 'cpu'} | paths,
  )
  assert process.returncode == 0, process.stdout + process.stderr
  assert 'resumed at step 2' in process.stdout
  rows = json.loads(process.stdout.splitlines()[-1])
  assert rows[0]['attack'] == 'none'
  assert all(0 <= row['top1'] <= 100 for row in rows)
  if title == 'An attack':
    summary = json.loads((tmp_path / 'run' / 'summary.json').read_text())
    assert 'mi_fgsm' in summary['robust_top1_by_attack']
  if title == 'An evaluation metric':
    assert 0 < rows[0]['margin'] < 100


def copy(path):
  """The package and the recipes, in a folder of their own."""
  for name in ('conadv_jax', 'configs'):
    ignored = shutil.ignore_patterns('__pycache__')
    shutil.copytree(ROOT / name, path / name, ignore=ignored)


def apply(diff, path):
  process = subprocess.run(
    ['git', 'apply', '--unsafe-paths', '-'],
    input=diff,
    cwd=path,
    capture_output=True,
    text=True,
    check=False,
    env={'PATH': '/usr/bin:/bin', 'GIT_CEILING_DIRECTORIES': str(path.parent)},
  )
  assert process.returncode == 0, process.stderr
  # Where the folder is inside of another repository, git applies nothing.
  paths = re.findall(r'^\+\+\+ b/(\S+)$', diff, re.MULTILINE)
  for name in paths:
    assert (path / name).read_text() != (
      (ROOT / name).read_text() if (ROOT / name).exists() else ''
    ), name
