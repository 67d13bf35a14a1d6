"""Crops and flips of a batch of small images in NumPy.

They are those of `views` and `preprocess`, to the bit. TensorFlow is not
imported, which takes longer than a short run.
"""

from __future__ import annotations

import numpy as np

from conadv_jax.config import Dataset
from conadv_jax.data.images import streams


def train_images(
  settings: Dataset,
  images: np.ndarray,
  seed: int,
  epochs: np.ndarray,
  example_ids: np.ndarray,
) -> np.ndarray:
  """The view 'clean' of `views.make_train_views`, of images of a fixed size.

  Args:
    settings: the padding of crops, and whether images are flipped.
    images: uint8 [B, H, W, C], which flips may overwrite.
    seed: the run's seed, 0 <= seed < 2**63.
    epochs: int64 [B].
    example_ids: int64 [B].

  Returns:
    uint8 [B, H, W, C].
  """
  padding = settings.crop_padding_px
  if not (padding or settings.random_flip):
    return images
  keys = _example_seeds(seed, epochs, example_ids)
  if padding:
    draws = _draw(*_fold_in(*keys, streams.CROP))
    images = _cropped(images, padding, draws[0], draws[1])
  if settings.random_flip:
    # A float32 in [0, 1) has these 23 bits, so this one says below a half.
    flips = _draw(*_fold_in(*keys, streams.FLIP))[0] & 0x400000 == 0
    images[flips] = images[flips, :, ::-1]
  return images


def _cropped(
  images: np.ndarray, padding: int, top: np.ndarray, left: np.ndarray
) -> np.ndarray:
  """Windows of the padded images; corners are draws, modulo their number."""
  _, height, width, _ = images.shape
  sides = (padding, padding)
  padded = np.pad(images, ((0, 0), sides, sides, (0, 0)))
  top, left = (draw % np.uint32(2 * padding + 1) for draw in (top, left))
  return np.stack(
    [
      image[y : y + height, x : x + width]
      for image, y, x in zip(padded, top, left, strict=True)
    ]
  )


# ---- The random numbers of TensorFlow's stateless ops, with alg='philox' -----


def _example_seeds(
  seed: int, epochs: np.ndarray, example_ids: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """`preprocess.example_seed`, as two arrays int64 [B] of 32 bits each."""
  seeds = np.full_like(epochs, seed)
  words = _draw(*_fold_in(seeds, epochs, example_ids))
  return tuple(word.view(np.int32).astype(np.int64) for word in words[:2])


def _fold_in(first: np.ndarray, second: np.ndarray, data: np.ndarray | int):
  """`tf.random.experimental.stateless_fold_in` of seeds int64 [B], [B]."""
  low, high, *_ = _draw(first, second)
  mixed = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
  return mixed.view(np.int64), np.broadcast_to(np.int64(data), first.shape)


def _draw(first: np.ndarray, second: np.ndarray) -> list[np.ndarray]:
  """The first four words, uint32 [B], of stateless ops with these seeds."""
  words = [w for seed in (first, second) for w in _halves(seed)]
  mixed = _philox(words, 0x3EC8F720, 0x02461E29)
  zeros = np.zeros_like(mixed[0])
  return _philox([zeros, zeros, *mixed[2:]], *mixed[:2])


def _halves(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  words = np.ascontiguousarray(words).view(np.uint64)
  return words.astype(np.uint32), (words >> np.uint64(32)).astype(np.uint32)


def _philox(counter, key_low, key_high) -> list[np.ndarray]:
  """Philox 4x32 with 10 rounds (Salmon et al. 2011)."""
  a, b, c, d = counter
  low, high = (np.atleast_1d(np.uint32(k)) for k in (key_low, key_high))
  for _ in range(10):
    a_low, a_high = _halves(a.astype(np.uint64) * np.uint64(0xD2511F53))
    c_low, c_high = _halves(c.astype(np.uint64) * np.uint64(0xCD9E8D57))
    a, b, c, d = c_high ^ b ^ low, c_low, a_high ^ d ^ high, a_low
    low, high = low + np.uint32(0x9E3779B9), high + np.uint32(0xBB67AE85)
  return [a, b, c, d]
