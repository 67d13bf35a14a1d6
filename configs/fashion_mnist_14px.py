r"""Fashion-MNIST at 14x14: small and large batches compared, on a CPU.

A sixth of the examples, of which a batch of 1,280 is an eighth, and no
augmentation, as in studies of the gap between small and large batches
(Keskar et al. 2017, arXiv:1609.04836).

Prepare: python scripts/prepare_fashion_mnist.py --balanced
Run:     python -m conadv_jax.train \
           --config=fashion_mnist_14px:method=conadv,batch_size=1280 \
           --workdir=runs/fashion_mnist_14px
Choose:  settings on --config.dataset.eval_split='train[10240:20240]', not on
         the test split
Rivals:  method=baseline,epochs=192 takes 8/3 of the epochs, and so the FLOPs
         of conadv in 72; optimizer.name=sgd (Nesterov) or lamb takes the rate
         of `RATES` to start tuning at
"""

import math

import ml_collections

from conadv_jax.base.fields import check_choice
from conadv_jax.config import default_config
from conadv_jax.config.recipes import parse_args

ARGUMENTS = {
  'method': 'conadv',
  'batch_size': 1280,
  'seed': 0,
  'epochs': 72.0,
  'optimizer.name': 'lars',
}
# {optimizer: {batch size: peak}}; others follow the nearest with the square
# root. LARS: the best of two or three for the baseline, in a pilot of one seed.
# SGD and LAMB: not tuned, the middle of a grid to begin with; they train the
# digits. LAMB moves a kernel by the rate, LARS by 0.001 to 0.01 of it.
RATES = {
  'lars': {128: 4.0, 1280: 8.0},
  'sgd': {256: 0.2},
  'lamb': {128: 0.02, 1280: 0.04},
}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  c = default_config()
  c.update_from_flattened_dict(parse_args(arg, ARGUMENTS))
  c.dataset.name = 'fashion_mnist_balanced'
  c.dataset.train_split = 'train[:10240]'
  c.dataset.eval_split = 'test'
  c.dataset.pool = 2
  c.model = 'resnet8'
  c.bn_group_size = min(128, c.batch_size)
  c.schedule.warmup_epochs = c.epochs / 10

  check_choice('optimizer.name', c.optimizer.name, RATES)
  rates = RATES[c.optimizer.name]
  nearest = min(rates, key=lambda size: abs(math.log(size / c.batch_size)))
  c.optimizer.learning_rate = rates[nearest]
  c.optimizer.base_batch_size = nearest
  c.optimizer.scaling = 'sqrt'
  c.optimizer.nesterov = c.optimizer.name == 'sgd'
  return c
