"""What each recipe resolves to, compared with tests/golden/*.json.

UPDATE_GOLDEN=1 makes those files again; look at their diff before it is
committed.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import pytest

from conadv_jax import models
from conadv_jax.config import (
  Steps,
  default_config,
  flatten,
  from_config_dict,
  recipes,
  to_dict,
)
from conadv_jax.data import datasets
from conadv_jax.method import optim, schedules
from conadv_jax.methods import METHODS

FOLDER = pathlib.Path(__file__).parent / 'golden'
BATCHES = {
  'digits': (64, 320, 1280),
  'fashion_mnist': (256, 2048),
  'fashion_mnist_14px': (128, 512, 1280),
  'cifar10': (256, 2048),
  'fine_tune': (),
  'imagenet_resnet50': (256, 4096, 8192, 16384, 32768, 65536, 98304),
  'imagenet_efficientnet': (256, 4096, 8192, 16384, 32768, 65536, 98304),
}
# Arguments of more cases, of method conadv.
MORE = {
  'fine_tune': (
    'dataset.name=imagenet2012,model=resnet50,batch_size=256',
    'dataset.name=cifar10,model=resnet18_cifar,epochs=10',
    'dataset.name=digits,model=resnet8,method=baseline,batch_size=64',
  ),
  'imagenet_resnet50': (
    'recipe=mlperf,batch_size=4k',
    'recipe=mlperf,batch_size=32k',
    'recipe=mlperf,batch_size=64k',
    'model=resnet18,batch_size=32k',
  ),
  'imagenet_efficientnet': (
    'recipe=rmsprop,batch_size=16k',
    'recipe=lars,batch_size=4k',
    'model=efficientnet_b0,batch_size=64k',
  ),
}


def cases(recipe):
  for method in METHODS:
    for batch in BATCHES[recipe]:
      yield f'method={method},batch_size={batch}'
  yield from MORE.get(recipe, ())


@functools.cache
def decay_mask(model, image_shape, num_classes):
  """Which parameters decay: how many, and a digest of their names."""
  network = models.create(model, num_classes=num_classes, num_routes=1)
  image = jnp.zeros((1, 1, 1, *image_shape))
  shapes = jax.eval_shape(
    lambda: network.init(jax.random.key(0), image, (0,), True)
  )
  mask, _ = jax.tree_util.tree_flatten_with_path(
    optim.kernel_mask(shapes['params'])
  )
  names = {True: [], False: []}
  for path, decays in mask:
    names[decays].append(optim.path_name(path))
  text = '\n'.join(sorted(names[True]))
  return {
    model: {
      'decay': len(names[True]),
      'others': len(names[False]),
      'digest': hashlib.sha256(text.encode()).hexdigest()[:16],
    }
  }


def resolved(recipe, args):
  """What differs from the defaults, and what follows from it."""
  config = from_config_dict(recipes.load(f'{recipe}:{args}', {}))
  size = config.dataset.image_size_px
  spec = datasets.get_spec(config.dataset.name)
  train_split = config.dataset.train_split or spec.train_split
  spec = dataclasses.replace(spec, train_split=train_split)
  steps = Steps.of(config, spec.num_train)
  peak = config.optimizer.peak_learning_rate(config.batch_size)
  schedule = schedules.make_schedule(config.schedule, steps, peak)
  at = [0, steps.warmup // 2, steps.warmup, steps.total // 2, steps.total]
  shape = (size, size, 3) if spec.encoded else spec.image_shape
  usual = flatten(to_dict(from_config_dict(default_config())))
  found = flatten(to_dict(config))
  return {
    'config': {k: v for k, v in found.items() if v != usual.get(k)},
    'views': ' '.join(f'{view}:{route}' for view, route in config.views),
    'fed_views': ' '.join(config.fed_views),
    'steps': [steps.total, steps.warmup],
    'rates': {str(step): float(f'{schedule(step):.5g}') for step in at},
    'decay_mask': decay_mask(config.model, shape, spec.num_classes),
  }


def summarize(recipe):
  """All cases of a recipe, and once what is the same in all of them."""
  found = {args: resolved(recipe, args) for args in cases(recipe)}
  configs = [case['config'] for case in found.values()]
  same = {
    k: v for k, v in configs[0].items() if all(c.get(k) == v for c in configs)
  }
  masks = {}
  for case in found.values():
    case['config'] = {k: v for k, v in case['config'].items() if k not in same}
    masks |= case.pop('decay_mask')
  return {'every case': same, 'decay masks': masks, **found}


def compare(name, found):
  """Compares with the golden file, or makes it."""
  path = FOLDER / f'{name}.json'
  if os.environ.get('UPDATE_GOLDEN'):
    # One case a line, so that a diff shows which ones changed.
    lines = [f'  {json.dumps(k)}: {json.dumps(v)}' for k, v in found.items()]
    path.write_text('{\n' + ',\n'.join(lines) + '\n}\n')
  expected = json.loads(path.read_text())
  hint = f'if that is meant: UPDATE_GOLDEN=1 pytest {__file__}'
  assert found.keys() == expected.keys(), hint
  for case, values in found.items():
    assert values == expected[case], f'{name}, {case}: {hint}'


def test_the_defaults_are_the_golden_ones():
  compare('defaults', flatten(to_dict(from_config_dict(default_config()))))


@pytest.mark.parametrize('recipe', recipes.shipped())
def test_a_recipe_resolves_to_its_golden_file(recipe):
  compare(recipe, summarize(recipe))
