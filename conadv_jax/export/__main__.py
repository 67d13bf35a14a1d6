"""The network of a run as a file for other programs, with a model card.

  python -m conadv_jax.export --workdir=DIR --output=FILE.safetensors
                              [--format=safetensors|stablehlo|saved_model]
                              [--config.eval.FIELD=VALUE ...]

Takes the newest checkpoint: the batch-norm row `eval.route`, and the averaged
weights if `eval.use_ema`. Writes beside it FILE.json and FILE.md, which say
what it is, how good it was measured to be, and how it is loaded.

  safetensors   weights that timm.create_model loads; for networks of timm
  stablehlo     FILE.stablehlo, a function of uint8 images for jax.export
  saved_model   a directory with the same function for TensorFlow
"""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from etils import epath

from conadv_jax import cli, experiment, models
from conadv_jax.base.errors import ConfigError, unknown
from conadv_jax.experiment import Run
from conadv_jax.export import model_card
from conadv_jax.export.model_card import Card
from conadv_jax.method.pixels import normalize, wide_dtype
from conadv_jax.method.state import Snapshot
from conadv_jax.models import weights as weights_lib
from conadv_jax.run import workdir
from conadv_jax.run.evaluator import weights_of
from conadv_jax.run.reopen import parse_args, restore_newest

PLATFORMS = ('cpu', 'cuda', 'tpu')
SUFFIXES = {
  'safetensors': '.safetensors',
  'stablehlo': '.stablehlo',
  'saved_model': '',
}

# Added to the variance by timm's batch norms.
_TIMM_EPSILON = {'efficientnet': 1e-3}
_TIMM_EPSILON_OF_OTHERS = 1e-5


def export(argv: Sequence[str]) -> epath.Path:
  """The command: returns the path that it wrote."""
  output, kind, rest = _parse(argv)
  directory, config = parse_args(rest)
  if kind == 'safetensors':
    _check_timm_has(config.model)
  card_path = _prepare(output, kind)
  # The file does not depend on the devices that happen to be here.
  run = experiment.build(config, jax.devices()[:1], platform='')
  step, state = restore_newest(directory, run)
  weights = jax.device_get(weights_of(config, state))

  card = model_card.make(run, directory, step, weights)
  card |= {'format': kind, 'file': output.name}
  card['usage'] = USAGES[kind](card)
  with _writing(output):
    WRITERS[kind](output, run, weights, card)
    workdir.write_json(card_path, card)
    card_path.with_suffix('.md').write_text(model_card.markdown(card))
  top1 = 'not evaluated' if card['top1'] is None else f'{card["top1"]:.2f} %'
  print(
    f'{config.model} of step {step}, route {config.eval.route}, top-1 '
    f'{top1}: wrote {output} with {card_path.name} and {card_path.stem}.md'
  )
  return output


# ---- Files -----------------------------------------------------------------


def to_timm(run: Run, weights: Snapshot) -> dict[str, np.ndarray]:
  """The route `eval.route` as the state dict of timm's network.

  timm's batch norm divides by sqrt(var + its own epsilon). Where the run has
  another epsilon, their difference goes into the variance, so that the function
  is the same.

  Raises:
    ConfigError: if timm has no such network.
  """
  config = run.config
  state_dict = weights_lib.to_state_dict(
    config.model,
    weights.params,
    weights.batch_stats,
    config.routes.index(config.eval.route),
  )
  family = config.model.partition('_')[0]
  epsilon = _TIMM_EPSILON.get(family, _TIMM_EPSILON_OF_OTHERS)
  if config.bn_epsilon != epsilon:
    for name, value in state_dict.items():
      if name.endswith('.running_var'):
        moved = value.astype(np.float64) + (config.bn_epsilon - epsilon)
        state_dict[name] = moved.astype(value.dtype)
  return state_dict


def timm_name(model: str) -> str:
  """timm's name of our `model`."""
  return f'tf_{model}' if model.startswith('efficientnet') else model


def make_predict_fn(
  run: Run, weights: Snapshot
) -> Callable[[jax.Array], jax.Array]:
  """uint8 pixels [B, H, W, C] -> logits [B, K], on the route `eval.route`.

  Normalises, and computes in the `dtype` that the run was evaluated in.
  """
  row = (run.config.routes.index(run.config.eval.route),)
  variables = jax.tree.map(
    jnp.asarray,
    {'params': weights.params, 'batch_stats': weights.batch_stats},
  )

  def predict(images):
    x = normalize(run.spec, images.astype(wide_dtype(run.config)))
    return run.apply_fn(variables, x[None, None], row, False)[0][0, 0]

  return predict


def to_stablehlo(run: Run, weights: Snapshot) -> jax.export.Exported:
  """`make_predict_fn` for any batch size, with the weights, on `PLATFORMS`."""
  (batch_size,) = jax.export.symbolic_shape('b')
  images = jax.ShapeDtypeStruct((batch_size, *run.spec.image_shape), jnp.uint8)
  predict = jax.jit(make_predict_fn(run, weights))
  return jax.export.export(predict, platforms=PLATFORMS)(images)


def load_stablehlo(path: str) -> Callable[[Any], jax.Array]:
  """The function uint8 [B, H, W, C] -> logits [B, K] of an exported file.

  Raises:
    ConfigError: if there is no such file, or it is of another kind.
  """
  try:
    content = epath.Path(path).read_bytes()
    return jax.export.deserialize(bytearray(content)).call
  except OSError as error:
    raise ConfigError(f'{path!r}: cannot be read: {error}') from error
  except (struct.error, ValueError) as error:
    raise ConfigError(f'{path!r}: not of jax.export: {error}') from error


def save_tf(output: str, run: Run, weights: Snapshot) -> None:
  """Writes `make_predict_fn` as a tf.SavedModel: `predict`, and its signature.

  The program is the same StableHLO, which TensorFlow hands to XLA.
  """
  # The only function outside of conadv_jax.data that makes something of
  # TensorFlow's, which is loaded here and not before.
  import tensorflow as tf
  from jax.experimental import jax2tf

  from conadv_jax.data import datasets

  datasets.hide_gpus()
  predict = jax2tf.convert(
    make_predict_fn(run, weights),
    polymorphic_shapes=['(b, ...)'],
    with_gradient=False,
    native_serialization_platforms=PLATFORMS,
  )
  images = tf.TensorSpec([None, *run.spec.image_shape], tf.uint8, 'images')
  module = tf.Module()
  module.predict = tf.function(predict, [images], autograph=False)
  tf.saved_model.save(module, output, signatures=module.predict)


def _write_safetensors(
  output: epath.Path, run: Run, weights: Snapshot, card: Card
) -> None:
  arrays = to_timm(run, weights)
  # All of it text, as the file's format asks for.
  metadata = {
    'format': 'pt',  # by which tools know PyTorch's names and layouts
    'model': card['model'],
    'architecture': timm_name(card['model']),
    'num_classes': str(card['dataset']['num_classes']),
    **{key: json.dumps(value) for key, value in card['input'].items()},
    'license': card['license'],
  }
  weights_lib.save(str(output), arrays, metadata)


def _write_stablehlo(
  output: epath.Path, run: Run, weights: Snapshot, card: Card
) -> None:
  output.write_bytes(to_stablehlo(run, weights).serialize())


def _write_saved_model(
  output: epath.Path, run: Run, weights: Snapshot, card: Card
) -> None:
  save_tf(str(output), run, weights)


WRITERS = {
  'safetensors': _write_safetensors,
  'stablehlo': _write_stablehlo,
  'saved_model': _write_saved_model,
}


# ---- How each is loaded, for the model card --------------------------------


def _timm_usage(card: Mapping[str, Any]) -> str:
  spec = card['input']
  channels = spec['input_size'][0]
  channels_arg = '' if channels == 3 else f'\n  in_chans={channels},'
  mode = 'RGB' if channels == 3 else 'L'
  return f"""\
import timm
from PIL import Image

model = timm.create_model(
  {timm_name(card['model'])!r},
  num_classes={card['dataset']['num_classes']},{channels_arg}
  checkpoint_path={card['file']!r},
).eval()
transform = timm.data.create_transform(
  input_size={tuple(spec['input_size'])},
  mean={tuple(spec['mean'])},
  std={tuple(spec['std'])},
  interpolation={spec['interpolation']!r},
  crop_pct={spec['crop_pct']!r},
)
image = Image.open('image.jpg').convert({mode!r})
logits = model(transform(image)[None])"""


def _stablehlo_usage(card: Mapping[str, Any]) -> str:
  return f"""\
import jax
import numpy as np

with open({card['file']!r}, 'rb') as file:
  predict = jax.export.deserialize(bytearray(file.read())).call
images = np.zeros({_batch_shape(card)}, np.uint8)  # any number of them
logits = predict(images)"""


def _saved_model_usage(card: Mapping[str, Any]) -> str:
  return f"""\
import tensorflow as tf

model = tf.saved_model.load({card['file']!r})
images = tf.zeros({_batch_shape(card)}, tf.uint8)  # any number of them
logits = model.predict(images)"""


def _batch_shape(card: Mapping[str, Any]) -> tuple[int, ...]:
  channels, height, width = card['input']['input_size']
  return (2, height, width, channels)


USAGES = {
  'safetensors': _timm_usage,
  'stablehlo': _stablehlo_usage,
  'saved_model': _saved_model_usage,
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
  if kind.value not in SUFFIXES:
    raise unknown('--format', kind.value, SUFFIXES)
  path = epath.Path(output.value)
  suffix = SUFFIXES[kind.value]
  given = {s: k for k, s in SUFFIXES.items() if s}.get(path.suffix)
  if given is not None and given != kind.value:
    raise ConfigError(
      f'--output={output.value}: is not for --format={kind.value}; set '
      f'--format={given}'
    )
  if suffix and path.suffix != suffix:
    raise ConfigError(
      f'--output={output.value}: a file of --format={kind.value} must end in '
      f'{suffix}'
    )
  return path, kind.value, rest


def _check_timm_has(model: str) -> None:
  if models.get(model).timm_module is None:
    able = [name for name, entry in models.MODELS.items() if entry.timm_module]
    raise ConfigError(
      f'--format=safetensors: timm has no network {model!r}; set '
      f'--format=stablehlo, which writes any, or train one of timm: '
      f'{", ".join(able)}'
    )


def _prepare(output: epath.Path, kind: str) -> epath.Path:
  """Makes the directory for `output`; returns the path of the card's JSON.

  Raises:
    ConfigError: if it cannot be made, or the card would replace another file.
  """
  with _writing(output):
    (output if kind == 'saved_model' else output.parent).mkdir(
      parents=True, exist_ok=True
    )
  name = output.name.removesuffix(SUFFIXES[kind])
  card_path = output.parent / f'{name}.json'
  for path in (card_path, card_path.with_suffix('.md')):
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


if __name__ == '__main__':
  cli.run(export, __doc__)
