"""The loss over fixed examples, as a function of all weights."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from conadv_jax.devices.mesh import replicated
from conadv_jax.experiment import Run
from conadv_jax.method import losses
from conadv_jax.method.pixels import wide_dtype
from conadv_jax.method.state import Snapshot
from conadv_jax.run.evaluator import make_logits_fn

Vector = jax.Array | np.ndarray


class Surface:
  """The loss of a network, L(w), over fixed examples and with its derivatives.

    L(w) = mean_n cross_entropy(f(x_n; w), y_n)

  in evaluation mode on one route, without label smoothing. w are all P
  parameters as one vector; L is constant along those of other routes.

  Every call is a loop over batches whose examples are divided over the devices.
  It is not one in the program: XLA:CPU is slow at convolutions there.

  Attributes:
    weights: those of the network, [P], on every device.
    params: the same as the network has them, on the host.
    unravel: vector -> parameters.
  """

  def __init__(
    self,
    run: Run,
    route: str,
    weights: Snapshot,
    batches: Sequence[Any],
    tick: Callable[[], None] = lambda: None,
  ):
    """Compiles nothing yet.

    Args:
      run: of the network.
      route: batch-norm row.
      weights: of the network.
      batches: from `Evaluator.batches`.
      tick: called after each pass over the examples.
    """
    self._sharding = replicated(run.mesh)
    self._batches, self._tick = batches, tick
    self.params, stats = jax.device_get((weights.params, weights.batch_stats))
    flat, self.unravel = ravel_pytree(self.params)
    self._dtype = flat.dtype
    self.weights = self.put(flat)
    self._stats = jax.device_put(stats, self._sharding)

    def sums(w, stats, batch):
      logits_of = make_logits_fn(run, Snapshot(self.unravel(w), stats), route)
      logits = logits_of(batch['clean'].astype(wide_dtype(run.config)))
      label, mask = batch['label'], batch['mask']
      loss = losses.cross_entropy(logits, label)
      return {
        'count': mask.sum(),
        'correct': (losses.top1(logits, label) * mask).sum(),
        'loss': jnp.where(mask, loss, 0).sum(),
      }

    def loss(w, stats, batch):
      return sums(w, stats, batch)['loss']

    def product(w, v, stats, batch):
      gradient = jax.grad(lambda w: loss(w, stats, batch))
      return jax.jvp(gradient, (w,), (v,))[1]

    jit = functools.partial(jax.jit, out_shardings=self._sharding)
    self._sums = jit(sums)
    self._gradient = jit(jax.value_and_grad(loss))
    self._product = jit(product)
    self._count = float(self._sum(self._sums, self.weights)['count'])

  def put(self, vector: Vector) -> jax.Array:
    """`vector` in the type of the weights, on every device."""
    return jax.device_put(np.asarray(vector, self._dtype), self._sharding)

  def loss(self, w: Vector) -> tuple[float, float]:
    """Computes L(w), and the top-1 accuracy in percent."""
    sums = jax.device_get(self._sum(self._sums, self.put(w)))
    loss, correct = float(sums['loss']), float(sums['correct'])
    return loss / self._count, 100 * correct / self._count

  def gradient(self, w: jax.Array) -> tuple[float, jax.Array]:
    """Computes L(w) and its gradient, [P]."""
    loss, gradient = self._sum(self._gradient, w)
    return float(loss) / self._count, gradient / self._count

  def hessian_product(self, v: Vector) -> np.ndarray:
    """Computes H v with the Hessian H of L at `weights`: float64 [P].

    Forward over reverse: the derivative of the gradient along v, exact but for
    rounding, for about twice the cost of a gradient.
    """
    total = self._sum(self._product, self.weights, self.put(v))
    return np.asarray(total, np.float64) / self._count

  def _sum(self, fn: Callable[..., Any], *args: Any) -> Any:
    """The sum of `fn(*args, statistics, batch)` over batches."""
    total = None
    # GPUs and TPUs would multiply float32 in fewer bits.
    with jax.default_matmul_precision('highest'):
      for batch in self._batches:
        part = fn(*args, self._stats, batch)
        total = part if total is None else jax.tree.map(jnp.add, total, part)
    jax.block_until_ready(total)
    self._tick()
    return total
