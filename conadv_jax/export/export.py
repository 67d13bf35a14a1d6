"""Writes the network of a run in a format for other programs."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from absl import flags
from etils import epath

from conadv_jax import experiment, models
from conadv_jax.base import storage
from conadv_jax.base.errors import ConfigError, unknown
from conadv_jax.data import datasets
from conadv_jax.experiment import Run
from conadv_jax.export import model_card, usage
from conadv_jax.export.model_card import Card
from conadv_jax.method.pixels import normalize, wide_dtype
from conadv_jax.method.state import Snapshot
from conadv_jax.models.weights import (
  timm_epsilon,
  to_arrays,
  to_state_dict,
)
from conadv_jax.run import evaluations, workdir
from conadv_jax.run.evaluator import weights_of
from conadv_jax.run.reopen import parse_args, restore_newest

PLATFORMS = ('cpu', 'cuda', 'tpu')


def export(argv: Sequence[str]) -> epath.Path:
  """Runs the command; returns the path of the file that it wrote.

  Raises:
    ConfigError: for a wrong flag, a directory without a checkpoint, or a file
      that cannot be written.
  """
  output, kind, rest = _parse(argv)
  directory, config = parse_args(rest)
  card_path = _prepare(output)
  origin = workdir.read_run(directory)
  # The file must not depend on how many devices are here, nor on the images.
  run = experiment.build(
    config,
    jax.devices()[:1],
    datasets.recorded(config.dataset, origin.get('data', {})),
    trains=False,
  )
  step, state = restore_newest(directory, run)
  weights = jax.device_get(weights_of(config, state))

  rows = evaluations.of_weights(directory, config, step)
  card = model_card.make(run, origin, rows, step, weights)
  card |= {'format': kind, 'file': output.name}
  card['usage'] = FORMATS[kind].example(card)
  with _writing(output):
    output.write_bytes(FORMATS[kind].content(run, weights, card))
    workdir.write_json(card_path, card)
    card_path.with_suffix('.md').write_text(model_card.markdown(card))
  top1 = 'not evaluated' if card['top1'] is None else f'{card["top1"]:.2f} %'
  print(
    f'{config.model}, step {step}, route {config.eval.route}, top-1 {top1}: '
    f'wrote {output}, {card_path.name} and {card_path.stem}.md'
  )
  return output


# ---- Weights ---------------------------------------------------------------


def to_timm(run: Run, weights: Snapshot) -> dict[str, np.ndarray]:
  """Returns the route `eval.route` as the state dict of timm's network.

  timm's batch norm divides by sqrt(var + its own epsilon). Where the run has
  another epsilon, the difference goes into the variance, which leaves the
  function the same.

  Raises:
    ConfigError: if timm has no such network.
  """
  config = run.config
  state_dict = to_state_dict(
    config.model, weights.params, weights.batch_stats, _row(run)
  )
  epsilon = timm_epsilon(config.model)
  if config.bn_epsilon != epsilon:
    for name, value in state_dict.items():
      if name.endswith('.running_var'):
        moved = value.astype(np.float64) + (config.bn_epsilon - epsilon)
        state_dict[name] = moved.astype(value.dtype)
  return state_dict


def _safetensors(run: Run, weights: Snapshot, card: Card) -> bytes:
  # The file's format asks for text.
  metadata = {
    'model': card['model'],
    'num_classes': str(card['dataset']['num_classes']),
    'class_names': json.dumps(card['dataset']['class_names']),
    **{key: json.dumps(value) for key, value in card['input'].items()},
    'license': card['license'],
  }
  if card['timm_name'] is None:
    arrays = to_arrays(weights.params, weights.batch_stats, _row(run))
    metadata['names'] = 'conadv_jax'
  else:
    arrays = to_timm(run, weights)
    # 'pt' tells tools that names and layouts are PyTorch's.
    metadata |= {'format': 'pt', 'architecture': card['timm_name']}
  return safetensors.numpy.save(arrays, metadata)


# ---- Functions -------------------------------------------------------------


def make_predict_fn(
  run: Run, weights: Snapshot
) -> Callable[[jax.Array], jax.Array]:
  """Returns the function uint8 pixels [B, H, W, C] -> logits [B, K].

  It takes the route `eval.route`, normalises the pixels, and computes in the
  `dtype` of the run.
  """
  variables = jax.tree.map(
    jnp.asarray,
    {'params': weights.params, 'batch_stats': weights.batch_stats},
  )
  apply_fn = models.make_apply_fn(_for_any_platform(run.model))

  def predict(images: jax.Array) -> jax.Array:
    x = normalize(run.spec, images.astype(wide_dtype(run.config)))
    logits, _ = apply_fn(variables, x[None, None], (_row(run),), False)
    return logits[0, 0]

  return predict


def _for_any_platform(model: nn.Module) -> nn.Module:
  """`model` without forms of its layers that suit one platform only."""
  fields = {field.name for field in dataclasses.fields(model)}
  return model.clone(platform='') if 'platform' in fields else model


def to_stablehlo(run: Run, weights: Snapshot) -> jax.export.Exported:
  """Exports `make_predict_fn` for any batch size and all of `PLATFORMS`."""
  (batch_size,) = jax.export.symbolic_shape('b')
  images = jax.ShapeDtypeStruct((batch_size, *run.spec.image_shape), jnp.uint8)
  predict = jax.jit(make_predict_fn(run, weights))
  return jax.export.export(predict, platforms=PLATFORMS)(images)


def load_stablehlo(path: str) -> Callable[[Any], jax.Array]:
  """Loads an exported function uint8 [B, H, W, C] -> logits [B, K].

  Raises:
    ConfigError: if there is no such file, or it is of another kind.
  """
  try:
    content = storage.expand(path).read_bytes()
    return jax.export.deserialize(bytearray(content)).call
  except OSError as error:
    raise ConfigError(f'{path!r}: cannot be read: {error}') from error
  except (struct.error, ValueError) as error:
    raise ConfigError(f'{path!r}: not a file of jax.export: {error}') from error


def _stablehlo(run: Run, weights: Snapshot, card: Card) -> bytes:
  return to_stablehlo(run, weights).serialize()


def _row(run: Run) -> int:
  """The row of the batch norms that `eval.route` is."""
  return run.config.routes.index(run.config.eval.route)


class Format(NamedTuple):
  """A format of `--format`.

  Attributes:
    suffix: of the file.
    content: (run, weights, card) -> the file.
    example: card -> Python that loads the file.
  """

  suffix: str
  content: Callable[[Run, Snapshot, Card], bytes]
  example: Callable[[Card], str]


FORMATS = {
  'safetensors': Format('.safetensors', _safetensors, usage.safetensors),
  'stablehlo': Format('.stablehlo', _stablehlo, usage.stablehlo),
}


# ---- The command line ------------------------------------------------------


def _parse(argv: Sequence[str]) -> tuple[epath.Path, str, list[str]]:
  """The output, its format, and the flags that are not of this command."""
  values = flags.FlagValues()
  output = flags.DEFINE_string('output', None, '', flag_values=values)
  kind = flags.DEFINE_string('format', 'safetensors', '', flag_values=values)
  rest = values(argv, known_only=True)
  if not output.value:
    raise ConfigError('missing --output=FILE, the file to write')
  if kind.value not in FORMATS:
    raise unknown('--format', kind.value, FORMATS)
  path = storage.expand(output.value)
  suffixes = {form.suffix: name for name, form in FORMATS.items()}
  given = suffixes.get(path.suffix, kind.value)
  if given != kind.value:
    raise ConfigError(
      f'--output={output.value}: not a file of --format={kind.value}; set '
      f'--format={given}'
    )
  if path.suffix not in suffixes:
    raise ConfigError(
      f'--output={output.value}: with --format={kind.value} the name must end '
      f'in {FORMATS[kind.value].suffix}'
    )
  return path, kind.value, rest


def _prepare(output: epath.Path) -> epath.Path:
  """Makes the directory for `output`; returns the path of the card's JSON.

  Raises:
    ConfigError: if it cannot be made, or the card would replace another file.
  """
  with _writing(output):
    output.parent.mkdir(parents=True, exist_ok=True)
  card_path = output.with_suffix('.json')
  for path in (card_path, output.with_suffix('.md')):
    if path.exists() and not _is_card(card_path):
      raise ConfigError(
        f'--output={output}: its model card would replace {path}; use another '
        'name'
      )
  return card_path


def _is_card(path: epath.Path) -> bool:
  try:
    return json.loads(path.read_text())['card'] == model_card.KIND
  except (OSError, ValueError, KeyError, TypeError):
    return False


@contextlib.contextmanager
def _writing(output: epath.Path):
  try:
    yield
  except OSError as error:
    raise ConfigError(
      f'--output={output}: cannot be written: {error}'
    ) from error
