"""Directories with checkpoints, and no waits between attempts."""

import gc

import pytest
from saved import save

from conadv_jax.base import storage
from conadv_jax.checkpoints import checkpoint
from conadv_jax.checkpoints.checkpoint import Checkpoints


@pytest.fixture(autouse=True)
def dropped_coroutines():
  """They end in the test that left them, not in a later one."""
  yield
  gc.collect()


@pytest.fixture(autouse=True)
def waits(monkeypatch):
  """Seconds that were waited for before another attempt: none really are."""
  seconds = []
  monkeypatch.setattr(checkpoint, '_sleep', seconds.append)
  monkeypatch.setattr(storage, '_sleep', seconds.append)
  return seconds


@pytest.fixture
def two(tmp_path):
  """A directory with checkpoints of steps 1 and 2."""
  checkpoints = Checkpoints(tmp_path, keep=5)
  save(checkpoints, 1)
  save(checkpoints, 2, {'answer': 42})
  checkpoints.close()
  return tmp_path
