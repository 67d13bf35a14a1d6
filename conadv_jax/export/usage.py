"""Python code that loads an exported file, for its model card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Card = Mapping[str, Any]


def safetensors(card: Card) -> str:
  """Returns code that makes `logits` of an image, or of a batch of zeros."""
  return _own(card) if card['timm_name'] is None else _timm(card)


def _timm(card: Card) -> str:
  spec = card['input']
  channels = spec['input_size'][0]
  channels_arg = '' if channels == 3 else f'\n  in_chans={channels},'
  mode = 'RGB' if channels == 3 else 'L'
  header = ['import numpy as np', 'import timm', 'import torch']
  if _needs_tensorflow(spec):
    header.insert(1, 'import tensorflow as tf')
  imports = '\n'.join(header)
  return f"""\
{imports}
from PIL import Image


{crop(card)}


def to_tensor(pixels):
  x = (pixels.astype(np.float32) / 255 - {spec['mean']}) / {spec['std']}
  return torch.tensor(x.transpose(2, 0, 1), dtype=torch.float32)


model = timm.create_model(
  {card['timm_name']!r},
  num_classes={card['dataset']['num_classes']},{channels_arg}
  checkpoint_path={card['file']!r},
).eval()
image = Image.open('image.jpg').convert({mode!r})
logits = model(to_tensor(crop(image))[None])"""


def _needs_tensorflow(spec: Mapping[str, Any]) -> bool:
  """Whether the run shrinks images without a low-pass, which is TF's alone."""
  return spec['resized'] and not spec['antialias']


def crop(card: Card) -> str:
  """Returns a function PIL image -> uint8 pixels [H, W, C], as the run's."""
  spec = card['input']
  _, height, width = spec['input_size']
  kind = spec['interpolation']
  lines = [
    'def crop(image):',
    f'side = int(np.float32({spec["crop_pct"]!r}) * min(image.size))',
    'left, top = ((length - side + 1) // 2 for length in image.size)',
    'image = image.crop((left, top, left + side, top + side))',
  ]
  if not spec['resized']:
    lines[1:] = [f'return np.array(image).reshape({height}, {width}, -1)']
  elif spec['antialias']:
    how = f'Image.Resampling.{kind.upper()}'
    lines += [f'return np.array(image.resize({width, height}, {how}))']
  else:
    lines += [
      f'pixels = tf.image.resize(np.array(image), {height, width}, {kind!r})',
      'return np.clip(np.floor(pixels + 0.5), 0, 255).astype(np.uint8)',
    ]
  return '\n  '.join(lines)


def _own(card: Card) -> str:
  spec = card['input']
  return f"""\
import numpy as np
import safetensors.numpy
from flax import traverse_util

from conadv_jax import models

arrays = safetensors.numpy.load_file({card['file']!r})
model = models.create(
  {card['model']!r},
  num_classes={card['dataset']['num_classes']},
  num_routes=1,
  bn_epsilon={card['config']['bn_epsilon']!r},
)
images = np.zeros({_batch_shape(card)}, np.uint8)  # any number of them
x = (images / np.float32(255) - {spec['mean']}) / {spec['std']}
# One group and one view, on the first (and only) batch-norm row.
variables = traverse_util.unflatten_dict(arrays, sep='/')
logits = model.apply(variables, x[None, None], (0,), False)[0, 0]"""


def stablehlo(card: Card) -> str:
  """Returns code that makes `logits` of a batch of zeros."""
  return f"""\
import jax
import numpy as np

with open({card['file']!r}, 'rb') as file:
  predict = jax.export.deserialize(bytearray(file.read())).call
images = np.zeros({_batch_shape(card)}, np.uint8)  # any number of them
logits = predict(images)"""


def _batch_shape(card: Card) -> tuple[int, ...]:
  channels, height, width = card['input']['input_size']
  return (2, height, width, channels)
