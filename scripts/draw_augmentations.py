r"""Draws every augmentation operation, and draws of the policies, as one PNG.

Run:  python scripts/draw_augmentations.py [--output=docs/autoaugment.png]
        [--image=PHOTO] [--policy=v0]

Shows a photo (one of scikit-learn's unless --image names a file) as 224 x 224,
after each operation of AutoAugment at several levels, and after policies with
random seeds; each tile says what happened to it. At the end, the training views
that the input pipeline makes of the whole photo.
"""

import argparse
import io
import itertools
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import numpy as np
import tensorflow as tf
from PIL import Image
from sklearn import datasets as sklearn_datasets

from conadv_jax.config import default_config, from_config_dict
from conadv_jax.config.recipes import set_imagenet
from conadv_jax.data.images import autoaugment, preprocess, views

SIZE_PX = 224
COLUMNS = 8
LEVELS = (1, 4, 7, 10)
WITHOUT_LEVEL = ('AutoContrast', 'Equalize', 'Invert')
SIGNED = ('Rotate', 'ShearX', 'ShearY', 'TranslateX', 'TranslateY')
RANDAUGMENT = 'randaugment'
RANDAUGMENT_LAYERS, RANDAUGMENT_MAGNITUDE = 2, 9
# In inches: a tile, the gap beside it, a line of its label, a section's title.
TILE, GAP, LINE, TITLE = 1.0, 0.06, 0.13, 0.36
TILE_PX = 100


class Tile(NamedTuple):
  """An image, uint8 [H, W, 3], and the lines that are written above it."""

  label: str
  image: np.ndarray


class Section(NamedTuple):
  """Tiles under a title, `COLUMNS` in a row."""

  title: str
  tiles: Sequence[Tile]


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    '--output', type=os.path.expanduser, default='docs/autoaugment.png'
  )
  parser.add_argument(
    '--policy',
    choices=[*autoaugment.POLICIES, RANDAUGMENT],
    help='default: all',
  )
  parser.add_argument(
    '--image', type=os.path.expanduser, help='a photo, e.g. a JPEG'
  )
  args = parser.parse_args()

  try:
    photo = load_photo(args.image)
  except OSError as error:
    parser.error(f'--image={args.image}: not a readable image ({error})')
  policies = [args.policy] if args.policy else [
    *autoaugment.POLICIES, RANDAUGMENT
  ]  # fmt: skip
  sections = [operations_section(photo)]
  sections += [policy_section(policy, photo) for policy in policies]
  sections.append(views_section(load_file(args.image)))
  draw_sheet(sections, pathlib.Path(args.output))
  print(f'Wrote {args.output}')


def load_photo(path: str | None) -> np.ndarray:
  """The central square of a photo, uint8 [SIZE_PX, SIZE_PX, 3]."""
  if path is None:
    photo = Image.fromarray(sklearn_datasets.load_sample_image('china.jpg'))
  else:
    photo = Image.open(path).convert('RGB')
  side = min(photo.size)
  left, top = (photo.width - side) // 2, (photo.height - side) // 2
  box = (left, top, left + side, top + side)
  return np.asarray(photo.resize((SIZE_PX, SIZE_PX), Image.BICUBIC, box))


def load_file(path: str | None) -> bytes:
  """The bytes of a photo as a data set has them, JPEG or PNG."""
  if path is not None:
    return pathlib.Path(path).read_bytes()
  data = io.BytesIO()
  photo = sklearn_datasets.load_sample_image('china.jpg')
  Image.fromarray(photo).save(data, 'JPEG', quality=95)
  return data.getvalue()


def views_section(file: bytes, count: int = 8) -> Section:
  """What training sees of a whole photo: a column for each seed."""
  values = default_config()
  set_imagenet(values, SIZE_PX)
  settings = from_config_dict(values).dataset
  make_views = views.make_train_views(settings, ('clean', 'aa'))
  made = [
    make_views(tf.constant(file), preprocess.example_seed(0, epoch, epoch))
    for epoch in tf.range(count, dtype=tf.int64)
  ]
  tiles = [Tile(view, x[view].numpy()) for view in made[0] for x in made]
  return Section('Training views of the whole photo', tiles)


def operations_section(photo: np.ndarray) -> Section:
  """Every operation; those with a sign with each in turn."""
  tiles = [Tile('original', photo)]
  for name in WITHOUT_LEVEL:
    tiles.append(Tile(name, autoaugment.operation(name, photo, 0).numpy()))
  for name in autoaugment.OPERATIONS:
    if name in WITHOUT_LEVEL:
      continue
    signs = itertools.cycle((False, True) if name in SIGNED else (False,))
    for level, negative in zip(LEVELS, signs, strict=False):
      image = autoaugment.operation(name, photo, level, negative=negative)
      tiles.append(Tile(step_label(name, level, negative), image.numpy()))
  return Section("Operations by level, at AutoAugment's limits", tiles)


def policy_section(policy: str, photo: np.ndarray, count: int = 16) -> Section:
  """The photo under a policy with the seeds 0, 1, ..."""
  title = f"AutoAugment '{policy}'"
  if policy == RANDAUGMENT:
    title = f'RandAugment, N={RANDAUGMENT_LAYERS}, M={RANDAUGMENT_MAGNITUDE}'
  tiles = []
  for seed in range(count):
    seeds = tf.constant([seed, 0], tf.int64)
    if policy == RANDAUGMENT:
      image = autoaugment.rand_augment(
        tf.constant(photo), seeds, RANDAUGMENT_LAYERS, RANDAUGMENT_MAGNITUDE
      )
    else:
      image = autoaugment.augment(policy, tf.constant(photo), seeds)
    label = '\n'.join(applied_steps(policy, seeds)) or 'unchanged'
    tiles.append(Tile(label, image.numpy()))
  return Section(f'{title}: draws', tiles)


def applied_steps(policy: str, seed: tf.Tensor) -> Iterator[str]:
  """Labels of the operations that a policy does with this seed."""
  if policy == RANDAUGMENT:
    for drawn in autoaugment.rand_draw(seed, RANDAUGMENT_LAYERS):
      if drawn.applied:
        name = autoaugment.OPERATIONS[drawn.choice]
        yield step_label(name, RANDAUGMENT_MAGNITUDE, bool(drawn.negative))
    return
  for layer, drawn in enumerate(autoaugment.draw(policy, seed)):
    if drawn.applied:
      name, _, level = autoaugment.POLICIES[policy][drawn.choice][layer]
      yield step_label(name, level, bool(drawn.negative))


def step_label(name: str, level: int, negative: bool) -> str:
  if name in WITHOUT_LEVEL:
    return name
  return f'{name} {"−" if negative and name in SIGNED else ""}{level}'


def draw_sheet(sections: Sequence[Section], path: pathlib.Path) -> None:
  """Writes the sections below each other as a PNG of 256 colours."""
  # matplotlib's pyplot keeps global state and may look for a display.
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  width = COLUMNS * (TILE + GAP) + GAP
  height = sum(TITLE + _rows(s) * _row_height(s) for s in sections) + GAP
  figure = Figure(figsize=(width, height), dpi=TILE_PX / TILE)
  canvas = FigureCanvasAgg(figure)
  top = height
  for section in sections:
    top -= TITLE
    figure.text(
      GAP / width, (top + 0.08) / height, section.title, fontsize=11,
      fontweight='bold', va='bottom',
    )  # fmt: skip
    for index, tile in enumerate(section.tiles):
      row, column = divmod(index, COLUMNS)
      left = GAP + column * (TILE + GAP)
      bottom = top - (row + 1) * _row_height(section)
      box = (left / width, bottom / height, TILE / width, TILE / height)
      _draw_tile(figure.add_axes(box), tile)
    top -= _rows(section) * _row_height(section)
  canvas.draw()
  sheet = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
  path.parent.mkdir(parents=True, exist_ok=True)
  # A third of the size in full colour.
  sheet.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def _draw_tile(axes, tile: Tile) -> None:
  axes.imshow(tile.image, interpolation='antialiased')
  axes.set(xticks=[], yticks=[])
  for spine in axes.spines.values():
    spine.set_visible(False)
  axes.set_title(tile.label, fontsize=7, pad=1.5, loc='left')


def _rows(section: Section) -> int:
  return -(-len(section.tiles) // COLUMNS)


def _row_height(section: Section) -> float:
  lines = max(tile.label.count('\n') + 1 for tile in section.tiles)
  return TILE + GAP + lines * LINE


if __name__ == '__main__':
  main()
