"""AutoAttack by its authors' package, on our network.

The package is written for PyTorch (`pip install pyautoattack torch`, the extra
`robust`). Our network is a function of it whose values and gradients JAX
computes.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from conadv_jax import hosts
from conadv_jax.base.errors import ConfigError, unknown
from conadv_jax.experiment import Run
from conadv_jax.method.state import Snapshot
from conadv_jax.run.evaluator import make_logits_fn

STANDARD = ('apgd-ce', 'apgd-t', 'fab-t', 'square')
ATTACKS = (*STANDARD, 'apgd-dlr', 'fab')
MAX_EXAMPLES = 10_000
_SMALLEST_BATCH = 32
_NORMS = {'linf': 'Linf', 'l2': 'L2'}


def parse(text: str) -> tuple[str, ...]:
  """The attacks that 'standard', or names with commas between, stand for.

  Raises:
    ConfigError: for an unknown name, several hosts, or a missing package.
  """
  if not text:
    return ()
  names = STANDARD if text == 'standard' else tuple(text.split(','))
  for name in names:
    if name not in ATTACKS:
      raise unknown('--autoattack', name, ('standard', *ATTACKS))
  if hosts.count() > 1:
    raise ConfigError('--autoattack: runs on one host; start no others')
  for package in ('torch', 'pyautoattack'):
    if importlib.util.find_spec(package) is None:
      raise ConfigError(
        f'--autoattack: needs the package {package}, which is not installed; '
        "pip install 'conadv_jax[robust]'"
      )
  return names


def check_count(count: int) -> None:
  """Raises ConfigError for more examples than an attack is made of at once."""
  if count > MAX_EXAMPLES:
    raise ConfigError(
      f'--autoattack: {count:,} examples are too many; take some, such as '
      '--config.dataset.eval_split=SPLIT[:1000], at most '
      f'{MAX_EXAMPLES:,}'
    )


def attack(
  run: Run,
  weights: Snapshot,
  images: np.ndarray,
  labels: np.ndarray,
  *,
  norm: str,
  epsilon: float,
  names: Sequence[str] = STANDARD,
  before_batch: Callable[[], None] = lambda: None,
) -> tuple[np.ndarray, np.ndarray]:
  """Attacks images with each of `names` in turn, as long as they resist.

  The settings are those of the package's version 'standard' (Croce & Hein 2020,
  arXiv:2003.01690).

  Args:
    run: as it is evaluated, on the route `eval.route`.
    weights: of the network.
    images: uint8 [N, H, W, C].
    labels: int [N].
    norm: 'linf' or 'l2'.
    epsilon: radius in grey levels of 255.
    names: of ATTACKS.
    before_batch: called before each pass through the network; may raise.

  Returns:
    Adversarial images in grey levels, float32 [N, H, W, C], clean where no
    attack succeeded or none was needed, and the classes that the package saw
    predicted for them, int [N].
  """
  import torch
  from pyautoattack import AutoAttack

  size = min(run.config.eval.batch_size, len(images))
  made = AutoAttack(
    torch_network(run, weights, before_batch),
    norm=_NORMS[norm],
    eps=epsilon / 255,
    seed=run.config.seed,
  )
  made.attacks_to_run = list(names)
  # The package's own nine are more than few classes have.
  targets = min(9, run.spec.num_classes - 1)
  made.apgd_targeted.n_target_classes = made.fab.n_target_classes = targets
  pixels = np.float32(images).transpose(0, 3, 1, 2) / 255
  found, predicted = made.run_standard_evaluation(
    torch.from_numpy(pixels),
    torch.from_numpy(np.int64(labels)),
    batch_size=size,
  )
  return 255 * found.numpy().transpose(0, 2, 3, 1), predicted.numpy()


def torch_network(
  run: Run, weights: Snapshot, before_batch: Callable[[], None] = lambda: None
) -> Callable[[Any], Any]:
  """Returns the function of tensors [N, C, H, W] in [0, 1] -> logits [N, K].

  PyTorch gets its gradient, too. N may be anything: images are padded to a few
  sizes, each of which is compiled once.
  """
  import torch

  weights = jax.tree.map(np.asarray, jax.device_get(weights))

  @jax.jit
  def forward(weights, x):
    pixels = 255 * x.transpose(0, 2, 3, 1)[None]
    return make_logits_fn(run, weights, run.config.eval.route)(pixels)[0]

  @jax.jit
  def backward(weights, x, g):
    return jax.vjp(lambda x: forward(weights, x), x)[1](g)[0]

  def called(fn: Callable, *tensors: Any) -> Any:
    before_batch()
    arrays = [tensor.detach().numpy() for tensor in tensors]
    count = len(arrays[0])
    size = max(_SMALLEST_BATCH, 1 << (count - 1).bit_length())
    padded = [
      np.pad(x, [(0, size - count), *[(0, 0)] * (x.ndim - 1)]) for x in arrays
    ]
    return torch.from_numpy(np.array(fn(weights, *padded))[:count])

  class Network(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
      ctx.save_for_backward(x)
      return called(forward, x)

    @staticmethod
    def backward(ctx, g):
      return called(backward, *ctx.saved_tensors, g)

  return Network.apply
