"""The model card of an exported network, as JSON and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from flax import traverse_util

from conadv_jax import models
from conadv_jax.config import Config
from conadv_jax.data.datasets import DatasetSpec
from conadv_jax.experiment import Run
from conadv_jax.method.state import Snapshot
from conadv_jax.methods import METHODS
from conadv_jax.models.norm import norms_of
from conadv_jax.run import evaluations, provenance

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


def make(
  run: Run,
  origin: Mapping[str, Any],
  rows: Sequence[evaluations.Row],
  step: int,
  weights: Snapshot,
) -> Card:
  """Makes the card of `weights`.

  Args:
    run: as it is evaluated.
    origin: what config.json says of the run; see `workdir.read_run`.
    rows: what was measured on these very weights, the newest last. `top1` is
      that of the run's own eval split, or None.
    step: that the weights were trained to.
    weights: one snapshot of the run.
  """
  config, data = run.config, origin.get('data', {})
  dataset = dict(origin['config']['dataset'])
  del dataset['data_dir']  # a place on the machine that trained
  return {
    'card': KIND,
    'model': config.model,
    'timm_name': timm_name(config.model),
    'parameters': count_parameters(weights),
    'method': config.method,
    'views': [list(pair) for pair in config.views],
    'staleness_steps': config.staleness_steps,
    'dataset': _dataset(run.spec, data),
    'step': step,
    'steps_of_schedule': run.steps.total,
    'epochs': step / run.steps.per_epoch,
    'route': config.eval.route,
    'use_ema': config.eval.use_ema,
    'top1': next(
      (
        row['top1']
        for row in reversed(rows)
        if row['attack'] == 'none' and provenance.is_own(data, row['data'])
      ),
      None,
    ),
    'evaluations': list(rows),
    'input': input_of(config, run.spec),
    'peak_learning_rate': config.optimizer.peak_learning_rate(
      config.batch_size
    ),
    'config': {**origin['config'], 'dataset': dataset},
    'git_commit': origin['git_commit'],
    'versions': origin['versions'],
    'devices': origin['devices'],
    'license': LICENSE,
    'citation': CITATION,
  }


def _dataset(spec: DatasetSpec, data: Mapping[str, Any]) -> dict[str, Any]:
  """What the run was trained and evaluated on; `data` is of config.json."""
  return {
    'name': spec.name,
    'num_classes': spec.num_classes,
    'class_names': data.get('class_names', []),
    'num_train': spec.num_train,
    'num_eval': spec.num_eval,
    'version': data.get('version', ''),
    'train_digest': data.get('train_digest'),
    'eval_digest': data.get('eval_digest'),
    'eval_content': data.get('eval_content'),
  }


def timm_name(model: str) -> str | None:
  """Returns timm's name of our `model`; None if timm has no such network."""
  if models.get(model).timm_module is None:
    return None
  return f'tf_{model}' if model.startswith('efficientnet') else model


def count_parameters(weights: Snapshot) -> int:
  """Counts the parameters of the network that one route is."""
  norms = norms_of(weights.batch_stats)
  shapes = {
    path: leaf.shape[1:] if path[:-1] in norms else leaf.shape
    for path, leaf in traverse_util.flatten_dict(weights.params).items()
  }
  return sum(map(math.prod, shapes.values()))


def input_of(config: Config, spec: DatasetSpec) -> dict[str, Any]:
  """Describes the preprocessing in the words of timm's `pretrained_cfg`.

  Where they are `resized`, the central square, `crop_pct` of the shorter side,
  is cut out first. (timm resizes first: other pixels.) With `antialias` the
  result is Pillow's; without, that of `tf.image.resize`. Images of a data set
  of one size are taken as they are.
  """
  height, width, channels = spec.image_shape
  return {
    'input_size': [channels, height, width],
    'mean': [value / 255 for value in spec.mean],
    'std': [value / 255 for value in spec.std],
    'resized': spec.encoded,
    'interpolation': config.dataset.interpolation,
    'antialias': config.dataset.antialias,
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
    f'{dataset["num_classes"]} classes' + _named(dataset['class_names']),
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
  if spec['resized']:
    low_pass = 'with' if spec['antialias'] else 'without'
    text += (
      f'; the central square of {spec["crop_pct"]:.4g} of the shorter side, '
      f'then resized, {spec["interpolation"]}, {low_pass} antialiasing'
    )
  return text


def _accuracies(card: Mapping[str, Any]) -> str:
  """A table of `evaluations`; 'not evaluated' where there is none."""
  rows = list(card['evaluations'])
  if card['top1'] is None:
    rows.insert(0, {'attack': 'none', 'top1': None})
  if all(row['attack'] == 'none' for row in rows):
    rows.append({'attack': 'any', 'top1': None})
  radii = 'radius, grey levels of 255'
  header = ('images', 'attack', radii, 'steps', 'top-1, %')
  lines = []
  for row in rows:
    top1 = 'not evaluated' if row['top1'] is None else f'{row["top1"]:.2f}'
    radius = f'{row["epsilon"]:g}' if row.get('epsilon') else ''
    if radius and row.get('norm') == 'l2':
      radius += ' in L2'
    steps = row.get('attack_steps') or ''
    if (restarts := row.get('restarts', 1)) > 1:
      steps = f'{steps}, {restarts} restarts'
    images = _images(card, row)
    lines.append((images, row['attack'], radius, steps, top1))
  text = 'Attacks are in an L-infinity ball where no other is named.\n\n'
  return text + _table(header, lines)


def _named(names: Sequence[str]) -> str:
  """The first and last of the class names; the JSON has them all."""
  if not names:
    return ''
  return f', {names[0]!r} to {names[-1]!r} in the order of the labels'


def _images(card: Mapping[str, Any], row: Mapping[str, Any]) -> str:
  """What a result was measured on; '' where there is none."""
  data = row.get('data')
  if data is None:
    return ''
  text = f'{data["name"]}, {data["split"]}: {data["num_examples"]:,}'
  if bad := row.get('bad_examples'):
    text += f', {bad:g} of them unreadable'
  if not provenance.is_own(card['dataset'], data):
    digests = f'{data["digest"]}/{data["content"]}'
    text += f" (not the run's own; digest {digests})"
  return text


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
      f'grey levels of 255, gradient steps: {attack["steps"]}'
    )
    if attack['steps']:
      rows['attack'] += f' of {attack["step_size"]:g} each'
  ascent = METHODS[card['method']].ascent
  if ascent != 'none':
    sam = config['sam']
    rows['perturbed weights'] = (
      f'along {ascent}: rho {sam["rho"]:g}, normalize {sam["normalize"]}, mask '
      f'{sam["mask"]}, groups of {sam["group_size"] or config["batch_size"]:,}'
    )
  if ema:
    rows['average'] = f'decay {ema:g} per step'
  return rows


def _table(header, rows) -> str:
  lines = [header, ('---',) * len(header), *rows]
  return '\n'.join(f'| {" | ".join(map(str, line))} |' for line in lines)


def _numbers(values) -> str:
  return ', '.join(f'{value:.4g}' for value in values)
