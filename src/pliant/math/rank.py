"""How many singular values matter: by energy kept, and by analytic variational Bayes."""

import functools
import math
from collections.abc import Sequence

import numpy as np
from scipy.optimize import brentq, minimize_scalar
from torch import Tensor

from pliant.errors import PliantError

_POINTS = 9  # of the noise search between two kinks of the free energy
_NARROW = 1e-9  # in the logarithm of the variance: less is rounding


def energy_rank(sigma: Tensor, p: float) -> int:
    """Return the smallest rank whose squared singular values sum to a share p of all.

    Args:
        sigma: singular values in any order.
        p: share of the energy to keep, 0 to 1. At least rank 1 is returned, for zeros too.

    Raises:
        PliantError: p is outside 0 to 1.
    """
    if not 0 <= p <= 1:
        raise PliantError(
            f"An energy share p between 0 and 1 was expected, not {p}: 0.95 keeps 95 %."
        )
    energy = sigma.detach().double().square().sort(descending=True).values.cumsum(0)
    total = float(energy[-1])
    if total == 0.0:
        return 1
    return int((energy < p * total).sum()) + 1


def numerical_rank(sigma: Tensor, tolerance: float = 1e-5) -> int:
    """Count the singular values above `tolerance` times the largest; 0 for a zero matrix."""
    sigma = sigma.detach()
    return int((sigma > tolerance * sigma.max()).sum())


def stable_rank(sigma: Tensor) -> float:
    """Return the sum of squared singular values over the largest: no rounding, no threshold.

    It is 1 for a single direction and for a zero matrix, and the rank where all are equal.
    """
    energy = sigma.detach().double().square()
    return float(energy.sum() / energy.max()) if float(energy.max()) > 0 else 1.0


def evbmf_rank(sigma: Tensor, shape: Sequence[int]) -> int:
    """Return the rank that empirical variational Bayes keeps, with the noise estimated too.

    The global analytic solution of Nakajima, Sugiyama, Babacan, Tomioka, "Global analytic
    solution of fully-observed variational Bayesian matrix factorization", JMLR 14 (2013): a
    component stays if its singular value exceeds a threshold set by the noise variance, and
    that variance minimises the free energy in one dimension. The rank can be 0 (all noise).

    Args:
        sigma: all singular values of the matrix.
        shape: (rows, columns) of the matrix.

    Raises:
        PliantError: there are more singular values than the shape allows.
    """
    small, large = sorted(shape)
    if len(sigma) > small:
        raise PliantError(
            f"At most {small} singular values were expected for shape {tuple(shape)}, not "
            f"{len(sigma)}: pass the shape of the unfolding that they came from."
        )
    energy = _energies(sigma, small)
    if energy[0] == 0.0:
        return 0
    alpha = small / large
    edge = _edge(alpha)
    variance = _noise(energy, large, alpha, edge)
    return int((energy > large * variance * edge).sum())


def _energies(sigma: Tensor, small: int) -> np.ndarray:
    """Squared singular values, largest first, padded with zeros to the small side."""
    energy = np.zeros(small)
    values = sigma.detach().double().cpu().numpy()
    energy[: len(values)] = np.sort(values**2)[::-1]
    # Exact zeros have no logarithm: lift them to the rounding noise of float32 weights.
    return np.maximum(energy, energy[0] * 1e-13)


@functools.cache
def _edge(alpha: float) -> float:
    """The largest x = gamma^2 / (M sigma^2) that is still noise (x underlined, theorem 2).

    tau is the zero of Phi(tau) + Phi(tau / alpha), Phi(z) = log(1 + z) / z - 1 / 2.
    """

    def balance(tau: float) -> float:
        return math.log1p(tau) / tau + math.log1p(tau / alpha) * alpha / tau - 1

    # log(1+z)/z falls from 1 to 1/2 at z = 2.5129: the zero lies between alpha and one times it.
    tau = brentq(balance, alpha * 2.5, 2.6)
    return (1 + tau) * (1 + alpha / tau)


def _noise(energy: np.ndarray, large: int, alpha: float, edge: float) -> float:
    """Minimise the free energy over the noise variance, in logarithm: it may be tiny.

    Where a component changes sides the free energy is the lower of two curves, so that no minimum
    lies at such a kink, and any interval between two of them may hold the lowest.
    """
    # Noise of the whole matrix is the upper bound, the smallest singular value the lower one.
    upper = math.log(energy.sum() / (len(energy) * large))
    lower = math.log(energy[-1] / (large * edge))
    kinks = np.log(energy / (large * edge))
    ends = np.unique(np.concatenate([[lower, upper], kinks[(kinks > lower) & (kinks < upper)]]))
    # Intervals of rounding between equal singular values hold nothing.
    starts, widths = ends[:-1], np.diff(ends)
    starts, widths = starts[widths > _NARROW], widths[widths > _NARROW]
    if not len(starts):
        return math.exp(upper)

    def objective(points: np.ndarray) -> np.ndarray:
        return np.array([_free_energy(point, energy / large, alpha, edge) for point in points])

    grid = np.linspace(0, 1, _POINTS)
    values = objective((starts[:, None] + widths[:, None] * grid).ravel()).reshape(-1, _POINTS)
    best, least = upper, math.inf
    bound = values.min()
    for start, width, row in zip(starts, widths, values, strict=True):
        # A step of the grid away from a minimum the free energy is hardly higher than in it.
        if row.min() - bound > np.ptp(row) + _NARROW * abs(bound):
            continue
        for k in _valleys(row):
            left, right = grid[max(k - 1, 0)], grid[min(k + 1, _POINTS - 1)]
            found = minimize_scalar(
                lambda point: float(objective(np.array([point]))[0]),
                bounds=(start + width * left, start + width * right),
                method="bounded",
                options={"xatol": 1e-10},
            )
            if found.fun < least:
                best, least = float(found.x), float(found.fun)
    return math.exp(best)


def _valleys(row: np.ndarray) -> list[int]:
    """The places of a row that are no higher than both neighbours."""
    padded = np.concatenate([[np.inf], row, [np.inf]])
    return [int(k) for k in np.flatnonzero((row <= padded[:-2]) & (row <= padded[2:]))]


def _free_energy(log_variance: float, scaled: np.ndarray, alpha: float, edge: float) -> float:
    """The part of the free energy that depends on the noise variance (theorem 4, eq. 27)."""
    x = scaled / math.exp(log_variance)
    noise, signal = x[x <= edge], x[x > edge]
    shifted = signal - (1 + alpha)
    tau = (shifted + np.sqrt(np.maximum(shifted**2 - 4 * alpha, 0))) / 2
    kept = signal - tau + np.log((tau + 1) / signal) + alpha * np.log(tau / alpha + 1)
    return float((noise - np.log(noise)).sum() + kept.sum())
