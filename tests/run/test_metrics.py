"""metrics.jsonl, and the rates of the progress line."""

import json
import math

import helpers
import pytest
from etils import epath
from PIL import Image
from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.plugins.hparams import metadata as hparams_metadata
from tensorboard.util import tensor_util

from conadv_jax.base import storage
from conadv_jax.config import flatten, to_dict
from conadv_jax.run import metrics


def test_lines_after_the_step_of_a_resume_are_dropped(tmp_path):
  writer = metrics.MetricWriter(tmp_path, 0)
  for step in (1, 2, 3):
    writer.write(step, 'train', {'loss': step / 2, 'seconds': 10.0 * step})
  writer.close()
  path = tmp_path / 'metrics.jsonl'
  path.write_text(path.read_text() + '{"step": 4, "spl')  # a line cut short
  writer = metrics.MetricWriter(tmp_path, 2)
  assert writer.seconds_before == 20.0
  writer.write(3, 'train', {'loss': 7.0})
  writer.close()
  rows = metrics.read_metrics(tmp_path)
  assert [(r['step'], r['loss']) for r in rows] == [(1, 0.5), (2, 1.0), (3, 7)]


@pytest.mark.parametrize('start', [0, 2])
def test_tensorboard_shows_a_step_once_after_a_resume(start, tmp_path):
  for begin, loss in ((0, 1.0), (start, 7.0)):
    writer = metrics.MetricWriter(tmp_path, begin)
    for step in range(begin + 1, 5):
      writer.write(step, 'train', {'loss': loss})
    writer.close()
  events = plugin_event_accumulator.EventAccumulator(str(tmp_path))
  events.Reload()
  shown = [
    (e.step, float(tensor_util.make_ndarray(e.tensor_proto)))
    for e in events.Tensors('train/loss')
  ]
  rows = metrics.read_metrics(tmp_path)
  assert shown == [(row['step'], row['loss']) for row in rows]
  assert shown == [
    (step, 1.0 if step <= start else 7.0) for step in (1, 2, 3, 4)
  ]


def test_a_line_is_in_the_file_when_write_returns(tmp_path):
  writer = metrics.MetricWriter(tmp_path, 0)
  for step in (1, 2):
    writer.write(step, 'train', {'loss': 0.5})
    assert len(metrics.read_metrics(tmp_path)) == step
  writer.close()


def test_a_bucket_gets_the_file_on_flush_every_minute_and_at_the_end(
  tmp_path, monkeypatch
):
  now = [100.0]
  monkeypatch.setattr(metrics.time, 'monotonic', lambda: now[0])
  monkeypatch.setattr(storage, 'is_remote', lambda path: True)

  def steps():
    return [row['step'] for row in metrics.read_metrics(tmp_path)]

  (tmp_path / 'metrics.jsonl').write_text('{"step": 1, "split": "train"}\n')
  writer = metrics.MetricWriter(tmp_path, 1)
  writer.write(2, 'train', {'loss': 0.5})
  assert steps() == [1]
  writer.flush()  # before a checkpoint
  assert steps() == [1, 2]
  writer.write(3, 'train', {'loss': 0.5})
  now[0] += 61
  assert steps() == [1, 2]
  writer.write(4, 'train', {'loss': 0.5})
  assert steps() == [1, 2, 3, 4]
  writer.write(5, 'train', {'loss': 0.5})
  writer.close()
  assert steps() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
  'path, expected', [('gs://bucket/run', True), ('/data/run', False)]
)
def test_buckets_are_known_by_their_address(path, expected):
  assert storage.is_remote(epath.Path(path)) == expected


def test_a_number_that_is_not_finite_is_null(tmp_path):
  writer = metrics.MetricWriter(tmp_path, 0)
  writer.write(1, 'train', {'loss': math.nan, 'norm': math.inf, 'layer': 'a'})
  writer.close()

  def refuse(name):
    raise AssertionError(f'{name} is not JSON')

  line = (tmp_path / 'metrics.jsonl').read_text()
  row = json.loads(line, parse_constant=refuse)
  assert row == {
    'step': 1, 'split': 'train', 'loss': None, 'norm': None, 'layer': 'a'
  }  # fmt: skip


def test_rates_leave_out_what_was_paused(monkeypatch):
  now = [100.0]
  monkeypatch.setattr(metrics.time, 'monotonic', lambda: now[0])
  progress = metrics.Progress(10, 40, batch_size=8, waited_seconds=3.0)
  now[0] += 4
  with progress.paused():
    now[0] += 1000
  now[0] += 1
  rates = progress.report(20, waited_seconds=4.0)  # 10 steps in 5 s
  assert rates == pytest.approx(
    {'images_per_sec': 16.0, 'input_wait_percent': 20.0}
  )
  assert progress.eta() == '0:00:10'
  assert metrics.clock(12345.6) == '3:25:46'


def test_tensorboard_shows_the_settings_and_pictures(tmp_path):
  config = helpers.make_config({'attack.epsilon': 6.0})
  image = tmp_path / 'grid.png'
  Image.new('RGB', (5, 3), (9, 8, 7)).save(image)
  writer = metrics.MetricWriter(tmp_path, 0)
  writer.settings(0, config)
  writer.pictures(4, [image])
  writer.close()
  events = plugin_event_accumulator.EventAccumulator(str(tmp_path))
  events.Reload()
  (text,) = events.Tensors('settings')
  assert (
    '| attack.epsilon | `6.0` |' in text.tensor_proto.string_val[0].decode()
  )
  found = events.PluginTagToContent('hparams')
  start = hparams_metadata.parse_session_start_info_plugin_data(
    found[hparams_metadata.SESSION_START_INFO_TAG]
  )
  assert start.hparams['attack.epsilon'].number_value == 6.0
  assert start.hparams['method'].string_value == config.method
  experiment = hparams_metadata.parse_experiment_plugin_data(
    found[hparams_metadata.EXPERIMENT_TAG]
  )
  names = {info.name for info in experiment.hparam_infos}
  assert names == set(start.hparams) == set(flatten(to_dict(config)))
  (shown,) = events.Tensors('plots/grid')
  width, height, png = shown.tensor_proto.string_val
  assert (shown.step, width, height) == (4, b'5', b'3')
  assert png == image.read_bytes()
