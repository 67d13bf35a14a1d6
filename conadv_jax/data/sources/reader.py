"""Batches of encoded examples; those that cannot be used are replaced."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import tensorflow as tf

from conadv_jax.base.errors import ConfigError, DataError, StorageError
from conadv_jax.data.quarantine import Quarantine
from conadv_jax.data.sources.source import (
  BadExamples,
  Batch,
  Encoded,
  ExampleFn,
)

# Examples that one call of a map reads or decodes. A failure is caught by a
# small data set inside of the call, whose cost so many examples share.
_MAX_CHUNK = 32


class Reader:
  """Reads, decodes and batches the examples of an encoded data set."""

  def __init__(self, source: Encoded, example: ExampleFn, bad: BadExamples):
    """Starts nothing.

    Args:
      source: where the records come from.
      example: decodes and augments; fails with a TensorFlow error.
      bad: what makes an example bad, and what happens then.
    """
    self._source = source
    self._example = example
    self._bad = bad
    allows_none = bad.quarantine is None
    self._quarantine = Quarantine() if allows_none else bad.quarantine
    self._failure: Exception | None = None
    self._decode_one = tf.function(self._usable)

  def batches(self, order: tf.data.Dataset, size: int) -> Iterator[Batch]:
    """See `Source.batches`."""
    chunk = max(n for n in range(1, _MAX_CHUNK + 1) if size % n == 0)
    dataset = order.batch(chunk, drop_remainder=True)
    for step in (self._read, self._decode):
      dataset = dataset.map(
        step, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True
      )
    dataset = dataset.batch(size // chunk, drop_remainder=True)

    def flat(batch):
      return {k: tf.reshape(x, [size, *x.shape[2:]]) for k, x in batch.items()}

    options = tf.data.Options()
    options.deterministic = True
    dataset = dataset.map(flat).prefetch(2).with_options(options)
    return self._checked(dataset.as_numpy_iterator())

  def _read(self, chunk: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    """Adds `record`, unless the order came with it."""
    if 'record' in chunk:
      return chunk
    record = tf.numpy_function(self._fetch, [chunk['id']], tf.string)
    return {**chunk, 'record': tf.ensure_shape(record, chunk['id'].shape)}

  def _fetch(self, ids: np.ndarray) -> np.ndarray:
    records = np.full(len(ids), b'', object)
    there = ids >= 0
    try:
      records[there] = self._source.fetch(ids[there])
    except (ConfigError, OSError, StorageError) as error:
      self._failure = error  # tf.data passes on only its text
      raise
    return records

  def _decode(self, chunk: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    """Decodes a chunk; zeros, and `usable` False, where that fails."""
    size = chunk['id'].shape[0]
    records = tf.data.Dataset.from_tensor_slices(
      (chunk['record'], chunk['id'], chunk['epoch'], tf.range(size))
    )

    def one(record, example_id, epoch, slot):
      return {**self._usable(record, example_id, epoch), 'slot': slot}

    good = records.map(one).ignore_errors()
    blank = {
      k: tf.zeros(s.shape, s.dtype) for k, s in good.element_spec.items()
    }
    blank['slot'] = tf.constant(-1)
    blanks = tf.data.Dataset.from_tensors(blank).repeat(size)
    made = good.concatenate(blanks).batch(size).take(1).get_single_element()
    made = {
      k: tf.ensure_shape(x, [size, *x.shape[1:]]) for k, x in made.items()
    }
    slot = made.pop('slot')
    made['usable'] = slot >= 0

    def in_place():
      slots = slot[made['usable']][:, None]
      return {
        k: tf.scatter_nd(slots, x[made['usable']], x.shape)
        for k, x in made.items()
      }

    made = tf.cond(tf.reduce_all(made['usable']), lambda: made, in_place)
    return {**made, 'id': chunk['id'], 'epoch': chunk['epoch']}

  def _usable(self, record, example_id, epoch) -> dict[str, tf.Tensor]:
    """The decoded example; a TensorFlow error says why there is none."""
    image, label = self._source.parse(record, example_id)
    classes = self._bad.num_classes
    with tf.control_dependencies(
      [
        tf.debugging.Assert(
          (label >= 0) & (label < classes),
          ['label', label, f'is outside [0, {classes})'],
        )
      ]
    ):
      label = tf.identity(label)
    return self._example(image, label, example_id, epoch)

  def _checked(self, batches: Iterator[Batch]) -> Iterator[Batch]:
    """Notes the failures of each batch, and replaces them."""
    while True:
      try:
        batch = next(batches)
      except StopIteration:
        return
      except tf.errors.OpError as error:
        failure = self._failure or self._source.failure
        if isinstance(failure, StorageError):
          raise failure from error
        raise DataError(str(failure or error.message)) from failure or error
      bad = np.flatnonzero(~batch['usable'] & (batch['id'] >= 0))
      if len(bad):
        batch = {name: array.copy() for name, array in batch.items()}
      for place in bad:
        example_id, epoch = int(batch['id'][place]), int(batch['epoch'][place])
        found = self._try(example_id, epoch)  # storage may have come back
        batch['usable'][place] = found is not None
        if found is None and self._bad.replace:
          found = self._next_usable(example_id, epoch)
        for name, value in (found or {}).items():
          batch[name][place] = value
      del batch['epoch']
      if self._bad.replace:
        del batch['usable']
      yield batch

  def _next_usable(self, example_id: int, epoch: int) -> dict[str, np.ndarray]:
    count = self._source.num_examples
    for distance in range(1, count):
      found = self._try((example_id + distance) % count, epoch)
      if found is not None:
        return found
    raise DataError(f'no example of {self._bad.split!r} can be used')

  def _try(self, example_id: int, epoch: int) -> dict[str, np.ndarray] | None:
    """The decoded example, or None with the reason in the quarantine."""
    try:
      (record,) = self._source.fetch(np.array([example_id]))
    except (ConfigError, OSError) as error:
      raise DataError(str(error)) from error
    try:
      example = self._decode_one(
        tf.constant(record),
        tf.constant(example_id, tf.int64),
        tf.constant(epoch, tf.int64),
      )
      return {name: value.numpy() for name, value in example.items()}
    except tf.errors.OpError as error:
      known = '' if record else self._source.why_unreadable(example_id)
      self._quarantine.add(
        self._bad.split,
        example_id,
        self._source.describe(example_id),
        known or (reason_of(error) if record else 'cannot be read'),
        of=self._source.num_examples,
      )
      return None


def reason_of(error: tf.errors.OpError) -> str:
  """What the failing op said, without where it stands in the graph."""
  said = error.message.split('\n\t [[')[0].strip().splitlines()[-1]
  assertion = said.partition('assertion failed:')[2]
  return re.sub(r'[\[\]]', '', assertion).strip() if assertion else said
