"""The model card of an exported network, as JSON and as Markdown."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from etils import epath
from flax import traverse_util

from conadv_jax import models
from conadv_jax.config import Config, from_config_dict, to_dict
from conadv_jax.data.datasets import DatasetSpec
from conadv_jax.experiment import Run
from conadv_jax.method.state import Snapshot
from conadv_jax.run.evaluator import eval_attack

Card = dict[str, Any]

KIND = 'conadv_jax model card'
LICENSE = 'Apache-2.0'
_TITLE = 'Concurrent Adversarial Learning for Large-Batch Training'
CITATION = f"""\
@inproceedings{{liu2022concurrent,
  title = {{{_TITLE}}},
  author = {{Liu, Yong and Chen, Xiangning and Cheng, Minhao and Hsieh, Cho-Jui
            and You, Yang}},
  booktitle = {{International Conference on Learning Representations}},
  year = {{2022}},
  url = {{https://arxiv.org/abs/2106.00221}}
}}"""


def make(run: Run, directory: epath.Path, step: int, weights: Snapshot) -> Card:
  """Makes the card of `weights`, those of `step` of the run in `directory`.

  `evaluations` lists only what was measured on these very weights; `top1` is
  None if nothing was.
  """
  config = run.config
  origin = json.loads((directory / 'config.json').read_text())
  resolved = to_dict(config)
  del resolved['dataset']['data_dir']  # a place on the machine that trained
  rows = evaluations(directory, config, step)
  return {
    'card': KIND,
    'model': config.model,
    'timm_name': timm_name(config.model),
    'parameters': count_parameters(weights),
    'method': config.method,
    'views': [list(pair) for pair in config.views],
    'staleness_steps': config.staleness_steps,
    'dataset': {
      'name': run.spec.name,
      'num_classes': run.spec.num_classes,
      'num_train': run.spec.num_train,
      'num_eval': run.spec.num_eval,
    },
    'step': step,
    'steps_of_schedule': run.steps.total,
    'epochs': step / run.steps.per_epoch,
    'route': config.eval.route,
    'use_ema': config.eval.use_ema,
    'top1': next((r['top1'] for r in rows if r['attack'] == 'none'), None),
    'evaluations': rows,
    'input': input_of(config, run.spec),
    'peak_learning_rate': config.optimizer.peak_learning_rate(
      config.batch_size
    ),
    'config': resolved,
    'git_commit': origin['git_commit'],
    'versions': origin['versions'],
    'devices': origin['devices'],
    'license': LICENSE,
    'citation': CITATION,
  }


def timm_name(model: str) -> str | None:
  """Returns timm's name of our `model`; None if timm has no such network."""
  if models.get(model).timm_module is None:
    return None
  return f'tf_{model}' if model.startswith('efficientnet') else model


def norms_of(weights: Snapshot) -> set[tuple[str, ...]]:
  """Returns the paths of the batch norms, whose leaves have a row per route."""
  stats = traverse_util.flatten_dict(weights.batch_stats)
  return {path[:-1] for path in stats}


def count_parameters(weights: Snapshot) -> int:
  """Counts the parameters of the network that one route is."""
  norms = norms_of(weights)
  shapes = {
    path: leaf.shape[1:] if path[:-1] in norms else leaf.shape
    for path, leaf in traverse_util.flatten_dict(weights.params).items()
  }
  return sum(map(math.prod, shapes.values()))


def evaluations(
  directory: epath.Path, config: Config, step: int
) -> list[dict[str, Any]]:
  """Finds the evaluations in summary.json of `step`, `eval.route` and EMA.

  Returns:
    Rows with `attack` ('none' for clean images), `epsilon`, `attack_steps` and
    `top1`; of several of one kind, the newest.
  """
  file = directory / 'summary.json'
  summary = json.loads(file.read_text()) if file.exists() else {}
  wanted = (step, config.eval.route, config.eval.use_ema)
  values = json.loads((directory / 'config.json').read_text())['config']
  trained = from_config_dict(values)
  rows = []
  at_end = (summary.get('steps'), trained.eval.route, trained.eval.use_ema)
  if 'top1' in summary and at_end == wanted:
    by_attack = {'none': summary['top1'], **summary['robust_top1_by_attack']}
    rows = [_row(trained, *item) for item in by_attack.items()]
  for row in summary.get('evaluations', []):
    if (row['step'], row['route'], row['use_ema']) == wanted:
      names = ('attack', 'epsilon', 'attack_steps', 'top1')
      rows.append({name: row[name] for name in names})
  # A later row of a kind replaces an earlier one.
  return list({tuple(r.values())[:-1]: r for r in rows}.values())


def _row(trained: Config, name: str, top1: float) -> dict[str, Any]:
  row = {'attack': name, 'epsilon': 0.0, 'attack_steps': 0, 'top1': top1}
  if name != 'none':
    attack = eval_attack(trained, name)
    row |= {'epsilon': attack.epsilon, 'attack_steps': attack.steps}
  return row


def input_of(config: Config, spec: DatasetSpec) -> dict[str, Any]:
  """Describes the preprocessing in the words of timm's `pretrained_cfg`.

  The central square, `crop_pct` of the shorter side, is resized. Images of a
  data set of one size are taken as they are.
  """
  height, width, channels = spec.image_shape
  return {
    'input_size': [channels, height, width],
    'mean': [value / 255 for value in spec.mean],
    'std': [value / 255 for value in spec.std],
    'interpolation': config.dataset.interpolation,
    'crop_pct': config.dataset.eval_crop_ratio if spec.encoded else 1.0,
    'crop_mode': 'center',
  }


def markdown(card: Mapping[str, Any]) -> str:
  """Renders the card as a page of Markdown."""
  dataset, config = card['dataset'], card['config']
  staleness = card['staleness_steps']
  method = card['method'] + (f' (staleness {staleness})' if staleness else '')
  weights = 'moving average' if card['use_ema'] else 'those of the last step'
  facts = {
    'method': method,
    'data': f'{dataset["name"]}, {dataset["num_train"]:,} training images, '
    f'{dataset["num_classes"]} classes',
    'training': f'{card["step"]:,} of {card["steps_of_schedule"]:,} steps, '
    f'{card["epochs"]:.2f} epochs, seed {config["seed"]}',
    'weights': f'{weights}; batch norm of the route {card["route"]!r}',
    'parameters': f'{card["parameters"]:,}',
    'input': _input(card),
    'commit': card['git_commit'] or 'unknown',
    'versions': ', '.join(f'{k} {v}' for k, v in card['versions'].items()),
    'devices': f'{card["devices"]["count"]} x {card["devices"]["kind"]}',
  }
  return '\n\n'.join(
    (
      f'# {card["model"]}, {card["method"]}, {dataset["name"]}',
      _table(('', ''), facts.items()),
      '## Accuracy',
      _accuracies(card),
      '## Loading',
      f'```python\n{card["usage"]}\n```',
      '## Recipe',
      _table(('', ''), _recipe(card).items()),
      '## Licence and citation',
      f'{card["license"]}; the data set has terms of its own.',
      f'```bibtex\n{card["citation"]}\n```\n',
    )
  )


def _input(card: Mapping[str, Any]) -> str:
  spec = card['input']
  channels, height, width = spec['input_size']
  text = (
    f'{height} x {width} x {channels}; mean {_numbers(spec["mean"])} and '
    f'standard deviation {_numbers(spec["std"])} of pixels in [0, 1]'
  )
  if card['config']['dataset']['image_size_px']:
    text += (
      f'; central crop of {spec["crop_pct"]:.4g} of the shorter side, '
      f'{spec["interpolation"]}'
    )
  return text


def _accuracies(card: Mapping[str, Any]) -> str:
  """A table of `evaluations`; 'not evaluated' where there is none."""
  rows = list(card['evaluations'])
  if card['top1'] is None:
    rows.insert(0, {'attack': 'none', 'top1': None})
  if all(row['attack'] == 'none' for row in rows):
    rows.append({'attack': 'any', 'top1': None})
  header = ('attack', 'radius, grey levels of 255', 'steps', 'top-1, %')
  lines = []
  for row in rows:
    top1 = 'not evaluated' if row['top1'] is None else f'{row["top1"]:.2f}'
    radius = f'{row["epsilon"]:g}' if row.get('epsilon') else ''
    steps = row.get('attack_steps') or ''
    lines.append((row['attack'], radius, steps, top1))
  images = f'On {card["dataset"]["num_eval"]:,} images that were not trained on'
  return f'{images}; attacks are in an L-infinity ball.\n\n' + _table(
    header, lines
  )


def _recipe(card: Mapping[str, Any]) -> dict[str, str]:
  """The settings that matter most; `config` in the JSON has all of them."""
  config = card['config']
  optimizer, schedule = config['optimizer'], config['schedule']
  attack, ema = config['attack'], config['ema']['decay']
  rows = {
    'batch': f'{config["batch_size"]:,} examples, batch norm over '
    f'{config["bn_group_size"]:,}, {config["dtype"]}',
    'optimizer': f'{optimizer["name"]}, momentum {optimizer["momentum"]:g}, '
    f'weight decay {optimizer["weight_decay"]:g}',
    'learning rate': f'peak {card["peak_learning_rate"]:g}, warm-up '
    f'{schedule["warmup_epochs"]:g} of {config["epochs"]:g} epochs, '
    f'{schedule["name"]} decay',
    'loss': f'label smoothing {config["loss"]["label_smoothing"]:g}',
  }
  if any(view == 'adv' for view, _ in card['views']):
    rows['attack'] = (
      f'{attack["preset"]}: {attack["norm"]} radius {attack["epsilon"]:g} '
      f'grey levels of 255, steps of {attack["step_size"]:g}: '
      f'{attack["steps"]}'
    )
  if ema:
    rows['average'] = f'decay {ema:g} per step'
  return rows


def _table(header, rows) -> str:
  lines = [header, ('---',) * len(header), *rows]
  return '\n'.join(f'| {" | ".join(map(str, line))} |' for line in lines)


def _numbers(values) -> str:
  return ', '.join(f'{value:.4g}' for value in values)
