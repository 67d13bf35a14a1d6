"""Results say what they were measured on; a data set is more than counts."""

import datetime as dt
import json
import os
import re
import shutil

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from etils import epath
from PIL import Image

from conadv_jax import evaluate, experiment, models, train
from conadv_jax.base.errors import ConfigError
from conadv_jax.checkpoints.checkpoint import Checkpoints
from conadv_jax.config import Dataset, from_config_dict
from conadv_jax.data import datasets
from conadv_jax.debug import replay
from conadv_jax.export import export
from conadv_jax.run import equal_hosts, provenance, workdir
from configs import digits
from scripts import make_fake_imagenet

SIZE = 8
CLASSES = ('0', '10', '2')
MEAN = np.array([123.675, 116.28, 103.53])
STD = np.array([58.395, 57.12, 57.375])


def make_folder(root, seed, classes=CLASSES, count=8):
  """Images of noise around a colour of their class, in both splits."""
  rng = np.random.default_rng(seed)
  for split in ('train', 'val'):
    for label, name in enumerate(classes):
      directory = root / split / name
      directory.mkdir(parents=True)
      for i in range(count):
        pixels = rng.integers(0, 160, (SIZE, SIZE, 3)) + 45 * label
        image = Image.fromarray(pixels.astype(np.uint8))
        image.save(directory / f'{i}.png')
  return root


def settings(folder, **fields):
  values = digits.get_config('batch_size=16')
  values.update_from_flattened_dict(
    {
      'dataset.name': 'image_folder',
      'dataset.data_dir': str(folder),
      'dataset.image_size_px': SIZE,
      'dataset.eval_crop_ratio': 1.0,
      'dataset.crop_padding_px': 0,
      'model': 'tiny',
      'bn_group_size': 2,
      'max_steps': 2,
      'optimizer.learning_rate': 8.0,
      'schedule.warmup_epochs': 0.0,
      'log_every_steps': 1,
      'attack_stats_every_steps': 0,
      'plots': False,
      'checkpoint.every_steps': 1,
      'checkpoint.keep': 9,
      'eval.attack': 'fgsm',
      'eval.batch_size': 16,
      **{name.replace('__', '.'): value for name, value in fields.items()},
    }
  )
  return from_config_dict(values)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """(work directory, its folder, another folder of the same classes)."""
  root = tmp_path_factory.mktemp('provenance')
  with pytest.MonkeyPatch.context() as patch:
    entry = models.Entry(helpers.TinyNet, SIZE)
    patch.setitem(models.MODELS, 'tiny', entry)
    one = make_folder(root / 'f1', 1)
    other = make_folder(root / 'f2', 2)
    train.train(settings(one), str(root / 'run'))
    yield root / 'run', one, other


@pytest.fixture
def run(trained, tmp_path):
  """A copy of all three, which a test may change."""
  for source in trained:
    shutil.copytree(source, tmp_path / source.name)
  return tuple(tmp_path / source.name for source in trained)


def read(path):
  return json.loads(path.read_text())


def run_evaluate(directory, folder, *flags):
  return evaluate.evaluate(
    ['prog', f'--workdir={directory}', f'--config.dataset.data_dir={folder}',
     *flags]
  )  # fmt: skip


def run_export(directory, output, *flags):
  argv = ['prog', f'--workdir={directory}', f'--output={output}', *flags]
  export.export(argv)
  return read(output.with_suffix('.json'))


def rename(folder, old, new):
  for split in ('train', 'val'):
    (folder / split / old).rename(folder / split / new)


def files_of(directory):
  return {
    path.relative_to(directory): (path.read_bytes(), path.stat().st_mtime_ns)
    for path in directory.rglob('*')
    if path.is_file()
  }


# ---- Which examples ---------------------------------------------------------


def test_the_run_knows_its_classes_and_examples(trained):
  directory, *_ = trained
  data = read(directory / 'config.json')['data']
  assert data['class_names'] == list(CLASSES) and data['num_classes'] == 3
  assert data['splits'] == {'train': 24, 'val': 24}
  assert (data['num_train'], data['num_eval']) == (24, 24)
  assert data['train_digest'] != data['eval_digest']


PERMUTED = re.escape("label 0 was '0', is '10'; label 1 was '10', is '2'; ")


def test_permuted_classes_are_refused_on_resume(run):
  """As many images and classes, but labels that mean something else."""
  directory, folder, _ = run
  rename(folder, '0', 'z')
  before = files_of(directory)
  with pytest.raises(ConfigError, match=PERMUTED) as error:
    train.train(settings(folder, max_steps=3), str(directory))
  assert "gone: '0'; new: 'z'" in str(error.value)
  assert files_of(directory) == before


def test_permuted_classes_are_refused_by_evaluate_and_replay(run):
  directory, folder, _ = run
  rename(folder, '0', 'z')
  with pytest.raises(ConfigError, match=PERMUTED):
    run_evaluate(directory, folder)
  with pytest.raises(ConfigError, match=PERMUTED):
    replay.main(
      ['prog', f'--workdir={directory}', '--replay=1',
       f'--config.dataset.data_dir={folder}']
    )  # fmt: skip


def test_another_number_of_classes_is_not_a_damaged_checkpoint(run, tmp_path):
  directory, *_ = run
  folder = make_folder(tmp_path / 'f4', 1, (*CLASSES, 'new'))
  message = "data.num_classes: 3 -> 4(.|\n)*new: 'new'"
  with pytest.raises(ConfigError, match=message):
    run_evaluate(directory, folder)
  with pytest.raises(ConfigError, match=message):
    train.train(settings(folder, max_steps=3), str(directory))


def test_as_many_other_files_are_refused(run):
  directory, folder, _ = run
  image = folder / 'train' / '0' / '3.png'
  image.rename(image.with_name('33.png'))
  with pytest.raises(ConfigError, match='data.train_digest: '):
    train.train(settings(folder, max_steps=3), str(directory))


@pytest.mark.parametrize(
  'file_format, changes', [('tfrecord', 1), ('array_record', 0)]
)
def test_a_cache_that_changes_the_order_is_other_data(
  file_format, changes, tmp_path
):
  make_fake_imagenet.prepare(str(tmp_path), file_format, 12, 4, 2)
  found = []
  for cache in ('none', 'raw'):
    config = Dataset(
      'imagenet2012', str(tmp_path), image_size_px=8, cache=cache
    )
    spec = datasets.resolve(config)
    source = spec.open('train', config)
    found.append(provenance.of_examples(spec, str(tmp_path), train=source))
  lines = provenance.changes(*found)
  assert len(lines) == changes
  assert all("shuffled: 'in windows' -> 'as a whole'" in line for line in lines)


def test_class_names_that_are_no_text_are_kept_escaped(tmp_path):
  """In Latin-1, say: config.json, the card and messages are UTF-8."""
  folder = make_folder(tmp_path / 'images', 1, ('a', 'b'))
  for split in ('train', 'val'):
    (folder / split / 'b').rename(folder / split / os.fsdecode(b'br\xfcke'))
  config = settings(folder).dataset
  spec = datasets.resolve(config)
  source = spec.open('train', config)
  data = provenance.of_examples(spec, str(folder), train=source)
  assert data['class_names'] == ['a', r'br\xfcke']
  (line,) = provenance.changes({'class_names': ['a', 'b']}, data)
  for text in (json.dumps(data, ensure_ascii=False), line):
    text.encode()


def test_hosts_compare_names_and_listings(trained, monkeypatch):
  """Host 1 sees another folder; both splits are as large."""
  _, folder, _ = trained
  build = experiment.build(settings(folder))
  source = build.spec.open('train', build.config.dataset)
  data = provenance.of_examples(build.spec, str(folder), train=source)
  other = data | {'train_digest': '0' * 12, 'class_names': ['0', '2', '10']}
  real = equal_hosts.hosts.gather

  def gather(name, facts):
    if name != 'the comparison of inputs':
      return real(name, facts)
    theirs = {f'data.{key}': value for key, value in other.items()}
    return [facts, facts | theirs]

  monkeypatch.setattr(equal_hosts.hosts, 'gather', gather)
  with pytest.raises(ConfigError, match='data.train_digest: .* on host 0') as e:
    equal_hosts.check_input(build, data)
  assert 'data.class_names' in str(e.value)


@pytest.mark.parametrize(
  'old, new, text',
  [
    (['a', 'b'], ['a', 'c'], "label 1 was 'b', is 'c'; gone: 'b'; new: 'c'"),
    (['a'], [], "gone: 'a'"),
    ([], ['a'], "new: 'a'"),
    (['a', 'b'], ['b', 'a'], "label 0 was 'a', is 'b'; label 1 was 'b', is"),
    (list('abcd'), list('efgh'), "label 0 was 'a', is 'e'; "),
  ],
)
def test_changes_of_classes_are_said_shortly(old, new, text):
  (line,) = provenance.changes({'class_names': old}, {'class_names': new})
  assert line.startswith(f'data.class_names: {text}')
  if len(old) > 3:
    assert "and 1 more labels; gone: 'a', 'b', 'c' and 1 more; new:" in line


# ---- Without the images -----------------------------------------------------


def test_export_needs_no_images_and_carries_the_class_names(run, tmp_path):
  directory, folder, other = run
  shutil.rmtree(folder)
  card = run_export(directory, tmp_path / 'm.safetensors')
  assert card['dataset']['class_names'] == list(CLASSES)
  assert card['dataset']['num_train'] == 24
  with safetensors.safe_open(str(tmp_path / 'm.safetensors'), 'numpy') as file:
    assert json.loads(file.metadata()['class_names']) == list(CLASSES)
  assert "'0' to '2' in the order" in (tmp_path / 'm.md').read_text()
  assert run_export(directory, tmp_path / 'm.stablehlo', '--format=stablehlo')


@pytest.mark.slow
def test_evaluate_needs_no_training_images_and_replay_no_others(run):
  directory, folder, _ = run
  replayed = ['prog', f'--workdir={directory}', '--replay=1',
              f'--config.dataset.data_dir={folder}']  # fmt: skip
  (folder / 'val').rename(folder / 'away')
  replay.main(replayed)
  (folder / 'away').rename(folder / 'val')
  shutil.rmtree(folder / 'train')
  rows = run_evaluate(directory, folder)
  known = read(directory / 'summary.json')['top1']
  assert rows[0]['top1'] == pytest.approx(known)


# ---- Nothing is lost or rewritten -------------------------------------------


@pytest.mark.slow
def test_results_on_other_examples_stand_beside_the_runs_own(run, tmp_path):
  directory, _, other = run
  before = read(directory / 'summary.json')
  rows = run_evaluate(directory, other)
  after = read(directory / 'summary.json')
  assert after == before | {'evaluations': before['evaluations'] + rows}
  one, two = before['evaluations'][0]['data'], rows[0]['data']
  assert (one['digest'], one['num_examples']) == (two['digest'], 24)
  assert one['content'] != two['content']  # the same names, other images
  card = run_export(directory, tmp_path / 'm.safetensors')
  assert card['top1'] == before['top1']
  assert before['evaluations'][0]['loss'] != rows[0]['loss']
  assert [row['data']['content'] for row in card['evaluations']] == [
    *2 * [one['content']], *3 * [two['content']]
  ]  # fmt: skip
  page = (tmp_path / 'm.md').read_text()
  foreign = f'{two["digest"]}/{two["content"]}'
  assert f"val: 24 (not the run's own; digest {foreign}) | none" in page
  assert str(other) not in page + (tmp_path / 'm.json').read_text()


def test_the_same_evaluation_again_takes_the_place_of_its_own(run):
  directory, folder, _ = run
  before = read(directory / 'summary.json')['evaluations']
  rows = run_evaluate(directory, folder, '--config.eval.attack=fgsm')
  assert read(directory / 'summary.json')['evaluations'] == rows
  for old, new in zip(before, rows, strict=True):
    assert old['data'] != new['data']  # the place alone
    assert old | {'data': 0} == new | {'data': 0, 'loss': old['loss']}


def test_a_finished_run_that_is_started_again_changes_nothing(run, capsys):
  directory, folder, _ = run
  before = files_of(directory)
  changed = settings(folder, eval__epsilon=2.0, eval__route='adv')
  done = train.train(changed, str(directory))
  assert files_of(directory) == before
  said = capsys.readouterr().out
  assert 'nothing left to train' in said
  assert 'eval.epsilon: 16.0 -> 2.0' in said and 'conadv_jax.evaluate' in said
  assert done['robust_epsilon'] == 16.0


@pytest.mark.slow
def test_the_summary_of_an_earlier_end_is_not_the_last_ones(run):
  """A run that was lengthened, and stopped before its last evaluation."""
  directory, folder, _ = run
  early = (directory / 'summary.json').read_text()
  train.train(settings(folder, max_steps=4), str(directory))
  (directory / 'summary.json').write_text(early)
  done = train.train(settings(folder, max_steps=4), str(directory))
  assert done['steps'] == 4
  assert read(directory / 'summary.json')['steps'] == 4


@pytest.mark.slow
def test_a_run_that_goes_on_loses_nothing(run, tmp_path):
  """Elsewhere, on data that moved: evaluations, and what it ran on before."""
  directory, folder, other = run
  rows = run_evaluate(directory, other, '--config.eval.route=adv')
  content = read(directory / 'config.json')
  (start,) = content['starts']
  before = dt.datetime.fromisoformat(start['time'])
  assert before < dt.datetime.now(dt.UTC)
  assert start == {'step': 0, 'time': start['time'], 'changed': {}}
  content['git_commit'], content['devices']['count'] = 'abc', 512
  (directory / 'config.json').write_text(json.dumps(content))
  folder = folder.rename(tmp_path / 'elsewhere')
  train.train(settings(folder, max_steps=4, eval__epsilon=2.0), str(directory))
  kept = read(directory / 'summary.json')['evaluations']
  assert [row['step'] for row in kept] == [2, 2, 2, 2, 2, 4, 4]
  assert all(row in kept for row in rows)
  first, last = read(directory / 'config.json')['starts']
  assert dt.datetime.fromisoformat(first['time']) == before
  assert dt.datetime.fromisoformat(last['time']) >= before
  assert last['step'] == 2
  place = last['changed'].pop('config.dataset.data_dir')
  assert place[0] != place[1] == str(folder)
  assert last['changed'] == {
    'config.max_steps': [2, 4],
    'config.eval.epsilon': [16.0, 2.0],
    'devices.count': [512, jax.device_count()],
    'git_commit': ['abc', workdir.git_commit()],
  }


@pytest.mark.slow
def test_a_damaged_summary_is_not_replaced(run):
  directory, folder, _ = run
  (directory / 'summary.json').write_text('{"top1": ')
  for command in (
    lambda: run_evaluate(directory, folder),
    lambda: train.train(settings(folder), str(directory)),
  ):
    with pytest.raises(ConfigError, match='summary.json: not readable'):
      command()
  assert (directory / 'summary.json').read_text() == '{"top1": '


# ---- Every number again -----------------------------------------------------


def recomputed(row, directory, folders):
  """Top-1 in percent of a row, from nothing but what the row says."""
  folder = folders[row['data']['content']]
  split = folder / row['data']['split']
  pixels, labels = [], []
  for label, name in enumerate(CLASSES):
    for path in sorted((split / name).iterdir()):
      pixels.append(np.asarray(Image.open(path)))
      labels.append(label)
  values = workdir.read_config(str(directory))
  values['dataset']['data_dir'] = str(folder)
  build = experiment.build(from_config_dict(values))
  _, state, _ = Checkpoints(epath.Path(directory), read_only=True).restore(
    build.abstract_state(), row['step']
  )
  state = jax.device_get(state)
  weights = state.ema if row['use_ema'] else state
  variables = {'params': weights.params, 'batch_stats': weights.batch_stats}
  route = ('clean', 'adv').index(row['route'])

  def logits_of(images):
    x = ((images - MEAN) / STD).astype(jnp.float32)[None, None]
    return build.apply_fn(variables, x, (route,), False)[0][0, 0]

  def loss_of(images):
    logs = jax.nn.log_softmax(logits_of(images))
    return -logs[np.arange(len(labels)), np.array(labels)].sum()

  images = jnp.asarray(np.stack(pixels), jnp.float32)
  if row['attack'] == 'fgsm':
    moved = images + row['epsilon'] * jnp.sign(jax.grad(loss_of)(images))
    images = moved.clip(0, 255)
  return 100 * np.mean(logits_of(images).argmax(-1) == np.array(labels))


@pytest.mark.slow
def test_every_number_is_what_its_settings_give(run, tmp_path):
  """Train, evaluate elsewhere and otherwise, resume, rerun, move, export."""
  directory, folder, other = run
  fgsm = '--config.eval.attack=fgsm'
  run_evaluate(directory, other, fgsm, '--config.eval.epsilon=2')
  run_evaluate(directory, folder, fgsm, '--config.eval.route=adv')
  longer = settings(folder, max_steps=4, eval__epsilon=30.0)
  train.train(longer, str(directory))
  train.train(
    settings(folder, max_steps=4, eval__epsilon=1.0, eval__route='adv'),
    str(directory),
  )
  moved = directory.rename(tmp_path / 'moved')
  folder = folder.rename(tmp_path / 'images')
  run_evaluate(moved, other, fgsm, '--config.eval.epsilon=8')
  card = run_export(moved, tmp_path / 'm.safetensors')

  folders = {}
  for place in (folder, other):
    config = settings(place).dataset
    source = datasets.resolve(config).open('eval', config)
    folders[source.content] = place
  final = read(moved / 'summary.json')
  rows = final['evaluations']
  assert len(rows) == 10 and len({row['step'] for row in rows}) == 2
  for row in rows + card['evaluations']:
    assert row['top1'] == pytest.approx(recomputed(row, moved, folders)), row
  # The figures that stand alone, with the settings that stand beside them.
  own = card['dataset']
  at_end = {name: final[name] for name in ('route', 'use_ema')} | {
    'step': final['steps'],
    'data': {'content': own['eval_content'], 'split': 'val'},
    'epsilon': final['robust_epsilon'],
  }
  top1 = recomputed(at_end | {'attack': 'none'}, moved, folders)
  robust = recomputed(at_end | {'attack': 'fgsm'}, moved, folders)
  assert final['top1'] == card['top1'] == pytest.approx(top1)
  assert final['robust_top1_by_attack'] == {'fgsm': pytest.approx(robust)}
  assert final['robust_epsilon'] == 30.0 and card['step'] == 4
  assert len({row['top1'] for row in rows}) > 3  # no constant
  # The page has the very rows of the card.
  page = (tmp_path / 'm.md').read_text()
  for row in card['evaluations']:
    radius = f'{row["epsilon"]:g}' if row['epsilon'] else ''
    steps = row['attack_steps'] or ''
    assert f'{row["attack"]} | {radius} | {steps} | {row["top1"]:.2f} |' in page
  assert len(card['evaluations']) == 4
