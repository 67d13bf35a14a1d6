"""The ImageNet recipes: their numbers by batch size, and that they train."""

import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from conadv_jax import experiment, models, train
from conadv_jax.base.errors import ConfigError
from conadv_jax.config import Network, Steps, from_config_dict, recipes
from conadv_jax.data import datasets
from conadv_jax.method import schedules
from conadv_jax.methods import METHODS
from conadv_jax.models import efficientnet, resnet
from conadv_jax.run import metrics
from configs import imagenet_efficientnet, imagenet_resnet50

ROOT = pathlib.Path(__file__).resolve().parents[2]
NUM_TRAIN = datasets.get_spec('imagenet2012').num_train
BATCHES = {
  '4k': 4096, '8k': 8192, '16k': 16384, '32k': 32768, '64k': 65536,
  '96k': 98304,
}  # fmt: skip
RECIPES = {'resnet': imagenet_resnet50, 'efficientnet': imagenet_efficientnet}


def recipe_of(model):
  return RECIPES['efficientnet' if 'efficientnet' in model else 'resnet']


def load(file, **args):
  """The validated configuration of a file and its arguments."""
  text = ','.join(f'{name}={value}' for name, value in args.items())
  return from_config_dict(file.get_config(text))


def rate(cfg, count):
  """Learning rate of update `count`."""
  steps = Steps.of(cfg, NUM_TRAIN)
  peak = cfg.optimizer.peak_learning_rate(cfg.batch_size)
  return float(schedules.make_schedule(cfg.schedule, steps, peak)(count))


# ---- Both -------------------------------------------------------------------


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('batch', BATCHES)
def test_every_model_loads_with_every_method_and_batch(method, batch):
  for name in models.MODELS:
    cfg = load(recipe_of(name), model=name, method=method, batch_size=batch)
    assert cfg.batch_size == BATCHES[batch]
    assert cfg.dataset.image_size_px == models.get(name).resolution_px
    attack = {
      'advprop': ('pgd', 4.0),
      'fast_advprop': ('rs_fgsm', 1.0),
      'noise': ('random_signs', 4.0),
    }.get(method, ('paper', 4.0))
    assert (cfg.attack.preset, cfg.attack.epsilon) == attack


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize(
  'family, power', [('resnet', 0.5), ('efficientnet', 1)]
)
def test_the_rates_of_small_batches_follow_the_batch(family, power, method):
  base = load(RECIPES[family], method=method, batch_size=4096)
  for batch in (8, 128, 256, 2048):
    cfg = load(RECIPES[family], method=method, batch_size=batch)
    peaks = [c.optimizer.peak_learning_rate(c.batch_size) for c in (cfg, base)]
    expected = peaks[1] * (batch / 4096) ** power
    np.testing.assert_allclose(peaks[0], expected, rtol=1e-12)


# LARS-ImageNet-PyTorch of NUS-HPC-AI-Lab; mlcommons/logging, rcps_resnet.json.
@pytest.mark.parametrize(
  'batch, published',
  [(512, 4.0), (1024, 2**2.5), (1632, 7.4), (2048, 8.5), (4096, 2**3.5)],
)
def test_rates_below_4k_are_near_published_ones(batch, published):
  cfg = load(imagenet_resnet50, batch_size=batch - batch % 128)
  peak = cfg.optimizer.peak_learning_rate(cfg.batch_size)
  assert 0.8 < peak / published <= 1


@pytest.mark.parametrize('family', RECIPES)
def test_conadv_aa_has_three_routes_and_the_policy_of_the_paper(family):
  cfg = load(RECIPES[family], method='conadv_aa')
  assert cfg.routes == ('clean', 'aa', 'adv')
  assert cfg.dataset.autoaugment == 'v0'
  assert not cfg.dataset.aa_shares_crop


@pytest.mark.parametrize('family', RECIPES)
@pytest.mark.parametrize('batch', BATCHES)
@pytest.mark.parametrize('cores', [8, 128, 256, 512, 1024])
def test_batch_norm_groups_lie_evenly_on_slices(family, batch, cores):
  cfg = load(RECIPES[family], batch_size=batch)
  groups, rest = divmod(cfg.batch_size, cfg.bn_group_size)
  assert rest == 0
  span = max(1, cores // groups)  # cores that share a group
  assert groups * span % cores == 0
  assert cfg.bn_group_size % span == 0


@pytest.mark.parametrize('family', RECIPES)
@pytest.mark.parametrize(
  'args, message',
  [
    ({'batch_size': '5k'}, "batch_size='5k': must be a number or one of 4k"),
    ({'batch_size': 0}, "batch_size='0'"),
    ({'batch_size': 131072}, 'ends at 98304'),
    ({'recipe': 'adam'}, "recipe='adam': must be one of"),
    ({'method': 'conadw'}, "did you mean 'conadv'"),
    ({'model': 'efficientnet_b9'}, "did you mean 'efficientnet_b"),
    ({'modle': 'resnet18'}, "did you mean 'model'"),
  ],
)
def test_wrong_arguments_say_what_is_known(family, args, message):
  with pytest.raises(ConfigError, match=message):
    load(RECIPES[family], **args)


# ---- ResNet -----------------------------------------------------------------


# conadv/ConAdv: lars_util.py, resnet_config.py, configs/cloud/v3-*.yaml.
@pytest.mark.parametrize(
  'batch, steps, peak, warmup_epochs, group',
  [
    ('4k', None, 10.0, 5, 128),
    ('8k', None, 10.0, 5, 128),
    ('16k', 7116, 25.0, 5, 128),
    ('32k', 3558, 31.2, 25, 128),
    ('64k', None, 43.0, 41, 128),
    ('96k', 1301, 43.0, 41, 96),
  ],
)
def test_paper_settings_by_batch(batch, steps, peak, warmup_epochs, group):
  cfg = load(imagenet_resnet50, batch_size=batch)
  assert steps in (None, Steps.of(cfg, NUM_TRAIN).total)
  assert cfg.optimizer.peak_learning_rate(cfg.batch_size) == peak
  assert cfg.schedule.warmup_epochs == warmup_epochs
  assert cfg.bn_group_size == group
  optimizer = cfg.optimizer
  assert (optimizer.name, optimizer.lars_denominator, optimizer.eps) == (
    'lars', 'sum_of_norms', 0.0,
  )  # fmt: skip
  assert (optimizer.momentum, optimizer.weight_decay) == (0.92, 5e-5)
  assert (cfg.schedule.power, cfg.schedule.end_learning_rate) == (1.6, 1e-4)
  assert (cfg.bn_momentum, cfg.bn_epsilon) == (0.9, 1e-5)
  assert cfg.loss.label_smoothing == 0.1
  assert cfg.dataset.eval_crop_ratio == 224 / (224 + 32)


def test_the_rate_at_96k_peaks_after_41_epochs_and_ends_low():
  cfg = load(imagenet_resnet50, batch_size='96k')
  peak_at = round(41 * NUM_TRAIN / 98304)
  np.testing.assert_allclose(rate(cfg, peak_at), 43.0, rtol=1e-6)
  assert rate(cfg, peak_at - 1) < 43.0 > rate(cfg, peak_at + 1)
  np.testing.assert_allclose(rate(cfg, 1301), 1e-4, rtol=1e-4)


# mlcommons/training_results_v0.7, Google, resnet-research-JAX, train.py.
@pytest.mark.parametrize(
  'batch, peak, warmup_epochs, epochs, momentum, weight_decay',
  [
    ('4k', 10.0, 5, 56, 0.9, 2e-4),
    ('16k', 25.0, 5, 56, 0.9, 2e-4),
    ('32k', 29.0, 18, 64, 0.929, 1e-4),
    ('64k', 23.080977304670448, 33, 92, 0.9537213777059405, 1e-4),
  ],
)
def test_mlperf_settings_by_batch(
  batch, peak, warmup_epochs, epochs, momentum, weight_decay
):
  cfg = load(imagenet_resnet50, batch_size=batch, recipe='mlperf')
  assert cfg.optimizer.peak_learning_rate(cfg.batch_size) == peak
  assert (cfg.schedule.warmup_epochs, cfg.epochs) == (warmup_epochs, epochs)
  optimizer = cfg.optimizer
  assert (optimizer.momentum, optimizer.weight_decay) == (
    momentum, weight_decay,
  )  # fmt: skip
  assert (cfg.schedule.power, cfg.schedule.end_learning_rate) == (2.0, 1e-4)
  assert cfg.bn_group_size == 64


def test_mlperf_has_nothing_beyond_64k():
  with pytest.raises(ConfigError, match="'mlperf' ends at 65536"):
    load(imagenet_resnet50, batch_size='96k', recipe='mlperf')


# ---- EfficientNet -----------------------------------------------------------


@pytest.mark.parametrize(
  'number, size_px',
  list(enumerate([224, 240, 260, 300, 380, 456, 528, 600, 672])),
)
def test_efficientnet_sizes_and_crops(number, size_px):
  cfg = load(imagenet_efficientnet, model=f'efficientnet_b{number}')
  assert cfg.dataset.image_size_px == size_px
  assert cfg.dataset.eval_crop_ratio == size_px / (size_px + 32)
  assert (cfg.bn_momentum, cfg.bn_epsilon) == (0.99, 1e-3)
  assert cfg.network == Network(False, None, None)  # the model's own


# tensorflow/tpu, models/official/efficientnet/main.py and utils.py.
@pytest.mark.parametrize('batch, recipe', [('4k', 'auto'), ('16k', 'rmsprop')])
def test_rmsprop_is_that_of_tensorflow_tpu(batch, recipe):
  cfg = load(imagenet_efficientnet, batch_size=batch, recipe=recipe)
  optimizer, schedule = cfg.optimizer, cfg.schedule
  assert (optimizer.name, optimizer.decay, optimizer.momentum) == (
    'rmsprop', 0.9, 0.9,
  )  # fmt: skip
  assert (optimizer.eps, optimizer.weight_decay) == (1e-3, 1e-5)
  assert (cfg.epochs, cfg.loss.label_smoothing) == (350.0, 0.1)
  assert schedule.name == 'exponential'
  peak = 0.016 * BATCHES[batch] / 256
  per_epoch = NUM_TRAIN / BATCHES[batch]
  np.testing.assert_allclose(rate(cfg, round(5 * per_epoch)), peak, rtol=1e-6)
  half = round(2.5 * per_epoch)
  np.testing.assert_allclose(rate(cfg, half), peak / 2, rtol=1 / half)
  # Two decays, a little more than 4.8 epochs after the warm-up.
  later = round(9.9 * per_epoch)
  np.testing.assert_allclose(rate(cfg, later), peak * 0.97**2, rtol=1e-6)


@pytest.mark.parametrize(
  'batch, peak, warmup_epochs',
  [
    ('4k', 3.776, 50),
    ('16k', 15.104, 50),
    ('32k', 15.104, 50),
    ('64k', 20.736, 43),
    ('96k', 20.736, 43),
  ],
)
def test_efficientnet_lars_by_batch(batch, peak, warmup_epochs):
  cfg = load(imagenet_efficientnet, batch_size=batch, recipe='lars')
  optimizer = cfg.optimizer
  assert (optimizer.name, optimizer.lars_denominator, optimizer.eps) == (
    'lars', 'sum_of_norms', 0.0,
  )  # fmt: skip
  assert (optimizer.momentum, optimizer.weight_decay) == (0.9, 1e-5)
  steps = Steps.of(cfg, NUM_TRAIN)
  assert steps.warmup == round(warmup_epochs * NUM_TRAIN / BATCHES[batch])
  np.testing.assert_allclose(rate(cfg, steps.warmup), peak, rtol=1e-6)
  middle = (steps.warmup + steps.total) // 2
  expected = 0.1 + (peak - 0.1) / 4
  np.testing.assert_allclose(rate(cfg, middle), expected, rtol=1e-3)
  np.testing.assert_allclose(rate(cfg, steps.total), 0.1, rtol=1e-5)


@pytest.mark.parametrize('batch', BATCHES)
def test_the_average_forgets_the_initial_weights(batch):
  """0.9999 per step would keep half of them at 64K, in a run of 6,842 steps."""
  cfg = load(imagenet_efficientnet, batch_size=batch)
  assert cfg.eval.use_ema and cfg.ema.batch_stats
  steps = Steps.of(cfg, NUM_TRAIN).total
  assert cfg.ema.decay**steps < 1e-4
  # The time constant is as many examples as at 4,096.
  examples = cfg.batch_size / -np.log(cfg.ema.decay)
  np.testing.assert_allclose(examples, 4096 / -np.log(0.9999), rtol=1e-6)


def test_rmsprop_is_refused_where_it_collapses():
  with pytest.raises(ConfigError, match=r'40\.3 % .* recipe=lars'):
    load(imagenet_efficientnet, batch_size='32k', recipe='rmsprop')
  chosen = [load(imagenet_efficientnet, batch_size=b) for b in BATCHES]
  names = [cfg.optimizer.name for cfg in chosen]
  assert names == ['rmsprop'] * 2 + ['lars'] * 4


@pytest.mark.parametrize('model', ['resnet50', 'efficientnet_b9'])
def test_the_efficientnet_recipe_is_for_efficientnets(model):
  with pytest.raises(ConfigError, match="unknown model '"):
    load(imagenet_efficientnet, model=model)


# ---- Whole runs -------------------------------------------------------------

# The first blocks of each network, thin: compiling takes most of the time.
SHORT = {
  'resnet18': functools.partial(resnet.resnet18, width=8, blocks=(1, 1)),
  'efficientnet_b0': functools.partial(
    efficientnet.efficientnet_b0,
    width_factor=0.25,
    stages=efficientnet.STAGES[:2],
  ),
}
SMALL = {
  'max_steps': 3,
  'log_every_steps': 1,
  'eval.batch_size': 8,
  'eval.attack': 'none',
  'attack_stats_every_steps': 0,
  'plots': False,
}


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
  from scripts import make_fake_imagenet

  root = str(tmp_path_factory.mktemp('data'))
  make_fake_imagenet.prepare(root, 'array_record', 40, 16, 2)
  return root


@pytest.mark.slow
@pytest.mark.parametrize(
  'model, method',
  [
    ('resnet18', 'conadv_aa'),
    ('resnet18', 'conadv_from_aa'),
    ('efficientnet_b0', 'baseline'),
    ('efficientnet_b0', 'conadv'),
  ],
)
def test_a_recipe_trains(model, method, data_dir, tmp_path, monkeypatch):
  """On one device; the command below trains a whole network.

  Golden files hold what every method resolves to, test_presets.py trains any.
  """
  entry = dataclasses.replace(models.get(model), build=SHORT[model])
  monkeypatch.setitem(models.MODELS, model, entry)
  build = functools.partial(experiment.build, devices=jax.devices()[:1])
  monkeypatch.setattr(experiment, 'build', build)
  values = recipe_of(model).get_config(
    f'model={model},method={method},batch_size=8'
  )
  values.update_from_flattened_dict(
    SMALL | {'dataset.image_size_px': 32, 'dataset.data_dir': data_dir}
  )
  cfg = from_config_dict(values)
  assert cfg.dtype == 'bfloat16'
  found = train.train(cfg, str(tmp_path))
  assert found['steps'] == 3 and found['nonfinite_steps'] == 0
  rows = metrics.read_metrics(tmp_path)
  losses = [row['loss'] for row in rows if row['split'] == 'train']
  assert len(losses) == 3
  # Chance on 1,000 classes is a loss of 6.9.
  assert all(5 < loss < 9 for loss in losses)
  for view, _ in cfg.views:
    assert f'loss_{view}' in rows[0]


@pytest.mark.slow
def test_the_command_of_a_recipe_trains_the_whole_network(data_dir, tmp_path):
  recipe = 'imagenet_resnet50.py:method=conadv_aa,model=resnet18,batch_size=8'
  overrides = SMALL | {
    'dataset.image_size_px': 64,
    'dataset.data_dir': data_dir,
    'dtype': 'float32',
  }
  command = [
    sys.executable, '-m', 'conadv_jax.train', f'--config=configs/{recipe}',
    f'--workdir={tmp_path}',
    *(f'--config.{name}={value}' for name, value in overrides.items()),
  ]  # fmt: skip
  environment = os.environ | {'JAX_PLATFORMS': 'cpu'}
  result = subprocess.run(
    command, cwd=ROOT, env=environment, capture_output=True, text=True
  )
  assert result.returncode == 0, result.stderr
  assert 'step 3/3' in result.stdout
  found = json.loads((tmp_path / 'summary.json').read_text())
  assert found['steps'] == 3 and found['nonfinite_steps'] == 0


def test_the_list_has_a_line_for_each_recipe(capsys, monkeypatch):
  monkeypatch.setattr(recipes, 'run_file', None)  # nothing is run
  train.main(['train', '--list'])
  lines = capsys.readouterr().out.splitlines()
  assert [line.split()[0] for line in lines] == sorted(recipes.shipped())
  assert any('EfficientNet-B0 to B8' in line for line in lines)
