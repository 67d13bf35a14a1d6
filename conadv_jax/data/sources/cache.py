"""A split of an encoded data set in RAM, as its files or as pixels."""

from __future__ import annotations

import concurrent.futures
import os
import pathlib
import struct
import time
from typing import Literal

import numpy as np

from conadv_jax.base.errors import ConfigError
from conadv_jax.data.sources.source import Encoded

_USABLE_SHARE = 0.8  # Of the memory that is free now.
_CHUNK = 256  # Examples that a thread reads at a time.
_SAMPLED_RUNS, _SAMPLED_RUN = 4, 16  # Images whose size stands for all.
# Of decoded examples: height, width and label, then the pixels. A height of 0
# is an example that cannot be decoded; the reason is in place of the pixels.
_HEADER = struct.Struct('<iii')


class Cached(Encoded):
  """All examples of a source in memory, with random access.

  Every host holds the whole split: each epoch sends it other examples. TFRecord
  files get the order of random access by this.
  """

  def __init__(self, source: Encoded, kind: Literal['raw', 'decoded']):
    """Reads everything, in threads, and prints the progress.

    Raises:
      ConfigError: if that is more than the memory that is free.
    """
    self.num_examples = source.num_examples
    self.class_names = source.class_names
    self._source = source
    self._kind = kind
    self._decode = _decoder(source) if kind == 'decoded' else None
    _check_memory(kind, self._estimate())
    self._records = self._read()
    self.nbytes = sum(map(len, self._records))

  @property
  def digest(self) -> str:
    return self._source.digest

  @property
  def content(self) -> str:
    return self._source.content

  def fetch(self, ids: np.ndarray) -> list[bytes]:
    return [self._records[i] for i in ids]

  def parse(self, record, example_id):
    """(image, label) of a record, in the graph; a decoded image is uint8."""
    if self._kind == 'raw':
      return self._source.parse(record, example_id)
    import tensorflow as tf

    header = tf.io.decode_raw(
      tf.strings.substr(record, 0, _HEADER.size), tf.int32, little_endian=True
    )
    height, width, label = tf.unstack(tf.ensure_shape(header, [3]))
    body = tf.strings.substr(record, _HEADER.size, -1)
    decodable = tf.debugging.Assert(height > 0, [body])
    with tf.control_dependencies([decodable]):
      pixels = tf.io.decode_raw(body, tf.uint8)
    return tf.reshape(pixels, [height, width, 3]), label

  def describe(self, example_id: int) -> str:
    return self._source.describe(example_id)

  def why_unreadable(self, example_id: int) -> str:
    return self._source.why_unreadable(example_id)

  def _estimate(self) -> int:
    if self._decode is None:
      return self._source.nbytes
    # A few runs of neighbours: of TFRecord, each costs the reading of a file.
    firsts = np.linspace(0, self.num_examples - 1, _SAMPLED_RUNS)
    ids = firsts.astype(np.int64)[:, None] + np.arange(_SAMPLED_RUN)
    ids = np.unique(ids.clip(0, self.num_examples - 1))
    sizes = [len(record) for record in self._chunk(ids)]
    return round(self.num_examples * sum(sizes) / len(ids))

  def _chunk(self, ids: np.ndarray) -> list[bytes]:
    records = self._source.fetch(ids)
    if self._decode is None:
      return records
    return [self._decode(r, i) for r, i in zip(records, ids, strict=True)]

  def _read(self) -> list[bytes]:
    count, start = self.num_examples, time.monotonic()
    chunks = np.split(np.arange(count), range(_CHUNK, count, _CHUNK))
    records, printed = [], start
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
      for chunk in pool.map(self._chunk, chunks):
        records += chunk
        now = time.monotonic()
        if now - printed > 10:
          printed = now
          left = (now - start) * (count - len(records)) / len(records)
          print(
            f'cache: {len(records):,} of {count:,} examples, about {left:.0f} s'
            ' left',
            flush=True,
          )
    return records


def available_bytes() -> int | None:
  """Memory that is free for this process; None where Linux does not tell."""
  limits = []
  info = pathlib.Path('/proc/meminfo')
  if info.exists():
    for line in info.read_text().splitlines():
      if line.startswith('MemAvailable:'):
        limits.append(1024 * int(line.split()[1]))
  group = pathlib.Path('/sys/fs/cgroup')
  if (group / 'memory.max').exists():
    limit = (group / 'memory.max').read_text().strip()
    if limit != 'max':
      used = int((group / 'memory.current').read_text())
      limits.append(max(0, int(limit) - used))
  return min(limits, default=None)


def _check_memory(kind: str, needed: int) -> None:
  free = available_bytes()
  if free is not None and needed > _USABLE_SHARE * free:
    smaller = "'raw' or 'none'" if kind == 'decoded' else "'none'"
    raise ConfigError(
      f'dataset.cache={kind!r}: the split needs {needed / 1e9:.1f} GB on every'
      f' host, and {free / 1e9:.1f} GB are free, of which'
      f' {100 * _USABLE_SHARE:.0f} % may be used; set it to {smaller}'
    )


def _decoder(source: Encoded):
  """(record, id) -> header and pixels, or header and reason."""
  import tensorflow as tf

  from conadv_jax.data.images import decode
  from conadv_jax.data.sources.reader import reason_of

  @tf.function
  def decoded(record, example_id):
    data, label = source.parse(record, example_id)
    return decode.decode(data), label

  def run(record: bytes, example_id: int) -> bytes:
    try:
      pixels, label = decoded(
        tf.constant(record), tf.constant(example_id, tf.int64)
      )
    except tf.errors.OpError as error:
      known = '' if record else source.why_unreadable(example_id)
      return _HEADER.pack(0, 0, 0) + (known or reason_of(error)).encode()
    height, width, _ = pixels.shape
    return _HEADER.pack(height, width, int(label)) + pixels.numpy().tobytes()

  return run
