"""Data sets that TFDS has prepared: found, checked and opened.

Nothing is downloaded. A data set that is not prepared is an error that says
which command prepares it. Only `open` imports tensorflow.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import re
import shlex
from typing import TYPE_CHECKING, Any

import numpy as np
from etils import epath

from conadv_jax.base.errors import ConfigError
from conadv_jax.config import Dataset
from conadv_jax.data.slices import Piece
from conadv_jax.data.sources.source import Source, data_root, hide_gpus

if TYPE_CHECKING:
  from conadv_jax.data.sources.records import ShardedRecords
  from conadv_jax.data.spec import DatasetSpec


_VERSION = re.compile(r'\d+\.\d+\.\d+')


@dataclasses.dataclass(frozen=True)
class Prepared:
  """A `Store` in a TFDS data directory.

  Attributes:
    tfds_name: its directory under the TFDS data directory.
    command: shell command that prepares it in `{data_dir}`.
    resumes: whether that command resumes an interrupted preparation.
    first_label: name of label 0, and
    last_label: of the last one. They tell an offset or another order of the
      classes; '' is not checked.
    label: the feature that is the label.
  """

  tfds_name: str
  command: str
  resumes: bool = False
  first_label: str = ''
  last_label: str = ''
  label: str = 'label'

  def resolve(self, spec: DatasetSpec, data_dir: str) -> DatasetSpec:
    """The spec with the sizes that dataset_info.json records, if there is one.

    `open` tells what is wrong with a data set that is half-prepared.
    """
    try:
      directory = self._find(spec.name, data_root(data_dir))
      info = json.loads((directory / 'dataset_info.json').read_text())
      sizes = {
        split['name']: sum(map(int, split['shardLengths']))
        for split in info['splits']
      }
    except (ConfigError, OSError, ValueError, KeyError, TypeError):
      return spec
    is_whole = sizes.keys() >= spec.splits.keys()
    return dataclasses.replace(spec, splits=sizes) if is_whole else spec

  def version(self, data_dir: str) -> str:
    return self._find(self.tfds_name, data_root(data_dir)).name

  def open(
    self, spec: DatasetSpec, pieces: tuple[Piece, ...], config: Dataset
  ) -> Source:
    """Opens record files, or reads images of a fixed size into memory."""
    root = data_root(config.data_dir)
    directory = self._find(spec.name, root)
    builder = self._builder(spec, pieces, root, directory)
    self._check_info(spec, builder.info, pieces, config.pool, directory)
    hide_gpus()
    if spec.encoded:
      source = _records(spec, builder, pieces, config.shuffle_window_shards)
      source.label = self.label
      source.class_names = tuple(builder.info.features[self.label].names)
      return source
    from conadv_jax.data.sources import in_memory

    found = None
    if builder.info.file_format.value == 'array_record':
      source = _records(spec, builder, pieces, config.shuffle_window_shards)
      found = source.fetch(np.arange(source.num_examples))
    return in_memory.read(builder, pieces, spec.num_classes, config.pool, found)

  def _find(self, name: str, root: epath.Path) -> epath.Path:
    """The directory of the newest prepared version."""
    parent = root / self.tfds_name
    names = [path.name for path in parent.iterdir()] if parent.exists() else []
    versions = list(filter(_VERSION.fullmatch, names))
    if not versions:
      self._check_not_inside(root)
      state = 'an unfinished preparation is' if names else 'nothing is'
      raise ConfigError(
        f'dataset.name={name!r}: not prepared, {state} in {parent};'
        f' {self._remedy(root)}'
      )
    return parent / max(versions, key=lambda v: [int(n) for n in v.split('.')])

  def _check_not_inside(self, root: epath.Path) -> None:
    """Raises ConfigError if `root` is the data set's own directory."""
    for directory in (root, root.parent):
      if directory.name == self.tfds_name and _has_version(directory):
        raise ConfigError(
          f'dataset.data_dir={str(root)!r}: is inside the data set; data_dir is'
          f' the directory that holds {self.tfds_name}/, use {directory.parent}'
        )

  def _remedy(self, root: epath.Path, do: str = 'prepare it') -> str:
    command = self.command.format(data_dir=shlex.quote(str(root)))
    return f'set dataset.data_dir, or {do} with:\n  {command}'

  def _builder(
    self,
    spec: DatasetSpec,
    pieces: tuple[Piece, ...],
    root: epath.Path,
    directory: epath.Path,
  ):
    """The TFDS builder of `directory`, if it has all files of `pieces`."""

    def half_prepared(what: str, resumes: bool = self.resumes) -> ConfigError:
      do = 'remove that directory and prepare it'
      do = 'prepare the rest (what is there is kept)' if resumes else do
      return ConfigError(
        f'dataset.name={spec.name!r}: {directory} is half-prepared, {what};'
        f' {self._remedy(root, do)}'
      )

    for name in ('dataset_info.json', 'features.json'):
      if not (directory / name).exists():
        raise half_prepared(f'it has no {name}')

    import tensorflow_datasets as tfds
    from google.protobuf import json_format

    try:
      builder = tfds.builder_from_directory(str(directory))
    except (OSError, ValueError, json_format.ParseError) as error:
      what = f'its metadata is not readable ({error})'
      raise half_prepared(what, resumes=False) from error
    paths = {}
    for piece in pieces:
      if piece.split not in builder.info.splits:
        raise half_prepared(f'it has no split {piece.split!r}')
      for path, *_ in _parts(builder, piece):
        paths[path] = None
    # A thousand look-ups in a bucket, one after the other, would take a minute.
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
      there = list(pool.map(lambda path: path.exists(), paths))
    missing = [p.name for p, ok in zip(paths, there, strict=True) if not ok]
    if missing:
      others = f' and {len(missing) - 1} others are' if missing[1:] else ' is'
      what = f'{missing[0]}{others} missing, of {len(paths)} files to read'
      raise half_prepared(what)
    return builder

  def _check_info(
    self,
    spec: DatasetSpec,
    info,
    pieces: tuple[Piece, ...],
    pool: int,
    directory: epath.Path,
  ) -> None:
    """Compares the data set's own description with `spec`."""
    label, image = info.features[self.label], info.features['image']
    *sides, channels = spec.image_shape
    sides = [None if spec.encoded else pool * side for side in sides]
    found = [None if spec.encoded else side for side in image.shape[:2]]
    checks = [
      ('classes', label.num_classes, spec.num_classes),
      ('image shape', (*found, image.shape[-1]), (*sides, channels)),
    ] + [
      (f'{p.split} examples', info.splits[p.split].num_examples,
       spec.splits[p.split]) for p in pieces
    ]  # fmt: skip
    if self.first_label:
      checks += [
        ('first label', label.names[0], self.first_label),
        ('last label', label.names[-1], self.last_label),
      ]
    for what, found, needed in checks:
      if found != needed:
        raise ConfigError(
          f'dataset.name={spec.name!r}: {directory} has {what} {found}, need'
          f' {needed}; it is another data set, or was prepared in part'
        )


def _has_version(directory: epath.Path) -> bool:
  if not directory.exists():
    return False
  return any(_VERSION.fullmatch(path.name) for path in directory.iterdir())


def _parts(builder, piece: Piece) -> list[tuple[Any, int, tuple[int, int]]]:
  """The files that hold `piece`; see `records.parts_of`."""
  from conadv_jax.data.sources import records

  info = builder.info.splits[piece.split]
  return records.parts_of(info.filepaths, info.shard_lengths, piece)


def _records(
  spec: DatasetSpec, builder, pieces: tuple[Piece, ...], window_shards: int
) -> ShardedRecords:
  parts = [part for piece in pieces for part in _parts(builder, piece)]
  file_format = builder.info.file_format.value
  if file_format == 'array_record':
    from conadv_jax.data.sources import array_record

    return array_record.ArrayRecords(*zip(*parts, strict=True))
  if file_format == 'tfrecord':
    from conadv_jax.data.sources import tfrecord

    return tfrecord.TfRecords(
      *zip(*parts, strict=True), window_shards=window_shards
    )
  raise ConfigError(
    f'dataset.name={spec.name!r}: {builder.data_dir} holds {file_format}'
    ' files; need array_record or tfrecord; see scripts/prepare_imagenet.md'
  )
