r"""Handwritten digits, 8x8: ConAdv at a large batch, in a minute on two cores.

Run:    python -m conadv_jax.train \
          --config=digits:method=conadv,batch_size=320 \
          --workdir=runs/digits
"""

import ml_collections

from conadv_jax.config import default_config
from conadv_jax.config.recipes import parse_args

ARGUMENTS = dict(method='conadv', batch_size=320, seed=0)


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  args = parse_args(arg, ARGUMENTS)
  c = default_config()
  c.update(args)
  c.dataset.name = 'digits'
  c.dataset.crop_padding_px = 1
  c.model = 'resnet8'
  c.epochs = 40.0
  c.bn_group_size = min(64, args['batch_size'])

  c.attack.epsilon = 16.0
  c.eval.epsilon = 16.0

  c.optimizer.learning_rate = 8.0
  c.optimizer.base_batch_size = 320
  c.optimizer.scaling = 'sqrt'
  c.log_every_steps = 20
  c.eval.every_steps = 60
  c.attack_stats_every_steps = 20
  return c
