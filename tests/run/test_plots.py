"""The pictures of a run: which images and points are drawn."""

import types

import helpers
import numpy as np
import odd_images
import pytest
from matplotlib.figure import Figure
from PIL import Image

from conadv_jax.data.quarantine import Quarantine
from conadv_jax.data.sources.source import Encoded
from conadv_jax.run import plots
from conadv_jax.run.evaluator import Evaluator


class Files(Encoded):
  """Grey images of class 1; None is a file that is no image."""

  def __init__(self, greys):
    self._files = [
      b'nonsense'
      if grey is None
      else odd_images.encode(Image.new('RGB', (9, 9), (grey,) * 3), 'PNG')
      for grey in greys
    ]
    self.num_examples = len(greys)

  def fetch(self, ids):
    return [self._files[i] for i in ids]

  def parse(self, record, example_id):
    del example_id
    return record, 1

  def describe(self, example_id):
    return f'file{example_id}'


@pytest.mark.parametrize(
  'greys, expected',
  [
    ([50, 60, 70], [50, 60, 70]),  # fewer than are asked for: no padding
    ([50, None, 70], [50, 70]),
    ([None, 60, None, None, None, 70, 80, 90, 95], [60, 70, 80, 90]),
  ],
)
def test_only_images_that_are_there_and_decodable_are_drawn(greys, expected):
  config = helpers.make_config(
    {'dataset.image_size_px': 8, 'dataset.eval_crop_ratio': 1.0}
  )
  run = types.SimpleNamespace(
    config=config, spec=helpers.SPEC, mesh=helpers.one_device(config)
  )
  evaluator = Evaluator(run, Files(greys), Quarantine(max_share=0.9))
  images, labels = evaluator.first_examples(4)
  assert images.mean((1, 2, 3)).tolist() == expected
  assert labels.tolist() == [1] * len(expected)


@pytest.fixture
def drawn(monkeypatch, tmp_path):
  """Draws rows of metrics.jsonl; returns the lines by label."""
  figures = []
  monkeypatch.setattr(
    plots, 'save', lambda figure, path: figures.append(figure)
  )

  def draw(rows):
    plots.training_curves(rows, 'title', tmp_path / 'x.png')
    (figure,) = figures
    return {
      line.get_label(): line for axis in figure.axes for line in axis.lines
    }

  return draw


def ink(line):
  """Pixels that a line colours on a canvas of its own."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg

  figure = Figure(figsize=(2, 2))
  canvas = FigureCanvasAgg(figure)
  axis = figure.add_axes((0, 0, 1, 1))
  axis.set_axis_off()
  axis.plot(
    *line.get_data(),
    color='black',
    marker=line.get_marker(),
    markevery=line.get_markevery(),
  )
  canvas.draw()
  return int((np.asarray(canvas.buffer_rgba())[..., :3].min(-1) < 200).sum())


def test_a_curve_of_one_point_is_visible(drawn):
  lines = drawn([{'step': 5, 'split': 'train', 'loss_clean': 1.5}])
  assert ink(lines['clean view']) > 5


def test_a_curve_of_many_points_has_no_markers(drawn):
  lines = drawn(
    [{'step': i, 'split': 'train', 'loss_clean': 1.5} for i in range(9)]
  )
  line = lines['clean view']
  assert line.get_markevery() == [] and ink(line) > 50


def test_what_is_not_finite_is_a_gap_and_a_point_within_is_visible(drawn):
  """metrics.jsonl has null for it."""
  values = [1.0, 2.0, None, 3.0, None, 2.0, 1.0]
  lines = drawn(
    [
      {'step': i, 'split': 'train', 'grad_norm': value}
      for i, value in enumerate(values)
    ]
  )
  line = lines['gradient norm']
  shown = np.isfinite(line.get_ydata()).tolist()
  assert shown == [value is not None for value in values]
  assert line.get_markevery() == [3]


def test_a_curve_without_a_number_is_left_out(drawn):
  rows = [{'step': 1, 'split': 'train', 'loss_clean': 1.0, 'grad_norm': None}]
  assert 'gradient norm' not in drawn(rows)
