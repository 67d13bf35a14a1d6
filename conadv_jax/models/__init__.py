"""Networks by name, behind one seam: `apply_fn`."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from conadv_jax.base.errors import ConfigError, unknown
from conadv_jax.models import efficientnet, resnet, stochastic, vit

Variables = dict[str, Any]


class ApplyFn(Protocol):
  """A network as a function: all that a training step knows of one."""

  def __call__(
    self,
    variables: Variables,
    x: jax.Array,
    routes: tuple[int, ...],
    train: bool,
    key: jax.Array | None = None,
    examples: jax.Array | None = None,
  ) -> tuple[jax.Array, Any]:
    """Images [G, V, b, H, W, C] -> (logits [G, V, b, K], batch_stats).

    Args:
      variables: `params`, and `batch_stats` if the network has any; arrays of
        JAX or NumPy, such as `weights.from_state_dict` returns.
      x: normalised images.
      routes: row of the batch norms that each view uses, length V.
      train: normalise by the statistics of the batch; move the running ones.
      key: of dropout and stochastic depth; None, or not `train`: neither.
      examples: places of the examples in the batch, int [G, b], by which those
        are drawn; None counts them from 0.
    """


@dataclasses.dataclass(frozen=True)
class Entry:
  """A registered network.

  Published numbers are of 1000 classes and of one image at `resolution_px`;
  None where nobody published any. A multiply-add is one operation in them, as
  in the papers' tables, and two FLOPs to XLA.

  Attributes:
    build: (num_classes, ...) -> module. `create` gives it those of the fields
      in COMMON_FIELDS that it names as parameters.
    resolution_px: side of the images that it is made for.
    parameters: published number of them, batch statistics not counted.
    multiply_adds: published number of them in a forward pass.
    source: who published them.
    options: fields of the configuration that change it.
    timm_module: path of a module -> its name in timm's network of this name;
      None where timm has no such network.
  """

  build: Callable[..., nn.Module]
  resolution_px: int
  parameters: int | None = None
  multiply_adds: float | None = None
  source: str = ''
  options: tuple[str, ...] = ()
  timm_module: Callable[[str], str] | None = None


_TORCHVISION = 'torchvision 0.28, models/resnet.py'
_TIMM = 'timm 1.0.31, results/benchmark-infer-amp-nhwc-pt240-cu124-rtx4090.csv'


def _resnet(build, parameters, multiply_adds, source, **kwargs) -> Entry:
  options = ('remat', 'network.space_to_depth', 'network.drop_path_rate')
  kwargs = {'options': options, 'timm_module': resnet.timm_module} | kwargs
  return Entry(build, 224, parameters, multiply_adds, source, **kwargs)


_PAPER = 'arXiv:1905.11946, table 2; parameters counted in timm 1.0.31'


def _efficientnet(
  build, resolution_px, parameters, multiply_adds, source=_PAPER
) -> Entry:
  return Entry(
    build,
    resolution_px,
    parameters,
    multiply_adds,
    source,
    options=('remat', 'network.drop_path_rate', 'network.dropout_rate'),
    timm_module=efficientnet.timm_module,
  )


MODELS: dict[str, Entry] = {
  'resnet8': Entry(resnet.resnet8, 32),
  'resnet20': Entry(resnet.resnet20, 32),
  'resnet18_cifar': Entry(
    resnet.resnet18_cifar, 32, options=('remat', 'network.drop_path_rate')
  ),
  'vit_tiny': Entry(vit.vit_tiny, 32),
  'resnet18': _resnet(resnet.resnet18, 11_689_512, 1.814e9, _TORCHVISION),
  'resnet34': _resnet(resnet.resnet34, 21_797_672, 3.664e9, _TORCHVISION),
  'resnet50': _resnet(resnet.resnet50, 25_557_032, 4.089e9, _TORCHVISION),
  'resnet101': _resnet(resnet.resnet101, 44_549_160, 7.801e9, _TORCHVISION),
  'resnet152': _resnet(resnet.resnet152, 60_192_808, 11.514e9, _TORCHVISION),
  'resnet200': _resnet(resnet.resnet200, 64_673_832, 15.07e9, _TIMM),
  'resnet50d': _resnet(
    resnet.resnet50d,
    25_576_264,
    4.35e9,
    _TIMM,
    options=('remat', 'network.drop_path_rate'),
    timm_module=resnet.timm_module_d,
  ),
  'seresnet50': _resnet(resnet.seresnet50, 28_088_024, 4.11e9, _TIMM),
  'efficientnet_b0': _efficientnet(
    efficientnet.efficientnet_b0, 224, 5_288_548, 0.39e9
  ),
  'efficientnet_b1': _efficientnet(
    efficientnet.efficientnet_b1, 240, 7_794_184, 0.70e9
  ),
  'efficientnet_b2': _efficientnet(
    efficientnet.efficientnet_b2, 260, 9_109_994, 1.0e9
  ),
  'efficientnet_b3': _efficientnet(
    efficientnet.efficientnet_b3, 300, 12_233_232, 1.8e9
  ),
  'efficientnet_b4': _efficientnet(
    efficientnet.efficientnet_b4, 380, 19_341_616, 4.2e9
  ),
  'efficientnet_b5': _efficientnet(
    efficientnet.efficientnet_b5, 456, 30_389_784, 9.9e9
  ),
  'efficientnet_b6': _efficientnet(
    efficientnet.efficientnet_b6, 528, 43_040_704, 19e9
  ),
  'efficientnet_b7': _efficientnet(
    efficientnet.efficientnet_b7, 600, 66_347_960, 37e9
  ),
  'efficientnet_b8': _efficientnet(
    efficientnet.efficientnet_b8, 672, 87_413_142, 63.48e9, _TIMM
  ),
}


# Given to every network; those without batch norm, say, have no use for some.
COMMON_FIELDS = (
  'num_routes', 'bn_axis', 'bn_momentum', 'bn_epsilon', 'dtype', 'platform',
)  # fmt: skip


def get(name: str) -> Entry:
  """The registered network called `name`.

  Raises:
    ConfigError: if there is none of that name.
  """
  if name not in MODELS:
    raise unknown('model', name, MODELS)
  return MODELS[name]


def takes(name: str, field: str) -> bool:
  """Whether `create` gives the network called `name` this COMMON_FIELD."""
  return field in inspect.signature(get(name).build).parameters


def create(
  name: str, options: Mapping[str, Any] | None = None, **kwargs: Any
) -> nn.Module:
  """Returns the network called `name`.

  Args:
    name: in MODELS.
    options: by field of the configuration; 'none', False and None leave the
      network as it is.
    **kwargs: `num_classes`, and any of COMMON_FIELDS, of which those are
      ignored that the network lacks.

  Raises:
    ConfigError: for an unknown name, or an option that the network lacks.
  """
  entry = get(name)
  for field in COMMON_FIELDS:
    if not takes(name, field):
      kwargs.pop(field, None)
  for field, value in (options or {}).items():
    if value is None or value is False or value == 'none':
      continue
    if field not in entry.options:
      able = [m for m, e in MODELS.items() if field in e.options]
      raise ConfigError(
        f'{field}={value!r}: model {name!r} has no such option; leave it at '
        f'its default, or use a model that has it: {", ".join(able)}'
      )
    kwargs[field.rsplit('.', 1)[-1]] = value
  return entry.build(**kwargs)


def make_apply_fn(model: nn.Module) -> ApplyFn:
  """`apply_fn` of a Linen module.

  Train mode returns the moved batch statistics; whoever must not move them
  drops them. Evaluation mode returns them as they came. Those of a network
  without any are {}.
  """

  def as_jax(leaf):
    # An array of NumPy has no `at`, and no rows for a traced index.
    return jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf

  def apply_fn(variables, x, routes, train, key=None, examples=None):
    variables = jax.tree.map(as_jax, variables)
    if not train:
      logits = model.apply(variables, x, routes, False)
      return logits, variables.get('batch_stats', {})
    rngs = {} if key is None else {stochastic.STREAM: key}
    logits, updates = model.apply(
      variables, x, routes, True, examples, mutable=['batch_stats'], rngs=rngs
    )
    return logits, updates.get('batch_stats', {})

  return apply_fn
