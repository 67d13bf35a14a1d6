"""AutoAugment and RandAugment, stateless, for images [H, W, C] of uint8.

Semantics: those of the TPU EfficientNet code (tensorflow/tpu, models/official/
efficientnet/autoaugment.py), rounded as Pillow does it where the two differ.
Ports to Pillow also differ in meaning; ours is the TPU code's:

* Posterize keeps int(level / 10 * 4) bits, and one where that is 0: shifting a
  byte by 8 there is shifting by 7. Ports keep 4 to 8 bits, or none (black).
* Translations are in pixels, up to 250 (RandAugment: 100), whatever the size of
  the image: level 9 leaves nothing of 224 pixels.
* Solarize at level 10 has the threshold 256, so it changes nothing.
* Rotations, shears and translations are positive or negative with equal odds.

Only Contrast is Pillow's in meaning too, see `image_ops.contrast`. C is 3 or 1;
one channel is treated as Pillow treats mode L, so that Color changes nothing.

Drawing and applying are apart: `draw` and `rand_draw` say in a few numbers what
happens to an image, and tests count them; `apply` does it. An image pays only
for the operations that it gets.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from conadv_jax.data.images import image_ops

_ALG = 'philox'
_MAX_LEVEL = 10

# 25 sub-policies of two (operation, probability, level). 'v0' is the one of the
# TPU EfficientNet code, which AdvProp and ConAdv use; 'reduced_imagenet' is the
# table of the AutoAugment paper, under its name in tensorflow/models.
POLICIES = {
  'v0': (
    (('Equalize', 0.8, 1), ('ShearY', 0.8, 4)),
    (('Color', 0.4, 9), ('Equalize', 0.6, 3)),
    (('Color', 0.4, 1), ('Rotate', 0.6, 8)),
    (('Solarize', 0.8, 3), ('Equalize', 0.4, 7)),
    (('Solarize', 0.4, 2), ('Solarize', 0.6, 2)),
    (('Color', 0.2, 0), ('Equalize', 0.8, 8)),
    (('Equalize', 0.4, 8), ('SolarizeAdd', 0.8, 3)),
    (('ShearX', 0.2, 9), ('Rotate', 0.6, 8)),
    (('Color', 0.6, 1), ('Equalize', 1.0, 2)),
    (('Invert', 0.4, 9), ('Rotate', 0.6, 0)),
    (('Equalize', 1.0, 9), ('ShearY', 0.6, 3)),
    (('Color', 0.4, 7), ('Equalize', 0.6, 0)),
    (('Posterize', 0.4, 6), ('AutoContrast', 0.4, 7)),
    (('Solarize', 0.6, 8), ('Color', 0.6, 9)),
    (('Solarize', 0.2, 4), ('Rotate', 0.8, 9)),
    (('Rotate', 1.0, 7), ('TranslateY', 0.8, 9)),
    (('ShearX', 0.0, 0), ('Solarize', 0.8, 4)),
    (('ShearY', 0.8, 0), ('Color', 0.6, 4)),
    (('Color', 1.0, 0), ('Rotate', 0.6, 2)),
    (('Equalize', 0.8, 4), ('Equalize', 0.0, 8)),
    (('Equalize', 1.0, 4), ('AutoContrast', 0.6, 2)),
    (('ShearY', 0.4, 7), ('SolarizeAdd', 0.6, 7)),
    (('Posterize', 0.8, 2), ('Solarize', 0.6, 10)),
    (('Solarize', 0.6, 8), ('Equalize', 0.6, 1)),
    (('Color', 0.8, 6), ('Rotate', 0.4, 5)),
  ),
  'reduced_imagenet': (
    (('Posterize', 0.4, 8), ('Rotate', 0.6, 9)),
    (('Solarize', 0.6, 5), ('AutoContrast', 0.6, 5)),
    (('Equalize', 0.8, 8), ('Equalize', 0.6, 3)),
    (('Posterize', 0.6, 7), ('Posterize', 0.6, 6)),
    (('Equalize', 0.4, 7), ('Solarize', 0.2, 4)),
    (('Equalize', 0.4, 4), ('Rotate', 0.8, 8)),
    (('Solarize', 0.6, 3), ('Equalize', 0.6, 7)),
    (('Posterize', 0.8, 5), ('Equalize', 1.0, 2)),
    (('Rotate', 0.2, 3), ('Solarize', 0.6, 8)),
    (('Equalize', 0.6, 8), ('Posterize', 0.4, 6)),
    (('Rotate', 0.8, 8), ('Color', 0.4, 0)),
    (('Rotate', 0.4, 9), ('Equalize', 0.6, 2)),
    (('Equalize', 0.0, 7), ('Equalize', 0.8, 8)),
    (('Invert', 0.6, 4), ('Equalize', 1.0, 8)),
    (('Color', 0.6, 4), ('Contrast', 1.0, 8)),
    (('Rotate', 0.8, 8), ('Color', 1.0, 2)),
    (('Color', 0.8, 8), ('Solarize', 0.8, 7)),
    (('Sharpness', 0.4, 7), ('Invert', 0.6, 8)),
    (('ShearX', 0.6, 5), ('Equalize', 1.0, 9)),
    (('Color', 0.4, 0), ('Equalize', 0.6, 3)),
    (('Equalize', 0.4, 7), ('Solarize', 0.2, 4)),
    (('Solarize', 0.6, 5), ('AutoContrast', 0.6, 5)),
    (('Invert', 0.6, 4), ('Equalize', 1.0, 8)),
    (('Color', 0.6, 4), ('Contrast', 1.0, 8)),
    (('Equalize', 0.8, 8), ('Equalize', 0.6, 3)),
  ),
}

# In the order of RandAugment's draw.
OPERATIONS = (
  'AutoContrast', 'Equalize', 'Invert', 'Rotate', 'Posterize', 'Solarize',
  'Color', 'Contrast', 'Brightness', 'Sharpness', 'ShearX', 'ShearY',
  'TranslateX', 'TranslateY', 'Cutout', 'SolarizeAdd',
)  # fmt: skip


class Limits(NamedTuple):
  """What level 10 means where the two methods differ.

  Attributes:
    translate_px: pixels that an image moves.
    cutout_px: half the side of the square.
  """

  translate_px: int
  cutout_px: int


AUTOAUGMENT_LIMITS = Limits(translate_px=250, cutout_px=100)
RANDAUGMENT_LIMITS = Limits(translate_px=100, cutout_px=40)


class Draw(NamedTuple):
  """What one layer does to one image.

  Attributes:
    choice: int32 scalar, index of the sub-policy, or into `OPERATIONS`, where
      len(OPERATIONS) is the identity.
    applied: bool scalar, whether the operation takes place.
    negative: bool scalar, the sign of a rotation, shear or translation.
    center: float32 [2] in [0, 1), of a cutout: fractions of height and width.
  """

  choice: tf.Tensor
  applied: tf.Tensor
  negative: tf.Tensor
  center: tf.Tensor


def augment(policy: str, image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
  """AutoAugment: a random sub-policy, each operation with its probability.

  Args:
    policy: a name in `POLICIES`.
    image: uint8 [H, W, C].
    seed: int32 or int64 [2].

  Returns:
    uint8 [H, W, C].
  """
  result = image
  columns = zip(*POLICIES[policy], strict=True)
  for column, drawn in zip(columns, draw(policy, seed), strict=True):
    steps = tuple((name, level) for name, _, level in column)
    result = apply(make_layer(steps, AUTOAUGMENT_LIMITS), result, drawn)
  return tf.ensure_shape(result, image.shape)


def rand_augment(
  image: tf.Tensor, seed: tf.Tensor, layers: int, magnitude: float
) -> tf.Tensor:
  """RandAugment: `layers` operations, uniform over 16 and the identity.

  As tensorflow/models; the TPU code has no identity. Both also draw a
  probability for each operation and then do not use it; we draw none.

  Args:
    image: uint8 [H, W, C].
    seed: int32 or int64 [2].
    layers: number of operations, N in the paper.
    magnitude: level of all of them, M in the paper; may exceed 10.

  Returns:
    uint8 [H, W, C].
  """
  steps = tuple((name, magnitude) for name in OPERATIONS)
  layer = make_layer(steps, RANDAUGMENT_LIMITS)
  result = image
  for drawn in rand_draw(seed, layers):
    result = apply(layer, result, drawn)
  return tf.ensure_shape(result, image.shape)


def operation(
  name: str,
  image: tf.Tensor,
  level: float,
  *,
  negative: bool = False,
  center: Sequence[float] = (0.5, 0.5),
  limits: Limits = AUTOAUGMENT_LIMITS,
) -> tf.Tensor:
  """One operation of `OPERATIONS`, without chance; see `Draw` and `Limits`."""
  layer = make_layer(((name, level),), limits)
  drawn = Draw(*map(tf.convert_to_tensor, (0, True, negative, center)))
  return apply(layer, tf.convert_to_tensor(image), drawn)


def draw(policy: str, seed: tf.Tensor) -> tuple[Draw, ...]:
  """What `augment` does with this seed, one `Draw` for each of two layers."""
  table = POLICIES[policy]
  probabilities = np.array(
    [[probability for _, probability, _ in pair] for pair in table], np.float32
  )
  u = tf.random.stateless_uniform([9], seed, alg=_ALG)
  choice = tf.cast(u[0] * len(table), tf.int32)
  needed = tf.unstack(tf.gather(probabilities, choice))
  return tuple(
    Draw(choice, v[0] < probability, v[1] < 0.5, v[2:])
    for v, probability in zip((u[1:5], u[5:9]), needed, strict=True)
  )


def rand_draw(seed: tf.Tensor, layers: int) -> tuple[Draw, ...]:
  """What `rand_augment` does with this seed, one `Draw` for each layer."""
  u = tf.random.stateless_uniform([layers, 4], seed, alg=_ALG)
  draws = []
  for v in tf.unstack(u):
    choice = tf.cast(v[0] * (len(OPERATIONS) + 1), tf.int32)
    draws.append(Draw(choice, choice < len(OPERATIONS), v[1] < 0.5, v[2:]))
  return tuple(draws)


def resolve(
  name: str, level: float, limits: Limits
) -> tuple[Callable[..., tf.Tensor] | None, list[np.ndarray]]:
  """The function of `image_ops` that does an operation, and its argument.

  Args:
    name: in `OPERATIONS`.
    level: from 0; AutoAugment's go up to 10.
    limits: what level 10 means where the methods differ.

  Returns:
    The function, None where the image would stay as it is, and the values of
    its second argument: none, one, or those for the signs + and -.
  """
  part = level / _MAX_LEVEL
  if name in _PLAIN:
    return _PLAIN[name], []
  if name in _GEOMETRIC:
    matrix, size = _GEOMETRIC[name]
    size = part * (limits.translate_px if size is None else size)
    values = [matrix(size), matrix(-size)]
    return (image_ops.affine, values) if size else (None, [])
  if name in _BLENDS:
    value = np.float32(part * 1.8 + 0.1)
    return (_BLENDS[name], [value]) if value != 1 else (None, [])
  function, value, neutral = {
    'Invert': (image_ops.solarize, 0, 256),
    'Posterize': (image_ops.posterize, _high_bits(int(part * 4)), 255),
    'Solarize': (image_ops.solarize, min(int(part * 256), 256), 256),
    'SolarizeAdd': (image_ops.solarize_add, min(int(part * 110), 255), 0),
    'Cutout': (image_ops.cutout, int(part * limits.cutout_px), 0),
  }[name]
  dtype = np.int32 if name == 'Cutout' else np.uint8
  return (function, [dtype(value)]) if value != neutral else (None, [])


_PLAIN = {
  'AutoContrast': image_ops.auto_contrast,
  'Equalize': image_ops.equalize,
}
_BLENDS = {
  'Color': image_ops.color,
  'Contrast': image_ops.contrast,
  'Brightness': image_ops.brightness,
  'Sharpness': image_ops.sharpness,
}
# The matrix of an amount, and the amount at level 10; None: the translation's.
_GEOMETRIC = {
  'Rotate': (image_ops.rotation, 30),
  'ShearX': (lambda amount: image_ops.shear(amount, 0), 0.3),
  'ShearY': (lambda amount: image_ops.shear(0, amount), 0.3),
  'TranslateX': (lambda amount: image_ops.translation(amount, 0), None),
  'TranslateY': (lambda amount: image_ops.translation(0, amount), None),
}


def _high_bits(count: int) -> int:
  """A mask of the `count` highest bits of eight, of 1 to 8 of them."""
  return 0xFF << (8 - min(max(count, 1), 8)) & 0xFF


class Layer(NamedTuple):
  """Operations to choose from, grouped by the function that does them.

  Attributes:
    functions: of `image_ops`, each once.
    values: for each function, those of its argument, [rows, ...]; or no rows.
    kind: int32 [operations], 1 + index of the function; 0 changes nothing.
    row: int32 [operations], into `values`.
    signed: int32 [operations], 1 where the next row is for the sign -.
  """

  functions: tuple[Callable[..., tf.Tensor], ...]
  values: tuple[np.ndarray, ...]
  kind: np.ndarray
  row: np.ndarray
  signed: np.ndarray


@functools.lru_cache
def make_layer(steps: tuple[tuple[str, float], ...], limits: Limits) -> Layer:
  """A `Layer` from pairs of operation and level."""
  rows: dict[Callable[..., tf.Tensor], list[np.ndarray]] = {}
  places = []
  for name, level in steps:
    function, values = resolve(name, level, limits)
    if function is None:
      places.append((0, 0, 0))
      continue
    known = rows.setdefault(function, [])
    kind = 1 + list(rows).index(function)
    places.append((kind, len(known), len(values) == 2))
    known.extend(values)
  kind, row, signed = np.array(places, np.int32).T
  tables = tuple(np.array(values) for values in rows.values())
  return Layer(tuple(rows), tables, kind, row, signed)


def apply(layer: Layer, image: tf.Tensor, drawn: Draw) -> tf.Tensor:
  """The image after the operation that was drawn."""
  # RandAugment's identity is past the end, and never applied.
  choice = tf.minimum(drawn.choice, len(layer.kind) - 1)
  kind = tf.where(drawn.applied, tf.gather(layer.kind, choice), 0)
  negative = tf.cast(drawn.negative, tf.int32)
  row = tf.gather(layer.row, choice)
  row += negative * tf.gather(layer.signed, choice)

  def branch(function, values):
    arguments = [tf.gather(values, row)] if len(values) else []
    if function is image_ops.cutout:
      arguments.append(drawn.center)
    return function(image, *arguments)

  branches = [lambda: image]
  for function, values in zip(layer.functions, layer.values, strict=True):
    branches.append(functools.partial(branch, function, values))
  return tf.switch_case(kind, branches)
