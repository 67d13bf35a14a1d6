"""The data set `digits`: 1,797 handwritten digits of 8 x 8 pixels.

They are the test set of the UCI data set 'Optical Recognition of Handwritten
Digits' (Alpaydin and Kaynak, 1998, doi:10.24432/C50P49, CC BY 4.0), in the
order of scikit-learn's `load_digits`, which a test compares with. They are in a
file here, as importing scikit-learn takes seconds.
"""

from __future__ import annotations

import pathlib

import numpy as np

_EVAL_EVERY = 5  # Every fifth example is in the split `test`.
_MAX_GREY = 16  # A pixel counts the inked ones of a block of 4 x 4.
_FILE = pathlib.Path(__file__).with_name('digits.npz')


def load() -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """{split: (images, labels)}, grey levels rescaled from 0..16 to 0..255.

  Each split is in the order of the file.
  """
  with np.load(_FILE, allow_pickle=False) as file:
    images, labels = file['images'], file['labels']
  images = np.rint(images * (255 / _MAX_GREY)).astype(np.uint8)
  is_eval = np.arange(len(images)) % _EVAL_EVERY == 0
  return {
    'train': (images[~is_eval], labels[~is_eval]),
    'test': (images[is_eval], labels[is_eval]),
  }
