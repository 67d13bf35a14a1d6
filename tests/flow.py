"""What each output of a training step is computed from, and with how much."""

import collections
import dataclasses

import helpers
import jax
from jax.interpreters import partial_eval

from conadv_jax import experiment, models


class Flow:
  """What each output of the uncompiled step is computed from.

  The network is one that users train, on its own data set.
  """

  def __init__(self, **fields):
    fields = {'model': 'resnet8', 'attack.preset': 'paper'} | fields
    run = experiment.build(
      helpers.make_config(fields), devices=jax.devices()[:1]
    )
    # Elsewhere than on a CPU, where some convolutions are products.
    apply_fn = models.make_apply_fn(run.model.clone(platform=''))
    self.run = dataclasses.replace(run, apply_fn=apply_fn)
    batch = self.run.abstract_batch()
    args = self.run.abstract_state(), batch, batch
    closed, out = jax.make_jaxpr(self.run.step_fn, return_shape=True)(*args)
    self.jaxpr = closed.jaxpr
    self.inputs = _labels(args, 'batch', 'next_batch')
    self.outputs = _labels(out, 'metrics')
    params = jax.tree_util.tree_leaves_with_path(args[0].params)
    self.kernels = [x.shape for path, x in params if path[-1].key == 'kernel']

  def to(self, *outputs):
    """(labels of the inputs that `outputs` need, the jaxpr that makes them)."""
    assert set(outputs) <= set(self.outputs)
    used = [label in outputs for label in self.outputs]
    jaxpr, needed = partial_eval.dce_jaxpr(self.jaxpr, used)
    labels = zip(self.inputs, needed, strict=True)
    return {label for label, need in labels if need}, jaxpr


def _labels(tree, *others):
  """One word for each leaf of (state, *others)."""

  def label(path, _):
    if path[0].idx:
      return others[path[0].idx - 1]
    if path[1].name == 'snapshots':
      return f'snapshots[{path[2].idx}]'
    return path[1].name

  return jax.tree.leaves(jax.tree_util.tree_map_with_path(label, tree))


def equations(jaxpr):
  """All equations, those of inner jaxprs too."""
  for equation in jaxpr.eqns:
    yield equation
    for parameter in jax.tree.leaves(list(equation.params.values())):
      inner = getattr(parameter, 'jaxpr', parameter)
      if hasattr(inner, 'eqns'):
        yield from equations(inner)


def contractions(jaxpr):
  """Numbers of convolutions and of products of matrices."""
  kinds = collections.Counter(
    equation.primitive.name
    for equation in equations(jaxpr)
    if equation.outvars and equation.outvars[0].aval.ndim > 1
  )
  return kinds['conv_general_dilated'], kinds['dot_general']
