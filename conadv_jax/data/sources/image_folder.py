"""A directory of splits, each a directory of classes: ROOT/SPLIT/CLASS/*.jpg.

This is the layout of `tfds.ImageFolder` and of torchvision. Labels are the
places of the class names in sorted order. As in torchvision, images may lie
deeper in a class, at any depth, and ids follow (class, directory, file name).
Links are followed; names that start with a dot are left out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import os
from collections.abc import Iterator, Sequence
from concurrent import futures
from typing import TYPE_CHECKING

import numpy as np
from etils import epath

from conadv_jax.base import storage
from conadv_jax.base.errors import ConfigError, printable
from conadv_jax.config import Dataset
from conadv_jax.data import slices
from conadv_jax.data.sources import records
from conadv_jax.data.sources.source import Encoded, data_root, sha256_digits

if TYPE_CHECKING:
  from conadv_jax.data.spec import DatasetSpec

_SAMPLED = 100  # files that stand for the contents of all
_SUFFIXES = ('.jpg', '.jpeg', '.png', '.webp')  # In any case.


@dataclasses.dataclass(frozen=True)
class Split:
  """What the directory of one split holds, without a look into the files.

  Attributes:
    directory: of the split.
    class_names: sorted; a name's place is its label.
    file_names: the images of each class, in order, as paths from there.
    num_ignored: files in it that are no images.
  """

  directory: str
  class_names: tuple[str, ...]
  file_names: tuple[tuple[str, ...], ...]
  num_ignored: int

  @functools.cached_property
  def starts(self) -> np.ndarray:
    """int64 [classes + 1]: the place of the first image of each class."""
    return np.cumsum([0, *map(len, self.file_names)])

  @property
  def num_examples(self) -> int:
    return int(self.starts[-1])

  @property
  def labels(self) -> np.ndarray:
    """int32 [num_examples]."""
    classes = np.arange(len(self.class_names), dtype=np.int32)
    return np.repeat(classes, np.diff(self.starts))

  def path(self, place: int) -> str:
    """The file at a place, in the order of (class, file name)."""
    label = int(np.searchsorted(self.starts, place, side='right')) - 1
    name = self.file_names[label][place - self.starts[label]]
    return os.path.join(self.directory, self.class_names[label], name)

  def listing(self, first: int, stop: int) -> Iterator[str]:
    """Each class, and then its files, of the places first .. stop - 1."""
    yield f'{os.path.basename(self.directory)}:'
    for name, files, start in zip(
      self.class_names, self.file_names, self.starts, strict=False
    ):
      yield f'{name}/'
      yield from files[max(first - start, 0) : max(stop - start, 0)]


class Folder:
  """The `Store` of a directory of images."""

  def resolve(self, spec: DatasetSpec, data_dir: str) -> DatasetSpec:
    """The spec with the classes and sizes of the splits that it names."""
    directory = str(data_root(data_dir))
    wanted = slices.names(f'{spec.train_split}+{spec.eval_split}')
    there = _list(_root(directory))[0]
    lacking = [name for name in wanted if name not in there]
    if lacking:
      raise ConfigError(
        f'{os.path.join(directory, lacking[0])}: no such directory, though'
        f' dataset.train_split={spec.train_split!r} and dataset.eval_split='
        f'{spec.eval_split!r} name it; {_layout(directory)}, and SPLIT may be'
        f' {", ".join(sorted(there)) or "nothing"}'
      )
    splits = scan(directory, wanted)
    return dataclasses.replace(
      spec,
      num_classes=len(splits[wanted[0]].class_names),
      splits={name: split.num_examples for name, split in splits.items()},
    )

  def version(self, data_dir: str) -> str:
    del data_dir
    return ''

  def open(
    self,
    spec: DatasetSpec,
    pieces: tuple[slices.Piece, ...],
    config: Dataset,
  ) -> ImageFolder:
    root = data_root(config.data_dir)
    source = ImageFolder(str(root), slices.to_text(pieces))
    if source.num_ignored:
      print(f'{root}: {source.num_ignored} entries are no images')
    return source


def scan(
  directory: str, splits: Sequence[str] | None = None, num_threads: int = 32
) -> dict[str, Split]:
  """Lists some splits of a folder, by name; None is all of its sub-directories.

  Raises:
    ConfigError: see `scan_split`; or there is no split, or two splits have
      different classes.
  """
  splits = {
    name: scan_split(directory, name, num_threads)
    for name in splits or sorted(_list(_root(directory))[0])
  }
  if not splits:
    raise ConfigError(
      f'{directory}: has no sub-directories; {_layout(directory)}'
    )
  for split in splits.values():
    check_same_classes(next(iter(splits.values())), split)
  return splits


def scan_split(directory: str, split: str, num_threads: int = 32) -> Split:
  """Lists the classes and images of one split, several classes at a time.

  Raises:
    ConfigError: the directory is missing, has no classes, a class has no
      image, or a link leads back to a directory around it.
  """
  parent = os.path.join(_root(directory), split)
  if not _is_dir(parent):
    raise ConfigError(f'{parent}: no such directory; {_layout(directory)}')
  class_names, others = _list(parent)
  if not class_names:
    raise ConfigError(
      f'{parent}: has no sub-directories, one for each class;'
      f' {_layout(directory)}'
    )
  class_names = sorted(class_names)
  paths = [os.path.join(parent, name) for name in class_names]
  with futures.ThreadPoolExecutor(num_threads) as pool:
    listed = list(pool.map(_list_images, paths))
  empty = [
    name
    for name, (images, _) in zip(class_names, listed, strict=True)
    if not images
  ]
  if empty:
    raise ConfigError(
      f'{parent}: {len(empty)} classes have no image ({", ".join(_SUFFIXES)}),'
      f' the first is {empty[0]!r}; remove it or fill it'
    )
  return Split(
    directory=parent,
    class_names=tuple(class_names),
    file_names=tuple(images for images, _ in listed),
    num_ignored=len(others) + sum(ignored for _, ignored in listed),
  )


def check_same_classes(train: Split, evaluation: Split) -> None:
  """Raises ConfigError unless both splits have the same class names."""
  for one, other in ((train, evaluation), (evaluation, train)):
    lacking = sorted(set(one.class_names) - set(other.class_names))
    if lacking:
      raise ConfigError(
        f'{other.directory}: lacks {len(lacking)} of the classes of'
        f' {one.directory}, the first is {lacking[0]!r}; labels are places in'
        ' the sorted class names, so that both need the same'
      )


class ImageFolder(Encoded):
  """Reads any image file of a split, from any thread.

  Attributes:
    class_names: sorted; a name's place is its label.
    labels: int32 [N].
    num_examples: N.
    num_ignored: files that are no images.
  """

  def __init__(self, directory: str, split: str, *, num_threads: int = 16):
    """Lists the files.

    Args:
      directory: local or gs://.
      split: name of a sub-directory, or what is used of some (see `slices`).
      num_threads: files that are waited for at the same time.

    Raises:
      ConfigError: see `scan` and `slices.parse`.
    """
    splits = scan(directory, slices.names(split))
    sizes = {name: found.num_examples for name, found in splits.items()}
    self._pieces = [
      (splits[piece.split], piece.start, piece.stop)
      for piece in slices.parse(split, sizes, 'split')
    ]
    self.class_names = self._pieces[0][0].class_names
    self.num_ignored = sum(found.num_ignored for found in splits.values())
    self._starts = np.cumsum([0] + [b - a for _, a, b in self._pieces])
    self.num_examples = int(self._starts[-1])
    self.labels = np.concatenate([x.labels[a:b] for x, a, b in self._pieces])
    self._num_threads = num_threads
    self._pool = futures.ThreadPoolExecutor(num_threads)
    self._reasons: dict[int, str] = {}

  @functools.cached_property
  def nbytes(self) -> int:
    """Bytes of all files; asks for each, at the first call."""
    paths = [self.path(index) for index in range(self.num_examples)]
    sizes = np.zeros(len(paths), np.int64)

    def measure(index):
      with contextlib.suppress(OSError):  # `fetch` says what is wrong with it
        sizes[index] = records.file_size(paths[index])

    records.map_in_threads(
      self._pool, self._num_threads, measure, range(len(paths))
    )
    return int(sizes.sum())

  @functools.cached_property
  def content(self) -> str:
    some = np.linspace(0, self.num_examples - 1, _SAMPLED).astype(np.int64)
    return sha256_digits(self.fetch(np.unique(some)))

  @functools.cached_property
  def digest(self) -> str:
    return sha256_digits(
      text
      for split, first, stop in self._pieces
      for text in split.listing(first, stop)
    )

  def path(self, example_id: int) -> str:
    """The file of an example."""
    if not 0 <= example_id < self.num_examples:
      raise IndexError(f'id {example_id}: must be in [0, {self.num_examples})')
    piece = int(np.searchsorted(self._starts, example_id, side='right')) - 1
    split, first, _ = self._pieces[piece]
    return split.path(first + example_id - self._starts[piece])

  def fetch(self, ids: np.ndarray) -> list[bytes]:
    """The contents of n files; b'' for one that is gone or empty.

    Raises:
      StorageError: the storage failed, in spite of some attempts.
    """
    output = [b''] * len(ids)

    def read(index):
      output[index] = self._read(int(ids[index]))

    records.map_in_threads(self._pool, self._num_threads, read, range(len(ids)))
    return output

  def _read(self, example_id: int) -> bytes:
    path = self.path(example_id)
    try:
      data = records.read_bytes(path)
    except OSError as error:
      self._reasons[example_id] = error.strerror or str(error)
      return b''
    if not data:
      self._reasons[example_id] = 'the file is empty'
    return data

  def parse(self, record, example_id):
    """(data, label) inside `tf.data.Dataset.map`.

    Args:
      record: string scalar tensor from `fetch`.
      example_id: int64 scalar tensor.

    Returns:
      The record itself, string scalar; its label, int32 scalar, -1 if the
      record is b''.
    """
    import tensorflow as tf

    label = self._label_tensor[example_id]
    return record, tf.where(tf.equal(record, ''), -1, label)

  @functools.cached_property
  def _label_tensor(self):
    import tensorflow as tf

    # Outside the graph being traced, which would hold it as a constant.
    with tf.init_scope():
      return tf.constant(self.labels)

  def describe(self, example_id: int) -> str:
    """The file of an example."""
    return printable(self.path(int(example_id)))

  def why_unreadable(self, example_id: int) -> str:
    return self._reasons.get(int(example_id), '')


def _root(directory: str) -> str:
  path = str(storage.expand(directory))
  if not _is_dir(path):
    raise ConfigError(f'dataset.data_dir={directory!r}: no such directory')
  return path


def _layout(directory: str) -> str:
  return f'images are looked for in {directory}/SPLIT/CLASS, at any depth'


def _is_dir(path: str) -> bool:
  return epath.Path(path).is_dir()


def _list_images(root: str) -> tuple[tuple[str, ...], int]:
  """(paths of images from `root`, number of other files) at any depth.

  Each directory is listed once, so that a flat one costs a bucket one request.
  """
  images, others = [], 0
  local = not storage.is_remote(root)
  waiting = [('', (os.path.realpath(root),) if local else ())]
  while waiting:
    inside, around = waiting.pop()
    directories, files = _list(os.path.join(root, inside))
    found = [name for name in files if name.lower().endswith(_SUFFIXES)]
    images += [os.path.join(inside, name) for name in found]
    others += len(files) - len(found)
    for name in directories:
      path = os.path.join(inside, name)
      real = os.path.realpath(os.path.join(root, path)) if local else path
      if real in around:
        raise ConfigError(
          f'{os.path.join(root, path)}: is a link to {real}, in which it lies;'
          ' remove it'
        )
      waiting.append((path, (*around, real)))
  return tuple(sorted(images, key=os.path.split)), others


def _list(path: str) -> tuple[list[str], list[str]]:
  """Names of the directories and of the files in `path`, hidden ones left out.

  Of a remote directory, what is named like an image is taken for a file: it
  would cost a request to ask.
  """
  return storage.read(lambda: _list_once(path), path)


def _leads_to_dir(entry: os.DirEntry) -> bool:
  try:
    return entry.is_dir()
  except OSError as error:
    if error.errno == errno.ELOOP:  # a link to itself
      return False
    raise


def _list_once(path: str) -> tuple[list[str], list[str]]:
  directories, files = [], []
  if storage.is_remote(path):
    for entry in epath.Path(path).iterdir():
      image = entry.name.lower().endswith(_SUFFIXES)
      to = files if image or not entry.is_dir() else directories
      to.append(entry.name)
  else:
    with os.scandir(path) as entries:
      for entry in entries:
        (directories if _leads_to_dir(entry) else files).append(entry.name)
  return (
    [name for name in directories if not name.startswith('.')],
    [name for name in files if not name.startswith('.')],
  )
