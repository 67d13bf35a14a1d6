r"""Fine-tuning: from the weights of a file or a run, to other classes.

Run:    python -m conadv_jax.train --config=fine_tune:model=resnet50 \
          --config.init_from=FILE.safetensors --config.dataset.data_dir=FOLDER \
          --workdir=runs/fine_tuned
        FILE is of timm or `conadv_jax.export`; the work directory of a run may
        stand for it. docs/fine_tuning.md has more.
        Arguments: model (that of the weights), method, dataset.name,
        batch_size, epochs, seed.
Expect: not measured; tune the rate between 0.003 and 0.03.

Rate, momentum and weight decay are those that Li et al. (2020,
arXiv:2002.11770) call usual for fine-tuning ResNets. The warm-up of a twentieth
and the cosine are those of google-research/big_vision, configs/transfer.py,
which also takes 0.01, at a batch of 512, and trains CIFAR for 100 epochs, small
data sets for 500 steps.
"""

import ml_collections

from conadv_jax import models
from conadv_jax.config import default_config
from conadv_jax.config.recipes import parse_args
from conadv_jax.data import datasets

ARGUMENTS = {
  'model': 'resnet50',
  'method': 'conadv',
  'dataset.name': 'image_folder',
  'batch_size': 512,
  'epochs': 20.0,
  'seed': 0,
}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  c = default_config()
  c.update_from_flattened_dict(parse_args(arg, ARGUMENTS))
  c.init_from = 'FILE_OR_RUN'  # an error until it is set
  spec = datasets.get_spec(c.dataset.name)
  c.dataset.random_flip = spec.allows_flip
  if spec.encoded:
    c.dataset.image_size_px = models.get(c.model).resolution_px
    c.dtype = 'bfloat16'
  else:
    c.dataset.crop_padding_px = spec.image_shape[0] // 8
  c.bn_group_size = min(128, c.batch_size)

  c.optimizer.name = 'sgd'
  c.optimizer.learning_rate = 0.01
  c.optimizer.base_batch_size = 512
  c.optimizer.scaling = 'linear'
  c.optimizer.momentum = 0.9
  c.optimizer.weight_decay = 1e-4
  c.schedule.name = 'cosine'
  c.schedule.warmup_epochs = c.epochs / 20
  c.log_every_steps = 10
  return c
