"""Other test sets of ImageNet, on fake copies: which classes count, and mCE."""

import json
import shutil

import fake_sets
import helpers
import jax.numpy as jnp
import numpy as np
import pytest

from conadv_jax import evaluate, experiment, models
from conadv_jax.base.errors import ConfigError
from conadv_jax.config import from_config_dict, recipes
from conadv_jax.data import datasets, imagenet_sets
from conadv_jax.method.state import Snapshot
from conadv_jax.models import weights
from scripts import make_fake_imagenet

A, R = (datasets.get_spec(f'imagenet_{x}').classes for x in 'ar')
SIZE = 16
RECIPE = 'imagenet_resnet50:method=conadv,batch_size=16'
FIELDS = {
  'model': 'tiny',
  'bn_group_size': '2',
  'dtype': 'float32',
  'dataset.image_size_px': str(SIZE),
  'dataset.eval_crop_ratio': '1.0',
  'eval.batch_size': '8',
}


@pytest.fixture(scope='module')
def network(tmp_path_factory):
  """(data directory, file of weights, function images -> logits [N, 1000])."""
  root = tmp_path_factory.mktemp('data')
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(models.MODELS, 'tiny', models.Entry(helpers.TinyNet, SIZE))
    run = experiment.build(from_config_dict(recipes.load(RECIPE, FIELDS)))
    state = run.init_state()
    file = root / 'm.safetensors'
    chosen = Snapshot(state.params, state.batch_stats)
    weights.save(
      str(file), weights.to_arrays(chosen.params, chosen.batch_stats, 0)
    )

    def logits_of(images):
      x = (images - np.array(run.spec.mean)) / np.array(run.spec.std)
      variables = {'params': state.params, 'batch_stats': state.batch_stats}
      x = jnp.asarray(x, jnp.float32)[None, None]
      logits, _ = run.apply_fn(variables, x, (0,), False)
      return np.asarray(logits[0, 0], np.float64)

    yield root, file, logits_of


def run_evaluate(network, name, *flags):
  root, file, _ = network
  fields = FIELDS | {'dataset.data_dir': root}
  return evaluate.evaluate(
    ['prog', f'--config={RECIPE}', f'--weights={file}', f'--set={name}',
     f'--output={root}/{name}.json',
     *(f'--config.{k}={v}' for k, v in fields.items()), *flags]
  )  # fmt: skip


def best_of(logits, classes):
  """The best class of each example among some, by a loop."""
  return [max(classes, key=lambda k: one[k]) for one in logits]


# ---- The sets ---------------------------------------------------------------


def test_the_classes_are_200_from_the_first_to_the_last_of_the_papers():
  """Stingray to acorn, and goldfish to acorn."""
  names = make_fake_imagenet.synsets()
  for classes, first in ((A, 'n01498041'), (R, 'n01443537')):
    assert len(set(classes)) == 200 and list(classes) == sorted(classes)
    assert (names[classes[0]], names[classes[-1]]) == (first, 'n12267677')


@pytest.mark.parity
def test_the_classes_are_those_of_timm():
  import importlib.resources

  folder = importlib.resources.files('timm.data._info')
  for name, classes in (('a', A), ('r', R)):
    text = (folder / f'imagenet_{name}_synsets.txt').read_text()
    names = make_fake_imagenet.synsets()
    assert text.split() == [names[k] for k in classes]


@pytest.mark.parametrize(
  'name, classes', [('a', A), pytest.param('r', R, marks=pytest.mark.slow)]
)
def test_logits_of_other_classes_are_not_compared(name, classes, network):
  root, _, logits_of = network
  rng = np.random.default_rng(1)
  noise = fake_sets.prepare(
    root, f'imagenet_{name}', rng.choice(classes, 24), size=(SIZE, SIZE)
  )
  shutil.rmtree(root / f'imagenet_{name}')
  logits = logits_of(noise)
  best = best_of(logits, classes)
  assert (logits.argmax(-1) != best).any()  # all classes would say otherwise
  # Right for the first half, as judged among the 200; wrong for the others.
  others = [classes[(classes.index(k) + 7) % 200] for k in best]
  labels = best[:12] + others[12:]
  fake_sets.prepare(root, f'imagenet_{name}', labels, size=(SIZE, SIZE))
  (row,) = run_evaluate(network, name)
  assert row['top1'] == 50.0
  assert row['data']['name'] == f'imagenet_{name}'
  allowed = logits[:, classes]
  log_p = allowed - np.logaddexp.reduce(allowed, -1, keepdims=True)
  places = [classes.index(k) for k in labels]
  expected = -log_p[np.arange(24), places].mean()
  assert row['loss'] == pytest.approx(expected, rel=1e-5)
  confidence = np.exp(log_p.max(-1))
  right = np.arange(24) < 12
  assert confidence.max() < 1 / 15  # one bin
  assert row['ece'] == pytest.approx(
    100 * abs(right.mean() - confidence.mean()), rel=1e-4
  )


@pytest.mark.slow
@pytest.mark.parametrize(
  'name, full, config',
  [
    ('v2', 'imagenet_v2', 'matched-frequency'),
    ('sketch', 'imagenet_sketch', ''),
  ],
)
def test_sets_with_all_classes(name, full, config, network):
  root, _, logits_of = network
  images = fake_sets.prepare(root, full, range(12), size=(SIZE, SIZE))
  shutil.rmtree(root / full)
  best = logits_of(images).argmax(-1)
  labels = [*best[:9], *((best[9:] + 1) % 1000)]
  fake_sets.prepare(root, full, labels, config, size=(SIZE, SIZE))
  (row,) = run_evaluate(network, name)
  assert row['top1'] == 75.0 and row['data']['num_examples'] == 12


def test_any_real_label_is_right_and_images_without_are_left_out(network):
  root, _, logits_of = network
  name = imagenet_sets.REAL
  images = fake_sets.prepare(
    root, name, range(8), size=(SIZE, SIZE), sets=[[]] * 8
  )
  shutil.rmtree(root / name)
  best = logits_of(images).argmax(-1)
  other = (best + 1) % 1000
  sets = [[other[0], best[0]], [best[1]], [], [other[3]], [other[4], other[3]],
          [best[5]], [], [best[7]]]  # fmt: skip
  fake_sets.prepare(root, name, other, size=(SIZE, SIZE), sets=sets)
  (row,) = run_evaluate(network, 'real')
  assert row['top1'] == pytest.approx(100 * 4 / 6)
  assert row['data']['num_examples'] == 8 and row['unlabeled_examples'] == 2
  assert 'bad_examples' not in row


def test_a_set_that_is_not_prepared_says_the_command(network, tmp_path):
  for name, command in (
    ('v2', 'prepare_tfds.py --name=imagenet_v2/matched-frequency --data_dir='),
    ('c', '--name=imagenet2012_corrupted/gaussian_noise_1 --data_dir='),
  ):
    with pytest.raises(ConfigError, match='not prepared') as error:
      run_evaluate(network, name, f'--config.dataset.data_dir={tmp_path}')
    assert command in str(error.value)


# ---- ImageNet-C -------------------------------------------------------------


def test_the_corruption_error_by_hand():
  """75 % of AlexNet's error at each severity but the last, where it is 0."""
  top1 = {}
  for corruption, error in imagenet_sets.ALEXNET_ERRORS.items():
    for severity in imagenet_sets.SEVERITIES:
      share = 0 if severity == 5 else 0.75 * error
      top1[f'imagenet2012_corrupted/{corruption}_{severity}'] = (
        100 - 100 * share
      )
  found = imagenet_sets.corruption_errors(top1)
  assert len(top1) == 75 and len(found) == 15
  assert list(found.values()) == pytest.approx([60.0] * 15)
  name = 'imagenet2012_corrupted/snow_5'
  found = imagenet_sets.corruption_errors(top1 | {name: 50.0})
  assert found['snow'] == pytest.approx(60 + 100 * 0.5 / (5 * 0.866816))
  assert found['frost'] == pytest.approx(60.0)


@pytest.mark.slow
def test_the_mce_of_a_fake_imagenet_c(network, monkeypatch):
  """Of the first and last severity: each data set takes a second."""
  root, *_ = network
  name, made = imagenet_sets.CORRUPTED, {}
  sets = [full for full in imagenet_sets.SETS['c'] if full[-1] in '15']
  monkeypatch.setattr(imagenet_sets, 'SEVERITIES', (1, 5))
  monkeypatch.setitem(imagenet_sets.SETS, 'c', sets)
  for severity in (1, 5):
    fake_sets.prepare(root, name, [0] * 4, f'snow_{severity}', severity,
                      (224, 224))  # fmt: skip
  for full in sets:
    if not (root / full).exists():
      shutil.copytree(root / name / f'snow_{full[-1]}', root / full)
  *rows, whole = run_evaluate(network, 'c')
  assert len(rows) == 30
  for row in rows:
    made[row['data']['name']] = row['top1']
  assert whole['ce'] == imagenet_sets.corruption_errors(made)
  assert whole['mce'] == pytest.approx(np.mean(list(whole['ce'].values())))
  assert whole['top1'] == pytest.approx(np.mean(list(made.values())))
  assert whole['data']['num_examples'] == 120
  kept = json.loads((root / 'c.json').read_text())
  assert kept['evaluations'] == [*rows, whole]
  assert kept['config']['dataset']['name'] == 'imagenet2012'
