"""The data set `digits`: 1,797 handwritten digits of 8 x 8 pixels.

They are the test set of the UCI data set 'Optical Recognition of Handwritten
Digits' (Alpaydin and Kaynak, 1998, doi:10.24432/C50P49), as packaged in
scikit-learn: no download.
"""

from __future__ import annotations

import numpy as np

_EVAL_EVERY = 5  # Every fifth example is in the split `test`.
_MAX_GREY = 16  # scikit-learn counts inked pixels of 4 x 4 blocks.


def load() -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """{split: (images, labels)}, grey levels rescaled from 0..16 to 0..255.

  Each split is in the order of scikit-learn.
  """
  from sklearn import datasets  # Over a second, and needed only here.

  digits = datasets.load_digits()
  images = np.rint(digits.images * (255 / _MAX_GREY)).astype(np.uint8)
  is_eval = np.arange(len(images)) % _EVAL_EVERY == 0
  return {
    'train': (images[~is_eval], digits.target[~is_eval]),
    'test': (images[is_eval], digits.target[is_eval]),
  }
