"""Weights in a file: what `export` writes, and timm's own."""

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
from references import make

from conadv_jax import experiment
from conadv_jax.config import from_config_dict
from conadv_jax.export import export, model_card
from conadv_jax.method.pixels import normalize
from conadv_jax.method.state import Snapshot
from conadv_jax.models import weights
from conadv_jax.models.norm import norms_of
from conadv_jax.run import weights_file
from configs import imagenet_resnet50

SIZE = 32


def build(model, epsilon):
  values = imagenet_resnet50.get_config('method=conadv,batch_size=8')
  values.update_from_flattened_dict(
    {
      'model': model,
      'bn_epsilon': epsilon,
      'dtype': 'float32',
      'dataset.image_size_px': SIZE,
    }
  )
  return experiment.build(from_config_dict(values), jax.devices()[:1])


MODELS = [('resnet18', 1e-3), ('resnet18', 1e-5), ('efficientnet_b0', 1e-5)]


@pytest.mark.slow
@pytest.mark.parametrize('model, epsilon', MODELS)
def test_a_file_of_export_has_the_weights_of_its_route(
  model, epsilon, tmp_path
):
  run = build(model, epsilon)
  variables = networks.random_variables(run.model)
  chosen = Snapshot(variables['params'], variables['batch_stats'])
  path = str(tmp_path / 'm.safetensors')
  weights.save(path, export.to_timm(run, chosen))
  found, identity = weights_file.read(path, run)
  assert identity['file'] == path and len(identity['sha256']) == 64
  norms = norms_of(chosen.batch_stats)
  flat = jax.tree_util.tree_leaves_with_path(chosen)
  for (place, old), new in zip(flat, jax.tree.leaves(found), strict=True):
    names = tuple(key.key for key in place[1:])
    old = np.asarray(old)
    assert new.dtype == old.dtype and new.shape == old.shape
    # Every route has the row of the route that was exported.
    expected = old[:1] if names[:-1] in norms else old
    np.testing.assert_allclose(new, np.broadcast_to(expected, new.shape), 1e-5)


@pytest.mark.parity
@pytest.mark.parametrize('model, epsilon', MODELS)
def test_weights_of_timm_have_timms_logits(model, epsilon, tmp_path):
  timm = make.import_timm()
  torch = pytest.importorskip('torch')
  safetensors = pytest.importorskip('safetensors.torch')
  torch.manual_seed(0)
  theirs = timm.create_model(model_card.timm_name(model)).eval()
  for name, value in theirs.state_dict().items():
    if name.endswith('running_var'):
      value.uniform_(0.5, 1.5)
  path = str(tmp_path / 'm.safetensors')
  safetensors.save_file(theirs.state_dict(), path)
  run = build(model, epsilon)
  found, _ = weights_file.read(path, run)
  images = np.random.default_rng(0).integers(0, 256, (4, SIZE, SIZE, 3))
  x = np.asarray(normalize(run.spec, jnp.asarray(images, jnp.float32)))
  with torch.no_grad():
    expected = theirs(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).numpy()
  variables = {'params': found.params, 'batch_stats': found.batch_stats}
  for route in (0, 1):
    logits, _ = jax.jit(
      lambda x, route=route: run.apply_fn(variables, x, (route,), False)
    )(x[None, None])
    assert networks.relative_error(np.asarray(logits[0, 0]), expected) < 1e-4
