"""The recipe of fine-tuning, and 96K on one device: they resolve, and train."""

import helpers
import jax
import numpy as np
import pytest

from conadv_jax import experiment, train
from conadv_jax.base.errors import ConfigError
from conadv_jax.config import from_config_dict, recipes
from conadv_jax.data import datasets
from conadv_jax.data.sources import digits
from conadv_jax.run import initial

QUICK = {
  'eval.every_steps': '0',
  'eval.attack': 'none',
  'attack_stats_every_steps': '0',
  'log_every_steps': '100',
  'plots': 'False',
}


def load(text, **overrides):
  fields = {name.replace('__', '.'): x for name, x in overrides.items()}
  return from_config_dict(recipes.load(text, fields))


@pytest.fixture
def pairs(monkeypatch):
  """The digits in five classes, 0 or 1, 2 or 3, and so on; one device."""
  build = experiment.build

  def on_one_device(config, devices=None, **kwargs):
    return build(config, jax.devices()[:1], **kwargs)

  monkeypatch.setattr(experiment, 'build', on_one_device)
  splits = {k: (x, y // 2) for k, (x, y) in digits.load().items()}
  spec = datasets.from_arrays('pairs', splits['train'], splits['test'])
  monkeypatch.setitem(datasets.DATASETS, 'pairs', spec)


# ---- The recipe -------------------------------------------------------------


@pytest.mark.parametrize(
  'name, model, size_px, padding_px, flips, dtype',
  [
    ('image_folder', 'resnet50', 224, 0, True, 'bfloat16'),
    ('imagenet2012', 'efficientnet_b2', 260, 0, True, 'bfloat16'),
    ('cifar10', 'resnet18_cifar', 0, 4, True, 'float32'),
    ('digits', 'resnet8', 0, 1, False, 'float32'),
  ],
)
def test_images_are_prepared_as_the_data_set_allows(
  name, model, size_px, padding_px, flips, dtype
):
  cfg = load(f'fine_tune:dataset.name={name},model={model}')
  data = cfg.dataset
  assert (data.image_size_px, data.crop_padding_px) == (size_px, padding_px)
  assert (data.random_flip, cfg.dtype) == (flips, dtype)


def test_rate_and_warm_up_follow_batch_and_epochs():
  cfg = load('fine_tune', batch_size='128', epochs='5')
  np.testing.assert_allclose(cfg.optimizer.peak_learning_rate(128), 0.0025)
  assert (cfg.schedule.name, cfg.schedule.warmup_epochs) == ('cosine', 0.25)
  assert cfg.bn_group_size == 128


def test_it_does_not_start_without_weights():
  with helpers.tiny_network():
    cfg = load('fine_tune:dataset.name=digits,model=tiny')
    run = experiment.build(cfg, jax.devices()[:1])
    with pytest.raises(
      ConfigError, match=r"^init_from='FILE_OR_RUN': .*cannot"
    ):
      initial.first_state(run)


@pytest.mark.slow
def test_a_run_starts_better_from_another_than_from_scratch(pairs, tmp_path):
  """Ten classes, then five: the same few steps, from weights and without."""
  first = load('digits:method=baseline,batch_size=128', epochs='10', **QUICK)
  before = train.train(first, str(tmp_path / 'first'))
  assert before['top1'] > 80
  found = {}
  for name, weights in (('tuned', str(tmp_path / 'first')), ('scratch', '')):
    text = 'fine_tune:dataset.name=pairs,model=resnet8,batch_size=128,epochs=4'
    cfg = load(text, init_from=weights, **QUICK)
    assert cfg.routes == ('clean', 'adv')  # both start from `clean`
    found[name] = train.train(cfg, str(tmp_path / name))['top1']
  assert found['tuned'] > found['scratch'] + 20


# ---- A batch of 98,304 on one device ----------------------------------------


@pytest.mark.parametrize('microbatches, images', [(512, 192), (1024, 96)])
def test_the_batch_of_the_paper_divides_on_one_device(microbatches, images):
  cfg = load(
    'imagenet_resnet50:method=conadv,batch_size=96k',
    microbatches=str(microbatches),
  )
  run = experiment.build(cfg, jax.devices()[:1])
  assert run.config.batch_size == 98304
  assert cfg.batch_size // cfg.microbatches == images


def test_one_part_too_many_is_refused():
  with pytest.raises(ConfigError, match='microbatches=2048: must divide the'):
    load('imagenet_resnet50:batch_size=96k', microbatches='2048')
