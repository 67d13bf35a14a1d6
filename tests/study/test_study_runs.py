"""A study of real trainings: killed twice, it gives the same table."""

import csv
import os
import signal
import subprocess
import sys
import time

import pytest

from conadv_jax.study.record import TIMINGS

pytestmark = pytest.mark.slow

STUDY = """
from conadv_jax.study.design import Arm, Search, Study

FIELDS = {'method': 'baseline', 'batch_size': 320}
STUDY = Study(
  config='digits',
  fields={'max_steps': 30, 'eval.attack': 'none', 'checkpoint.every_steps': 5,
          'eval.every_steps': 0},
  validation='train[80%:]',
  test='test',
  searches={'base': Search(FIELDS, {'optimizer.learning_rate': (4.0, 8.0)})},
  arms={'base': Arm(FIELDS, 2, 'base')},
)
"""


def start(path):
  command = [sys.executable, '-m', 'conadv_jax.study', '--processes=1']
  return subprocess.Popen(
    [*command, f'--study={path / "mine.py"}', f'--workdir={path / "w"}'],
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def wait_for(pattern, path, process):
  while not list((path / 'w').glob(pattern)):
    assert process.poll() is None, process.stdout.read()
    time.sleep(0.1)


def table(path):
  """study.csv without what two runs do not share."""
  with (path / 'w' / 'study.csv').open() as file:
    return [
      {k: v for k, v in row.items() if k not in TIMINGS}
      for row in csv.DictReader(file)
    ]


@pytest.fixture
def folders(tmp_path):
  made = tmp_path / 'unbroken', tmp_path / 'killed'
  for path in made:
    path.mkdir()
    (path / 'mine.py').write_text(STUDY)
  return made


def test_a_study_that_was_killed_twice_has_the_same_table(folders):
  unbroken, killed = folders
  process = start(unbroken)
  out, _ = process.communicate()
  assert process.returncode == 0, out

  # Its run outlives it, and the next study waits for that run.
  process = start(killed)
  wait_for('cells/search/base/*/checkpoints', killed, process)
  process.kill()
  process.communicate()
  process = start(killed)
  wait_for('cells/final/base/seed=0/checkpoints/*/*', killed, process)
  os.kill(process.pid, signal.SIGTERM)
  out, _ = process.communicate()
  assert process.returncode == 42, out
  assert 'run the same command again' in out
  process = start(killed)
  out, _ = process.communicate()
  assert process.returncode == 0, out

  assert len(table(killed)) >= 4
  assert table(killed) == table(unbroken)
