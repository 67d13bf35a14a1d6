"""Loops, unrolled where the compiler is slow inside of them.

XLA:CPU brings the gradients of convolutions into the form that it has fast code
for only outside of loops: within one, that of a kernel takes 80 times as long
(`scripts/bench_scaling.py --axes microbatches`).
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import jax

_MOST = 32  # turns; compiling takes as long as for so many programs
_ON_CPU = contextvars.ContextVar('on_cpu', default=False)


@contextlib.contextmanager
def of_mesh(mesh: jax.sharding.Mesh) -> Iterator[None]:
  """Traces loops for the devices of `mesh`, in this context."""
  token = _ON_CPU.set(mesh.devices.flat[0].platform == 'cpu')
  try:
    yield
  finally:
    _ON_CPU.reset(token)


def scan(
  body: Callable[[Any, Any], tuple[Any, Any]], carry: Any, xs: Any, count: int
) -> Any:
  """Computes the carry of `jax.lax.scan` over `count` rows of `xs`."""
  unroll = count if _ON_CPU.get() and count <= _MOST else 1
  return jax.lax.scan(body, carry, xs, count, unroll=unroll)[0]


def repeat(count: int, fn: Callable[[Any], Any], carry: Any) -> Any:
  """Applies `fn` to `carry` `count` times; a loop only where there are more."""
  if count < 2:
    return fn(carry) if count else carry
  unroll = True if _ON_CPU.get() and count <= _MOST else None
  return jax.lax.fori_loop(
    0, count, lambda _, carry: fn(carry), carry, unroll=unroll
  )
