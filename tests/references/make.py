"""timm's networks with weights by a formula, and a few of their logits.

`python tests/references/make.py [MODEL ...]` writes those of the given models
(default: all that timm has) into logits.json, where the tests find them without
timm. Needs the `parity` extra.
"""

import json
import pathlib
import sys

import numpy as np

_HERE = pathlib.Path(__file__).parent
if __name__ == '__main__':
  sys.path.insert(0, str(_HERE.parent))

from references import formula  # noqa: E402

FILE = _HERE / 'logits.json'
IMAGES = 2
SIDE_PX = 64
CLASSES = slice(0, 1000, 125)  # stored, of 1000


def import_timm():
  """timm, also where torchvision lacks its compiled operations."""
  from scripts.bench import torch_step

  return torch_step.import_timm()


def timm_name(name):
  """timm's name of our model `name`."""
  return f'tf_{name}' if name.startswith('efficientnet') else name


def timm_model(name, **kwargs):
  """timm's model in evaluation mode, with the weights of the formula."""
  import torch

  model = import_timm().create_model(timm_name(name), **kwargs)
  shapes = {key: value.shape for key, value in model.state_dict().items()}
  weights = formula.state_dict(shapes)
  model.load_state_dict({k: torch.from_numpy(v) for k, v in weights.items()})
  return model.eval()


def timm_logits(model, images):
  """images [N, H, W, 3] -> logits [N, 1000]."""
  import torch

  images = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
  with torch.no_grad():
    return model(images).numpy()


def main(names):
  from conadv_jax import models

  names = names or [n for n, e in models.MODELS.items() if e.timm_module]
  stored = json.loads(FILE.read_text()) if FILE.exists() else {}
  for name in names:
    images = formula.images(IMAGES, SIDE_PX)
    logits = timm_logits(timm_model(name), images)[:, CLASSES]
    stored[name] = [[float(f'{x:.7g}') for x in row] for row in logits]
    FILE.write_text(
      '{\n'
      + ',\n'.join(f'"{k}": {json.dumps(v)}' for k, v in sorted(stored.items()))
      + '\n}\n'
    )


if __name__ == '__main__':
  main(sys.argv[1:])
