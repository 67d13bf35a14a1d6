"""Other test sets of ImageNet, on fake copies: which classes count, and mCE."""

import shutil

import fake_sets
import helpers
import jax.numpy as jnp
import numpy as np
import pytest

from conadv_jax import evaluate, experiment, models, train
from conadv_jax.base.errors import ConfigError
from conadv_jax.config import from_config_dict
from conadv_jax.data import datasets, imagenet_sets
from conadv_jax.run import reopen, summary, workdir
from configs import imagenet_resnet50
from scripts import make_fake_imagenet

A, R = (datasets.get_spec(f'imagenet_{x}').classes for x in 'ar')
SIZE = 16


def settings(root, **fields):
  values = imagenet_resnet50.get_config('method=conadv,batch_size=16')
  values.update_from_flattened_dict(
    {
      'model': 'tiny',
      'bn_group_size': 2,
      'max_steps': 1,
      'dtype': 'float32',
      'dataset.data_dir': str(root),
      'dataset.image_size_px': SIZE,
      'dataset.eval_crop_ratio': 1.0,
      'eval.attack': 'none',
      'eval.batch_size': 8,
      'attack_stats_every_steps': 0,
    }
  )
  return from_config_dict(values)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """(data directory, work directory) of a run on fake images."""
  root = tmp_path_factory.mktemp('data')
  make_fake_imagenet.prepare(str(root), 'array_record', 32, 8, 1)
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(models.MODELS, 'tiny', models.Entry(helpers.TinyNet, SIZE))
    patch.setattr(summary, '_draw', lambda *_: None)
    train.train(settings(root), str(root / 'run'))
    yield root, root / 'run'


def run_evaluate(trained, name, *flags):
  _, path = trained
  return evaluate.evaluate(
    ['prog', f'--workdir={path}', f'--set={name}', *flags]
  )


def logits_of(trained, images):
  """Logits [N, 1000] of images of the network's size."""
  root, path = trained
  run = experiment.build(settings(root))
  _, state = reopen.restore_newest(workdir.path_of(str(path)), run)
  x = (images - np.array(run.spec.mean)) / np.array(run.spec.std)
  variables = {'params': state.params, 'batch_stats': state.batch_stats}
  x = jnp.asarray(x, jnp.float32)[None, None]
  return np.asarray(
    run.apply_fn(variables, x, (0,), False)[0][0, 0], np.float64
  )


def best_of(logits, classes):
  """The best class of each example among some, by a loop."""
  return [max(classes, key=lambda k: one[k]) for one in logits]


# ---- The sets ---------------------------------------------------------------


def test_the_classes_are_200_and_have_those_that_papers_name():
  names = make_fake_imagenet.synsets()
  for classes in (A, R):
    assert len(set(classes)) == 200 and list(classes) == sorted(classes)
  of_a, of_r = ({names[k] for k in classes} for classes in (A, R))
  # The first and last of each: stingray and grey fox squirrel's kin in the
  # papers' lists are n01498041 and n12267677, n01443537 and n12267677's like.
  assert 'n01498041' in of_a and 'n01443537' in of_r
  assert len(of_a & of_r) > 50


@pytest.mark.parity
def test_the_classes_are_those_of_timm():
  import importlib.resources

  folder = importlib.resources.files('timm.data._info')
  for name, classes in (('a', A), ('r', R)):
    text = (folder / f'imagenet_{name}_synsets.txt').read_text()
    names = make_fake_imagenet.synsets()
    assert text.split() == [names[k] for k in classes]


@pytest.mark.parametrize('name, classes', [('a', A), ('r', R)])
def test_logits_of_other_classes_are_not_compared(name, classes, trained):
  root, _ = trained
  rng = np.random.default_rng(1)
  noise = fake_sets.prepare(
    root, f'imagenet_{name}', rng.choice(classes, 24), size=(SIZE, SIZE)
  )
  shutil.rmtree(root / f'imagenet_{name}')
  logits = logits_of(trained, noise)
  best = best_of(logits, classes)
  assert (logits.argmax(-1) != best).any()  # all classes would say otherwise
  # Right for the first half, as judged among the 200; wrong for the others.
  others = [classes[(classes.index(k) + 7) % 200] for k in best]
  labels = best[:12] + others[12:]
  fake_sets.prepare(root, f'imagenet_{name}', labels, size=(SIZE, SIZE))
  (row,) = run_evaluate(trained, name)
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


@pytest.mark.parametrize(
  'name, full, config',
  [
    ('v2', 'imagenet_v2', 'matched-frequency'),
    ('sketch', 'imagenet_sketch', ''),
  ],
)
def test_sets_with_all_classes(name, full, config, trained):
  root, _ = trained
  images = fake_sets.prepare(root, full, range(12), size=(SIZE, SIZE))
  shutil.rmtree(root / full)
  best = logits_of(trained, images).argmax(-1)
  labels = [*best[:9], *((best[9:] + 1) % 1000)]
  fake_sets.prepare(root, full, labels, config, size=(SIZE, SIZE))
  (row,) = run_evaluate(trained, name)
  assert row['top1'] == 75.0 and row['data']['num_examples'] == 12


def test_any_real_label_is_right_and_images_without_are_left_out(trained):
  root, _ = trained
  name = imagenet_sets.REAL
  images = fake_sets.prepare(
    root, name, range(8), size=(SIZE, SIZE), sets=[[]] * 8
  )
  shutil.rmtree(root / name)
  best = logits_of(trained, images).argmax(-1)
  other = (best + 1) % 1000
  sets = [[other[0], best[0]], [best[1]], [], [other[3]], [other[4], other[3]],
          [best[5]], [], [best[7]]]  # fmt: skip
  fake_sets.prepare(root, name, other, size=(SIZE, SIZE), sets=sets)
  (row,) = run_evaluate(trained, 'real')
  assert row['top1'] == pytest.approx(100 * 4 / 6)
  assert row['data']['num_examples'] == 8 and row['unlabeled_examples'] == 2
  assert 'bad_examples' not in row


def test_a_set_that_is_not_prepared_says_the_command(trained, tmp_path):
  for name, command in (
    ('v2', 'prepare_tfds.py --name=imagenet_v2/matched-frequency --data_dir='),
    ('c', '--name=imagenet2012_corrupted/gaussian_noise_1 --data_dir='),
  ):
    with pytest.raises(ConfigError, match='not prepared') as error:
      run_evaluate(trained, name, f'--config.dataset.data_dir={tmp_path}')
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
def test_the_mce_of_a_fake_imagenet_c(trained):
  root, path = trained
  name = imagenet_sets.CORRUPTED
  made = {}
  for severity in (1, 5):
    fake_sets.prepare(root, name, [0] * 4, f'snow_{severity}', severity,
                      (224, 224))  # fmt: skip
  for full in imagenet_sets.SETS['c']:
    source = root / name / ('snow_5' if full.endswith('5') else 'snow_1')
    if not (root / full).exists():
      shutil.copytree(source, root / full)
  *rows, whole = run_evaluate(trained, 'c')
  assert len(rows) == 75
  for row in rows:
    made[row['data']['name']] = row['top1']
  assert whole['ce'] == imagenet_sets.corruption_errors(made)
  assert whole['mce'] == pytest.approx(np.mean(list(whole['ce'].values())))
  assert whole['top1'] == pytest.approx(np.mean(list(made.values())))
  assert whole['data']['num_examples'] == 300
  kept = workdir.read_run(path)  # the run is as it was
  assert kept['config']['dataset']['name'] == 'imagenet2012'
  assert evaluations_of(path)[-1] == whole


def evaluations_of(path):
  from conadv_jax.run import evaluations

  return evaluations.read(workdir.path_of(str(path)) / 'summary.json')[
    'evaluations'
  ]
