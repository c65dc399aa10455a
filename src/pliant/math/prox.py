"""The proximal step: shrink the singular values of an unfolding, the small ones to zero."""

from collections.abc import Callable

import torch
from torch import Tensor

from pliant.errors import PliantError
from pliant.math.svd import spectral_map

SOFTENING = 1e-2  # of the reweighted threshold, in units of the root mean square singular value


def shrink(
    weight: Tensor, mode: int, threshold: float, *, kind: str = "soft", keep_norm: bool = False
) -> Tensor:
    """Lower every singular value of an unfolding by a threshold, to no less than zero.

    With s the root mean square of the singular values, each one loses

    - soft: `threshold` itself, the proximal map of the nuclear norm;
    - relative: `threshold` times the largest singular value, blind to the weight's scale;
    - reweighted: threshold * s^2 / (sigma + 0.01 s), the log-det threshold: small singular
      values lose more than large ones. Blind to scale too, and s, unlike the mean, does not
      move as the rank falls while the norm is kept.

    Args:
        weight: kernel (T, S, *kernel) or (T, S).
        mode: 0 output channels, 1 input channels.
        threshold: 0 or more, in the unit that `kind` says.
        kind: "soft", "relative" or "reweighted".
        keep_norm: scale the result back to the Frobenius norm of the weight. Shrunken weights
            under BatchNorm raise the effective learning rate by 1 / norm^2. A weight of which
            nothing is left stays zero.

    Raises:
        PliantError: unknown kind or mode, or a negative threshold.
    """
    if kind not in THRESHOLDS:
        raise PliantError(
            f"One of the thresholds {tuple(THRESHOLDS)} was expected, not {kind!r}: choose one."
        )
    if not threshold >= 0:
        raise PliantError(f"A threshold of 0 or more was expected, not {threshold}: raise it.")
    loss = THRESHOLDS[kind]

    def scale(sigma: Tensor) -> Tensor:
        left = (sigma - loss(sigma, threshold)).clamp_min(0)
        return left * _gain(sigma, left) if keep_norm else left

    return spectral_map(weight, mode, scale)


def _gain(before: Tensor, after: Tensor) -> Tensor:
    """The factor that brings the norm back, or 1 if there is nothing to scale."""
    norm = after.norm()
    return torch.where(norm > 0, before.norm() / norm.clamp_min(_tiny(norm)), 1.0)


def _soft(sigma: Tensor, threshold: float) -> Tensor:
    return torch.full_like(sigma, threshold)


def _relative(sigma: Tensor, threshold: float) -> Tensor:
    return threshold * sigma.max().expand_as(sigma)


def _reweighted(sigma: Tensor, threshold: float) -> Tensor:
    mean = sigma.square().mean().sqrt().clamp_min(_tiny(sigma))
    return threshold * mean / (sigma / mean + SOFTENING)


def _tiny(values: Tensor) -> float:
    return torch.finfo(values.dtype).tiny


THRESHOLDS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "soft": _soft,
    "relative": _relative,
    "reweighted": _reweighted,
}
