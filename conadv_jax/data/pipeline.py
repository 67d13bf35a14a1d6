"""This host's share of each global batch: NumPy in, NumPy out, by tf.data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from conadv_jax.config import Dataset
from conadv_jax.data import datasets, sampler
from conadv_jax.data.images import preprocess
from conadv_jax.data.images import views as views_lib
from conadv_jax.data.quarantine import Quarantine
from conadv_jax.data.reader import Reader

Batch = dict[str, np.ndarray]


def train_batches(
  source: Any,
  settings: Dataset,
  *,
  num_classes: int,
  views: Sequence[str],
  seed: int,
  batch_size: int,
  positions: np.ndarray | None = None,
  host: tuple[int, int] = (0, 1),
  start_step: int,
  num_steps: int,
  quarantine: Quarantine | None = None,
) -> Iterator[Batch]:
  """Augmented training batches of steps start_step .. start_step+num_steps-1.

  The global batch of a step depends on `seed` and the step only: a late start
  costs nothing, and hosts agree without talking. Of TFRecord files, each host
  has an order of its own (`tfrecord.TfRecords`). An example that cannot be used
  is replaced by the one with the next id that can be.

  Args:
    source: the examples, from `cache.load`.
    settings: augmentation.
    num_classes: examples with another label than 0 .. num_classes-1 are bad.
    views: of 'clean' and 'aa'.
    seed: keys order and augmentation.
    batch_size: examples in the global batch, B.
    positions: places in the global batch that this host feeds, ints in [0, B);
      None is all of them. L below is their number.
    host: (this host, number of hosts), for files without random access.
    start_step, num_steps: the first step, and the number of batches.
    quarantine: gets the examples that were replaced; None allows none.

  Returns:
    Iterator over {view: uint8 [L, H, W, C], ..., 'label': int32 [L], 'id':
    int64 [L]}. 'id' is that of the order, also where another stands in.

  Raises:
    ConfigError: `seed`, `batch_size` or `start_step` is out of range.
    ValueError: a position is repeated or out of range.
    DataError: while iterating, for too many bad examples.
  """
  datasets.hide_gpus()
  positions = _positions(positions, batch_size)
  make_views = views_lib.make_train_views(settings, views)

  def example(image, label, example_id, epoch):
    key = preprocess.example_seed(seed, epoch, example_id)
    return {**make_views(image, key), 'label': label}

  steps = range(start_step, start_step + num_steps)
  order = _order(source, seed, host, batch_size, positions, steps)
  if hasattr(source, 'lookup'):
    return _lookups(source, order, example, len(positions))
  return Reader(
    source, num_classes, example, 'train', quarantine, replace=True
  ).batches(order, len(positions))


def eval_batches(
  source: Any,
  settings: Dataset,
  *,
  num_classes: int,
  batch_size: int,
  positions: np.ndarray | None = None,
  quarantine: Quarantine | None = None,
) -> Iterator[Batch]:
  """Every example once, in order of id, in ceil(N / B) batches on every host.

  Args:
    source: the examples, from `cache.load`.
    settings: size and interpolation of the central crop.
    num_classes: as in `train_batches`.
    batch_size: examples in the global batch, B; may exceed N.
    positions: as in `train_batches`.
    quarantine: gets the examples that cannot be used; None allows none.

  Returns:
    Iterator over {'clean': uint8 [L, H, W, C], 'label': int32 [L], 'id': int64
    [L], 'mask': bool [L]}. Places after the last example are padding: zero
    image and label, id -1, mask False. An example that cannot be used is
    likewise zero and masked, under its id.

  Raises:
    ValueError: a position is repeated or out of range.
    DataError: while iterating, for too many bad examples.
  """
  datasets.hide_gpus()
  positions = _positions(positions, batch_size)
  starts = np.arange(0, source.num_examples, batch_size)
  ids = (starts[:, None] + positions).ravel()
  ids[ids >= source.num_examples] = -1
  order = tf.data.Dataset.from_tensor_slices(
    {'id': ids, 'epoch': np.zeros_like(ids)}
  )

  def example(image, label, *_):
    return {'clean': views_lib.eval_view(settings, image), 'label': label}

  if hasattr(source, 'lookup'):
    batches = _lookups(source, order, example, len(positions))
  else:
    batches = Reader(
      source, num_classes, example, 'eval', quarantine, replace=False
    ).batches(order, len(positions))
  return map(_masked, batches)


def _order(
  source: Any,
  seed: int,
  host: tuple[int, int],
  batch_size: int,
  positions: np.ndarray,
  steps: range,
) -> tf.data.Dataset:
  """`id`, `epoch` and maybe `record` of this host's examples, one by one."""
  if hasattr(source, 'stream'):
    count = len(positions)
    stream = source.stream(seed, *host, steps.start * count)
    return stream.take(len(steps) * count)
  return _sampled(source.num_examples, seed, batch_size, positions, steps)


def _sampled(
  num_examples: int,
  seed: int,
  batch_size: int,
  positions: np.ndarray,
  steps: range,
) -> tf.data.Dataset:
  """`id` and `epoch` of one example after the other, of any example."""

  def local_ids(step):
    ids, epochs = sampler.example_ids(seed, int(step), batch_size, num_examples)
    return ids[positions], epochs[positions]

  local_ids(steps.start)  # A bad argument fails here, not in a thread of TF.

  def ids_of_step(step):
    outputs = tf.numpy_function(local_ids, [step], [tf.int64, tf.int64])
    ids, epochs = (tf.ensure_shape(x, positions.shape) for x in outputs)
    return {'id': ids, 'epoch': epochs}

  dataset = tf.data.Dataset.range(steps.start, steps.stop)
  return dataset.map(ids_of_step).unbatch()


def _lookups(
  source: Any,
  order: tf.data.Dataset,
  example: Callable[..., dict[str, tf.Tensor]],
  size: int,
) -> Iterator[Batch]:
  """Batches of examples in memory, and `id`, in the order of the ids."""

  def one(place):
    image, label = source.lookup(tf.maximum(place['id'], 0))
    made = example(image, label, place['id'], place['epoch'])
    return {**made, 'id': place['id']}

  dataset = order.map(
    one, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True
  )
  options = tf.data.Options()
  options.deterministic = True
  dataset = dataset.batch(size, drop_remainder=True).prefetch(2)
  return dataset.with_options(options).as_numpy_iterator()


def _masked(batch: Batch) -> Batch:
  """Zeros and a False `mask` where there is no example."""
  mask = batch.pop('usable', True) & (batch['id'] >= 0)
  clean, label = batch['clean'], batch['label']
  if not mask.all():
    clean, label = clean.copy(), label.copy()
    clean[~mask], label[~mask] = 0, 0
  return {'clean': clean, 'label': label, 'id': batch['id'], 'mask': mask}


def _positions(positions: np.ndarray | None, batch_size: int) -> np.ndarray:
  if positions is None:
    return np.arange(batch_size, dtype=np.int64)
  positions = np.asarray(positions, np.int64)
  inside = (positions >= 0) & (positions < batch_size)
  distinct = len(np.unique(positions)) == len(positions)
  if not len(positions) or not inside.all() or not distinct:
    raise ValueError(
      f'positions: need one or more, distinct and in [0, {batch_size}), got'
      f' {positions}'
    )
  return positions
