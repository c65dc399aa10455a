"""Spectral penalties of the channel unfoldings, with exact gradients in closed form.

For a function of singular values with derivative d the gradient by M = U diag(sigma) V^T is
U diag(d(sigma)) V^T. It needs no derivative of the eigenvectors, which explodes where
singular values repeat. Where sigma is numerically zero the gradient is taken as zero (the
smallest subgradient), so a direction that has died stays dead.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pliant.errors import PliantError
from pliant.math.svd import eigen, fold, plain_dtype, unfold, with_spectrum

KNEE = 1e-2  # of log-det: the share of the mean energy below which a direction counts as weak
POWER = 0.5  # p of Schatten-p
PRECISE = 32  # small sides up to this go through float64 at once: it costs next to nothing
FLAT = 0.03  # smallest over largest singular value above which float32 will do
SMOOTHING = 1e-3  # of Schatten-p: keeps the derivative finite at zero


@dataclass(frozen=True)
class Penalty:
    """A function of singular values and its derivative by each of them."""

    value: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]


def penalty(weight: Tensor, modes: Sequence[int] = (0, 1), kind: str = "nuclear") -> Tensor:
    """Return the sum of a spectral penalty over unfoldings of a kernel, outside autograd.

    Args:
        weight: kernel (T, S, *kernel) or (T, S). The two unfoldings of a matrix are each other's
            transpose: both modes count it twice.
        modes: unfoldings to penalise: 0 output channels, 1 input channels.
        kind: a name in `PENALTIES`.

    Raises:
        PliantError: unknown kind or mode.
    """
    return penalty_and_gradient(weight, modes, kind)[0]


def penalty_gradient(
    weight: Tensor, modes: Sequence[int] = (0, 1), kind: str = "nuclear"
) -> Tensor:
    """Return the exact gradient of `penalty` by the weight, in its shape and dtype."""
    return penalty_and_gradient(weight, modes, kind)[1]


@torch.no_grad()
def penalty_and_gradient(
    weight: Tensor, modes: Sequence[int] = (0, 1), kind: str = "nuclear"
) -> tuple[Tensor, Tensor]:
    """Return the value and the gradient of a spectral penalty from one eigh per unfolding."""
    function = _named(kind)
    dtype = plain_dtype(weight.dtype)
    value = torch.zeros((), dtype=dtype, device=weight.device)
    gradient = torch.zeros(weight.shape, dtype=dtype, device=weight.device)
    for mode in modes:
        matrix = unfold(weight.detach(), mode).to(dtype)
        sigma, vectors = _decomposed(matrix)
        value += function.value(sigma).to(dtype)
        slope = with_spectrum(matrix, sigma, vectors, function.derivative(sigma))
        gradient += fold(slope, weight.shape, mode)
    return value, gradient.to(weight.dtype)


def _decomposed(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values and vectors; in float32 only if large and flat enough to be exact there.

    Squared in float32, a singular value of 0.03 times the largest is still good to 1e-4.
    """
    if min(matrix.shape) > PRECISE:
        sigma, vectors = eigen(matrix, cheap=PRECISE)
        if sigma[0] > FLAT * sigma[-1]:
            return sigma, vectors
    return eigen(matrix)


def _named(kind: str) -> Penalty:
    if kind not in PENALTIES:
        raise PliantError(
            f"One of the penalties {tuple(PENALTIES)} was expected, not {kind!r}: choose one."
        )
    return PENALTIES[kind]


def _energies(sigma: Tensor) -> tuple[Tensor, Tensor]:
    """sigma^2 over the knee, and the knee: KNEE times the mean of sigma^2."""
    knee = (KNEE * sigma.square().mean()).clamp_min(torch.finfo(sigma.dtype).tiny)
    return sigma.square() / knee, knee


def _logdet(sigma: Tensor) -> Tensor:
    """Sum of log(1 + sigma^2 / (KNEE mean sigma^2)): blind to scale, as BatchNorm is."""
    return _energies(sigma)[0].log1p().sum()


def _logdet_derivative(sigma: Tensor) -> Tensor:
    energy, knee = _energies(sigma)
    own = 2 * sigma / knee / (1 + energy)
    # The mean in the knee moves with every sigma: this part takes the uniform shrinking out.
    through_mean = 2 * sigma * (KNEE / knee) * (energy / (1 + energy)).mean()
    return own - through_mean


def _schatten(sigma: Tensor) -> Tensor:
    """Sum of sigma^p, smoothed at zero."""
    return (sigma.square() + SMOOTHING**2).pow(POWER / 2).sum()


def _schatten_derivative(sigma: Tensor) -> Tensor:
    return POWER * sigma * (sigma.square() + SMOOTHING**2).pow(POWER / 2 - 1)


def _hoyer(sigma: Tensor) -> Tensor:
    """Sum over root of the sum of squares: 1 for rank one, sqrt(n) for a flat spectrum."""
    return sigma.sum() / sigma.norm().clamp_min(torch.finfo(sigma.dtype).tiny)


def _hoyer_derivative(sigma: Tensor) -> Tensor:
    norm = sigma.norm().clamp_min(torch.finfo(sigma.dtype).tiny)
    return 1 / norm - sigma * (sigma.sum() / norm**3)


PENALTIES = {
    "nuclear": Penalty(torch.sum, torch.ones_like),
    "logdet": Penalty(_logdet, _logdet_derivative),
    "schatten": Penalty(_schatten, _schatten_derivative),
    "hoyer": Penalty(_hoyer, _hoyer_derivative),
}
