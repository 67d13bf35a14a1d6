"""One example -> its views: crop, flip, AutoAugment, by stateless seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import tensorflow as tf

from conadv_jax.config import Dataset
from conadv_jax.data.images import autoaugment, decode, preprocess, streams

Views = dict[str, tf.Tensor]


def make_train_views(
  settings: Dataset, views: Sequence[str]
) -> Callable[[tf.Tensor, tf.Tensor], Views]:
  """The function (image, seed of the example) -> views for training.

  Args:
    settings: sizes, interpolation, policy.
    views: of 'clean' and 'aa'. Each has a crop and flip of its own, as in the
      paper's code, unless `aa_shares_crop`: then `aa` starts from the crop and
      flip of `clean`, and only one image is decoded.

  Returns:
    A function of an image, uint8 [H, W, C] of a fixed size or encoded (see
    `decode`), and its seed from `preprocess.example_seed`, that returns uint8
    [H, W, C] for each view.
  """
  pairs = {
    'clean': (streams.CROP, streams.FLIP),
    'aa': (streams.AA_CROP, streams.AA_FLIP),
  }
  if settings.aa_shares_crop:
    pairs['aa'] = pairs['clean']
  used = list(dict.fromkeys(pairs[view] for view in views))

  def train_views(image: tf.Tensor, seed: tf.Tensor) -> Views:
    seeds = [preprocess.op_seed(seed, crop) for crop, _ in used]
    crops = _crops(settings, image, seeds)
    for i, (_, flip) in enumerate(used):
      if settings.random_flip:
        crops[i] = preprocess.random_flip(
          crops[i], preprocess.op_seed(seed, flip)
        )
    made = {view: crops[used.index(pairs[view])] for view in views}
    if 'aa' in made:
      policy_seed = preprocess.op_seed(seed, streams.AA_POLICY)
      made['aa'] = _auto_augment(settings, made['aa'], policy_seed)
    return made

  return train_views


def eval_view(settings: Dataset, image: tf.Tensor) -> tf.Tensor:
  """The central crop of an encoded image; an image of a fixed size as it is."""
  if not settings.image_size_px:
    return image
  return decode.center_crop(
    image,
    settings.image_size_px,
    settings.eval_crop_ratio,
    settings.interpolation,
    settings.antialias,
  )


def _crops(
  settings: Dataset, image: tf.Tensor, seeds: Sequence[tf.Tensor]
) -> list[tf.Tensor]:
  if settings.image_size_px:
    crops = decode.random_resized_crops(
      image,
      seeds,
      settings.image_size_px,
      settings.interpolation,
      settings.antialias,
    )
    return tf.unstack(crops, num=len(seeds))
  padding = settings.crop_padding_px
  if not padding:
    return [image] * len(seeds)
  return [
    preprocess.random_crop_with_padding(image, padding, seed) for seed in seeds
  ]


def _auto_augment(
  settings: Dataset, image: tf.Tensor, seed: tf.Tensor
) -> tf.Tensor:
  if settings.autoaugment == 'randaugment':
    return autoaugment.rand_augment(
      image,
      seed,
      settings.randaugment_layers,
      settings.randaugment_magnitude,
    )
  return autoaugment.augment(settings.autoaugment, image, seed)
