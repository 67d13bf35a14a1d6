r"""ResNet on ImageNet with LARS, batch 256 to 96K.

Prepare: scripts/prepare_imagenet.md
Run:     python -m conadv_jax.train \
           --config=imagenet_resnet50:method=conadv,batch_size=96k \
           --workdir=gs://BUCKET/RUN --config.dataset.data_dir=DIRECTORY
         Arguments: model, method, batch_size (4k, 8k, 16k, 32k, 64k, 96k, or a
         number), recipe (paper, mlperf), seed. A batch below 4,096 takes the
         rate of that one, times the square root of its share.
Slice:   the paper trains 96K on v3-1024, 96 images per core, 1,301 steps.
         Others: docs/tpu.md; one GPU or v5e-8: docs/small_machines.md.
Time:    not measured. By XLA's count a step at 96 images per core moves 28 GB
         (baseline), 75 GB (conadv) or 102 GB (conadv_aa) per core; at 450 GB/s
         that is 1.3, 3.6 or 4.9 minutes for the run, or more.
Expect:  not measured by us. The paper's top-1 (arXiv 2106.00221): at 96K 74.3
         (baseline, as cited by later work), 75.3 (conadv), 76.2 (conadv_aa).
         recipe=mlperf is for the baseline: 76.07 at 65,536 after 92 epochs in
         the log of Google's JAX submission to MLPerf v0.7.

Small batches. Published rates of LARS fall with the square root of the batch,
or more slowly: 11.3 at 4,096, 5.66 at 1,024 and 4 at 512, each with 77 % top-1
(NUS-HPC-AI-Lab/LARS-ImageNet-PyTorch), and 10 at 4,096, 8.5 at 2,048 and 7.4 at
1,632 in MLPerf's reference runs. Ours are 10 at 4,096, 7.1 at 2,048, 5.0 at
1,024, 3.5 at 512 and 2.5 at 256. The warm-up stays at 5 epochs; the former's
shrinks with the batch.
"""

import dataclasses

import ml_collections

from conadv_jax import models
from conadv_jax.base.errors import ConfigError
from conadv_jax.config import default_config
from conadv_jax.config.recipes import (
  batch_size_of,
  parse_args,
  set_imagenet,
)

ARGUMENTS = dict(
  model='resnet50',
  method='conadv',
  batch_size='96k',
  recipe='paper',
  seed=0,
)


@dataclasses.dataclass(frozen=True)
class Recipe:
  """What depends on the batch size; good for batches up to `max_batch_size`."""

  max_batch_size: int
  learning_rate: float  # peak
  warmup_epochs: float
  epochs: float
  momentum: float
  weight_decay: float
  bn_group_size: int


# The released code of the paper: lars_util.py, resnet_config.py and the files
# of v3-128 (16K), v3-256 (32K) and v3-1024 (96K). It has no file for 4K, 8K and
# 64K: those have the epochs of 32K, and its learning rate for their size.
_PAPER = (
  Recipe(16383, 10.0, 5, 91.0, 0.92, 5e-5, 128),
  Recipe(32767, 25.0, 5, 91.0, 0.92, 5e-5, 128),
  Recipe(65535, 31.2, 25, 91.0, 0.92, 5e-5, 128),
  Recipe(98303, 43.0, 41, 91.0, 0.92, 5e-5, 128),
  Recipe(98304, 43.0, 41, 99.83, 0.92, 5e-5, 96),
)
# Google's JAX submission to MLPerf v0.7, which ends at 65,536.
_MLPERF = (
  Recipe(16383, 10.0, 5, 56.0, 0.9, 2e-4, 64),
  Recipe(32767, 25.0, 5, 56.0, 0.9, 2e-4, 64),
  Recipe(65535, 29.0, 18, 64.0, 0.929, 1e-4, 64),
  Recipe(65536, 23.080977304670448, 33, 92.0, 0.9537213777059405, 1e-4, 64),
)
MIN_BATCH_SIZE = 4096  # smaller ones take its rate, times the square root
RECIPES = {'paper': (_PAPER, 1.6), 'mlperf': (_MLPERF, 2.0)}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  args = parse_args(arg, ARGUMENTS)
  batch_size = batch_size_of(args['batch_size'])
  recipe, power = find_recipe(args['recipe'], batch_size)
  c = default_config()
  c.seed, c.method, c.model = args['seed'], args['method'], args['model']
  c.batch_size = batch_size
  c.epochs = recipe.epochs
  c.bn_group_size = min(recipe.bn_group_size, batch_size)
  c.dtype = 'bfloat16'
  set_imagenet(c, models.get(args['model']).resolution_px)

  c.optimizer.name = 'lars'
  scale = min(1, batch_size / MIN_BATCH_SIZE) ** 0.5
  c.optimizer.learning_rate = recipe.learning_rate * scale
  c.optimizer.momentum = recipe.momentum
  c.optimizer.weight_decay = recipe.weight_decay
  c.optimizer.lars_denominator = 'sum_of_norms'
  c.schedule.warmup_epochs = float(recipe.warmup_epochs)
  c.schedule.power = power
  c.schedule.end_learning_rate = 1e-4
  return c


def find_recipe(name: str, batch_size: int) -> tuple[Recipe, float]:
  """The recipe for a batch size, and the power of its polynomial decay."""
  if name not in RECIPES:
    raise ConfigError(f'recipe={name!r}: must be one of {", ".join(RECIPES)}')
  recipes, power = RECIPES[name]
  for recipe in recipes:
    if batch_size <= recipe.max_batch_size:
      return recipe, power
  raise ConfigError(
    f'batch_size={batch_size}: recipe {name!r} ends at'
    f' {recipes[-1].max_batch_size}'
  )
