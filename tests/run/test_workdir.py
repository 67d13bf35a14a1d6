"""What a rerun in a work directory may change, and what not."""

import json

import pytest

from conadv_jax import experiment, train
from conadv_jax.base.errors import ConfigError
from conadv_jax.config import from_config_dict
from conadv_jax.run import workdir
from conadv_jax.run.reopen import parse_args
from configs import digits

DATA = {'version': '1.0.0', 'num_train': 1437, 'num_eval': 360}


def build(**fields):
  values = digits.get_config('batch_size=64')
  values.bn_group_size = 8
  values.update_from_flattened_dict(
    {name.replace('__', '.'): value for name, value in fields.items()}
  )
  return experiment.build(from_config_dict(values))


@pytest.fixture
def run(tmp_path):
  """A work directory in which a run has begun."""
  first = build()
  path = workdir.prepare(str(tmp_path / 'run'), first, DATA)
  workdir.write_config(path, first, DATA)
  return path


@pytest.mark.parametrize(
  'name, value',
  [
    ('batch_size', 128),
    ('seed', 1),
    ('model', 'resnet20'),
    ('method', 'baseline'),
    ('dtype', 'bfloat16'),  # restored as bfloat16 without a word by orbax
    ('optimizer.momentum', 0.5),
    ('attack.epsilon', 1.0),
    ('dataset.train_split', 'train[:1000]'),
    ('bn_group_size', 16),
    ('spike.sigmas', 6.0),
    ('shard_optimizer', True),
  ],
)
def test_a_change_that_alters_the_run_is_refused_with_a_diff(name, value, run):
  before = (run / 'config.json').read_text()
  with pytest.raises(ConfigError) as info:
    workdir.prepare(str(run), build(**{name.replace('.', '__'): value}), DATA)
  assert f'{name}: ' in str(info.value)
  assert f' -> {value!r}' in str(info.value)
  assert (run / 'config.json').read_text() == before


@pytest.mark.parametrize('name', ['run[1]', 'a*', 'what?', 'a]/b'])
def test_a_name_that_orbax_takes_for_a_pattern_is_refused(name, tmp_path):
  """Its checkpoints could not be read."""
  with pytest.raises(ConfigError, match='use a name without them'):
    workdir.prepare(str(tmp_path / name), build(), DATA)
  assert not (tmp_path / name).exists()


@pytest.mark.parametrize('command', [train.train, None])
def test_a_file_is_refused_before_the_data_is_looked_at(command, tmp_path):
  (tmp_path / 'run').write_text('')
  values = digits.get_config()
  values.dataset.name = 'image_folder'  # there is none
  with pytest.raises(ConfigError, match='is a file; name a directory'):
    if command:
      command(from_config_dict(values), str(tmp_path / 'run'))
    else:
      parse_args(['prog', f'--workdir={tmp_path / "run"}'])


def test_the_folder_that_a_run_is_started_in_counts_as_well(
  tmp_path, monkeypatch
):
  (tmp_path / 'day[1]').mkdir()
  monkeypatch.chdir(tmp_path / 'day[1]')
  with pytest.raises(ConfigError, match=r'day\[1\]/run.*has \[ \] in its name'):
    workdir.prepare('run', build(), DATA)


def test_a_tilde_is_the_home(run, monkeypatch):
  monkeypatch.setenv('HOME', str(run.parent))
  path = workdir.prepare('~/run', build(), DATA)
  assert path == run
  assert parse_args(['prog', '--workdir=~/run'])[0] == run


@pytest.mark.parametrize('name', DATA)
def test_other_data_is_refused(name, run):
  other = DATA | {name: 'other'}
  with pytest.raises(ConfigError, match=f'data.{name}: .* -> .other.'):
    workdir.prepare(str(run), build(), other)


@pytest.mark.parametrize(
  'name, value',
  [
    ('log_every_steps', 7),
    ('checkpoint.every_steps', 11),
    ('checkpoint.keep', 1),
    ('max_steps', 50),
    ('eval.every_steps', 3),
    ('hang_timeout_seconds', 60),
    ('microbatches', 2),
    ('xla_flags', 'overlap'),
    ('dataset.max_bad_share', 0.1),
  ],
)
def test_a_change_that_does_not_alter_the_run_passes(name, value, run):
  changed = build(**{name.replace('.', '__'): value})
  assert workdir.prepare(str(run), changed, DATA) == run


def test_epochs_can_be_added_but_not_taken_away(run, capsys):
  epochs = build().config.epochs
  workdir.prepare(str(run), build(epochs=epochs + 10), DATA)
  assert 'follows the longer schedule' in capsys.readouterr().out
  with pytest.raises(ConfigError, match='epochs: '):
    workdir.prepare(str(run), build(epochs=epochs - 10), DATA)


def test_what_an_older_run_did_not_record_is_not_compared(run):
  known = DATA | {'class_names': ['a', 'b'], 'train_digest': '0' * 12}
  assert workdir.prepare(str(run), build(), known) == run


def test_other_versions_and_devices_are_said(run, capsys):
  workdir.prepare(str(run), build(), DATA)
  assert 'last bits' not in capsys.readouterr().out
  content = json.loads((run / 'config.json').read_text())
  content['versions']['jax'] = '0.1'
  content['devices']['count'] = 512
  (run / 'config.json').write_text(json.dumps(content))
  workdir.prepare(str(run), build(), DATA)
  said = capsys.readouterr().out
  assert "versions.jax: '0.1' -> " in said
  assert 'devices.count: 512 -> 8' in said


@pytest.mark.parametrize('content', ['', '{}', '[]', '{"config": 1', 'null'])
def test_an_unreadable_config_names_its_path(content, run):
  (run / 'config.json').write_text(content)
  with pytest.raises(ConfigError, match='config.json'):
    workdir.read_config(str(run))


def edit_config(run, edit):
  content = json.loads((run / 'config.json').read_text())
  edit(content['config'])
  (run / 'config.json').write_text(json.dumps(content))


def test_a_field_that_an_older_run_lacks_takes_its_default(run):
  def edit(values):
    del values['dataset']['pool'], values['attack']['rule'], values['spike']

  edit_config(run, edit)
  workdir.prepare(str(run), build(), DATA)
  assert 'spike' not in workdir.read_config(str(run))
  _, config = parse_args(
    ['prog', f'--workdir={run}', '--config.eval.route=adv']
  )
  assert config.dataset.pool == 1 and config.eval.route == 'adv'
  assert config.attack == build().config.attack


def test_fields_with_a_new_name_are_all_named_with_the_file(run):
  def edit(values):
    for group, new, old in (
      ('attack', 'epsilon', 'epsilon_px'),
      ('eval', 'attack_steps', 'pgd_steps'),
    ):
      values[group][old] = values[group].pop(new)

  edit_config(run, edit)
  with pytest.raises(ConfigError) as info:
    parse_args(['prog', f'--workdir={run}'])
  for part in (
    f'{run}/config.json: ',
    'attack.epsilon_px -> attack.epsilon',
    'eval.pgd_steps -> eval.attack_steps',
  ):
    assert part in str(info.value)
