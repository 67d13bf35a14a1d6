"""A folder of images, one sub-folder for each class, as `tfds.ImageFolder`."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
from typing import Any

import numpy as np
from etils import epath

from conadv_jax.config import ConfigError

SUFFIXES = ('.jpg', '.jpeg', '.png')
_THREADS = 32


@dataclasses.dataclass(frozen=True)
class Folder:
  """What is in `DIRECTORY/{train,val}/CLASS/`.

  Attributes:
    classes: names in order of the label.
    num_train: images under train/.
    num_eval: images under val/.
  """

  classes: tuple[str, ...]
  num_train: int
  num_eval: int


@functools.lru_cache(maxsize=4)  # a start asks for each split again
def _listed(directory: str, split: str) -> tuple[dict[str, list[str]], int]:
  """{class: file names} in order, and the number of files that are skipped."""
  parent = epath.Path(directory) / split
  if not parent.exists():
    raise ConfigError(
      f'dataset.data_dir={directory!r}: there is no folder {split!r} in it; it'
      ' must hold train/CLASS/*.jpg and val/CLASS/*.jpg'
    )
  folders = sorted(p for p in parent.iterdir() if p.is_dir())
  if not folders:
    raise ConfigError(f'{parent}: has no sub-folders; need one for each class')

  def names(folder):
    return sorted(p.name for p in folder.iterdir())

  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    found = list(pool.map(names, folders))
  files, skipped = {}, 0
  for folder, all_names in zip(folders, found, strict=True):
    images = [n for n in all_names if n.lower().endswith(SUFFIXES)]
    if not images:
      raise ConfigError(
        f'{folder}: a class without images ({", ".join(SUFFIXES)}); remove the'
        ' folder, or fill it'
      )
    skipped += len(all_names) - len(images)
    files[folder.name] = images
  if skipped:
    print(f'{parent}: {skipped} files are no images and are left out')
  return files, skipped


def scan(directory: Any) -> Folder:
  """Lists both splits; reads no image.

  Raises:
    ConfigError: a split is missing, a class is empty, or the splits differ in
      their classes.
  """
  train, _ = _listed(str(directory), 'train')
  evaluation, _ = _listed(str(directory), 'val')
  if train.keys() != evaluation.keys():
    odd = sorted(train.keys() ^ evaluation.keys())
    raise ConfigError(
      f'{directory}: train/ and val/ have different classes: {len(odd)} are in'
      f' one of them only, such as {odd[0]!r}'
    )
  return Folder(
    classes=tuple(train),
    num_train=sum(map(len, train.values())),
    num_eval=sum(map(len, evaluation.values())),
  )


class ImageFolder:
  """The images of one split, by class and name.

  Attributes:
    num_examples: N.
    num_classes: labels are places in the sorted names of the classes.
  """

  def __init__(self, directory: Any, split: str):
    """Lists the split.

    Args:
      directory: holds train/ and val/; local or remote.
      split: 'train' or 'val'.

    Raises:
      ConfigError: as `scan`.
    """
    files, _ = _listed(str(directory), split)
    self._parent = epath.Path(directory) / split
    self._names = [
      f'{c}/{name}' for c, names in files.items() for name in names
    ]
    counts = [len(names) for names in files.values()]
    self._labels = np.repeat(np.arange(len(files), dtype=np.int32), counts)
    self._reasons: dict[int, str] = {}
    self.num_examples = len(self._names)
    self.num_classes = len(files)
    # Kept: making threads for each call would cost more than a local read.
    self._pool = concurrent.futures.ThreadPoolExecutor(_THREADS)

  @property
  def nbytes(self) -> int:
    """Bytes of all files."""
    paths = (self._parent / name for name in self._names)
    return sum(self._pool.map(lambda path: path.stat().length, paths))

  def fetch(self, ids: np.ndarray) -> list[bytes]:
    """The content of each file; b'' for one that cannot be read."""
    if '://' not in str(self._parent):
      return [self._read(int(i)) for i in ids]
    return list(self._pool.map(self._read, (int(i) for i in ids)))

  def parse(self, record, example_id):
    """(encoded image, label) in the graph: the record is the file."""
    import tensorflow as tf

    with tf.init_scope():  # A constant of the graph would be copied with it.
      labels = tf.constant(self._labels)
    return record, tf.gather(labels, example_id)

  def describe(self, example_id: int) -> str:
    """The file, and why it could not be read if it could not."""
    place = str(self._parent / self._names[example_id])
    reason = self._reasons.get(int(example_id))
    return f'{place}: {reason}' if reason else place

  def _read(self, example_id: int) -> bytes:
    path = self._parent / self._names[example_id]
    try:
      return path.read_bytes()
    except OSError as error:
      self._reasons[example_id] = str(error)
      return b''
