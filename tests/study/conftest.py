"""A small study, ready to run."""

import sys

import pytest
from studies import FAKE, STUDY

from conadv_jax.study import command, runner


@pytest.fixture
def study(tmp_path, monkeypatch):
  """Runs the study with the program above; returns a function."""
  fake, file = tmp_path / 'fake.py', tmp_path / 'mine.py'
  fake.write_text(FAKE)
  file.write_text(STUDY)
  monkeypatch.setattr(runner, '_TRAIN', (sys.executable, str(fake)))

  def run(*flags, file=file):
    command.main(['', f'--study={file}', f'--workdir={tmp_path / "w"}', *flags])
    return tmp_path / 'w'

  return run
