"""A small network's loss surface, and the same loss written out."""

import types

import flax.linen as nn
import helpers
import jax
import jax.numpy as jnp
import numpy as np

from conadv_jax import experiment, models
from conadv_jax.analysis import options
from conadv_jax.analysis.surface import Surface
from conadv_jax.devices.mesh import example_sharding, put_batch
from conadv_jax.models.norm import Layout, RoutedBatchNorm

EXAMPLES, BATCH = 21, 8  # the last batch has padding


class DenseNet(helpers.TinyNet):
  """Dense, batch norm, tanh, dense: compiles fast, and is smooth."""

  @nn.compact
  def __call__(self, x, routes, train, examples=None):
    types = {'dtype': self.dtype, 'param_dtype': self.dtype}
    layout = Layout(x.shape[0], routes, self.bn_axis, examples)
    y = layout.fold(x).reshape(-1, 32)
    y = nn.Dense(6, use_bias=False, name='first', **types)(y)
    y = RoutedBatchNorm(
      self.num_routes,
      self.bn_momentum,
      self.bn_epsilon,
      self.dtype,
      name='norm',
    )(y, layout, train)
    y = nn.Dense(self.num_classes, name='head', **types)(nn.tanh(y))
    return layout.unfold(y)


def examples():
  """uint8 images [N, 4, 4, 2] and labels [N]."""
  rng = np.random.default_rng(3)
  shape = (EXAMPLES, *helpers.SPEC.image_shape)
  images = rng.integers(0, 256, shape).astype(np.uint8)
  return images, rng.integers(0, 5, EXAMPLES).astype(np.int32)


def weights_of(**fields):
  """Random weights of `DenseNet`."""
  return helpers.random_weights(helpers.make_config(fields), 0, DenseNet)


def make(monkeypatch, weights, devices=1, route='clean', **fields):
  """(Surface, its Run) of `DenseNet` on `examples`."""
  monkeypatch.setitem(models.MODELS, 'dense', models.Entry(DenseNet, 4))
  config = helpers.make_config(
    {'model': 'dense', 'batch_size': 8, 'bn_group_size': 1} | fields
  )
  run = experiment.build(config, jax.devices()[:devices], helpers.SPEC)
  layout = (example_sharding(run.mesh), devices, BATCH // devices)
  images, labels = examples()
  batches = []
  for first in range(0, EXAMPLES, BATCH):
    places = np.arange(first, first + BATCH)
    real = places < EXAMPLES
    places = np.minimum(places, EXAMPLES - 1)  # what is padded must not count
    batch = {'clean': images[places], 'label': labels[places], 'mask': real}
    batches.append(put_batch(*layout, batch | {'is_example': real}))
  return Surface(run, route, weights, batches), run


def written_out(surface, run, weights, route=0):
  """w -> L(w) of one batch without padding, by another way."""
  images, labels = examples()
  mean, std = np.array(helpers.SPEC.mean), np.array(helpers.SPEC.std)
  x = jnp.asarray((images - mean) / std)[None, None]

  def loss(w):
    variables = {'params': surface.unravel(w)}
    variables['batch_stats'] = weights.batch_stats
    logits, _ = run.apply_fn(variables, x, (route,), False)
    logp = jax.nn.log_softmax(logits[0, 0])
    return -logp[jnp.arange(EXAMPLES), labels].mean()

  return jax.jit(loss)


def measured(module, surface, **fields):
  """What `module.measure` finds on `surface`."""
  subject = types.SimpleNamespace(
    surface=lambda *_: surface, options=options.Options(**fields)
  )
  return module.measure(subject)
