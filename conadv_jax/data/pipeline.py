"""This host's share of each global batch: NumPy in, NumPy out, by tf.data."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from conadv_jax.data import datasets, preprocess, sampler

# Streams of random numbers of an example: one for each op, never renumbered.
_CROP = 0
_FLIP = 1


def train_batches(
  source: datasets.Source,
  *,
  seed: int,
  batch_size: int,
  positions: np.ndarray | None = None,
  start_step: int,
  num_steps: int,
  crop_padding_px: int,
  random_flip: bool,
) -> Iterator[dict[str, np.ndarray]]:
  """Augmented training batches of steps start_step .. start_step+num_steps-1.

  The global batch of a step depends on `seed` and the step only, so starting
  late skips nothing and costs nothing, and hosts agree without talking.

  Args:
    source: the examples.
    seed: keys order and augmentation.
    batch_size: examples in the global batch, B.
    positions: places in the global batch that this host feeds, ints in [0, B);
      None is all of them. L below is their number.
    start_step: first step.
    num_steps: batches to yield.
    crop_padding_px: zero padding of the random crop; 0 is no crop.
    random_flip: whether images are mirrored at random.

  Returns:
    Iterator over {'clean': uint8 [L, H, W, C], 'label': int32 [L]}.

  Raises:
    ConfigError: `seed`, `batch_size` or `start_step` is out of range.
    ValueError: a position is repeated or out of range.
  """
  datasets.hide_gpus()
  positions = _positions(positions, batch_size)

  def local_ids(step):
    ids, epochs = sampler.example_ids(
      seed, int(step), batch_size, source.num_examples
    )
    return ids[positions], epochs[positions]

  local_ids(start_step)  # A bad argument fails here, not in a thread of TF.

  def ids_of_step(step):
    outputs = tf.numpy_function(local_ids, [step], [tf.int64, tf.int64])
    return tuple(tf.ensure_shape(x, positions.shape) for x in outputs)

  def example(example_id, epoch):
    image, label = source.lookup(example_id)
    key = preprocess.example_seed(seed, epoch, example_id)
    image = _augment(image, key, crop_padding_px, random_flip)
    return {'clean': image, 'label': label}

  steps = tf.data.Dataset.range(start_step, start_step + num_steps)
  return _batches(steps.map(ids_of_step).unbatch(), example, len(positions))


def eval_batches(
  source: datasets.Source,
  *,
  batch_size: int,
  positions: np.ndarray | None = None,
) -> Iterator[dict[str, np.ndarray]]:
  """Every example once, in order of id, in ceil(N / B) batches on every host.

  Args:
    source: the examples.
    batch_size: examples in the global batch, B; may exceed N.
    positions: as in `train_batches`.

  Returns:
    Iterator over {'clean': uint8 [L, H, W, C], 'label': int32 [L], 'id': int64
    [L], 'mask': bool [L]}. Places after the last example are padding: zero
    image and label, id -1, mask False.

  Raises:
    ValueError: a position is repeated or out of range.
  """
  datasets.hide_gpus()
  positions = _positions(positions, batch_size)
  starts = np.arange(0, source.num_examples, batch_size)
  ids = (starts[:, None] + positions).ravel()
  ids[ids >= source.num_examples] = -1

  def example(example_id):
    mask = example_id >= 0
    image, label = source.lookup(tf.maximum(example_id, 0))
    return {
      'clean': tf.where(mask, image, tf.zeros_like(image)),
      'label': tf.where(mask, label, 0),
      'id': example_id,
      'mask': mask,
    }

  return _batches(
    tf.data.Dataset.from_tensor_slices(ids), example, len(positions)
  )


def _augment(image, key, crop_padding_px: int, random_flip: bool):
  """Crop and flip of one uint8 [H, W, C] image, keyed by the example."""
  if crop_padding_px:
    image = preprocess.random_crop_with_padding(
      image, crop_padding_px, preprocess.op_seed(key, _CROP)
    )
  if random_flip:
    image = preprocess.random_flip(image, preprocess.op_seed(key, _FLIP))
  return image


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


def _batches(
  dataset: tf.data.Dataset, example: Callable[..., Any], local_batch_size: int
) -> Iterator[dict[str, np.ndarray]]:
  """Maps ids to examples and batches them, in the order of the ids."""
  dataset = dataset.map(
    example, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True
  )
  dataset = dataset.batch(local_batch_size, drop_remainder=True).prefetch(2)
  options = tf.data.Options()
  options.deterministic = True
  return dataset.with_options(options).as_numpy_iterator()


class Prefetcher:
  """Hands batches to the device ahead of their use.

  Iterates over `put(batch)`. While the caller works on one batch, the next
  `depth` have been handed to `put` already.

  Attributes:
    wait_seconds: time for which the caller was blocked on the host iterator.
  """

  def __init__(
    self,
    batches: Iterator[Any],
    put: Callable[[Any], Any],
    depth: int = 2,
    *,
    expected: int | None = None,
    start_step: int = 0,
  ):
    """Starts nothing; the first `next` fills the queue.

    Args:
      batches: the host's batches.
      put: starts a transfer to the device, without waiting for its end.
      depth: batches in flight beyond the caller's own, 0 or more.
      expected: batches that the caller needs, after which iteration stops;
        None is all that there are.
      start_step: step of the first batch, for the error text.
    """
    if depth < 0:
      raise ValueError(f'depth={depth}: must be 0 or more')
    self.wait_seconds = 0.0
    self._batches = iter(batches)
    self._put = put
    self._depth = depth
    self._expected = expected
    self._start_step = start_step
    self._fetched = 0
    self._ended = False
    self._queue = collections.deque()

  def __iter__(self) -> Prefetcher:
    return self

  def __next__(self) -> Any:
    """The next batch on the device.

    Raises:
      RuntimeError: the host's batches ended before `expected` of them.
      StopIteration: all batches were delivered.
    """
    while len(self._queue) <= self._depth and not self._ended:
      self._fetch()
    if self._queue:
      return self._queue.popleft()
    if self._expected is not None and self._fetched < self._expected:
      raise RuntimeError(
        f'input ended at step {self._start_step + self._fetched}: needed'
        f' {self._expected} batches from step {self._start_step}, got'
        f' {self._fetched}'
      )
    raise StopIteration

  def _fetch(self) -> None:
    if self._fetched == self._expected:
      self._ended = True
      return
    start = time.perf_counter()
    try:
      batch = next(self._batches)
    except StopIteration:
      self._ended = True
      return
    finally:
      self.wait_seconds += time.perf_counter() - start
    self._fetched += 1
    self._queue.append(self._put(batch))
