"""The groups of `Config`: fields with their defaults, rules and meanings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from conadv_jax.base.errors import check_no_credentials
from conadv_jax.base.fields import (
  Group,
  check,
  check_choice,
  choice,
  number,
  setting,
)
from conadv_jax.methods import ATTACKS, METHODS


@dataclasses.dataclass(frozen=True)
class Network(Group):
  """Options of networks; a network that lacks an option refuses it."""

  prefix = 'network.'

  space_to_depth: bool = setting(
    False,
    'ResNet: the 7x7 stem as 4x4 on blocks of 2x2 pixels, which suits the '
    'matrix units of a TPU; same function, same weights',
  )
  drop_path_rate: float | None = number(
    None,
    'in [0, 1)',
    'stochastic depth: share of examples that skip the last block; fewer skip '
    "those before. None = the model's",
  )
  dropout_rate: float | None = number(
    None,
    'in [0, 1)',
    "share of features dropped before the last layer; None = the model's",
  )


_NO_RANDAUGMENT = {'autoaugment': ('v0', 'reduced_imagenet')}


@dataclasses.dataclass(frozen=True)
class Dataset(Group):
  """Which examples, and how their images are prepared."""

  prefix = 'dataset.'

  name: str = setting('digits', 'a name in conadv_jax.data.datasets.DATASETS')
  data_dir: str = setting(
    '', "TFDS directory or folder; '' = $TFDS_DATA_DIR or TFDS's own"
  )
  train_split: str = setting(
    '', "TFDS slicing, such as train[:10000]; '' = the data set's own split"
  )
  eval_split: str = setting('', 'likewise, of the examples for accuracy')
  # Of data sets stored as JPEG, PNG or WebP files of any size.
  image_size_px: int = number(
    0,
    '>= 0',
    'height and width that the crop for training (area 0.08 to 1, aspect 3/4 '
    'to 4/3) or the central one is resized to; 0 = data set of a fixed size',
  )
  interpolation: str = choice('bicubic', ('bicubic', 'bilinear'), 'of resizing')
  antialias: bool = setting(True, 'low-pass where an image is made smaller')
  eval_crop_ratio: float = number(
    0.875, 'in (0, 1]', "side of the central crop, as a share of the image's"
  )
  # Of data sets of a fixed size.
  pool: int = number(1, '>= 1', 'average over pool x pool pixels; 1 = off')
  crop_padding_px: int = number(
    0, '>= 0', 'zero padding before a random crop, in pixels; 0 = no crop'
  )
  random_flip: bool = setting(
    False, 'mirror left-right at random, where the data set allows it'
  )
  autoaugment: str = choice(
    'v0', ('v0', 'reduced_imagenet', 'randaugment'), 'policy of the view aa'
  )
  randaugment_layers: int = number(
    2, '>= 1', 'N, operations per image', unread=_NO_RANDAUGMENT
  )
  randaugment_magnitude: float = number(
    9.0,
    '>= 0',
    'M, level of each operation; 10 = full strength',
    unread=_NO_RANDAUGMENT,
  )
  aa_shares_crop: bool = setting(
    False, 'aa starts from the crop and flip of clean'
  )
  cache: str = choice(
    'none', ('none', 'raw', 'decoded'), 'keep files or pixels in memory'
  )
  shuffle_window_shards: int = number(
    8, '>= 1', 'shards of a TFRecord data set that are shuffled together'
  )
  max_bad_share: float = number(
    0.001,
    'in [0, 1)',
    'of unreadable examples in a split; more stop the run, but not up to 3 of '
    'them, unless it is 0',
  )

  def __post_init__(self):
    super().__post_init__()
    check_no_credentials('dataset.data_dir', self.data_dir)


def _every_view() -> dict[str, float]:
  """Weight 1 for every view that a method has: 1:1:1 as in the paper."""
  views = [v for method in METHODS.values() for v, _ in method.views]
  return dict.fromkeys(views, 1.0)


@dataclasses.dataclass(frozen=True)
class Profile(Group):
  """Traces of the devices and the host, for XProf and TensorBoard."""

  prefix = 'profile.'

  steps: str = setting(
    '', "'10:15' traces steps 10 to 14 into the work directory; '' = none"
  )

  def __post_init__(self):
    super().__post_init__()
    first, end = self.span
    fix = "must be 'FIRST:END' with 1 <= FIRST < END, such as '10:15'"
    check(not self.steps or 1 <= first < end, 'profile.steps', self.steps, fix)

  @property
  def span(self) -> tuple[int, int]:
    """(first step, step after the last); (0, 0) of none and of a wrong text."""
    first, _, end = self.steps.partition(':')
    if not (first.isdecimal() and end.isdecimal()):
      return 0, 0
    return int(first), int(end)


@dataclasses.dataclass(frozen=True)
class Loss(Group):
  """Cross-entropy, averaged over the views."""

  prefix = 'loss.'

  label_smoothing: float = number(
    0.1, 'in [0, 1)', 'share of a label that is spread evenly over all classes'
  )
  view_weights: Mapping[str, float] = dataclasses.field(
    default_factory=_every_view,
    metadata={'doc': 'relative weights of views', 'preset': False},
  )

  def __post_init__(self):
    super().__post_init__()
    for view, weight in self.view_weights.items():
      check_choice('loss.view_weights', view, _every_view())
      check(weight >= 0, f'loss.view_weights.{view}', weight, 'must be >= 0')

  def weights_of(self, shares: Mapping[str, float]) -> tuple[float, ...]:
    """Weights of the views of `shares`, times their share, summing to 1."""
    weights = [self.view_weights[v] * share for v, share in shares.items()]
    return tuple(weight / sum(weights) for weight in weights)


# What shipped optimizers do not read; one of your own may read any field.
_ONLY_LARS = {'name': ('sgd', 'lamb', 'rmsprop')}
_ONLY_LAMB = {'name': ('lars', 'sgd', 'rmsprop')}

# Value of `optimizer.eps` where it is left None, by optimizer: none for LARS
# (MLPerf), the paper's for LAMB, TensorFlow EfficientNet's for RMSProp.
OPTIMIZER_EPS = {'lars': 0.0, 'sgd': 0.0, 'lamb': 1e-6, 'rmsprop': 1e-3}


@dataclasses.dataclass(frozen=True)
class Optimizer(Group):
  """The optimizer and its peak learning rate."""

  prefix = 'optimizer.'

  name: str = choice('lars', OPTIMIZER_EPS, 'see conadv_jax.method.optim')
  learning_rate: float = number(4.0, '> 0', 'peak, at base_batch_size')
  base_batch_size: int = number(
    256, '>= 1', 'in examples', unread={'scaling': ('none',)}
  )
  scaling: str = choice(
    'none', ('none', 'linear', 'sqrt'), 'of the peak with the batch size'
  )
  momentum: float = number(
    0.9, 'in [0, 1)', 'lars, sgd, rmsprop', unread={'name': ('lamb',)}
  )
  nesterov: bool = setting(
    False, 'lars, sgd, rmsprop', unread={'name': ('lamb',), 'momentum': (0.0,)}
  )
  weight_decay: float = number(1e-4, '>= 0', 'of kernels only')
  lars_denominator: str = choice(
    'norm_of_sum',
    ('norm_of_sum', 'sum_of_norms'),
    "|g + wd w| (optax), or |g| + wd |w| (the paper's code, MLPerf)",
    unread=_ONLY_LARS,
  )
  trust_coefficient: float = number(
    0.001, '> 0', 'lars: eta', unread=_ONLY_LARS
  )
  beta1: float = number(
    0.9, 'in [0, 1)', 'lamb: decay of the first moment', unread=_ONLY_LAMB
  )
  beta2: float = number(
    0.999, 'in [0, 1)', 'lamb: decay of the second moment', unread=_ONLY_LAMB
  )
  decay: float = number(
    0.9,
    'in [0, 1)',
    'rmsprop: decay of the mean square',
    unread={'name': ('lars', 'sgd', 'lamb')},
  )
  eps: float = number(None, '>= 0', "None = the optimizer's", preset=True)

  def peak_learning_rate(self, batch_size: int) -> float:
    """learning_rate * (batch_size / base_batch_size) ** {0, 1, 0.5}."""
    power = {'none': 0.0, 'linear': 1.0, 'sqrt': 0.5}[self.scaling]
    return self.learning_rate * (batch_size / self.base_batch_size) ** power


_NOT_EXPONENTIAL = {'name': ('polynomial', 'cosine')}


@dataclasses.dataclass(frozen=True)
class Schedule(Group):
  """How the learning rate changes: linear warm-up from 0, then a decay."""

  prefix = 'schedule.'

  name: str = choice(
    'polynomial', ('polynomial', 'cosine', 'exponential'), 'of the decay'
  )
  warmup_epochs: float = number(
    5.0, '>= 0', 'linear from 0 to the peak; less than epochs'
  )
  power: float = number(
    2.0,
    '> 0',
    'polynomial: of the remaining share',
    unread={'name': ('cosine', 'exponential')},
  )
  end_learning_rate: float = number(
    0.0,
    '>= 0',
    'polynomial, cosine: the last value, at most the peak',
    unread={'name': ('exponential',)},
  )
  decay_rate: float = number(
    0.97,
    'in (0, 1]',
    'exponential: factor of each decay',
    unread=_NOT_EXPONENTIAL,
  )
  decay_epochs: float = number(
    2.4, '> 0', 'exponential: between decays', unread=_NOT_EXPONENTIAL
  )


@dataclasses.dataclass(frozen=True)
class Ema(Group):
  """A moving average of the weights."""

  prefix = 'ema.'

  decay: float = number(0.0, 'in [0, 1)', 'per step; 0 = off')
  batch_stats: bool = setting(
    True, 'average batch-norm statistics too', unread={'decay': (0.0,)}
  )


@dataclasses.dataclass(frozen=True)
class Checkpoint(Group):
  """When checkpoints are saved, and how many stay."""

  prefix = 'checkpoint.'

  every_steps: int = number(
    500, '>= 0', '0 = only at the end and when interrupted'
  )
  keep: int = number(3, '>= 1', 'newest checkpoints kept')
  strict: bool = setting(
    False, 'a damaged checkpoint is an error; False: take the one before it'
  )


@dataclasses.dataclass(frozen=True)
class Spike(Group):
  """Which losses are so high that their update is not applied."""

  prefix = 'spike.'

  sigmas: float = number(
    0.0, '>= 0', 'standard deviations above the mean, such as 6; 0 = off'
  )
  window_steps: int = number(
    128,
    '>= 2',
    'applied steps that mean and deviation are taken over',
    unread={'sigmas': (0.0,)},
  )
  max_in_a_row: int = number(
    5,
    '>= 1',
    'the next one is applied: the loss has moved',
    unread={'sigmas': (0.0,)},
  )


@dataclasses.dataclass(frozen=True)
class Eval(Group):
  """Evaluation: clean accuracy while training, robust accuracy at its end."""

  prefix = 'eval.'

  batch_size: int = number(512, '>= 1', 'examples, over all devices')
  every_steps: int = number(0, '>= 0', 'while training; 0 = only at the end')
  attack: str = setting(
    'fgsm', 'none, all (fgsm and pgd), or names in ATTACKS with commas between'
  )
  norm: str | None = choice(
    None, ('linf', 'l2'), "of the ball; None = the attack's"
  )
  epsilon: float = number(4.0, '>= 0', 'radius, in grey levels of 255')
  attack_steps: int = number(
    10, '>= 1', 'steps of attacks with several, each 2.5 * epsilon / steps'
  )
  restarts: int = number(
    1, '>= 1', 'of attacks with a random start or target; all have to fail'
  )
  route: str = setting(
    None, 'batch-norm row; None = clean, or the first without it', preset=True
  )
  use_ema: bool = setting(False, 'evaluate the averaged weights')
  train_split: str = setting(
    '',
    'training examples that are evaluated too, clean, at the end, such as '
    "'train[:10000]'; '' = none",
  )

  def __post_init__(self):
    super().__post_init__()
    for name in self.attacks:
      check_choice('eval.attack', name, {'none', 'all', *ATTACKS})

  @property
  def attacks(self) -> tuple[str, ...]:
    """Names of the attacks, in order."""
    named = {'none': (), 'all': ('fgsm', 'pgd')}
    listed = tuple(name.strip() for name in self.attack.split(','))
    return named.get(self.attack, listed)
