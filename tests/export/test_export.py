"""Exported files hold the network that was evaluated, and say what it is."""

import functools
import json
import pathlib
import sys
import types
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
import safetensors
from PIL import Image

from conadv_jax import cli, evaluate, experiment, models, train
from conadv_jax.base.errors import ConfigError
from conadv_jax.checkpoints.checkpoint import Checkpoints
from conadv_jax.config import Dataset, from_config_dict
from conadv_jax.data import datasets
from conadv_jax.data.images import decode
from conadv_jax.export import export, model_card, usage
from conadv_jax.method.state import Snapshot
from conadv_jax.models import efficientnet, resnet, weights
from conadv_jax.run import workdir
from configs import digits, imagenet_efficientnet, imagenet_resnet50

STEPS = 3


@pytest.fixture(scope='module')
def directory(tmp_path_factory):
  """A run of three steps on digits: a thin beginning of a ResNet-18, `thin`."""
  path = tmp_path_factory.mktemp('run')
  thin = functools.partial(resnet.resnet18, width=4, blocks=(1, 1))
  entry = models.Entry(thin, 8, timm_module=resnet.timm_module)
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(models.MODELS, 'thin', entry)
    values = digits.get_config('batch_size=64')
    values.update_from_flattened_dict(
      {
        'model': 'thin',
        'bn_group_size': 8,
        'max_steps': STEPS,
        'attack_stats_every_steps': 0,
        'optimizer.learning_rate': 40.0,
        'schedule.warmup_epochs': 0.0,
        'ema.decay': 0.5,
        'eval.attack': 'fgsm',
        'plots': False,
      }
    )
    train.train(from_config_dict(values), str(path))
    yield path


def run_export(directory, output, *flags):
  argv = ['prog', f'--workdir={directory}', f'--output={output}', *flags]
  return export.export(argv)


def saved_state(directory):
  values = workdir.read_config(str(directory))
  run = experiment.build(from_config_dict(values))
  checkpoints = Checkpoints(directory, read_only=True)
  return run, checkpoints.restore(run.abstract_state(), STEPS)[1]


def logits_of(directory, images, row=0):
  """The network in evaluation mode, on images normalised by NumPy."""
  run, state = saved_state(directory)
  x = (images.astype(np.float32) - 77.8) / 95.9
  variables = jax.tree.map(
    np.asarray, {'params': state.params, 'batch_stats': state.batch_stats}
  )
  apply_fn = jax.jit(run.apply_fn, static_argnums=(2, 3))
  return np.asarray(apply_fn(variables, x[None, None], (row,), False)[0][0, 0])


def eval_split():
  config = from_config_dict(digits.get_config()).dataset
  source = datasets.get_spec('digits').open('eval', config)
  return source.images, source.labels


# ---- Weights for timm -------------------------------------------------------


@pytest.mark.parametrize(
  'flags, name, row',
  [
    ((), 'params', 0),
    (('--config.eval.route=adv',), 'params', 1),
    (('--config.eval.use_ema=true',), 'ema', 0),
  ],
)
@pytest.mark.slow
def test_the_file_holds_the_chosen_weights(
  flags, name, row, directory, tmp_path
):
  output = run_export(directory, tmp_path / 'm.safetensors', *flags)
  _, state = saved_state(directory)
  chosen = state.ema if name == 'ema' else state
  expected = weights.to_state_dict(
    'thin', chosen.params, chosen.batch_stats, row
  )
  actual = weights.load(str(output))
  assert actual.keys() == expected.keys()
  for key, value in expected.items():
    np.testing.assert_array_equal(actual[key], value, key)
  card = json.loads((tmp_path / 'm.json').read_text())
  assert card['use_ema'] == (name == 'ema')
  assert card['route'] == ('clean', 'adv')[row]


@pytest.mark.slow
def test_the_metadata_are_those_that_timm_knows(directory, tmp_path):
  output = run_export(directory, tmp_path / 'm.safetensors')
  with safetensors.safe_open(str(output), 'numpy') as file:
    metadata = file.metadata()
  assert metadata['format'] == 'pt'
  assert (metadata['architecture'], metadata['num_classes']) == (
    'thin', '10',
  )  # fmt: skip
  assert json.loads(metadata['input_size']) == [1, 8, 8]
  np.testing.assert_allclose(json.loads(metadata['mean']), [77.8 / 255])
  np.testing.assert_allclose(json.loads(metadata['std']), [95.9 / 255])
  assert json.loads(metadata['crop_pct']) == 1.0


@pytest.mark.parametrize(
  'model, epsilon, theirs',
  [
    ('resnet18', 1e-5, 1e-5),
    ('resnet18', 1e-3, 1e-5),
    pytest.param('efficientnet_b0', 1e-3, 1e-3, marks=pytest.mark.slow),
    pytest.param('efficientnet_b0', 1e-5, 1e-3, marks=pytest.mark.slow),
  ],
)
def test_another_epsilon_goes_into_the_variance(model, epsilon, theirs):
  file = {'r': imagenet_resnet50, 'e': imagenet_efficientnet}[model[0]]
  values = file.get_config(f'model={model},method=baseline,batch_size=8')
  values.bn_epsilon = epsilon
  cfg = from_config_dict(values)
  run = experiment.build(cfg, jax.devices()[:1])
  state = run.abstract_state()
  rng = np.random.default_rng(0)

  def draw(leaf):
    return rng.uniform(0.01, 2.0, leaf.shape).astype(leaf.dtype)

  ours = jax.tree.map(draw, Snapshot(state.params, state.batch_stats))
  before = weights.to_state_dict(model, ours.params, ours.batch_stats, 0)
  after = export.to_timm(run, ours)
  changed = {k for k in before if np.any(before[k] != after[k])}
  variances = {k for k in before if k.endswith('.running_var')}
  assert changed == (variances if epsilon != theirs else set())
  for key in variances:
    np.testing.assert_allclose(
      after[key] + theirs, before[key] + epsilon, rtol=1e-6
    )


# ---- Weights under our own names --------------------------------------------


class Flat(nn.Module):
  """A network without batch norm; its layer norm has no rows for routes."""

  num_classes: int
  num_routes: int = 1
  bn_axis: str | None = None
  bn_momentum: float = 0.9
  bn_epsilon: float = 1e-5
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, routes, train, examples=None):
    y = nn.LayerNorm(name='norm')(x.reshape(*x.shape[:3], -1))
    return nn.Dense(self.num_classes, name='head')(y)


@pytest.mark.parametrize('method', ['baseline', 'conadv'])
@pytest.mark.parametrize('model', ['resnet8', 'flat'])
def test_a_network_that_timm_lacks_keeps_our_names(
  model, method, tmp_path, monkeypatch
):
  """The code of the card rebuilds it; with conadv, from the row `adv`."""
  monkeypatch.setitem(models.MODELS, 'flat', models.Entry(Flat, 8))
  values = digits.get_config(f'method={method}')
  values.update(model=model, bn_epsilon=1e-3)
  values.eval.route = 'clean' if method == 'baseline' else 'adv'
  run = experiment.build(from_config_dict(values), jax.devices()[:1])
  state = run.abstract_state()
  rng = np.random.default_rng(0)

  def draw(leaf):  # variances must be positive
    return rng.uniform(0.1, 1.0, leaf.shape).astype(leaf.dtype)

  chosen = jax.tree.map(draw, Snapshot(state.params, state.batch_stats))
  card = {
    'model': model,
    'timm_name': model_card.timm_name(model),
    'dataset': {'num_classes': 10, 'class_names': []},
    'input': model_card.input_of(run.config, run.spec),
    'config': {'bn_epsilon': 1e-3},
    'file': 'm.safetensors',
    'license': '',
  }
  monkeypatch.chdir(tmp_path)
  content = export.FORMATS['safetensors'].content(run, chosen, card)
  pathlib.Path('m.safetensors').write_bytes(content)
  images = rng.integers(0, 256, (2, 8, 8, 1), np.uint8)
  code = usage.safetensors(card).replace('np.zeros(', 'given(')
  scope = {'given': lambda shape, dtype: images}
  exec(code, scope)
  expected = jax.jit(export.make_predict_fn(run, chosen))(images)
  assert networks.relative_error(scope['logits'], expected) < 1e-5
  path = tmp_path / 'm.stablehlo'
  path.write_bytes(export.to_stablehlo(run, chosen).serialize())
  again = export.load_stablehlo(str(path))(images)
  assert networks.relative_error(again, expected) < 1e-5
  assert model_card.count_parameters(chosen) == sum(
    array.size
    for name, array in scope['arrays'].items()
    if name.startswith('params/')
  )


# ---- Functions --------------------------------------------------------------


def test_the_function_has_the_logits_and_accuracy_of_the_run(
  directory, tmp_path, monkeypatch
):
  """On all 360 images, and on the sizes of batches that the card runs."""
  run_export(directory, tmp_path / 'm.stablehlo', '--format=stablehlo')
  card = json.loads((tmp_path / 'm.json').read_text())
  monkeypatch.chdir(tmp_path)
  scope = {}
  exec(card['usage'], scope)
  assert scope['logits'].shape == (2, 10)
  predict = export.load_stablehlo('m.stablehlo')
  images, labels = eval_split()
  logits = np.asarray(predict(images))
  expected = logits_of(directory, images)
  np.testing.assert_allclose(
    logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max()
  )
  found = json.loads((directory / 'summary.json').read_text())
  top1 = 100 * (logits.argmax(-1) == labels).mean()
  np.testing.assert_allclose(top1, found['top1'], rtol=1e-6)
  assert card['top1'] == found['top1']


def test_a_route_has_a_function_of_its_own(directory, tmp_path):
  flags = ('--format=stablehlo', '--config.eval.route=adv')
  output = run_export(directory, tmp_path / 'm.stablehlo', *flags)
  images, _ = eval_split()
  logits = export.load_stablehlo(str(output))(images[:7])
  expected = logits_of(directory, images[:7], row=1)
  np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
  assert not np.allclose(logits, logits_of(directory, images[:7]), rtol=1e-3)


@pytest.mark.parametrize(
  'dtype', ['float32', pytest.param('bfloat16', marks=pytest.mark.slow)]
)
def test_depthwise_convolutions_are_exported_for_any_batch(
  dtype, tmp_path, monkeypatch
):
  """They have code of their own on a CPU, where sizes are known."""
  thin = functools.partial(
    efficientnet.efficientnet_b0,
    width_factor=0.25,
    stages=efficientnet.STAGES[:2],
  )
  entry = models.Entry(thin, 32)
  monkeypatch.setitem(models.MODELS, 'efficientnet_b0', entry)
  values = imagenet_efficientnet.get_config('model=efficientnet_b0')
  values.dtype = dtype
  run = experiment.build(from_config_dict(values), jax.devices()[:1])
  variables = networks.random_variables(run.model)
  chosen = Snapshot(variables['params'], variables['batch_stats'])
  path = tmp_path / 'm.stablehlo'
  path.write_bytes(export.to_stablehlo(run, chosen).serialize())
  predict = export.load_stablehlo(str(path))
  images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)
  expected = jax.jit(export.make_predict_fn(run, chosen))(images)
  tolerance = {'float32': 1e-5, 'bfloat16': 0.03}[dtype]  # bfloat16: 2**-8
  for count in (1, 5):
    logits = predict(images[:count])
    assert networks.relative_error(logits, expected[:count]) < tolerance


def test_stablehlo_is_for_all_platforms(directory, tmp_path):
  output = run_export(directory, tmp_path / 'm.stablehlo', '--format=stablehlo')
  exported = jax.export.deserialize(bytearray(output.read_bytes()))
  assert exported.platforms == ('cpu', 'cuda', 'tpu')
  (images,) = exported.in_avals
  assert (images.dtype, str(images.shape)) == (np.uint8, '(b, 8, 8, 1)')


@pytest.mark.parametrize('content', [None, b'', b'not one'])
def test_a_file_that_is_no_function_is_refused(content, tmp_path):
  path = tmp_path / 'm.stablehlo'
  if content is not None:
    path.write_bytes(content)
  with pytest.raises(ConfigError, match='m.stablehlo'):
    export.load_stablehlo(str(path))


# ---- The model card ---------------------------------------------------------


def test_the_card_says_what_the_network_is(directory, tmp_path):
  run_export(directory, tmp_path / 'm.safetensors')
  card = json.loads((tmp_path / 'm.json').read_text())
  found = json.loads((directory / 'summary.json').read_text())
  origin = json.loads((directory / 'config.json').read_text())
  assert (card['model'], card['method'], card['step']) == (
    'thin', 'conadv', STEPS,
  )  # fmt: skip
  names = ('attack', 'epsilon', 'attack_steps', 'top1')
  assert [tuple(row[n] for n in names) for row in card['evaluations']] == [
    ('none', 0.0, 0, found['top1']),
    ('fgsm', 16.0, 1, found['robust_top1']),
  ]
  for name in ('git_commit', 'versions', 'devices'):
    assert card[name] == origin[name]
  assert card['config']['optimizer'] == origin['config']['optimizer']
  assert 'data_dir' not in card['config']['dataset']
  page = (tmp_path / 'm.md').read_text()
  for text in (
    '# thin, conadv, digits',
    f'| digits, test: 360 | fgsm | 16 | 1 | {found["robust_top1"]:.2f} |',
    f'| digits, test: 360 | none |  |  | {found["top1"]:.2f} |',
    'conadv (staleness 1)',
    'Apache-2.0',
    'arxiv.org/abs/2106.00221',
    card['usage'],
    f'{card["parameters"]:,}',
  ):
    assert text in page
  assert 'not evaluated' not in page
  assert 'perturbed weights' not in page
  card['method'] = 'consam'
  row = (
    '| perturbed weights | along gradient: rho 0.05, normalize global, mask '
  )
  assert f'{row}all, groups of {card["config"]["batch_size"]} |' in (
    model_card.markdown(card)
  )


def test_numbers_of_other_weights_are_left_out(directory, tmp_path):
  """The run was evaluated on the route clean, without the average."""
  for flag in ('--config.eval.use_ema=true', '--config.eval.route=adv'):
    run_export(directory, tmp_path / 'm.safetensors', flag)
    card = json.loads((tmp_path / 'm.json').read_text())
    assert card['top1'] is None and card['evaluations'] == []
    page = (tmp_path / 'm.md').read_text()
    assert '| none |  |  | not evaluated |' in page
    assert '| any |  |  | not evaluated |' in page


@pytest.mark.slow
@pytest.mark.usefixtures('directory')
def test_a_run_is_exported_whatever_parts_its_batches_had(tmp_path):
  values = digits.get_config('batch_size=64,method=consam')
  values.update_from_flattened_dict(
    {
      'model': 'thin',
      'bn_group_size': 8,
      'max_steps': 1,
      'sam.group_size': 8,
      'noise_scale': True,
      'eval.attack': 'none',
      'plots': False,
    }
  )
  train.train(from_config_dict(values), str(tmp_path / 'run'))
  run_export(tmp_path / 'run', tmp_path / 'm.safetensors')
  rows = evaluate.evaluate(
    ['prog', f'--workdir={tmp_path / "run"}', '--config.eval.attack=fgsm']
  )
  assert len(rows) == 2
  assert (tmp_path / 'm.safetensors').exists()


def test_a_later_evaluation_is_in_the_card(directory, tmp_path):
  before = (directory / 'summary.json').read_text()
  try:
    rows = evaluate.evaluate(
      ['prog', f'--workdir={directory}', '--config.eval.route=adv',
       '--config.eval.attack=pgd', '--config.eval.attack_steps=2',
       '--config.eval.norm=l2', '--config.eval.restarts=3']
    )  # fmt: skip
    output = tmp_path / 'm.safetensors'
    run_export(directory, output, '--config.eval.route=adv')
  finally:
    (directory / 'summary.json').write_text(before)
  card = json.loads((tmp_path / 'm.json').read_text())
  assert card['top1'] == rows[0]['top1']
  row = dict(rows[1], data=dict(rows[1]['data']))
  del row['data']['data_dir']
  assert card['evaluations'][1] == row
  assert (row['epsilon'], row['attack_steps']) == (16.0, 2)
  ball = f'| pgd | 16 in L2 | 2, 3 restarts | {row["top1"]:.2f} |'
  assert ball in (tmp_path / 'm.md').read_text()


@pytest.mark.parametrize('size', [(50, 41), (33, 120)])
@pytest.mark.parametrize('interpolation', ['bicubic', 'bilinear'])
@pytest.mark.parametrize('antialias', [True, False])
def test_the_card_crops_as_the_run_does(antialias, interpolation, size):
  """With antialiasing as Pillow, of which ours is up to a grey level off."""
  settings = Dataset(
    name='imagenet2012',
    image_size_px=24,
    eval_crop_ratio=0.8,
    interpolation=interpolation,
    antialias=antialias,
  )
  config = types.SimpleNamespace(dataset=settings)
  data = {'num_classes': 1000, 'splits': {}}
  spec = datasets.recorded(settings, data)
  card = {'input': model_card.input_of(config, spec)}
  code = f'import tensorflow as tf\n{usage.crop(card)}'
  scope = {'np': np, 'Image': Image}
  exec(code, scope)
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 256, (*size, 3), np.uint8)
  image = Image.fromarray(pixels).resize((size[1], size[0]), Image.BILINEAR)
  ours = decode.center_crop(
    np.asarray(image), 24, 0.8, interpolation, antialias
  ).numpy()
  error = np.abs(scope['crop'](image).astype(int) - ours)
  assert error.max() <= antialias


@pytest.mark.parametrize('routes', [1, 3])
def test_parameters_are_counted_as_the_papers_do(routes):
  model = resnet.resnet50(num_classes=1000, num_routes=routes)
  variables = networks.abstract_variables(model)
  weights = Snapshot(variables['params'], variables['batch_stats'])
  assert model_card.count_parameters(weights) == 25_557_032


# ---- Wrong usage ------------------------------------------------------------


def exit_code(monkeypatch, *argv):
  monkeypatch.setattr(sys, 'argv', ['prog', *map(str, argv)])
  with pytest.raises(SystemExit) as exit_:
    cli.run(export.export)
  return exit_.value.code


@pytest.mark.parametrize(
  'flags, message',
  [
    (['--output='], 'missing --output'),
    (['--output=m.pt'], 'must end in .safetensors'),
    (['--output=m.stablehlo'], 'set --format=stablehlo'),
    (['--output=m.safetensors', '--format=stablehlo'], '--format=safetensors'),
    (['--output=m.onnx', '--format=onnx'], "unknown --format 'onnx'"),
    (['--output=FILE/m.safetensors'], 'cannot be written'),
    (['--output=run.safetensors'], 'would replace'),
    (['--output=page.safetensors'], 'would replace'),
    (['--output=m.safetensors', '--config.seed=3'], 'trained with 0'),
    (['--output=m.safetensors', '--config.eval.rout=adv'], 'eval.route'),
    (['--output=m.safetensors', '--ouput=x'], 'ouput'),
  ],
)
def test_wrong_usage_exits_with_2_and_says_why(
  flags, message, directory, tmp_path, monkeypatch, capsys
):
  monkeypatch.chdir(tmp_path)
  for name in ('FILE', 'run.json', 'page.md'):
    (tmp_path / name).write_text('{"config": {}}')
  assert exit_code(monkeypatch, f'--workdir={directory}', *flags) == 2
  assert message in capsys.readouterr().err
  assert {p.name for p in tmp_path.iterdir()} == {'FILE', 'run.json', 'page.md'}


def test_a_card_of_an_earlier_export_is_replaced(directory, tmp_path):
  run_export(directory, tmp_path / 'm.safetensors')
  run_export(directory, tmp_path / 'm.stablehlo', '--format=stablehlo')
  card = json.loads((tmp_path / 'm.json').read_text())
  assert (card['format'], card['file']) == ('stablehlo', 'm.stablehlo')


@pytest.mark.parametrize('kind', ['safetensors', 'stablehlo'])
def test_what_cannot_be_exported_says_why(kind, tmp_path):
  """A run before its first checkpoint, and no run."""
  config = from_config_dict(digits.get_config())
  run = experiment.build(config, jax.devices()[:1])
  workdir.write_config(workdir.prepare(str(tmp_path / 'run'), run, {}), run, {})
  output, flag = tmp_path / f'm.{kind}', f'--format={kind}'
  with pytest.raises(ConfigError, match='holds no checkpoint yet'):
    run_export(tmp_path / 'run', output, flag)
  with pytest.raises(ConfigError, match='holds no run'):
    run_export(tmp_path / 'none', output, flag)
