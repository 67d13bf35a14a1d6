"""ConfigDict at the edge -> one frozen, validated `Config`; epochs -> steps.

Config files (`configs/*.py`) return an `ml_collections.ConfigDict`. It becomes
the frozen dataclasses below exactly once, in `from_config_dict`; everything
after that reads attributes, so a misspelt field cannot fall back to a default.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from conadv_jax.base.errors import ConfigError, check_no_credentials, unknown


def _check(ok: bool, field: str, value: Any, fix: str) -> None:
  if not ok:
    raise ConfigError(f'{field}={value!r}: {fix}')


def _check_choice(field: str, value: str, choices: Iterable[str]) -> None:
  if not isinstance(value, str) or value not in choices:
    raise unknown(field, value, choices)


@dataclasses.dataclass(frozen=True)
class Method:
  """A preset over views, routes and staleness.

  Attributes:
    views: (view, route) pairs, in the order of the view axis V.
    staleness_steps: tau; None where no view is adversarial.
  """

  views: tuple[tuple[str, str], ...]
  staleness_steps: int | None = None

  @property
  def routes(self) -> tuple[str, ...]:
    """Names of the batch-norm rows, in the order of the rows."""
    return tuple(dict.fromkeys(route for _, route in self.views))


# `autoaugment` trains its one view on the `clean` route: that is the route of
# evaluation and export.
METHODS = {
  'baseline': Method((('clean', 'clean'),)),
  'autoaugment': Method((('aa', 'clean'),)),
  'disadv': Method((('clean', 'clean'), ('adv', 'adv')), 0),
  'conadv': Method((('clean', 'clean'), ('adv', 'adv')), 1),
  'conadv_aa': Method((('clean', 'clean'), ('aa', 'aa'), ('adv', 'adv')), 1),
}

# Attack presets, in grey levels of 255. `paper` is what the released code runs
# at a batch of 96K: its epsilon of 9 acts as about 4 grey levels there, as the
# images are standardised before a step that assumes [-1, 1].
ATTACK_PRESETS: dict[str, dict[str, Any]] = {
  'fgsm': dict(
    norm='linf', epsilon=4.0, step_size=None, steps=1, targeted=False,
    random_start_prob=0.0, train_mode=True, update_batch_stats=False,
  ),
  'paper': dict(
    norm='linf', epsilon=4.0, step_size=None, steps=1, targeted=True,
    random_start_prob=0.8, train_mode=True, update_batch_stats=False,
  ),
  'pgd': dict(
    norm='linf', epsilon=4.0, step_size=None, steps=5, targeted=False,
    random_start_prob=1.0, train_mode=True, update_batch_stats=False,
  ),
}  # fmt: skip


_RULES = {
  '>= 0': lambda x: x >= 0,
  '> 0': lambda x: x > 0,
  '>= 1': lambda x: x >= 1,
  '>= 2': lambda x: x >= 2,
  'in [0, 1)': lambda x: 0 <= x < 1,
  'in (0, 1]': lambda x: 0 < x <= 1,
  'in [0, 1]': lambda x: 0 <= x <= 1,
  'in [0, 2**31)': lambda x: 0 <= x < 2**31,
}


def _number(rule: str, note: str = '') -> Any:
  """A field whose value must be `rule`, a key of _RULES."""
  return dataclasses.field(metadata={'rule': rule, 'note': note})


def _choice(*choices: str) -> Any:
  """A field whose value must be one of `choices`."""
  return dataclasses.field(metadata={'choices': choices})


class _Group:
  """Checks the fields made by `_number` and `_choice`."""

  _prefix = ''

  def __post_init__(self):
    for field in dataclasses.fields(self):
      name, value = self._prefix + field.name, getattr(self, field.name)
      if 'choices' in field.metadata:
        _check_choice(name, value, field.metadata['choices'])
      if 'rule' in field.metadata and value is not None:
        rule, note = field.metadata['rule'], field.metadata['note']
        ok = _RULES[rule](value) and math.isfinite(value)
        _check(ok, name, value, f'must be {rule}{note and ", " + note}')


@dataclasses.dataclass(frozen=True)
class Dataset(_Group):
  _prefix = 'dataset.'

  name: str
  data_dir: str
  train_split: str
  eval_split: str
  pool: int = _number('>= 1', 'pixels a side; 1 = off')
  image_size_px: int = _number('>= 0', '0 = as stored')
  crop_padding_px: int = _number('>= 0', 'in pixels; 0 = no random crop')
  interpolation: str = _choice('bicubic', 'bilinear')
  antialias: bool
  eval_crop_ratio: float = _number('in (0, 1]')
  random_flip: bool
  autoaugment: str = _choice('v0', 'reduced_imagenet', 'randaugment')
  randaugment_layers: int = _number('>= 1')
  randaugment_magnitude: float = _number('>= 0', 'a level, 10 = full strength')
  aa_shares_crop: bool
  cache: str = _choice('none', 'raw', 'decoded')
  shuffle_window_shards: int = _number('>= 1', 'shards of a TFRecord data set')
  max_bad_share: float = _number('in [0, 1)', 'of the examples of a split')

  def __post_init__(self):
    super().__post_init__()
    check_no_credentials('dataset.data_dir', self.data_dir)


@dataclasses.dataclass(frozen=True)
class Network(_Group):
  """Options of networks; one that lacks an option refuses it."""

  _prefix = 'network.'

  space_to_depth: bool
  drop_path_rate: float | None = _number('in [0, 1)')
  dropout_rate: float | None = _number('in [0, 1)')


@dataclasses.dataclass(frozen=True)
class Attack(_Group):
  """How perturbations are made; see `conadv_jax.attack`."""

  _prefix = 'attack.'

  preset: str
  norm: str = _choice('linf', 'l2')
  epsilon: float = _number('>= 0', 'in grey levels of 255')
  step_size: float = _number('>= 0', 'in grey levels of 255')
  steps: int = _number('>= 1')
  targeted: bool
  random_start_prob: float = _number('in [0, 1]', 'a probability')
  train_mode: bool
  update_batch_stats: bool

  def __post_init__(self):
    super().__post_init__()
    _check(
      self.train_mode or not self.update_batch_stats,
      'attack.update_batch_stats',
      True,
      'needs attack.train_mode=True: in evaluation mode the attack computes '
      'no batch statistics',
    )


# Value of `optimizer.eps` where it is left None, by optimizer: none for LARS
# (MLPerf), the paper's for LAMB, TensorFlow EfficientNet's for RMSProp.
OPTIMIZER_EPS = {'lars': 0.0, 'sgd': 0.0, 'lamb': 1e-6, 'rmsprop': 1e-3}


@dataclasses.dataclass(frozen=True)
class Optimizer(_Group):
  _prefix = 'optimizer.'

  name: str = _choice(*OPTIMIZER_EPS)
  learning_rate: float = _number('> 0')
  base_batch_size: int = _number('>= 1')
  scaling: str = _choice('none', 'linear', 'sqrt')
  momentum: float = _number('in [0, 1)')
  nesterov: bool
  weight_decay: float = _number('>= 0')
  lars_denominator: str = _choice('norm_of_sum', 'sum_of_norms')
  trust_coefficient: float = _number('> 0')
  beta1: float = _number('in [0, 1)')
  beta2: float = _number('in [0, 1)')
  decay: float = _number('in [0, 1)')
  eps: float = _number('>= 0')

  def peak_learning_rate(self, batch_size: int) -> float:
    """learning_rate * (batch_size / base_batch_size) ** {0, 1, 0.5}."""
    power = {'none': 0.0, 'linear': 1.0, 'sqrt': 0.5}[self.scaling]
    return self.learning_rate * (batch_size / self.base_batch_size) ** power


@dataclasses.dataclass(frozen=True)
class Schedule(_Group):
  _prefix = 'schedule.'

  name: str = _choice('polynomial', 'cosine', 'exponential')
  warmup_epochs: float = _number('>= 0')
  power: float = _number('> 0')
  end_learning_rate: float = _number('>= 0')
  decay_rate: float = _number('in (0, 1]')
  decay_epochs: float = _number('> 0')


@dataclasses.dataclass(frozen=True)
class Loss(_Group):
  _prefix = 'loss.'

  label_smoothing: float = _number('in [0, 1)')
  view_weights: Mapping[str, float]

  def __post_init__(self):
    super().__post_init__()
    known = sorted({v for m in METHODS.values() for v, _ in m.views})
    for view, weight in self.view_weights.items():
      _check_choice('loss.view_weights', view, known)
      _check(weight >= 0, f'loss.view_weights.{view}', weight, 'must be >= 0')

  def weights_of(self, views: tuple[str, ...]) -> tuple[float, ...]:
    """Weights of `views`, summing to 1."""
    total = sum(self.view_weights[v] for v in views)
    return tuple(self.view_weights[v] / total for v in views)


@dataclasses.dataclass(frozen=True)
class Ema(_Group):
  _prefix = 'ema.'

  decay: float = _number('in [0, 1)', '0 = off')
  batch_stats: bool


@dataclasses.dataclass(frozen=True)
class Checkpoint(_Group):
  _prefix = 'checkpoint.'

  every_steps: int = _number('>= 0', '0 = at the end and when interrupted')
  keep: int = _number('>= 1')
  strict: bool


@dataclasses.dataclass(frozen=True)
class Spike(_Group):
  """Which losses are so high that their update is not applied."""

  _prefix = 'spike.'

  sigmas: float = _number('>= 0', '0 = off')
  window_steps: int = _number('>= 2')
  max_in_a_row: int = _number('>= 1')


@dataclasses.dataclass(frozen=True)
class Eval(_Group):
  _prefix = 'eval.'

  batch_size: int = _number('>= 1')
  every_steps: int = _number('>= 0', '0 = only at the end')
  attack: str = _choice('none', 'fgsm', 'pgd', 'all')
  epsilon: float = _number('>= 0', 'in grey levels of 255')
  pgd_steps: int = _number('>= 1')
  route: str
  use_ema: bool


@dataclasses.dataclass(frozen=True)
class Config(_Group):
  """Everything about a run; `configs/common.py` documents every field."""

  seed: int = _number('in [0, 2**31)')
  method: str = _choice(*METHODS)
  model: str
  network: Network
  dataset: Dataset
  batch_size: int = _number('>= 1')
  epochs: float = _number('> 0')
  max_steps: int = _number('>= 0', '0 = off')
  staleness_steps: int = _number('>= 0')
  bn_group_size: int = _number('>= 1', 'in examples')
  bn_momentum: float = _number('in [0, 1)', 'the share of the old statistic')
  bn_epsilon: float = _number('> 0')
  dtype: str = _choice('float32', 'bfloat16', 'float64')
  microbatches: int = _number('>= 1')
  remat: str = _choice('none', 'blocks')
  shard_optimizer: bool
  grad_allreduce_dtype: str = _choice('float32', 'bfloat16')
  grad_buckets: int = _number('>= 0', '0 = as the compiler sees fit')
  xla_flags: str = _choice('none', 'overlap', 'multislice')
  loss: Loss
  attack: Attack
  optimizer: Optimizer
  schedule: Schedule
  ema: Ema
  checkpoint: Checkpoint
  eval: Eval
  log_every_steps: int = _number('>= 1')
  attack_stats_every_steps: int = _number('>= 0', '0 = off')
  max_nonfinite_steps: int = _number('>= 1')
  spike: Spike
  hang_timeout_seconds: int = _number('>= 0', '0 = off')

  def __post_init__(self):
    super().__post_init__()
    self._check_staleness()
    self._check_loss()
    if self.batch_size % self.bn_group_size:
      groups = max(1, round(self.batch_size / self.bn_group_size))
      raise ConfigError(
        f'batch_size={self.batch_size}: must be a multiple of '
        f'bn_group_size={self.bn_group_size}: set that too, or the nearest: '
        f'batch_size={groups * self.bn_group_size}'
      )
    groups = self.batch_size // self.bn_group_size
    _check(
      groups % self.microbatches == 0,
      'microbatches',
      self.microbatches,
      f'must divide the {groups} batch-norm groups (batch_size='
      f'{self.batch_size}, bn_group_size={self.bn_group_size})',
    )
    _check(
      self.schedule.warmup_epochs <= self.epochs,
      'schedule.warmup_epochs',
      self.schedule.warmup_epochs,
      f'must not exceed epochs={self.epochs}',
    )
    _check_choice('eval.route', self.eval.route, self.routes)
    _check(
      not self.eval.use_ema or self.ema.decay > 0,
      'eval.use_ema',
      True,
      'there is no average to evaluate: set ema.decay > 0',
    )

  def _check_staleness(self):
    tau = self.staleness_steps
    _check(
      self.is_adversarial or tau == 0,
      'staleness_steps',
      tau,
      f'method {self.method!r} has no adversarial view; leave it unset',
    )
    _check(
      self.method != 'disadv' or tau == 0,
      'staleness_steps',
      tau,
      "method 'disadv' is staleness 0; use method 'conadv' for more",
    )

  def _check_loss(self):
    views = [view for view, _ in self.views]
    weights = self.loss.view_weights
    missing = sorted(set(views) - set(weights))
    _check(not missing, 'loss.view_weights', missing, 'views without a weight')
    _check(
      sum(weights[view] for view in views) > 0,
      'loss.view_weights',
      dict(weights),
      f'the weights of the views of {self.method!r} must not all be 0',
    )

  @property
  def views(self) -> tuple[tuple[str, str], ...]:
    """(view, route) pairs in the order of the view axis."""
    return METHODS[self.method].views

  @property
  def routes(self) -> tuple[str, ...]:
    return METHODS[self.method].routes

  @property
  def is_adversarial(self) -> bool:
    return METHODS[self.method].staleness_steps is not None


@dataclasses.dataclass(frozen=True)
class Steps:
  """A run's length in steps: the only place where epochs become steps.

  Attributes:
    total: optimizer steps of the whole schedule, round(epochs * N / B), >= 1.
    stop: the step to stop at: `total`, or `max_steps` if that is sooner.
    warmup: steps of linear warm-up.
    decay: steps per epoch-counted decay of the exponential schedule.
    per_epoch: N / B, not rounded.
  """

  total: int
  stop: int
  warmup: int
  decay: int
  per_epoch: float

  @classmethod
  def of(cls, config: Config, num_examples: int) -> Steps:
    per_epoch = num_examples / config.batch_size

    def steps(epochs: float) -> int:
      return round(epochs * per_epoch)

    total = max(1, steps(config.epochs))
    return cls(
      total=total,
      stop=min(total, config.max_steps or total),
      warmup=min(steps(config.schedule.warmup_epochs), total),
      decay=max(1, steps(config.schedule.decay_epochs)),
      per_epoch=per_epoch,
    )


def from_config_dict(values: Mapping[str, Any]) -> Config:
  """Resolves presets and validates; the only way from a file to a `Config`.

  Fields that are None take the value of their preset: `staleness_steps` the
  method's, the fields of `attack` those of `attack.preset`, `optimizer.eps` the
  optimizer's, `grad_buckets` that of `xla_flags`.

  Raises:
    ConfigError: for an unknown, missing or mistyped field, or a value out of
      range.
  """
  values = _plain(values)
  _fill_presets(values)
  return _build(Config, values, '')


def _fill_presets(values: dict[str, Any]) -> None:
  """Gives the None fields of `values` their preset's value, in place.

  A field that is not there at all is left for `_build` to report.
  """
  if 'method' in values:
    _check_choice('method', values['method'], METHODS)
    if values.get('staleness_steps', 0) is None:
      tau = METHODS[values['method']].staleness_steps
      values['staleness_steps'] = tau or 0
  attack = values.get('attack')
  if isinstance(attack, dict) and 'preset' in attack:
    _check_choice('attack.preset', attack['preset'], ATTACK_PRESETS)
    for field, value in ATTACK_PRESETS[attack['preset']].items():
      if attack.get(field, 0) is None:
        attack[field] = value
    epsilon = attack.get('epsilon')
    if attack.get('step_size', 0) is None and isinstance(epsilon, float):
      attack['step_size'] = epsilon if attack['steps'] == 1 else epsilon / 4
  if values.get('grad_buckets', 0) is None:
    values['grad_buckets'] = int(values.get('xla_flags', 'none') != 'none')
  optimizer = values.get('optimizer')
  if isinstance(optimizer, dict) and 'name' in optimizer:
    _check_choice('optimizer.name', optimizer['name'], OPTIMIZER_EPS)
    if optimizer.get('eps', 0) is None:
      optimizer['eps'] = OPTIMIZER_EPS[optimizer['name']]


def to_dict(config: Config) -> dict[str, Any]:
  """Plain nested dict, ready for JSON; `from_config_dict` reads it back."""
  return dataclasses.asdict(config)


def describe(config: Config) -> str:
  """The resolved configuration as an aligned two-column table."""
  rows = list(flatten(to_dict(config)).items())
  width = max(len(name) for name, _ in rows)
  return '\n'.join(f'{name:<{width}}  {value}' for name, value in rows)


def flatten(values: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  """{'a': {'b': 1}} -> {'a.b': 1}."""
  flat = {}
  for name, value in values.items():
    if isinstance(value, Mapping):
      flat |= flatten(value, f'{prefix}{name}.')
    else:
      flat[prefix + name] = value
  return flat


def changes(
  old: Config, new: Config, free: tuple[str, ...]
) -> dict[str, tuple[Any, Any]]:
  """Fields that differ, {name: (old, new)}, but for those `free` to differ.

  A name in `free` that ends with a dot stands for its whole group.
  """
  before, after = flatten(to_dict(old)), flatten(to_dict(new))
  groups = tuple(name for name in free if name.endswith('.'))
  return {
    name: (before[name], after[name])
    for name in after
    if before[name] != after[name]
    and name not in free
    and not name.startswith(groups)
  }


def parse_args(arg: str | None, **defaults: Any) -> dict[str, Any]:
  """Arguments of a config file: 'k=v,...' typed like `defaults`.

  Raises:
    ConfigError: for an unknown name or a value that does not parse.
  """
  parsed = dict(defaults)
  for item in (arg or '').split(','):
    if not item:
      continue
    name, equals, text = item.partition('=')
    if name not in defaults:
      raise unknown('config argument', name, defaults)
    kind = type(defaults[name])
    try:
      if not equals:
        raise ValueError('missing "=value"')
      if kind is bool:
        parsed[name] = {'true': True, 'false': False}[text.lower()]
      else:
        parsed[name] = kind(text)
    except (ValueError, KeyError) as error:
      raise ConfigError(
        f'config argument {item!r}: {name} needs a {kind.__name__}'
      ) from error
  return parsed


def _plain(values: Any) -> Any:
  """ConfigDict or mapping -> nested plain dicts (a copy)."""
  if hasattr(values, 'to_dict'):
    values = values.to_dict()
  if isinstance(values, Mapping):
    return {str(k): _plain(v) for k, v in values.items()}
  return values


def _build(cls: type, values: Mapping[str, Any], prefix: str) -> Any:
  """Builds dataclass `cls` from `values`, checking names and types."""
  types = typing.get_type_hints(cls)
  if not isinstance(values, Mapping):
    raise ConfigError(f'{prefix[:-1]}={values!r}: must be a group of fields')
  for name in values:
    if name not in types:
      raise unknown('config field', prefix + name, (prefix + t for t in types))
  missing = [prefix + name for name in types if name not in values]
  if missing:
    raise ConfigError(
      f'missing config fields: {", ".join(missing)}; start from '
      'configs/common.py, which has them all'
    )
  fields = {}
  for name, kind in types.items():
    if dataclasses.is_dataclass(kind):
      fields[name] = _build(kind, values[name], f'{prefix}{name}.')
    else:
      fields[name] = _typed(kind, values[name], prefix + name)
  return cls(**fields)


def _typed(kind: Any, value: Any, field: str) -> Any:
  if isinstance(kind, types.UnionType):  # float | None
    if value is None:
      return None
    kind, _ = typing.get_args(kind)
  if typing.get_origin(kind) is not None:
    if not isinstance(value, Mapping):
      raise ConfigError(f'{field}={value!r}: must be a mapping name -> number')
    return {k: _typed(float, v, f'{field}.{k}') for k, v in value.items()}
  if kind is float and isinstance(value, int) and not isinstance(value, bool):
    value = float(value)
  if type(value) is not kind:
    raise ConfigError(
      f'{field}={value!r}: must be {kind.__name__}, is {type(value).__name__}'
    )
  if kind is float and not math.isfinite(value):
    raise ConfigError(f'{field}={value!r}: must be finite')
  return value
