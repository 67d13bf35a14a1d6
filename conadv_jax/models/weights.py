"""Weights of one route with the names and layouts of timm, as safetensors.

kernel of a convolution  [H, W, I, O] -> weight [O, I, H, W]
kernel of a dense layer  [I, O]       -> weight [O, I]
scale, bias, mean, var   row [C] of the route
                         -> weight, bias, running_mean, running_var
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util

from conadv_jax import models
from conadv_jax.base import storage
from conadv_jax.base.errors import ConfigError
from conadv_jax.models.norm import norms_of

StateDict = dict[str, np.ndarray]

_LEAVES = {
  'kernel': 'weight',
  'scale': 'weight',
  'bias': 'bias',
  'mean': 'running_mean',
  'var': 'running_var',
}
# PyTorch's batch norm counts its batches, and reads the count only if it is
# asked for a plain average of them, which timm does not.
_COUNT = 'num_batches_tracked'
# Of a safetensors file; its own reader for NumPy has no BF16.
_DTYPES = {
  'F64': np.float64, 'F32': np.float32, 'F16': np.float16,
  'BF16': jnp.bfloat16, 'C64': np.complex64, 'BOOL': np.bool_,
  'I64': np.int64, 'I32': np.int32, 'I16': np.int16, 'I8': np.int8,
  'U64': np.uint64, 'U32': np.uint32, 'U16': np.uint16, 'U8': np.uint8,
}  # fmt: skip
_MAX_NAMES = 5  # listed of each kind of error

# Added to the variance by timm's batch norms.
_TIMM_EPSILON = {'efficientnet': 1e-3}
_TIMM_EPSILON_OF_OTHERS = 1e-5


def timm_epsilon(name: str) -> float:
  """What the batch norms of timm's network add to the variance.

  Args:
    name: in models.MODELS.
  """
  return _TIMM_EPSILON.get(name.partition('_')[0], _TIMM_EPSILON_OF_OTHERS)


def to_state_dict(
  name: str, params: Any, batch_stats: Any, route: int
) -> StateDict:
  """The network that `route` is, for timm's model called `name`.

  Counts of batches are 0.

  Args:
    name: in models.MODELS.
    params: parameters, or gradients of them.
    batch_stats: batch statistics.
    route: row of the batch norms.

  Raises:
    ConfigError: if timm has no network of that name.
  """
  variables = {'params': params, 'batch_stats': batch_stats}
  state_dict = {}
  for leaf in _leaves(name, variables):
    value = np.asarray(leaf.value)
    value = value[route] if leaf.in_norm else _to_timm(value)
    state_dict[leaf.name] = np.ascontiguousarray(value)
  counts = _counts(state_dict)
  return state_dict | dict.fromkeys(counts, np.zeros((), np.int64))


def from_state_dict(
  state_dict: Mapping[str, np.ndarray],
  name: str,
  variables: Any,
  routes: str | Sequence[int] = 'all',
) -> Any:
  """Variables of our network with the weights of timm's.

  Args:
    state_dict: by timm's name. Counts of batches are not read.
    name: in models.MODELS.
    variables: `params` and `batch_stats`, which give shapes and types, and the
      values of the rows that are not in `routes`.
    routes: rows of the batch norms to set. With 'all' the leaves of `variables`
      may be abstract.

  Returns:
    NumPy arrays, in the structure of `variables`.

  Raises:
    ConfigError: if timm has no network of that name, or for names that are
      missing, unexpected, or of an array of another shape.
  """
  leaves = list(_leaves(name, variables))
  _check_names(
    state_dict, name, {leaf.name: leaf.timm_shape for leaf in leaves}
  )
  flat = {}
  for leaf in leaves:
    value = np.asarray(state_dict[leaf.name])
    if not leaf.in_norm:
      rows = _from_timm(value)
    elif routes == 'all':
      rows = np.broadcast_to(value, leaf.value.shape)
    else:
      rows = np.array(leaf.value)
      rows[list(routes)] = value
    flat[leaf.path] = rows.astype(leaf.value.dtype)
  return traverse_util.unflatten_dict(flat)


def to_arrays(params: Any, batch_stats: Any, route: int) -> StateDict:
  """The variables with one row in their batch norms, by path.

  Args:
    params: of the network.
    batch_stats: of the network.
    route: row of the batch norms to take.

  Returns:
    Arrays by path, 'params/head/kernel' say: the variables of the network with
    `num_routes=1`.
  """
  flat = traverse_util.flatten_dict(
    {'params': params, 'batch_stats': batch_stats}
  )
  norms = norms_of(batch_stats)
  return {
    '/'.join(path): np.asarray(
      leaf[route : route + 1] if path[1:-1] in norms else leaf
    )
    for path, leaf in flat.items()
  }


def from_arrays(
  arrays: Mapping[str, np.ndarray], name: str, variables: Any
) -> Any:
  """Variables with arrays under our own names, as `export` writes them.

  Args:
    arrays: by path, 'params/head/kernel' say; those of a batch norm have one
      row, which every route gets.
    name: of the network, for the error text.
    variables: `params` and `batch_stats`, which give shapes and types; leaves
      may be abstract.

  Returns:
    NumPy arrays, in the structure of `variables`.

  Raises:
    ConfigError: as `from_state_dict`.
  """
  flat = traverse_util.flatten_dict(dict(variables))
  norms = norms_of(variables.get('batch_stats', {}))
  shapes = {
    '/'.join(path): (1, *x.shape[1:]) if path[1:-1] in norms else x.shape
    for path, x in flat.items()
  }
  _check_names(arrays, name, shapes)
  return traverse_util.unflatten_dict(
    {
      path: np.broadcast_to(arrays['/'.join(path)], x.shape).astype(x.dtype)
      for path, x in flat.items()
    }
  )


def is_ours(arrays: Mapping[str, Any]) -> bool:
  """Whether `arrays` are under our own names, not under timm's."""
  return any(name.startswith('params/') for name in arrays)


def with_head(
  arrays: Mapping[str, np.ndarray], name: str, variables: Any
) -> StateDict:
  """`arrays`, with a new last layer if theirs is for other classes.

  Args:
    arrays: under our own names or timm's.
    name: in models.MODELS.
    variables: `params` and `batch_stats`, of arrays: the new layer is theirs.
  """
  head = {'params': {'head': variables['params']['head']}}
  if is_ours(arrays):
    flat = traverse_util.flatten_dict(head, sep='/')
    new = {path: np.asarray(value) for path, value in flat.items()}
  else:
    new = {
      leaf.name: _to_timm(np.asarray(leaf.value))
      for leaf in _leaves(name, head)
    }
  same = all(arrays[n].shape == x.shape for n, x in new.items() if n in arrays)
  return dict(arrays) if same else {**arrays, **new}


def load(path: str) -> StateDict:
  """The arrays of a safetensors file, local or in a bucket.

  Raises:
    ConfigError: if there is no such file, it is of another kind, or an array
      has a type that NumPy lacks.
  """
  try:
    arrays = safetensors.deserialize(storage.expand(path).read_bytes())
  except OSError as error:
    raise ConfigError(f'weights {path!r}: cannot be read: {error}') from error
  except safetensors.SafetensorError as error:
    raise ConfigError(
      f'weights {path!r}: not a safetensors file: {error}'
    ) from error
  for name, array in arrays:
    if array['dtype'] not in _DTYPES:
      raise ConfigError(
        f'weights {path!r}: {name} is of type {array["dtype"]}; save it as one '
        f'of {", ".join(_DTYPES)}'
      )
  return {
    name: np.frombuffer(x['data'], _DTYPES[x['dtype']]).reshape(x['shape'])
    for name, x in arrays
  }


def save(
  path: str,
  state_dict: Mapping[str, np.ndarray],
  metadata: Mapping[str, str] | None = None,
) -> None:
  """Writes a safetensors file, which timm and PyTorch load as it is."""
  content = safetensors.numpy.save(dict(state_dict), dict(metadata or {}))
  storage.expand(path).write_bytes(content)


class _Leaf(NamedTuple):
  path: tuple[str, ...]  # in the variables
  name: str  # in timm
  in_norm: bool  # has a row for each route
  value: Any  # array, or its shape and type

  @property
  def timm_shape(self) -> tuple[int, ...]:
    if self.in_norm:
      return self.value.shape[1:]
    return _to_timm(np.broadcast_to(0, self.value.shape)).shape


def _leaves(name: str, variables: Any) -> Iterator[_Leaf]:
  timm_module = _timm_module(name)
  flat = traverse_util.flatten_dict(dict(variables))
  norms = {path[1:-1] for path in flat if path[-1] == 'scale'}
  for path, value in flat.items():
    module = path[1:-1]
    name = f'{timm_module("/".join(module))}.{_LEAVES[path[-1]]}'
    yield _Leaf(path, name, module in norms, value)


def _timm_module(name: str) -> Callable[[str], str]:
  function = models.get(name).timm_module
  if function is None:
    able = [m for m, entry in models.MODELS.items() if entry.timm_module]
    raise ConfigError(
      f'model={name!r}: timm has no such network to exchange weights with; '
      f'those that it has: {", ".join(able)}'
    )
  return function


def _to_timm(kernel: np.ndarray) -> np.ndarray:
  if kernel.ndim == 4:
    return kernel.transpose(3, 2, 0, 1)
  return kernel.T  # of a bias, itself


def _from_timm(weight: np.ndarray) -> np.ndarray:
  if weight.ndim == 4:
    return weight.transpose(2, 3, 1, 0)
  return weight.T


def _counts(names: Mapping[str, Any]) -> set[str]:
  end = '.running_mean'
  return {n.removesuffix(end) + '.' + _COUNT for n in names if n.endswith(end)}


def _check_names(
  arrays: Mapping[str, np.ndarray],
  name: str,
  expected: Mapping[str, tuple[int, ...]],
) -> None:
  """Compares names and shapes; counts of batches may be there."""
  wrong = [
    f'{key} {tuple(arrays[key].shape)}, not {shape}'
    for key, shape in expected.items()
    if key in arrays and tuple(arrays[key].shape) != shape
  ]
  problems = {
    'missing': [key for key in expected if key not in arrays],
    'unexpected': sorted(arrays.keys() - expected.keys() - _counts(expected)),
    'of another shape': wrong,
  }
  lines = []
  for kind, names in problems.items():
    if names:
      more = len(names) - _MAX_NAMES
      rest = f' and {more} more' if more > 0 else ''
      lines.append(f'  {kind}: {"; ".join(names[:_MAX_NAMES])}{rest}')
  if lines:
    raise ConfigError(
      f'the weights are not those of model {name!r}:\n' + '\n'.join(lines)
    )
