"""Curves of runs beside each other, and beside a published one."""

import json

import helpers
import pytest

from conadv_jax.base.errors import ConfigError
from conadv_jax.config import to_dict
from conadv_jax.study import compare


def test_compare_needs_runs(tmp_path):
  with pytest.raises(ConfigError, match='holds no metrics.jsonl'):
    compare.draw([str(tmp_path)], str(tmp_path / 'x.png'))


def made_run(path, top1):
  """A work directory whose run has 10 steps an epoch, evaluated twice."""
  path.mkdir()
  config = helpers.make_config({})
  content = {'config': to_dict(config), 'steps': {'per_epoch': 10}}
  (path / 'config.json').write_text(json.dumps(content))
  rows = [
    {'step': 20, 'split': 'train', 'loss': 2.0, 'top1_clean': 9.0},
    *(
      {'step': 10 * epoch, 'split': 'test', 'top1': value}
      for epoch, value in top1.items()
    ),
  ]
  text = ''.join(json.dumps(row) + '\n' for row in rows)
  (path / 'metrics.jsonl').write_text(text)
  return str(path)


def test_a_published_curve_is_drawn_and_compared_with(tmp_path, capsys):
  run = made_run(tmp_path / 'a', {1: 0.5, 6: 3.0, 92: 76.0})
  output = tmp_path / 'x.png'
  compare.draw([run], str(output), 'mlperf_64k')
  lines = capsys.readouterr().out.splitlines()
  # Epoch 6 is between 4 (2.2) and 8 (4.9); 92 is the last (76.07).
  assert [line.split() for line in lines[1:3]] == [
    ['6.0', '3.00', '-0.55'],
    ['92.0', '76.00', '-0.07'],
  ]
  with_it = output.read_bytes()
  compare.draw([run], str(output))
  assert output.read_bytes() != with_it
  early = made_run(tmp_path / 'b', {1: 0.5})
  compare.draw([early], str(output), 'mlperf_64k')
  assert 'no evaluation where that is known' in capsys.readouterr().out
  compare.draw([run], str(output), 'mlperf_40k')  # with a gap from 10 to 62
  assert [x.split()[0] for x in capsys.readouterr().out.splitlines()[1:-1]] == [
    '6.0'
  ]
  with pytest.raises(ConfigError, match="unknown reference 'mlperf'.*_64k"):
    compare.draw([run], str(output), 'mlperf')
