"""This host's share of each global batch: NumPy in, NumPy out.

By tf.data; but images in memory need no TensorFlow, whose import takes longer
than a short run, unless they are augmented by AutoAugment.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from conadv_jax.config import Dataset
from conadv_jax.data import sampler
from conadv_jax.data.images import batches
from conadv_jax.data.quarantine import Quarantine
from conadv_jax.data.sources.in_memory import InMemory
from conadv_jax.data.sources.source import (
  BadExamples,
  Batch,
  Share,
  Source,
  check_positions,
  hide_gpus,
)


def train_batches(
  source: Source,
  config: Dataset,
  share: Share,
  *,
  image_views: Sequence[str],
  num_classes: int,
  quarantine: Quarantine | None = None,
) -> Iterator[Batch]:
  """Makes the augmented training batches of `share.steps`.

  The global batch of a step depends on the seed and the step only: a late start
  costs nothing, and hosts agree without talking. Of TFRecord files, each host
  has an order of its own (`tfrecord.TfRecords`). An example that cannot be used
  is replaced by the one with the next id that can be.

  Args:
    source: the examples, from `DatasetSpec.open`.
    config: augmentation.
    share: which examples, L of them in each step.
    image_views: of 'clean' and 'aa'.
    num_classes: examples with another label than 0 .. num_classes-1 are bad.
    quarantine: gets the examples that were replaced; None allows none.

  Returns:
    Iterator over {view: uint8 [L, H, W, C], ..., 'label': int32 [L], 'id':
    int64 [L]}. 'id' is that of the order, also where another stands in.

  Raises:
    ConfigError: the seed, batch size or first step is out of range.
    DataError: while iterating, for too many bad examples.
  """
  if not uses_tensorflow(source, image_views):
    return _of_arrays(source, config, share)
  from conadv_jax.data.images import preprocess, views

  hide_gpus()
  make_views = views.make_train_views(config, image_views)

  def example(image, label, example_id, epoch):
    key = preprocess.example_seed(share.seed, epoch, example_id)
    return {**make_views(image, key), 'label': label}

  bad = BadExamples('train', num_classes, quarantine, replace=True)
  order = source.order(share)
  return source.batches(order, example, len(share.positions), bad)


def eval_batches(
  source: Source,
  config: Dataset,
  *,
  num_classes: int,
  batch_size: int,
  positions: np.ndarray | None = None,
  quarantine: Quarantine | None = None,
  name: str = 'eval',
  example_ids: np.ndarray | None = None,
) -> Iterator[Batch]:
  """Every example once, in order of id, in ceil(N / B) batches on every host.

  Args:
    source: the examples, from `DatasetSpec.open`.
    config: size and interpolation of the central crop.
    num_classes: as in `train_batches`.
    batch_size: examples in the global batch, B; may exceed N.
    positions: places in the global batch that this host feeds, as in `Share`.
    quarantine: gets the examples that cannot be used; None allows none.
    name: of the examples, for the quarantine.
    example_ids: int [N], of a part of the examples; None is all of them.

  Returns:
    Iterator over {'clean': uint8 [L, H, W, C], 'label': int32 [L], 'id': int64
    [L], 'mask': bool [L]}. Places after the last example are padding: zero
    image and label, id -1, mask False. An example that cannot be used is
    likewise zero and masked, under its id.

  Raises:
    ValueError: a position is repeated or out of range.
    DataError: while iterating, for too many bad examples.
  """
  positions = check_positions(positions, batch_size)
  if example_ids is None:
    example_ids = np.arange(source.num_examples)
  padded = np.pad(
    example_ids, (0, -len(example_ids) % batch_size), constant_values=-1
  )
  ids = padded.reshape(-1, batch_size)[:, positions]
  if isinstance(source, InMemory):
    return map(_masked, map(source.rows, ids))
  import tensorflow as tf

  from conadv_jax.data.images import views

  hide_gpus()
  order = tf.data.Dataset.from_tensor_slices(
    {'id': ids.ravel(), 'epoch': np.zeros_like(ids.ravel())}
  )

  def example(image, label, *_):
    return {'clean': views.eval_view(config, image), 'label': label}

  bad = BadExamples(name, num_classes, quarantine, replace=False)
  return map(_masked, source.batches(order, example, len(positions), bad))


def uses_tensorflow(source: Source, image_views: Sequence[str]) -> bool:
  """Whether `train_batches` loads TensorFlow, to decode or to AutoAugment."""
  return not isinstance(source, InMemory) or 'aa' in image_views


def _of_arrays(
  source: InMemory, config: Dataset, share: Share
) -> Iterator[Batch]:
  def of_step(step: int) -> Batch:
    places = sampler.example_ids(
      share.seed, step, share.batch_size, source.num_examples
    )
    ids, epochs = (of_batch[share.positions] for of_batch in places)
    batch = source.rows(ids)
    clean = batches.train_images(
      config, batch['clean'], share.seed, epochs, ids
    )
    return batch | {'clean': clean}

  of_step(share.steps.start)  # A bad argument fails here, not while iterating.
  return map(of_step, share.steps)


def _masked(batch: Batch) -> Batch:
  """Zeros and a False `mask` where there is no example."""
  mask = batch.pop('usable', True) & (batch['id'] >= 0)
  clean, label = batch['clean'], batch['label']
  if not mask.all():
    clean, label = clean.copy(), label.copy()
    clean[~mask], label[~mask] = 0, 0
  return {'clean': clean, 'label': label, 'id': batch['id'], 'mask': mask}
