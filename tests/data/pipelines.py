"""Makes batches of the input pipeline, and files to make them of."""

import dataclasses

from conadv_jax.config import default_config, from_config_dict
from conadv_jax.data import datasets, pipeline
from conadv_jax.data.sources.source import Share

FORMATS = ('array_record', 'tfrecord')
NUM_TRAIN, NUM_EVAL = 23, 13


def settings_of(**changes):
  dataset = from_config_dict(default_config()).dataset
  changes = {
    'name': 'imagenet2012',
    'image_size_px': 32,
    'random_flip': True,
  } | changes
  return dataclasses.replace(dataset, **changes)


def load(root, split='train', **changes):
  settings = settings_of(data_dir=str(root), **changes)
  spec = datasets.resolve(settings)
  return spec.open(split, settings)


def train(
  source,
  views=('clean', 'aa'),
  *,
  settings=None,
  seed=3,
  num_classes=1000,
  batch_size=4,
  start_step=0,
  num_steps=8,
  quarantine=None,
  **share,
):
  steps = range(start_step, start_step + num_steps)
  batches = pipeline.train_batches(
    source,
    settings or settings_of(),
    Share(seed, batch_size, steps, **share),
    image_views=views,
    num_classes=num_classes,
    quarantine=quarantine,
  )
  return list(batches)


def evaluation(source, **kwargs):
  defaults = dict(num_classes=1000, batch_size=4)
  return list(
    pipeline.eval_batches(source, settings_of(), **(defaults | kwargs))
  )
