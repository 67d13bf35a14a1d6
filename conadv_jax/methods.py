"""Presets as data: METHODS says what trains, ATTACKS how images are perturbed.

Start here to try an idea. An entry of METHODS is a training method; nothing
else has to know its name. An entry of ATTACKS is an attack, for training
(`attack.preset`) as for evaluation (`eval.attack`). `Sam` says how weights are
perturbed.
"""

from __future__ import annotations

import dataclasses

from conadv_jax.base.errors import ConfigError
from conadv_jax.base.fields import (
  Group,
  check_choice,
  choice,
  number,
  setting,
)

# Where the perturbation of weights points: along a gradient of tau steps ago,
# or of weights that look one step ahead; along the momentum; anywhere.
ASCENTS = ('none', 'gradient', 'lookahead', 'momentum', 'random')


@dataclasses.dataclass(frozen=True)
class Method:
  """A method says which views train, on which routes, and how stale they are.

  A view is one version of each example: `clean` (crop and flip), `aa` (an
  AutoAugment crop) or `adv` (another view plus a perturbation). A route is a
  set of batch-norm parameters and statistics; all other weights are shared.

  Attributes:
    views: (view, route) pairs, in the order of the view axis V. Routes are any
      names; views may share one.
    staleness_steps: tau, the age in steps of the weights that make the
      perturbation; None where none is made with a gradient.
    attacked: the view that the perturbation is made from. It is fed to the
      step even if it is not trained on.
    attack: a name in ATTACKS, of a method that stands for one attack; with
      None `attack.preset` chooses.
    adv_every: n of `method.fast_advprop`: of any n batch-norm groups, one is
      trained on in the view `adv` and the others in `clean`. 0: every example
      in all views.
    ascent: what perturbs the weights, a name in ASCENTS; see `method.sam`.
    rho: its `sam.rho`, if nothing else is set.
  """

  views: tuple[tuple[str, str], ...]
  staleness_steps: int | None = None
  attacked: str = 'clean'
  attack: str | None = None
  adv_every: int = 0
  ascent: str = 'none'
  rho: float = 0.05

  def __post_init__(self):
    names = [view for view, _ in self.views]
    if not names or len(set(names)) < len(names):
      raise ConfigError(f'a method needs views, each of them once: {names}')
    check_choice('ascent', self.ascent, ASCENTS)
    ages = 'adv' in names or bool(self.ascent_views)
    if ages != (self.staleness_steps is not None):
      raise ConfigError(
        f'a method of views {names} with staleness_steps='
        f"{self.staleness_steps}: needs a number with a view 'adv' or the "
        f'ascent of a gradient (ascent={self.ascent!r}), else None'
      )
    if self.ascent != 'none' and (names == ['adv'] or self.adv_every):
      raise ConfigError(
        f'ascent={self.ascent!r}: needs a view that every example has, such as '
        "'clean'"
      )
    if self.ascent == 'lookahead' and self.staleness_steps != 1:
      raise ConfigError("ascent='lookahead': needs staleness_steps=1")
    if self.attacked == 'adv':
      raise ConfigError("attacked='adv': attack another view, such as 'clean'")
    if self.adv_every and (
      self.adv_every < 2
      or (names, len(self.routes)) != (['clean', 'adv'], 2)
      or (self.staleness_steps, self.attacked) != (0, 'clean')
    ):
      raise ConfigError(
        f'adv_every={self.adv_every}: needs 2 or more, and the views clean and '
        'adv on routes of their own, with staleness_steps=0'
      )

  @property
  def shares(self) -> dict[str, float]:
    """{view: share of the examples that is trained on in it}."""
    shares = {view: 1.0 for view, _ in self.views}
    if self.adv_every:
      shares = {'clean': 1 - 1 / self.adv_every, 'adv': 1 / self.adv_every}
    return shares

  @property
  def ascent_views(self) -> tuple[str, ...]:
    """The views of the gradient that perturbs the weights; () without one."""
    if self.ascent not in ('gradient', 'lookahead'):
      return ()
    return tuple(view for view, _ in self.views if view != 'adv')

  @property
  def routes(self) -> tuple[str, ...]:
    """Names of the batch-norm rows, in the order of the rows."""
    return tuple(dict.fromkeys(route for _, route in self.views))

  @property
  def fed_views(self) -> tuple[str, ...]:
    """The views that the input makes; `adv` is made by the step."""
    names = [view for view, _ in self.views]
    if 'adv' in names:
      names = [view for view in names if view != 'adv'] + [self.attacked]
    return tuple(dict.fromkeys(names))


METHODS = {
  # One view. AutoAugment's is on the `clean` route, as evaluation uses that.
  'baseline': Method((('clean', 'clean'),)),
  'autoaugment': Method((('aa', 'clean'),)),
  # The paper's (arXiv:2106.00221): sequential, concurrent, with AutoAugment.
  'disadv': Method((('clean', 'clean'), ('adv', 'adv')), 0),
  'conadv': Method((('clean', 'clean'), ('adv', 'adv')), 1),
  'conadv_aa': Method((('clean', 'clean'), ('aa', 'aa'), ('adv', 'adv')), 1),
  # Rivals: AdvProp with five steps (arXiv:1911.09665); Fast AdvProp, which
  # attacks a fifth of the examples (arXiv:2204.09838); a random sign for each
  # pixel in place of the gradient's.
  'advprop': Method((('clean', 'clean'), ('adv', 'adv')), 0, attack='pgd'),
  'fast_advprop': Method(
    (('clean', 'clean'), ('adv', 'adv')), 0, attack='rs_fgsm', adv_every=5
  ),
  'noise': Method(
    (('clean', 'clean'), ('adv', 'adv')), 0, attack='random_signs'
  ),
  # Ablations: one batch norm for both views; no clean view; AutoAugment in its
  # place; a perturbation of the AutoAugment view.
  'conadv_shared_bn': Method((('clean', 'clean'), ('adv', 'clean')), 1),
  'adv_only': Method((('adv', 'clean'),), 1),
  'conadv_aa_only': Method((('aa', 'clean'), ('adv', 'adv')), 1),
  'conadv_from_aa': Method(
    (('clean', 'clean'), ('aa', 'aa'), ('adv', 'adv')), 1, attacked='aa'
  ),
  # Weights are perturbed, not images: sequential (SAM, arXiv:2010.01412),
  # concurrent (AsyncSAM, arXiv:2503.11147), from weights a step ahead (SAMPa,
  # arXiv:2410.10683); along the momentum, which costs nothing (MSAM,
  # arXiv:2401.12033); and anywhere, as a control. Both images and weights.
  'sam': Method((('clean', 'clean'),), 0, ascent='gradient'),
  'consam': Method((('clean', 'clean'),), 1, ascent='gradient'),
  'sampa': Method((('clean', 'clean'),), 1, ascent='lookahead', rho=0.1),
  'msam': Method((('clean', 'clean'),), ascent='momentum', rho=0.3),
  'random': Method((('clean', 'clean'),), ascent='random'),
  'conadv_consam': Method(
    (('clean', 'clean'), ('adv', 'adv')), 1, ascent='gradient'
  ),
}


@dataclasses.dataclass(frozen=True)
class Sam(Group):
  """How weights are perturbed, where `Method.ascent` says so."""

  prefix = 'sam.'

  rho: float = number(
    None, '>= 0', "size of the perturbation; None = the method's", preset=True
  )
  normalize: str = choice(
    'global',
    ('global', 'adaptive', 'layerwise'),
    'length rho over all weights; the same with each in units of its own size; '
    "rho times a weight's length for each array",
  )
  mask: str = choice(
    'all', ('all', 'norm_only'), 'norm_only: scales and biases of normalisation'
  )
  group_size: int = number(
    0,
    '>= 0',
    'in examples, with a perturbation of their own; 0 = the whole batch',
  )
  mix: float = number(
    0.2, 'in [0, 1]', 'sampa: share of the ascent gradient in the update'
  )


# What an attack that computes no gradient has no use for.
_NO_GRADIENT = {'steps': (0,)}


@dataclasses.dataclass(frozen=True)
class Attack(Group):
  """An attack says how a perturbation is made.

  Sizes are in grey levels of 255, for either norm: the default epsilon of 4
  is 4/255 of images in [0, 1].
  """

  prefix = 'attack.'

  preset: str = setting(
    'fgsm',
    "a name in ATTACKS; fills the fields left None. None = the method's, or "
    'fgsm',
    preset=True,
  )
  rule: str = setting(
    'gradient', 'a name in conadv_jax.method.attack.RULES', preset=True
  )
  norm: str = choice('linf', ('linf', 'l2'), 'of the ball', preset=True)
  epsilon: float = number(
    4.0, '>= 0', 'radius of the ball, in grey levels of 255', preset=True
  )
  step_size: float | None = number(
    None,
    '>= 0',
    'per step, in grey levels of 255; None = epsilon for one step, epsilon / 4 '
    'for more',
    preset=True,
    unread=_NO_GRADIENT,
  )
  steps: int = number(
    1,
    '>= 0',
    'gradient steps k; 0 = the start is the perturbation',
    preset=True,
  )
  targeted: bool = setting(
    False,
    'towards a random other class, not away from the label',
    preset=True,
    unread=_NO_GRADIENT,
  )
  random_start: str = choice(
    'ball',
    ('ball', 'extreme'),
    'uniform in the ball, or in its extreme points: each pixel at +-epsilon '
    '(linf), all directions at a distance of epsilon (l2)',
    preset=True,
    unread={'random_start_prob': (0.0,)},
  )
  random_start_prob: float = number(
    0.0, 'in [0, 1]', 'a probability; 0 = always a clean start', preset=True
  )
  train_mode: bool = setting(
    True,
    'batch norm uses the statistics of the batch',
    preset=True,
    unread=_NO_GRADIENT,
  )
  update_batch_stats: bool = setting(
    False, 'the attack moves the running statistics of batch norm', preset=True
  )

  def __post_init__(self):
    super().__post_init__()
    if self.update_batch_stats and not (self.train_mode and self.steps):
      raise ConfigError(
        'attack.update_batch_stats=True: without a gradient in training mode '
        'there are no statistics of its batch; set attack.steps >= 1 and '
        'attack.train_mode=True'
      )

  @property
  def is_random(self) -> bool:
    """Whether two attacks on an image may differ."""
    return self.targeted or self.random_start_prob > 0

  @property
  def default_step_size(self) -> float | None:
    """The size of a step where `step_size` is None, in grey levels of 255."""
    if not self.steps:
      return None
    return self.epsilon if self.steps == 1 else self.epsilon / 4

  def resolved(self) -> Attack:
    """The same attack with `step_size` set."""
    if self.step_size is not None:
      return self
    return dataclasses.replace(self, step_size=self.default_step_size)


# `paper` is what the released code runs at a batch of 96K: its epsilon of 9
# acts as about 4 grey levels there, as the images are standardised before a
# step that assumes [-1, 1].
ATTACKS = {
  'fgsm': Attack('fgsm'),
  'paper': Attack('paper', targeted=True, random_start_prob=0.8),
  'pgd': Attack('pgd', steps=5, random_start_prob=1.0),
  # One step from a random start (Wong et al. 2020, arXiv:2001.03994), with the
  # size of Fast AdvProp.
  'rs_fgsm': Attack('rs_fgsm', epsilon=1.0, random_start_prob=1.0),
  # A control without a gradient: epsilon times a random sign for each pixel.
  'random_signs': Attack(
    'random_signs', steps=0, random_start='extreme', random_start_prob=1.0
  ),
}
