"""Numbers of an evaluation, from what became of each example."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_BINS = 15  # of the calibration error
_Z = 1.959963984540054  # 95 % of a normal distribution is within +-z


class Outcomes(NamedTuple):
  """What became of N examples, in their order.

  Attributes:
    label: int [N].
    first: classes of the largest logits, five or all, from the top, int [N, 5].
    right: which of them are right, bool [N, 5].
    confidence: softmax probability of the first class, float [N].
    loss: cross-entropy of the label in nats, no smoothing, float [N].
    usable: False for images that could not be decoded, bool [N].
  """

  label: np.ndarray
  first: np.ndarray
  right: np.ndarray
  confidence: np.ndarray
  loss: np.ndarray
  usable: np.ndarray

  @property
  def correct(self) -> np.ndarray:
    """Whether the class with the largest logit is right, bool [N]."""
    return self.right[..., 0]

  def where(self, chosen: np.ndarray) -> Outcomes:
    """Those of the examples that are `chosen`, bool [N]."""
    return Outcomes(*(x[chosen] for x in self))


def of(outcomes: Outcomes) -> dict[str, float]:
  """Computes what a row of `evaluations` has; percentages are 0-100.

  Returns:
    `top1` and its interval `top1_low` to `top1_high`, `top5`, mean `loss` and
    `ece`. Images that could not be decoded are left out of all; `bad_examples`
    is their number, if there are any.
  """
  used = outcomes.where(outcomes.usable)
  count = len(used.correct)
  low, high = interval(int(used.correct.sum()), count)
  found = {
    'top1': 100 * float(used.correct.mean()),
    'top1_low': low,
    'top1_high': high,
    'top5': 100 * float(used.right.any(-1).mean()),
    'loss': float(used.loss.mean(dtype=np.float64)),
    'ece': ece(used.confidence, used.correct),
  }
  bad = len(outcomes.usable) - count
  return found | {'bad_examples': bad} if bad else found


def interval(correct: int, count: int) -> tuple[float, float]:
  """Computes the 95 % interval of an accuracy over examples, in percent.

  A bootstrap over examples draws the number of correct ones, k of n, from
  Binomial(n, k / n), so that its interval is a function of k and n alone. We
  take Wilson's (1927),

    (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)

  with p = k / n and z = 1.96. Away from 0 and 100 % it is the bootstrap's to
  within rounding; there, it still covers, where the bootstrap's has width 0.
  """
  p, extra = correct / count, _Z**2 / count
  middle = p + extra / 2
  half = math.sqrt(extra * p * (1 - p) + (extra / 2) ** 2)
  ends = ((middle + sign * half) / (1 + extra) for sign in (-1, 1))
  low, high = (100 * min(max(end, 0.0), 1.0) for end in ends)
  return low, high


def ece(confidence: np.ndarray, correct: np.ndarray) -> float:
  """Computes the expected calibration error, in percent.

    sum over bins of |B| / n * |accuracy of B - mean confidence of B|

  with 15 bins ((m - 1) / 15, m / 15] of the confidence (Guo et al. 2017,
  arXiv:1706.04599, equation 3).
  """
  if not np.isfinite(confidence).all():
    return float('nan')  # a network that diverged
  gap = correct - confidence.astype(np.float64)
  place = np.ceil(_BINS * confidence.astype(np.float64)).astype(int)
  sums = np.bincount(place, gap)
  return 100 * float(np.abs(sums).sum() / len(gap))


def worst(tries: Sequence[Outcomes]) -> Outcomes:
  """Picks for each example the first try that is wrong, else the worst loss."""
  stacked = Outcomes(*(np.stack(x) for x in zip(*tries, strict=True)))
  harm = np.where(stacked.correct, stacked.loss, np.inf)
  pick, place = harm.argmax(0), np.arange(harm.shape[1])
  return Outcomes(*(x[pick, place] for x in stacked))


def by_label_sets(outcomes: Outcomes, sets: np.ndarray) -> Outcomes:
  """Judges by sets of right classes, bool [N, K]; drops examples without any.

  `label` and `loss` stay those of the label.
  """
  right = np.take_along_axis(sets, outcomes.first, 1)
  return outcomes._replace(right=right).where(sets.any(1))
