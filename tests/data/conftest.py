"""Images in every format, and pipelines that are quick to build."""

import functools

import pytest
import tensorflow as tf
from pipelines import FORMATS, NUM_EVAL, NUM_TRAIN

from conadv_jax.data.images import autoaugment, views
from scripts import make_fake_imagenet


@pytest.fixture(scope='module')
def few_small_graphs():
  """One of each kind of views, of two operations; test_autoaugment.py has all.

  Building the graphs takes nearly all of the time of a pipeline so short.
  """
  make_train_views, eval_view = views.make_train_views, views.eval_view

  @functools.cache
  def train_graph(settings, names):
    return tf.function(make_train_views(settings, names))

  @functools.cache
  def eval_graph(settings):
    return tf.function(functools.partial(eval_view, settings))

  with pytest.MonkeyPatch.context() as patch:
    for name, first in (('v0', 'Invert'), ('reduced_imagenet', 'Rotate')):
      steps = (first, 0.8, 4), ('Posterize', 0.5, 4)
      patch.setitem(autoaugment.POLICIES, name, (steps, steps[::-1]))
    patch.setattr(views, 'make_train_views', train_graph)
    patch.setattr(views, 'eval_view', lambda s, image: eval_graph(s)(image))
    yield


@pytest.fixture(scope='session')
def fake_dirs(tmp_path_factory):
  """The same images as ArrayRecord, as TFRecord and in folders."""
  root = tmp_path_factory.mktemp('fake')
  for name in FORMATS:
    make_fake_imagenet.prepare(str(root / name), name, NUM_TRAIN, NUM_EVAL, 3)
  make_fake_imagenet.write_folder(str(root / 'folder'), NUM_TRAIN, NUM_EVAL)
  return root
