"""The embedded data set `digits`: 1,797 handwritten digits of 8 x 8 pixels."""

from __future__ import annotations

import contextlib
import io
import os
import pathlib
import shutil
import tempfile
from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds

from conadv_jax.base import storage
from conadv_jax.base.errors import ConfigError

IMAGE_SHAPE = (8, 8, 1)
_EVAL_EVERY = 5  # Every fifth example is in the split `test`.
_MAX_GREY = 16  # scikit-learn counts inked pixels of 4 x 4 blocks.

_DESCRIPTION = """\
The test set of the UCI data set 'Optical Recognition of Handwritten Digits', as
packaged in scikit-learn (`sklearn.datasets.load_digits`): 1,797 grey images of
8 x 8 pixels, rescaled from 0..16 to 0..255. Every fifth example (index % 5 ==
0) is in `test`, the others are in `train`, both in the order of scikit-learn.
"""

_CITATION = """\
@misc{alpaydin1998optical,
  author = {Alpaydin, Ethem and Kaynak, Cenk},
  title = {Optical Recognition of Handwritten Digits},
  year = {1998},
  howpublished = {UCI Machine Learning Repository},
  doi = {10.24432/C50P49},
}
"""


class Digits(tfds.core.GeneratorBasedBuilder):
  """Builds `digits` from the copy inside scikit-learn: no download."""

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES: ClassVar[dict[str, str]] = {
    '1.0.0': 'Every fifth example is the test split.'
  }

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description=_DESCRIPTION,
      features=tfds.features.FeaturesDict(
        {
          'image': tfds.features.Image(shape=IMAGE_SHAPE, dtype=np.uint8),
          'label': tfds.features.ClassLabel(num_classes=10),
          'index': tfds.features.Scalar(np.int64),
        }
      ),
      supervised_keys=('image', 'label'),
      homepage='https://archive.ics.uci.edu/dataset/80',
      citation=_CITATION,
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # Nothing to download.
    return {
      'train': self._generate_examples(is_eval=False),
      'test': self._generate_examples(is_eval=True),
    }

  def _generate_examples(self, is_eval: bool):
    from sklearn import datasets  # Over a second, and needed only here.

    digits = datasets.load_digits()
    images = np.rint(digits.images * (255 / _MAX_GREY)).astype(np.uint8)
    for index, label in enumerate(digits.target):
      if (index % _EVAL_EVERY == 0) == is_eval:
        image = images[index].reshape(IMAGE_SHAPE)
        yield index, {'image': image, 'label': label, 'index': index}


def prepare(root: str) -> str:
  """Writes the data set under `root` unless it is there.

  Several processes may do so at once: each writes a directory of its own and
  renames it, and those that come second drop theirs.

  Args:
    root: a local TFDS data directory, made if missing.

  Returns:
    The directory of the prepared data set, `root`/digits/VERSION.

  Raises:
    ConfigError: `root` is remote or cannot be written.
  """
  if storage.is_remote(root):
    raise ConfigError(
      f'dataset.data_dir={root!r}: digits is prepared on the fly and needs a'
      ' local directory; set dataset.data_dir to one'
    )
  parent = pathlib.Path(root) / Digits.name
  directory = parent / str(Digits.VERSION)
  if directory.exists():
    return str(directory)
  try:
    parent.mkdir(parents=True, exist_ok=True)
    work = tempfile.mkdtemp(prefix='incomplete.', dir=parent)
    try:
      _publish(_build(work), directory)
    finally:
      shutil.rmtree(work)
  except OSError as error:
    raise ConfigError(
      f'dataset.data_dir: cannot write {parent}: {error.strerror}; set'
      ' dataset.data_dir (or TFDS_DATA_DIR) to a directory that you can write'
    ) from error
  return str(directory)


def _build(root: str) -> str:
  tfds.disable_progress_bar()
  builder = Digits(data_dir=root)
  # TFDS prints that it downloads, and names the temporary directory.
  with contextlib.redirect_stdout(io.StringIO()):
    builder.download_and_prepare(
      download_config=tfds.download.DownloadConfig(try_download_gcs=False)
    )
  return builder.data_dir


def _publish(source: str, target: pathlib.Path) -> None:
  try:
    os.rename(source, target)
  except OSError:
    if not target.exists():
      raise
