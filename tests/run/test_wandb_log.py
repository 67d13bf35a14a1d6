"""Weights & Biases, offline and played by a module."""

import sys
import threading
import time
import types

import pytest
from etils import epath
from PIL import Image

from conadv_jax.base.errors import ConfigError
from conadv_jax.run import metrics, wandb_log


class FakeRun:
  def __init__(self, fails=False):
    self.rows, self.config, self.fails = [], self, fails
    self.updates, self.finished = [], False

  def define_metric(self, *names, **more):
    self.axis = more.get('step_metric')

  def log(self, row):
    if self.fails:
      raise RuntimeError('quota')
    self.rows.append(row)

  def update(self, values, allow_val_change):
    self.updates.append(values)

  def finish(self):
    self.finished = True


@pytest.fixture
def fake(monkeypatch):
  """Plays wandb; its `runs` are what was asked for and what came of it."""
  module = types.ModuleType('wandb')
  module.runs, module.fails = [], False
  module.Image = lambda image: image.size

  def init(**arguments):
    run = FakeRun(module.fails)
    module.runs.append((arguments, run))
    return run

  module.init = init
  monkeypatch.setitem(sys.modules, 'wandb', module)
  return module


def test_numbers_settings_and_pictures_arrive_in_order(fake, tmp_path):
  Image.new('RGB', (5, 3)).save(tmp_path / 'grid.png')
  for start in (0, 1):
    writer = metrics.make_writer(epath.Path(tmp_path), start, 'p')
    for shown in writer._shown:
      shown.settings(start, {'method': 'conadv'})
    writer.write(start + 1, 'train', {'loss': 0.5, 'layer': 'head'})
    writer.pictures(start + 1, [epath.Path(tmp_path / 'grid.png')])
    writer.close()
  (first, run), (second, _) = fake.runs
  assert run.rows == [
    {'train/loss': 0.5, 'step': 1},
    {'plots/grid': (5, 3), 'step': 1},
  ]
  assert run.updates == [{'method': 'conadv'}] and run.finished
  assert run.axis == 'step' and first['project'] == 'p'
  assert first['id'] == second['id'] and second['resume'] == 'allow'


def test_an_error_ends_the_log_and_not_the_run(fake, tmp_path, capsys):
  fake.fails = True
  writer = metrics.make_writer(epath.Path(tmp_path), 0, 'p')
  for step in (1, 2):
    writer.write(step, 'train', {'loss': 0.5})
  writer.close()
  assert len(metrics.read_metrics(epath.Path(tmp_path))) == 2
  assert "nothing is logged there any more: RuntimeError('quota')" in (
    capsys.readouterr().out
  )


def test_a_slow_network_delays_no_step(fake, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(wandb_log, '_CLOSE_SECONDS', 0.01)
  network = threading.Event()
  fake.init = lambda **_: (network.wait(), FakeRun())[1]
  start = time.monotonic()
  writer = metrics.make_writer(epath.Path(tmp_path), 0, 'p')
  writer.write(1, 'train', {'loss': 0.5})
  writer.close()
  assert time.monotonic() - start < 2.5
  assert 'wandb sync' in capsys.readouterr().out
  network.set()


def test_what_is_not_installed_is_an_error_at_start(monkeypatch):
  monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
  with pytest.raises(
    ConfigError, match=r"^wandb_project='p'.*conadv_jax\[wandb"
  ):
    wandb_log.check_installed('p')
  wandb_log.check_installed('')


@pytest.mark.parity
def test_wandb_keeps_a_run_offline(tmp_path, monkeypatch):
  wandb = pytest.importorskip('wandb')
  monkeypatch.setenv('WANDB_MODE', 'offline')
  Image.new('RGB', (5, 3)).save(tmp_path / 'grid.png')
  writer = metrics.make_writer(epath.Path(tmp_path), 0, 'p')
  writer.write(1, 'train', {'loss': 0.5})
  writer.pictures(1, [epath.Path(tmp_path / 'grid.png')])
  writer.close()
  wandb.teardown()  # Its own process writes the file, some ms after `finish`.
  (file,) = tmp_path.glob('wandb/offline-run-*/*.wandb')
  content = file.read_bytes()
  assert b'train/loss' in content and b'plots/grid' in content
  assert (tmp_path / 'wandb_id').read_text() in file.name
