"""timm computes what an exported network computes here."""

import functools
import json

import jax
import networks
import numpy as np
import pytest
from PIL import Image
from references import make
from test_export import run_export

from conadv_jax import experiment, train
from conadv_jax.config import from_config_dict
from conadv_jax.export import export, model_card, usage
from conadv_jax.method.state import Snapshot
from conadv_jax.models import weights
from conadv_jax.run import workdir
from conadv_jax.run.evaluator import Evaluator
from conadv_jax.run.reopen import restore_newest
from configs import imagenet_efficientnet, imagenet_resnet50


def timm_logits(usage, images, folder, monkeypatch):
  """Runs the card's own lines; returns the logits of images [N, H, W, 3].

  These are cropped already.
  """
  import torch

  make.import_timm()
  Image.new('RGB', (50, 40)).save(folder / 'image.jpg')
  monkeypatch.chdir(folder)
  scope = {}
  exec(usage, scope)
  assert scope['logits'].shape == (1, 1000)
  x = [scope['to_tensor'](image) for image in images]
  with torch.no_grad():
    return scope['model'](torch.stack(x)).numpy()


@pytest.mark.parity
def test_timm_has_the_logits_and_top1_of_a_run(tmp_path, monkeypatch):
  from scripts import make_fake_imagenet

  make_fake_imagenet.prepare(str(tmp_path), 'array_record', 40, 16, 2)
  values = imagenet_resnet50.get_config('model=resnet18,batch_size=8')
  values.update_from_flattened_dict(
    {
      'dataset.image_size_px': 32,
      'dataset.data_dir': str(tmp_path),
      'dtype': 'float32',
      'max_steps': 2,
      'eval.attack': 'none',
      'eval.batch_size': 16,
      'attack_stats_every_steps': 0,
      'plots': False,
    }
  )
  settings = from_config_dict(values)
  build = functools.partial(experiment.build, devices=jax.devices()[:1])
  with monkeypatch.context() as patch:
    patch.setattr(experiment, 'build', build)
    train.train(settings, str(tmp_path / 'run'))
  run_export(tmp_path / 'run', tmp_path / 'm.safetensors')

  run = build(settings)
  source = run.spec.open('eval', settings.dataset)
  quarantine = workdir.quarantine(tmp_path, settings)
  evaluator = Evaluator(run, source, quarantine)
  images, labels = evaluator.first_examples(16)
  _, state = restore_newest(tmp_path / 'run', run)
  state = Snapshot(state.params, state.batch_stats)
  ours = np.asarray(jax.jit(export.make_predict_fn(run, state))(images))
  card = json.loads((tmp_path / 'm.json').read_text())
  theirs = timm_logits(card['usage'], images, tmp_path, monkeypatch)
  assert networks.relative_error(ours, theirs) < 1e-4
  np.testing.assert_array_equal(ours.argmax(-1), theirs.argmax(-1))
  top1 = 100 * (theirs.argmax(-1) == labels).mean()
  np.testing.assert_allclose(top1, card['top1'], rtol=1e-6)


@pytest.mark.parity
@pytest.mark.parametrize('epsilon', [1e-3, 1e-5])
def test_timm_has_the_logits_of_an_efficientnet_of_any_epsilon(
  epsilon, tmp_path, monkeypatch
):
  values = imagenet_efficientnet.get_config(
    'model=efficientnet_b0,method=conadv_aa,batch_size=8'
  )
  values.update_from_flattened_dict(
    {'bn_epsilon': epsilon, 'dtype': 'float32', 'dataset.image_size_px': 64}
  )
  run = experiment.build(from_config_dict(values), jax.devices()[:1])
  variables = networks.random_variables(run.model)
  chosen = Snapshot(variables['params'], variables['batch_stats'])
  arrays = export.to_timm(run, chosen)
  weights.save(str(tmp_path / 'm.safetensors'), arrays)
  card = {
    'timm_name': model_card.timm_name('efficientnet_b0'),
    'dataset': {'num_classes': 1000},
    'input': model_card.input_of(run.config, run.spec),
    'file': 'm.safetensors',
  }
  images = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), np.uint8)
  ours = np.asarray(jax.jit(export.make_predict_fn(run, chosen))(images))
  theirs = timm_logits(usage.safetensors(card), images, tmp_path, monkeypatch)
  assert networks.relative_error(ours, theirs) < 1e-4
