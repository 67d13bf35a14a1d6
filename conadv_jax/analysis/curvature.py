"""The Hessian of the loss: its largest eigenvalues, and its trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.sparse import linalg

from conadv_jax.analysis.results import Found
from conadv_jax.analysis.subject import Subject

Product = Callable[[np.ndarray], np.ndarray]

# Vectors that Lanczos keeps orthogonal before it restarts.
_LANCZOS_VECTORS = 20
_MAX_RESTARTS = 30


def asked(subject: Subject) -> dict[str, Any]:
  """What is measured, on what."""
  return subject.asked('eigenvalues', 'probes')


def measure(subject: Subject) -> Found:
  """Computes the largest eigenvalues of the Hessian, and its trace."""
  options = subject.options
  surface = subject.surface('curvature', 20 + options.probes)
  product, size = surface.hessian_product, surface.weights.size
  loss, top1 = surface.loss(surface.weights)
  top = top_eigenvalues(product, size, options.eigenvalues, options.seed)
  forms = quadratic_forms(product, size, options.probes, options.seed)
  names = ('lambda_max', *(f'lambda_{i}' for i in range(2, len(top) + 1)))
  values = dict(zip(names, top, strict=False)) | {
    'trace': forms.mean(),
    'trace_stderr': forms.std(ddof=1) / len(forms) ** 0.5,
    'loss': loss,
    'top1': top1,
  }
  return Found(values, {'eigenvalues': top, 'quadratic_forms': forms})


def top_eigenvalues(
  product: Product, size: int, count: int, seed: int, tolerance: float = 1e-3
) -> np.ndarray:
  """Computes the largest eigenvalues of a symmetric matrix H by Lanczos.

  ARPACK's implicitly restarted method with full reorthogonalisation, in
  float64. An eigenvalue has converged when the residual |H u - lambda u| of its
  vector is below tolerance * lambda; its own error is smaller still, about the
  square of that over the gap to its neighbours.

  Args:
    product: v [P] -> H v.
    size: P.
    count: how many, less than P.
    seed: of the first vector.
    tolerance: relative.

  Returns:
    float64, in descending order; without those that have not converged after
    `_MAX_RESTARTS`.
  """
  operator = linalg.LinearOperator((size, size), product, dtype=np.float64)
  vectors = min(size, max(_LANCZOS_VECTORS, 2 * count + 1))
  start = np.random.default_rng(seed).standard_normal(size)
  try:
    found = linalg.eigsh(
      operator, count, which='LA', v0=start, ncv=vectors, tol=tolerance,
      maxiter=_MAX_RESTARTS, return_eigenvectors=False,
    )  # fmt: skip
  except linalg.ArpackNoConvergence as error:
    found = error.eigenvalues
  return np.sort(found)[::-1]


def quadratic_forms(
  product: Product, size: int, count: int, seed: int
) -> np.ndarray:
  """Computes z' H z for vectors z of random signs: float64 [count].

  Their mean estimates tr(H) without bias (Hutchinson 1990), with the standard
  error std / sqrt(count).
  """
  rng = np.random.default_rng(seed)
  signs = (rng.choice((-1.0, 1.0), size) for _ in range(count))
  return np.array([z @ product(z) for z in signs])
