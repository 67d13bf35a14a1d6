"""One frozen `Config`: every field with its default, rule and meaning.

A recipe (`configs/*.py`) changes a few fields of `default_config()`, an
`ml_collections.ConfigDict`. `from_config_dict` turns that into a `Config`
exactly once; everything after it reads attributes, so a misspelt field cannot
fall back to a default. Epochs become steps in one place, `Steps`.

A field that is None takes the value of its preset then: `staleness_steps`,
`attack.preset`, `sam.rho` and `eval.route` the method's, the other fields of
`attack` those of `attack.preset`, `optimizer.eps` the optimizer's,
`grad_buckets` that of `xla_flags`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import ml_collections

from conadv_jax.base import fields
from conadv_jax.base.errors import ConfigError, check_no_credentials
from conadv_jax.base.fields import (
  Group,
  check,
  check_choice,
  choice,
  flatten,
  number,
  setting,
)
from conadv_jax.config.groups import (
  OPTIMIZER_EPS,
  Checkpoint,
  Dataset,
  Ema,
  Eval,
  Loss,
  Network,
  Optimizer,
  Profile,
  Schedule,
  Spike,
)
from conadv_jax.config.notices import check_not_renamed, warn_of_fractions
from conadv_jax.methods import ATTACKS, METHODS, Attack, Sam


@dataclasses.dataclass(frozen=True)
class Config(Group):
  """Everything about a run."""

  seed: int = number(
    0, 'in [0, 2**31)', 'keys order, augmentation, weights and attack noise'
  )
  method: str = choice('conadv', METHODS, 'a name in METHODS')
  model: str = setting('resnet8', 'a name in conadv_jax.models.MODELS')
  network: Network = Network()
  init_from: str = setting(
    '', "weights to start from: a file .safetensors, or a run's work directory"
  )
  dataset: Dataset = Dataset()
  batch_size: int = number(
    320, '>= 1', 'examples per optimizer step, over all devices'
  )
  epochs: float = number(60.0, '> 0', 'of the schedule')
  max_steps: int = number(
    0, '>= 0', 'stop after so many steps, schedule unchanged; 0 = off'
  )
  staleness_steps: int = number(
    None,
    '>= 0',
    'tau: the perturbations of batch t, and of the weights that it trains, are '
    "made with the weights of step t - tau; None = the method's",
    preset=True,
  )
  bn_group_size: int = number(
    64, '>= 1', 'in examples, which share batch-norm statistics'
  )
  bn_momentum: float = number(0.9, 'in [0, 1)', 'share of old statistics kept')
  bn_epsilon: float = number(1e-5, '> 0', 'added to the variance')
  dtype: str = choice(
    'float32',
    ('float32', 'bfloat16', 'float64'),
    'of activations; parameters and loss stay float32; float64 is for tests '
    '(JAX_ENABLE_X64=1)',
  )
  microbatches: int = number(
    1, '>= 1', 'parts of a batch, one after the other: less memory, same result'
  )
  remat: str = choice(
    'none',
    ('none', 'blocks'),
    "blocks: keep only the inputs of a network's blocks and compute the rest "
    'again: a fifth more work, less memory (not on CPUs)',
  )
  shard_optimizer: bool = setting(
    False, 'split the state of the optimizer over devices'
  )
  grad_allreduce_dtype: str = choice(
    'float32', ('float32', 'bfloat16'), 'bfloat16: half the bytes, less exact'
  )
  grad_buckets: int = number(
    None,
    '>= 0',
    'vectors that gradients are summed in; 0 = as the compiler sees fit; None '
    '= 1 if xla_flags is set, as v5e and networks between slices can put '
    'nothing else behind other work',
    preset=True,
  )
  xla_flags: str = choice(
    'none',
    ('none', 'overlap', 'multislice'),
    'of TPU compilers: sums of gradients behind other work, or those between '
    'slices',
  )
  loss: Loss = dataclasses.field(default_factory=Loss)
  attack: Attack = Attack()
  sam: Sam = Sam()
  optimizer: Optimizer = Optimizer()
  schedule: Schedule = Schedule()
  ema: Ema = Ema()
  checkpoint: Checkpoint = Checkpoint()
  eval: Eval = Eval()
  log_every_steps: int = number(50, '>= 1', 'metrics.jsonl, TensorBoard')
  attack_stats_every_steps: int = number(
    100, '>= 0', 'stale against fresh perturbation; 0 = off'
  )
  noise_scale: bool = setting(
    False, 'log the gradient noise scale; needs several devices or microbatches'
  )
  plots: bool = setting(True, 'draw curves and attacked images at the end')
  wandb_project: str = setting('', "of Weights & Biases; '' = not logged there")
  max_nonfinite_steps: int = number(5, '>= 1', 'in a row, and the run stops')
  spike: Spike = Spike()
  profile: Profile = Profile()
  compile_cache: str = setting(
    'auto',
    "directory of compiled programs, which later starts load; '' = none; auto "
    "= $JAX_COMPILATION_CACHE_DIR, or conadv_jax/ in the user's cache",
  )
  hang_timeout_seconds: int = number(
    1800, '>= 0', 'a step, its input or a save that takes longer ends; 0 = off'
  )

  def __post_init__(self):
    super().__post_init__()
    check_no_credentials('compile_cache', self.compile_cache)
    check_no_credentials('init_from', self.init_from)
    self._check_read()
    self._check_staleness()
    self._check_attack()
    self._check_sam()
    self._check_loss()
    self._check_batch()
    self._check_schedule()
    check_choice('eval.route', self.eval.route, self.routes)
    fix = 'there is no average to evaluate: set ema.decay > 0'
    check(
      not self.eval.use_ema or self.ema.decay > 0, 'eval.use_ema', True, fix
    )

  def _check_read(self):
    """Refuses what is set and has no effect beside the rest of its group.

    What only other methods or evaluations read may stay, such as `attack.*` of
    a baseline: one recipe is for a grid of methods.
    """
    values = dataclasses.asdict(self)
    for name, default, other, chosen in fields.unread(Config, values):
      fix = f'not read with {other}={chosen!r}; leave it at {default!r}'
      check(False, name, flatten(values)[name], f'{fix}, or change {other}')
    eps = self.optimizer.eps
    fix = "not read with optimizer.name='sgd'; leave it unset"
    check(self.optimizer.name != 'sgd' or not eps, 'optimizer.eps', eps, fix)

  def _check_batch(self):
    if self.batch_size % self.bn_group_size:
      groups = max(1, round(self.batch_size / self.bn_group_size))
      raise ConfigError(
        f'batch_size={self.batch_size}: must be a multiple of '
        f'bn_group_size={self.bn_group_size}: set that too, or the nearest: '
        f'batch_size={groups * self.bn_group_size}'
      )
    groups = self.batch_size // self.bn_group_size
    check(
      groups % self.microbatches == 0,
      'microbatches',
      self.microbatches,
      f'must divide the {groups} batch-norm groups (batch_size='
      f'{self.batch_size}, bn_group_size={self.bn_group_size})',
    )

  def _check_schedule(self):
    """The rate has to fall after its warm-up, if it ever changes."""
    schedule, optimizer = self.schedule, self.optimizer
    warmup, end = schedule.warmup_epochs, schedule.end_learning_rate
    fix = (
      f'must be less than epochs={self.epochs}, or nothing is left for the '
      'decay; to stop a run early, set max_steps'
    )
    check(warmup < self.epochs, 'schedule.warmup_epochs', warmup, fix)
    left = self.epochs - warmup
    if schedule.name == 'exponential':
      fix = (
        f'must be less than the {left} epochs after the warm-up, or the rate '
        'never decays; to stop a run early, set max_steps'
      )
      ok = schedule.decay_epochs < left
      check(ok, 'schedule.decay_epochs', schedule.decay_epochs, fix)
    else:
      peak = optimizer.peak_learning_rate(self.batch_size)
      fix = (
        f'must not exceed the peak, {peak} at batch_size={self.batch_size} '
        f'(optimizer.learning_rate={optimizer.learning_rate}, '
        f'optimizer.scaling={optimizer.scaling!r}): the rate would rise'
      )
      check(end <= peak, 'schedule.end_learning_rate', end, fix)

  def _check_staleness(self):
    tau, own = self.staleness_steps, METHODS[self.method].staleness_steps
    fix = f'method {self.method!r} perturbs with no gradient; leave it unset'
    check(own is not None or tau == 0, 'staleness_steps', tau, fix)
    other = 'conadv' if self.is_adversarial else 'consam'
    fix = f'method {self.method!r} is staleness 0; for more, use {other!r}'
    check(own != 0 or tau == 0, 'staleness_steps', tau, fix)
    fix = f'method {self.method!r} looks one step ahead; leave it unset'
    check(self.ascent != 'lookahead' or tau == 1, 'staleness_steps', tau, fix)

  def _check_attack(self):
    own, preset = METHODS[self.method].attack, self.attack.preset
    fix = (
      f'method {self.method!r} stands for {own!r}; leave it unset, or use '
      "method 'disadv' for other attacks"
    )
    check(own in (None, preset), 'attack.preset', preset, fix)
    if self.adv_every:
      fix = f'method {self.method!r} trains with its attack; leave it unset'
      for name in (
        'rule', 'steps', 'targeted', 'train_mode', 'update_batch_stats',
      ):  # fmt: skip
        value = getattr(self.attack, name)
        check(value == getattr(Attack, name), f'attack.{name}', value, fix)

  def _check_sam(self):
    sam, size = self.sam, self.sam.group_size
    fix = (
      f'must divide batch_size={self.batch_size} and be a multiple of '
      f'bn_group_size={self.bn_group_size}'
    )
    ok = not size or not (self.batch_size % size or size % self.bn_group_size)
    check(ok, 'sam.group_size', size, fix)
    looks = self.ascent == 'lookahead'
    fix = f'method {self.method!r} trains with the ascent too: leave it at '
    check(not looks or sam.mask == 'all', 'sam.mask', sam.mask, f"{fix}'all'")
    check(not looks or not size, 'sam.group_size', size, f'{fix}0')
    fix = f'method {self.method!r} needs a momentum: set optimizer.momentum'
    free = self.ascent != 'momentum' or self.optimizer.name == 'lamb'
    check(free or self.optimizer.momentum > 0, 'optimizer.momentum', 0.0, fix)

  def _check_loss(self):
    name, weights = 'loss.view_weights', self.loss.view_weights
    views = [view for view, _ in self.views]
    missing = sorted(set(views) - set(weights))
    check(not missing, name, missing, 'views without a weight')
    losses = [views] + [self.ascent_views] * self.ascends
    if self.adv_every:
      losses += [[view] for view in views]
    for part in losses:
      fix = f'{self.method!r} has a loss of {[*part]}, which must not all be 0'
      check(any(map(weights.get, part)), name, dict(weights), fix)

  @property
  def views(self) -> tuple[tuple[str, str], ...]:
    """(view, route) pairs in the order of the view axis."""
    return METHODS[self.method].views

  @property
  def attacked(self) -> str:
    """The view that the perturbation is made from."""
    return METHODS[self.method].attacked

  @property
  def adv_every(self) -> int:
    """See `Method`."""
    return METHODS[self.method].adv_every

  @property
  def ascent(self) -> str:
    """What perturbs the weights, one of ASCENTS."""
    return METHODS[self.method].ascent

  @property
  def ascent_views(self) -> tuple[str, ...]:
    """The views of the gradient that perturbs the weights; () without one."""
    return METHODS[self.method].ascent_views

  @property
  def ascends(self) -> bool:
    """Whether a gradient perturbs the weights."""
    return bool(self.ascent_views)

  @property
  def num_snapshots(self) -> int:
    """How many weights a step needs beside theta_t; see `TrainState`."""
    return self.staleness_steps + (self.ascent == 'lookahead')

  @property
  def shares(self) -> dict[str, float]:
    """{view: share of the examples that is trained on in it}."""
    return METHODS[self.method].shares

  @property
  def fed_views(self) -> tuple[str, ...]:
    """The views that the input makes; `adv` is made by the step."""
    return METHODS[self.method].fed_views

  @property
  def routes(self) -> tuple[str, ...]:
    """Names of the batch-norm rows, in the order of the rows."""
    return METHODS[self.method].routes

  def route_of(self, view: str) -> int:
    """The batch-norm row of a view."""
    return self.routes.index(dict(self.views)[view])

  @property
  def is_adversarial(self) -> bool:
    """Whether there is an adversarial view."""
    return 'adv' in dict(self.views)


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
    """The steps of `config` on `num_examples` training examples."""
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


def default_config() -> ml_collections.ConfigDict:
  """Every field at its default; None where a preset decides."""
  return fields.defaults(Config)


def from_config_dict(values: Mapping[str, Any]) -> Config:
  """Resolves presets and validates; the only way to a `Config`.

  Args:
    values: nested; a field that is not there takes its default.

  Raises:
    ConfigError: for an unknown, renamed or mistyped field, or a value out of
      range.
  """
  values = fields.plain(values)
  check_not_renamed(flatten(values))
  values = fields.complete(Config, values, default_config().to_dict())
  _fill_presets(values)
  config = fields.build(Config, values)
  warn_of_fractions(config.attack, config.eval.epsilon)
  return config


def _fill_presets(values: dict[str, Any]) -> None:
  """Gives the None fields of `values` their preset's value, in place."""
  check_choice('method', values['method'], METHODS)
  method = METHODS[values['method']]
  if values['staleness_steps'] is None:
    values['staleness_steps'] = method.staleness_steps or 0
  if values['grad_buckets'] is None:
    values['grad_buckets'] = int(values['xla_flags'] != 'none')
  groups = {k: v for k, v in values.items() if isinstance(v, dict)}
  if 'attack' in groups:
    attack = groups['attack']
    if attack['preset'] is None:
      attack['preset'] = method.attack or Attack.preset
    check_choice('attack.preset', attack['preset'], ATTACKS)
    preset = ATTACKS[attack['preset']]
    for field, value in dataclasses.asdict(preset).items():
      attack[field] = value if attack[field] is None else attack[field]
    if attack['step_size'] is None:
      made = fields.build(Attack, attack, Attack.prefix)
      attack['step_size'] = made.default_step_size
  if 'sam' in groups and groups['sam']['rho'] is None:
    groups['sam']['rho'] = method.rho
  if 'optimizer' in groups and groups['optimizer']['eps'] is None:
    name = groups['optimizer']['name']
    check_choice('optimizer.name', name, OPTIMIZER_EPS)
    groups['optimizer']['eps'] = OPTIMIZER_EPS[name]
  if 'eval' in groups and groups['eval']['route'] is None:
    routes = method.routes
    groups['eval']['route'] = 'clean' if 'clean' in routes else routes[0]


def to_dict(config: Config) -> dict[str, Any]:
  """Plain nested dict, ready for JSON; `from_config_dict` reads it back."""
  return dataclasses.asdict(config)


def describe(config: Config) -> str:
  """The resolved configuration as an aligned two-column table."""
  rows = list(flatten(to_dict(config)).items())
  width = max(len(name) for name, _ in rows)
  return '\n'.join(f'{name:<{width}}  {value}' for name, value in rows)


def changes(
  old: Config, new: Config, free: tuple[str, ...]
) -> dict[str, tuple[Any, Any]]:
  """Fields that differ, {name: (old, new)}, but for those `free` to differ.

  A name in `free` that ends with a dot stands for its whole group.
  """
  groups = tuple(name for name in free if name.endswith('.'))
  found = fields.differences(to_dict(old), to_dict(new))
  return {
    name: pair
    for name, pair in found.items()
    if name not in free and not name.startswith(groups)
  }
