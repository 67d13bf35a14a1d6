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
  return f"""\
import timm
from PIL import Image

model = timm.create_model(
  {card['timm_name']!r},
  num_classes={card['dataset']['num_classes']},{channels_arg}
  checkpoint_path={card['file']!r},
).eval()
transform = timm.data.create_transform(
  input_size={tuple(spec['input_size'])},
  mean={tuple(spec['mean'])},
  std={tuple(spec['std'])},
  interpolation={spec['interpolation']!r},
  crop_pct={spec['crop_pct']!r},
)
image = Image.open('image.jpg').convert({mode!r})
logits = model(transform(image)[None])"""


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
