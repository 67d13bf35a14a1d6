"""A shuffled order of records that are read file by file, in NumPy alone.

Each epoch puts the files in a random order. The records in that order are split
over the hosts, N // H (+ 1) in a row for each, and a host's records are cut
into windows of a few files, in each of which they are shuffled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from conadv_jax.base.errors import ConfigError
from conadv_jax.data import sampler

# Counter of the random words: the files, then windows by their first record.
_FILES = 0
_WINDOWS = 1


@dataclasses.dataclass(frozen=True, eq=False)
class Window:
  """Neighbouring records of an epoch that one host shuffles as a whole.

  Attributes:
    seed: of the order.
    epoch: it belongs to.
    start: place of its first record among all records of the epoch.
    shards: int64 [k], the files that it reads.
    first_ids: int64 [k], of the records that it takes from each file.
    counts: int64 [k], how many it takes, in a row.
  """

  seed: int
  epoch: int
  start: int
  shards: np.ndarray
  first_ids: np.ndarray
  counts: np.ndarray

  @property
  def num_records(self) -> int:
    return int(self.counts.sum())

  def ids(self) -> np.ndarray:
    """Its ids in the order of reading, int64 [num_records]."""
    ids = np.concatenate(
      [
        np.arange(first, first + count)
        for first, count in zip(self.first_ids, self.counts, strict=True)
      ]
    )
    stream = _WINDOWS + self.start
    return ids[sampler.permutation(self.seed, self.epoch, len(ids), stream)]


def records_per_epoch(num_examples: int, host: int, num_hosts: int) -> int:
  """How many records a host reads in each epoch: N // H, one more if h < N % H.

  Raises:
    ConfigError: no such host, or fewer records than hosts.
  """
  if not 0 <= host < num_hosts:
    raise ConfigError(f'host={host}: must be in [0, {num_hosts})')
  if num_hosts > num_examples:
    raise ConfigError(
      f'num_hosts={num_hosts}: must be at most the {num_examples} records'
    )
  return num_examples // num_hosts + (host < num_examples % num_hosts)


def windows(
  lengths: np.ndarray,
  seed: int,
  epoch: int,
  host: int,
  num_hosts: int,
  window_shards: int,
) -> list[Window]:
  """The windows of one host in one epoch, none of them empty.

  A host whose records lie in S files gets ceil(S / window_shards) windows of
  about the same number of files, so that no small one is left over.

  Args:
    lengths: int64 [F], records of each file.
    seed: 0 <= seed < 2**63.
    epoch: 0 or more.
    host: in [0, num_hosts).
    num_hosts: H.
    window_shards: files that a window reads at most.

  Raises:
    ConfigError: an argument is out of range.
  """
  if not 0 <= seed < 2**63:
    raise ConfigError(f'seed={seed}: must be from 0 to 2**63 - 1')
  if window_shards < 1:
    raise ConfigError(f'window_shards={window_shards}: must be 1 or more')
  num_examples = int(lengths.sum())
  share = records_per_epoch(num_examples, host, num_hosts)
  begin = host * (num_examples // num_hosts)
  begin += min(host, num_examples % num_hosts)
  order = sampler.permutation(seed, epoch, len(lengths), _FILES)
  stops = np.cumsum(lengths[order])
  starts = stops - lengths[order]
  # What lies of each file, in the order of this epoch, in the host's range.
  low = np.maximum(starts, begin)
  high = np.minimum(stops, begin + share)
  used = np.flatnonzero(low < high)
  first_ids = (np.cumsum(lengths) - lengths)[order] + low - starts
  return [
    Window(
      seed=seed,
      epoch=epoch,
      start=int(low[part[0]]),
      shards=order[part],
      first_ids=first_ids[part],
      counts=(high - low)[part],
    )
    for part in np.array_split(used, -(-len(used) // window_shards))
  ]


def stream(
  lengths: np.ndarray,
  seed: int,
  host: int,
  num_hosts: int,
  window_shards: int,
  start_record: int,
) -> Iterator[tuple[Window, int]]:
  """The windows of all epochs, from the one that holds `start_record` on.

  The other arguments are those of `windows`.

  Args:
    start_record: counts the host's records from the start of epoch 0.

  Yields:
    (window, skip), without end: its first `skip` records come before
    `start_record`.

  Raises:
    ConfigError: an argument is out of range.
  """
  if start_record < 0:
    raise ConfigError(f'start_record={start_record}: must be 0 or more')
  share = records_per_epoch(int(lengths.sum()), host, num_hosts)
  epoch, skip = divmod(start_record, share)
  while True:
    for window in windows(lengths, seed, epoch, host, num_hosts, window_shards):
      if skip >= window.num_records:
        skip -= window.num_records
      else:
        yield window, skip
        skip = 0
    epoch += 1
