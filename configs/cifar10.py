r"""CIFAR-10, 32x32: ResNet-18, ConAdv against the baseline on one accelerator.

The network is ResNet-18 with a 3x3 stem of stride 1 and no pooling, as is usual
for images of this size; --config.model=resnet20 is a 40th of its size.

Prepare: python scripts/prepare_cifar.py --archive=cifar-10-binary.tar.gz,
         or let TFDS download it: scripts/prepare_tfds.py --name=cifar10
Run:     python -m conadv_jax.train \
           --config=cifar10:method=conadv,batch_size=2048 \
           --workdir=runs/cifar10_conadv
         and the same with method=baseline
Compare: python -m conadv_jax.study --output=cifar10.png \
           --compare runs/cifar10_conadv runs/cifar10_baseline
         or tune both and add seeds: python -m conadv_jax.study \
           --study=cifar10 --workdir=runs/cifar10_study
Expect:  not measured; the rates are a starting point.
"""

import ml_collections

from conadv_jax.config import default_config
from conadv_jax.config.recipes import parse_args

ARGUMENTS = dict(method='conadv', batch_size=2048, seed=0)


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  args = parse_args(arg, ARGUMENTS)
  c = default_config()
  c.update(args)
  c.dataset.name = 'cifar10'
  c.dataset.crop_padding_px = 4
  c.dataset.random_flip = True
  c.model = 'resnet18_cifar'
  c.epochs = 100.0
  c.bn_group_size = min(128, args['batch_size'])
  c.dtype = 'bfloat16'

  c.attack.epsilon = 4.0
  c.eval.epsilon = 4.0

  c.optimizer.learning_rate = 8.0
  c.optimizer.base_batch_size = 2048
  c.optimizer.scaling = 'sqrt'
  c.eval.every_steps = 200
  return c
