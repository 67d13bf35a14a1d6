"""What is known of a data set before it is read, and how it is opened."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal, Protocol

from conadv_jax.base.errors import ConfigError
from conadv_jax.config import Dataset
from conadv_jax.data import slices
from conadv_jax.data.sources.source import Source


class Store(Protocol):
  """Where the examples of a data set are kept."""

  def resolve(self, spec: DatasetSpec, data_dir: str) -> DatasetSpec:
    """`spec` with what the files say of it, read without tensorflow.

    Sets the sizes of splits, of a folder also the number of classes. A data set
    that is not prepared leaves `spec` as it is.

    Raises:
      ConfigError: a folder is missing or has another layout.
    """

  def version(self, data_dir: str) -> str:
    """Tells these examples from others of the same name; '' if there are none.

    Raises:
      ConfigError: the data set is not prepared.
    """

  def open(
    self, spec: DatasetSpec, pieces: tuple[slices.Piece, ...], config: Dataset
  ) -> Source:
    """The examples of `pieces`, in this order.

    Raises:
      ConfigError: the data set is missing, half-prepared or damaged, or is not
        the one that `spec` describes.
    """


@dataclasses.dataclass(frozen=True)
class DatasetSpec:
  """What is known of a data set before it is read.

  Attributes:
    name: the value of `dataset.name`.
    num_classes: labels are 0 .. num_classes - 1.
    splits: {split: its number of examples}: as published, after
      `datasets.resolve` as found.
    train_split: what is trained on, in TFDS's slicing notation.
    eval_split: what accuracy is reported on, likewise.
    image_shape: (H, W, C) in pixels and channels. H and W are 0 in the registry
      where images are of any size; `datasets.resolve` sets the size of crops.
    mean: mean of the train split per channel, in grey levels of 255.
    std: standard deviation, likewise.
    allows_flip: whether a mirrored image keeps its label.
    store: where the examples are kept.
    encoded: whether examples are image files of any size, which stay
      encoded until they are cropped; otherwise all images are kept in memory.
    classes: labels that predictions are restricted to; () is all.
  """

  name: str
  num_classes: int
  splits: Mapping[str, int]
  train_split: str
  eval_split: str
  image_shape: tuple[int, int, int]
  mean: tuple[float, ...]
  std: tuple[float, ...]
  allows_flip: bool
  store: Store
  encoded: bool = False
  classes: tuple[int, ...] = ()

  @property
  def num_train(self) -> int:
    """Examples that are trained on."""
    return slices.count(self.pieces('train'))

  @property
  def num_eval(self) -> int:
    """Examples that accuracy is reported on."""
    return slices.count(self.pieces('eval'))

  def pieces(self, part: Literal['train', 'eval']) -> tuple[slices.Piece, ...]:
    """What `train_split` or `eval_split` selects.

    Raises:
      ConfigError: there is no such split, or the slice is out of range.
    """
    text = {'train': self.train_split, 'eval': self.eval_split}[part]
    return slices.parse(text, self.splits, f'dataset.{part}_split')

  def open(self, part: Literal['train', 'eval'], config: Dataset) -> Source:
    """Opens what is trained on, or evaluated; reads it if it is small.

    Ids of the source are 0 .. N - 1 within the slice, in the order of the
    files. With `cache`, everything is read into memory.

    Raises:
      ConfigError: as `Store.open`, or if memory does not suffice, or for the
        window of a source that is not read in windows.
    """
    source = self.store.open(self, self.pieces(part), config)
    window = config.shuffle_window_shards
    default = Dataset.shuffle_window_shards
    in_windows = source.in_windows and config.cache == 'none'
    if window != default and not in_windows:
      raise ConfigError(
        f'dataset.shuffle_window_shards={window}: only TFRecord files without'
        f' dataset.cache are read in windows; leave it at {default}'
      )
    if config.cache == 'none':
      return source
    from conadv_jax.data.sources.cache import Cached

    return Cached(source, config.cache)

  def version(self, data_dir: str) -> str:
    """See `Store.version`."""
    return self.store.version(data_dir)
