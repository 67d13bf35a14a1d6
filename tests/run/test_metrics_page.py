"""docs/metrics.md lists the keys that a run writes, and no others."""

import json
import pathlib
import re

import helpers
import pytest

from conadv_jax import evaluate, models, train
from conadv_jax.config import from_config_dict
from conadv_jax.run import log, metrics
from configs import digits

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Needs images that cannot be decoded, which tests/data has.
DAMAGED = 'if there are any'


def page():
  """{section: {key: when it is written}}."""
  found = {}
  text = (ROOT / 'docs' / 'metrics.md').read_text()
  for heading, body in re.findall(r'^##+ (.*)\n((?:(?!#).*\n)*)', text, re.M):
    split = re.match(r'split `(\w+)`', heading)
    rows = re.findall(r'^\| `(\w+)` \|[^|]*\| ([^|]*) \|', body, re.M)
    if rows:
      found[split[1] if split else heading] = dict(rows)
  return found


def general(key):
  """A key or split with VIEW and ATTACK for their names."""
  key = re.sub(r'^(loss|top1)_(clean|aa|adv)$', r'\1_VIEW', key)
  return re.sub(r'^test_\w+$', 'test_ATTACK', key)


def written(directory, **fields):
  """{section: keys} of a run of three steps in a new directory."""
  values = digits.get_config('batch_size=64')
  values.update_from_flattened_dict(
    {
      'model': 'tiny',
      'bn_group_size': 8,
      'max_steps': 3,
      'log_every_steps': 1,
      'eval.every_steps': 2,
      'plots': False,
      **{name.replace('__', '.'): value for name, value in fields.items()},
    }
  )
  train.train(from_config_dict(values), str(directory))
  found = {}
  for row in metrics.read_metrics(directory):
    keys = {general(key) for key in row.keys() - {'step', 'split'}}
    found.setdefault(general(row['split']), set()).update(keys)
  return found


def keys_of_summary(directory):
  return set(json.loads((directory / 'summary.json').read_text()))


@pytest.fixture(autouse=True)
def fast_run(monkeypatch):
  monkeypatch.setitem(models.MODELS, 'tiny', models.Entry(helpers.TinyNet, 4))


@pytest.mark.slow
def test_the_page_has_every_key_that_a_run_with_everything_on_writes(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(log, 'peak_flops_per_sec', lambda kind: 1e12)
  found = written(
    tmp_path,
    method='conadv',
    attack_stats_every_steps=1,
    spike__sigmas=6.0,
    noise_scale=True,
    eval__attack='fgsm',
  )
  rows = evaluate.evaluate(
    ['prog', f'--workdir={tmp_path}', '--config.eval.attack=none']
  )
  found['summary.json'] = keys_of_summary(tmp_path)
  found['Rows of `evaluations`'] = {key for row in rows for key in row}
  assert found == {
    section: {key for key, when in keys.items() if when != DAMAGED}
    for section, keys in page().items()
  }


@pytest.mark.slow
def test_a_run_with_everything_off_writes_what_is_always_written(tmp_path):
  found = written(
    tmp_path,
    method='baseline',
    staleness_steps=0,
    optimizer__name='sgd',
    eval__attack='none',
  )
  found['summary.json'] = keys_of_summary(tmp_path)
  always = {
    section: {key for key, when in keys.items() if when == 'always'}
    for section, keys in page().items()
  }
  del always['Rows of `evaluations`']
  assert found == {section: keys for section, keys in always.items() if keys}
