"""What the tests of all network families share."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from references import formula, make

from conadv_jax import models
from conadv_jax.models import weights
from conadv_jax.models.norm import RoutedBatchNorm

# For programs that take longer to run, unoptimised, than to compile.
OPTIMISED = {'xla_backend_optimization_level': '3'}


def abstract_variables(model, side_px=64):
  """Shapes and types of the variables of `model`."""
  routes = tuple(range(getattr(model, 'num_routes', 1)))
  image = (1, len(routes), 1, side_px, side_px, 3)
  return jax.eval_shape(
    lambda: model.init(jax.random.key(0), jnp.zeros(image), routes, False)
  )


def formula_state_dict(name, model):
  """The weights of the formula by timm's names."""
  shapes = abstract_variables(model)
  empty = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
  names = weights.to_state_dict(name, empty['params'], empty['batch_stats'], 0)
  return formula.state_dict({k: v.shape for k, v in names.items()})


def formula_variables(name, model):
  """Variables with the weights of the formula in every row."""
  state_dict = formula_state_dict(name, model)
  return weights.from_state_dict(state_dict, name, abstract_variables(model))


def random_variables(model, side_px=32):
  """Every row different, and no scale of zero to hide half of the network."""
  shapes = abstract_variables(model, side_px)
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    noise = rng.normal(size=leaf.shape)
    last = path[-1].key
    if last == 'kernel':
      noise = noise * np.sqrt(2 / np.prod(leaf.shape[:-1]))
    elif last in ('scale', 'var'):
      noise = np.exp(0.2 * noise)
    else:
      noise = 0.2 * noise
    return jnp.asarray(noise, leaf.dtype)

  return jax.tree_util.tree_map_with_path(draw, shapes)


def apply(model, variables, x, routes=(0,), train=False, key=None):
  """(logits, batch statistics) of one call under jit."""
  function = jax.jit(models.make_apply_fn(model), static_argnums=(2, 3))
  return function(variables, x, routes, train, key)


def images(*shape, dtype='float32'):
  return jnp.asarray(formula.uniform('test', shape), dtype)


def relative_error(actual, expected):
  """Largest |actual - expected| over largest |expected|."""
  return np.abs(actual - expected).max() / np.abs(expected).max()


def views_error(model, views, examples=3):
  """Largest relative error of `views` in one call against one call each.

  Of logits and moved statistics in train mode, two views of 32 pixels.
  """
  variables = random_variables(model)
  x = images(1, 2, examples, 32, 32, 3, dtype=model.dtype)
  logits, stats = apply(model, variables, x, (0, 1), True)
  errors = []
  for v in views:
    alone, stats_alone = apply(model, variables, x[:, v : v + 1], (v,), True)
    errors.append(relative_error(logits[:, v], alone[:, 0]))
    row = jax.tree.map(lambda s, v=v: s[v], (stats, stats_alone))
    errors += jax.tree.leaves(jax.tree.map(relative_error, *row))
  return max(errors)


def assert_training_equals_timm(name, norms, side_px=64):
  """Logits, gradients and moved statistics of a step in float64.

  Args:
    name: in models.MODELS.
    norms: number of batch norms that must have been compared.
    side_px: of the images.
  """
  import torch

  x = formula.images(4, side_px).astype(np.float64)
  labels = np.array([7, 1, 900, 3])
  theirs = make.timm_model(name).double().train()
  old_stats = {k: v.numpy().copy() for k, v in theirs.state_dict().items()}
  expected = theirs(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()))
  loss = torch.nn.functional.cross_entropy(expected, torch.from_numpy(labels))
  loss.backward()

  logits, grads, stats, counts = _train_step(name, x, labels)
  assert relative_error(logits, expected.detach().numpy()) < 1e-11
  ours = weights.to_state_dict(name, grads, stats, 0)
  for key, parameter in theirs.named_parameters():
    expected = parameter.grad.numpy()
    # A bias before another batch norm has a gradient of nothing but rounding.
    tolerance = 1e-9 * np.abs(expected).max() + 1e-12
    assert np.abs(ours[key] - expected).max() < tolerance, key
  new_stats = {k: v.numpy() for k, v in theirs.state_dict().items()}
  for module, count in counts.items():
    mean, var = f'{module}.running_mean', f'{module}.running_var'
    assert relative_error(ours[mean], new_stats[mean]) < 1e-11
    # PyTorch moves the running variance to the unbiased one, of n - 1.
    moved = ours[var] - 0.9 * old_stats[var]
    moved = 0.9 * old_stats[var] + moved * count / (count - 1)
    assert relative_error(moved, new_stats[var]) < 1e-11
  assert len(counts) == norms


def _train_step(name, x, labels):
  """Logits, gradients, moved statistics, and n of each batch norm of timm's."""
  model = models.create(
    name, num_classes=1000, num_routes=1, bn_momentum=0.9, dtype=jnp.float64
  )
  variables = jax.tree.map(jnp.asarray, formula_variables(name, model))
  apply_fn = models.make_apply_fn(model)
  timm_module = models.get(name).timm_module
  counts = {}

  def record(next_function, args, kwargs, context):
    module, method = context.module, context.method_name
    if isinstance(module, RoutedBatchNorm) and method == '__call__':
      module = timm_module('/'.join(module.path))
      counts[module] = args[0].size // args[0].shape[-1]
    return next_function(*args, **kwargs)

  def loss_fn(params):
    both = variables | {'params': params}
    logits, stats = apply_fn(both, x[None, None], (0,), True)
    log_p = jax.nn.log_softmax(logits[0, 0])
    loss = -log_p[jnp.arange(len(labels)), labels].mean()
    return loss, (logits[0, 0], stats)

  with nn.intercept_methods(record):
    gradient = jax.jit(
      jax.grad(loss_fn, has_aux=True), compiler_options=OPTIMISED
    )
    grads, (logits, stats) = gradient(variables['params'])
  return logits, grads, stats, counts
