"""Training batches on their way to the devices, and the ids of the last."""

from __future__ import annotations

import threading
from concurrent import futures
from typing import Any

import numpy as np

from conadv_jax import hosts
from conadv_jax.config import Config
from conadv_jax.data import pipeline
from conadv_jax.data.prefetch import Prefetcher
from conadv_jax.data.quarantine import Quarantine
from conadv_jax.data.sources.source import Share, Source
from conadv_jax.experiment import Run


class ExampleIds:
  """The ids of this host's last batches: `ids[t]` for batch t."""

  def __init__(self, start: int, keep: int):
    self._next = start
    self._keep = keep
    self._ids: dict[int, np.ndarray] = {}

  def add(self, ids: np.ndarray) -> None:
    self._ids[self._next] = ids
    self._next += 1
    self._ids.pop(self._next - 1 - self._keep, None)

  def __getitem__(self, batch: int) -> np.ndarray:
    return self._ids[batch]


def prepare() -> None:
  """Starts to import TensorFlow, while the step compiles, say."""

  def load() -> None:
    from conadv_jax.data.images import views  # noqa: F401

  # No daemon: an interpreter that ends amid such an import may crash.
  threading.Thread(target=load).start()


def prepare_for(source: Source, config: Config) -> None:
  """As `prepare`, where the batches of `config` need TensorFlow."""
  if pipeline.uses_tensorflow(source, config.fed_views):
    prepare()


def started(*args: Any) -> futures.Future[tuple[Prefetcher, Any]]:
  """Makes `batches(*args)` in a thread, and their first one beside them."""
  pool = futures.ThreadPoolExecutor(1)

  def start() -> tuple[Prefetcher, Any]:
    fed = batches(*args)
    return fed, next(fed)

  future = pool.submit(start)
  pool.shutdown(wait=False)
  return future


def batches(
  run: Run,
  source: Source,
  quarantine: Quarantine,
  example_ids: ExampleIds,
  start: int,
  count: int,
) -> Prefetcher:
  """Batches start, start + 1, ... on the devices, `count` of them."""
  config = run.config
  share = Share(
    seed=config.seed,
    batch_size=config.batch_size,
    steps=range(start, start + count),
    positions=run.local_positions(),
    host=hosts.index(),
    num_hosts=hosts.count(),
  )
  local = pipeline.train_batches(
    source,
    config.dataset,
    share,
    image_views=run.config.fed_views,
    num_classes=run.spec.num_classes,
    quarantine=quarantine,
  )

  def put(batch):
    example_ids.add(batch.pop('id'))
    return run.put_batch(batch)

  return Prefetcher(local, put, expected=count, start_step=start)
