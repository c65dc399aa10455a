"""Tucker-2: a kernel as input factor, small core and output factor (HOSVD start, HOOI sweeps)."""

import torch
from torch import Tensor

from pliant.errors import PliantError
from pliant.math.svd import leading, plain_dtype, unfold

SWEEPS = 50
# The share of the squared error that a sweep must gain to be worth another one. On random kernels
# of 200 to 512 channels, the slowest to settle, the looser one stops at 1.0007 times the error of
# TensorLy's partial_tucker or less, and at up to 1.0013 times that of the tighter one.
_SETTLED_SMALL, _SETTLED_LARGE = 2e-5, 5e-4
_ROUNDING = 1e-7  # share of the whole energy that float32 cannot tell from nothing
_PRECISE = 192  # leading directions, unlike small singular values, survive squaring in float32


def tucker2(
    weight: Tensor, rank_in: int, rank_out: int, *, sweeps: int = SWEEPS
) -> tuple[Tensor, Tensor, Tensor]:
    """Factorize a kernel (T, S, *kernel) along its two channel axes.

    Starts from the truncated higher-order SVD and improves it by higher-order orthogonal
    iteration (De Lathauwer et al. 2000), each step by the eigenvectors of a small Gram matrix.
    A sweep never raises the error; sweeping ends early once the core's energy stands still.

    Returns:
        a_in (rank_in, S) with orthonormal rows, core (rank_out, rank_in, *kernel), a_out
        (T, rank_out) with orthonormal columns, in the dtype of the weight.

    Raises:
        PliantError: a rank is not between 1 and its number of channels.
    """
    _check(weight, rank_in, rank_out)
    dense = weight.detach().to(plain_dtype(weight.dtype))
    a_in = leading(unfold(dense, 1), rank_in, _PRECISE).to(dense.dtype).T
    a_out = leading(unfold(dense, 0), rank_out, _PRECISE).to(dense.dtype)
    settled = _SETTLED_LARGE if max(dense.shape[:2]) > _PRECISE else _SETTLED_SMALL
    total, energy = float(dense.norm()) ** 2, 0.0
    for _ in range(sweeps):
        a_out = leading(unfold(_inputs(dense, a_in), 0), rank_out, _PRECISE).to(dense.dtype)
        half = _outputs(dense, a_out)
        a_in = leading(unfold(half, 1), rank_in, _PRECISE).to(dense.dtype).T
        before, energy = energy, float(_inputs(half, a_in).norm()) ** 2
        if energy - before <= settled * (total - energy) + _ROUNDING * total:
            break
    core = _inputs(_outputs(dense, a_out), a_in)
    return a_in.to(weight.dtype), core.to(weight.dtype), a_out.to(weight.dtype)


def _inputs(weight: Tensor, a_in: Tensor) -> Tensor:
    """Contract the input channels with a_in (r, S)."""
    return torch.einsum("ts...,rs->tr...", weight, a_in)


def _outputs(weight: Tensor, a_out: Tensor) -> Tensor:
    """Contract the output channels with a_out (T, r)."""
    return torch.einsum("ts...,tr->rs...", weight, a_out)


def _check(weight: Tensor, rank_in: int, rank_out: int) -> None:
    channels_out, channels_in = weight.shape[:2]
    if not (1 <= rank_in <= channels_in and 1 <= rank_out <= channels_out):
        raise PliantError(
            f"Ranks between (1, 1) and ({channels_in}, {channels_out}) were expected for a kernel "
            f"of shape {tuple(weight.shape)}, not ({rank_in}, {rank_out}): lower them."
        )
