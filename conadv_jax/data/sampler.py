"""Which examples make up a global batch: a pure function of (seed, step)."""

from __future__ import annotations

import functools

import numpy as np

from conadv_jax.base.errors import ConfigError


def example_ids(
  seed: int, step: int, batch_size: int, num_examples: int
) -> tuple[np.ndarray, np.ndarray]:
  """The ids of the global batch of `step`, and the epoch that each belongs to.

  With B = batch_size and N = num_examples, place i of the batch holds

    p     = step * B + i
    epoch = p // N
    id    = permutation(seed, epoch)[p % N]

  so every id occurs once in each epoch, a batch may straddle epochs, and it may
  be larger than the data set.

  Args:
    seed: 0 <= seed < 2**63.
    step: optimizer updates done before this batch, from 0 to 2**40 at least.
    batch_size: B, examples in the global batch.
    num_examples: N, examples in the data set.

  Returns:
    ids, int64 [B], in [0, N); epochs, int64 [B].

  Raises:
    ConfigError: an argument is out of its range.
  """
  _check('seed', seed, 0 <= seed < 2**63, 'from 0 to 2**63 - 1')
  _check('step', step, step >= 0, '0 or more')
  _check('batch_size', batch_size, batch_size >= 1, '1 or more')
  _check('num_examples', num_examples, num_examples >= 1, '1 or more')
  position = step * batch_size + np.arange(batch_size, dtype=np.int64)
  epochs, places = np.divmod(position, num_examples)
  ids = np.empty(batch_size, np.int64)
  for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
    here = epochs == epoch
    ids[here] = _of_epoch(seed, epoch, num_examples)[places[here]]
  return ids, epochs


def permutation(
  seed: int, epoch: int, count: int, stream: int = 0
) -> np.ndarray:
  """An order of `count` items, int64, keyed by (seed, epoch, stream).

  Sorts raw Philox words: NumPy promises those for ever, while
  `Generator.permutation` may change between releases.
  """
  words = np.random.Philox(
    key=np.array([seed, epoch], np.uint64),
    counter=np.array([0, 0, 0, stream], np.uint64),
  )
  return np.argsort(words.random_raw(count), kind='stable')


# A batch needs one epoch or two neighbours, train and restart a few more.
@functools.lru_cache(maxsize=4)
def _of_epoch(seed: int, epoch: int, num_examples: int) -> np.ndarray:
  order = permutation(seed, epoch, num_examples)
  order.setflags(write=False)  # The cache hands it to every caller.
  return order


def _check(name: str, value: int, ok: bool, allowed: str) -> None:
  if not ok:
    raise ConfigError(f'{name}={value}: must be {allowed}')
