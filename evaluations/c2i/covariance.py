"""Covariances (D, D): whether a matrix is one, and its factor."""

import numpy as np
import scipy.linalg

LEAST_EIGENVALUE = -1e-6        # of a covariance, as a fraction of its largest one


def check_covariance(sigma: np.ndarray) -> None:
    """Raises ValueError unless (D, D) is symmetric and positive semidefinite up to rounding."""
    sigma = np.asarray(sigma, dtype=np.float64)
    asymmetry = np.abs(sigma - sigma.T).max(initial=0)
    if asymmetry > -LEAST_EIGENVALUE * np.abs(sigma).max(initial=0):
        raise ValueError(f"expected a covariance, found an asymmetric matrix ({asymmetry:g} apart)")
    try:
        scipy.linalg.cholesky(sigma)
    except scipy.linalg.LinAlgError:                           # singular, or worse
        _check_eigenvalues(scipy.linalg.eigvalsh(sigma))


def _check_eigenvalues(values: np.ndarray) -> None:
    """Raises ValueError unless the ascending eigenvalues (D,) are a covariance's."""
    if values[0] < LEAST_EIGENVALUE * max(values[-1], 0):
        raise ValueError(f"expected a covariance, found a matrix with eigenvalues {values[0]:g} to "
                         f"{values[-1]:g}")


def covariance_factor(sigma: np.ndarray) -> np.ndarray:
    """Returns F (r, D) with F^T F = sigma (D, D) float64, r <= D, leaving out its null space.

    Raises:
        ValueError: an eigenvalue is negative by more than rounding.
    """
    threshold = len(sigma) * np.finfo(np.float64).eps
    try:
        factor = scipy.linalg.cholesky(sigma)
        if np.square(np.diagonal(factor)).min() > threshold * np.diagonal(sigma).max():
            return factor
    except scipy.linalg.LinAlgError:
        pass                        # singular: fewer images than dimensions, or dead features
    values, vectors = scipy.linalg.eigh(sigma)
    _check_eigenvalues(values)
    kept = values > threshold * values[-1]
    return (vectors[:, kept] * np.sqrt(values[kept])).T
