"""Slurm's script, the image and xpk's command, as far as they run without."""

import os
import pathlib
import re
import shlex
import subprocess

import pytest

from conadv_jax.base import errors
from conadv_jax.devices import topology

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / 'docs/cloud.md').read_text(encoding='utf-8')
# Writes down its arguments, and ends with $CODE.
FAKE = '#!/bin/sh\necho "$0" "$@" >> "$CALLS"\nexit "${CODE:-0}"\n'


@pytest.fixture
def program(tmp_path, monkeypatch):
  """Makes programs of the PATH that `calls` tells of."""
  monkeypatch.setenv('PATH', f'{tmp_path}:{os.environ["PATH"]}')
  monkeypatch.setenv('CALLS', str(tmp_path / 'calls'))

  def make(name):
    (tmp_path / name).write_text(FAKE)
    (tmp_path / name).chmod(0o755)

  return make


def calls(tmp_path):
  text = (tmp_path / 'calls').read_text()
  return text.replace(f'{tmp_path}/', '').splitlines()


@pytest.mark.parametrize('code', [0, errors.USAGE, errors.PREEMPTED])
def test_slurm_runs_again_what_was_stopped_and_saved(
  code, program, tmp_path, monkeypatch
):
  program('srun')
  program('scontrol')
  monkeypatch.setenv('SLURM_JOB_ID', '7')
  monkeypatch.setenv('CODE', str(code))
  script = ['sh', str(ROOT / 'examples/slurm.sh'), '--workdir=a b']
  assert subprocess.run(script, check=False).returncode == code
  srun, *rest = calls(tmp_path)
  assert srun.startswith('srun ') and srun.endswith(
    '.venv/bin/python -m conadv_jax.train --workdir=a b'
  )
  assert rest == ['scontrol requeue 7'] * (code == errors.PREEMPTED)


def test_the_image_has_a_stage_for_each_target_of_the_page(program, tmp_path):
  """The commands of the page are run as they are, with fakes."""
  for name in ('docker', 'xpk'):
    program(name)
  (block,) = re.findall(r'```sh\n([^`]*docker build.*?)```', PAGE, re.DOTALL)
  subprocess.run(['sh', '-ec', block], cwd=ROOT, check=True)
  build, push, workload = map(shlex.split, calls(tmp_path))
  source = (ROOT / build[build.index('-f') + 1]).read_text(encoding='utf-8')
  stages = re.findall(r'^FROM \S+ AS (\w+)$', source, re.MULTILINE)
  assert build[build.index('--target') + 1] in stages
  assert {'tpu', 'cuda'} <= {*stages}
  copied = re.findall(r'^COPY (?!--)(.*) \S+$', source, re.MULTILINE)
  assert copied
  for pattern in ' '.join(copied).split():
    assert pattern == '.' or list(ROOT.glob(pattern)), pattern
  assert push[1:] == ['push', build[build.index('-t') + 1]]
  assert workload[1:3] == ['workload', 'create']
  assert 'python -m conadv_jax.train' in ' '.join(workload)
  options = dict(zip(workload[3::2], workload[4::2], strict=False))
  assert topology.parse(options['--tpu-type']).chips == 256
  assert options['--docker-image'] == push[-1]
