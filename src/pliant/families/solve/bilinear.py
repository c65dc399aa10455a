"""Self-representations Z = U V^T of thin factors, with a penalty on Z or on the factors.

Each solver minimises (errors of Z) + strength * penalty by ADMM. What U V^T has to fit in a sweep
is T = Z + Y / mu, with Y the multiplier of Z = U V^T.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pliant.families.solve.admm import Blocks, Pace, Solved, admm
from pliant.families.solve.selfrep import Fit, nuclear_norm
from pliant.math.svd import soft_spectrum

Solver = Callable[[Fit, float, int, Pace], Solved]


def product(now: Blocks) -> Tensor:
    """Return Z = U V^T, (N, N)."""
    return now["u"] @ now["v"].T


def nuclear_of_product(fit: Fit, strength: float, rank: int, pace: Pace) -> Solved:
    """Solve with the nuclear norm of Z, of which J is a copy.

    U is a step of subspace iteration towards the best fit of rank r, V the least squares given U.
    """
    linear, none = fit.linear, torch.zeros_like(fit.gram)

    def solve_z(now: Blocks, mu: float) -> Tensor:
        right = linear + mu * (now["copy"] + product(now)) - now["dual_copy"] - now["dual"]
        return fit.least(right, 2 * mu)

    def shrink_copy(now: Blocks, mu: float) -> Tensor:
        return soft_spectrum(now["z"] + now["dual_copy"] / mu, strength / mu)

    return admm(
        {**_start(fit, rank), "copy": none, "dual_copy": none},
        {
            "z": solve_z,
            "copy": shrink_copy,
            "u": lambda now, mu: torch.linalg.qr(_target(now, mu) @ now["v"])[0],
            "v": lambda now, mu: _target(now, mu).T @ now["u"],
        },
        {
            "dual_copy": lambda now: now["z"] - now["copy"],
            "dual": lambda now: now["z"] - product(now),
        },
        pace,
        watch=("z",),
    )


def nuclear_of_factors(fit: Fit, strength: float, rank: int, pace: Pace) -> Solved:
    """Solve with (|U|_* + |V|_*) / 2, the sum of roots of Z's singular values, by copies of both.

    Over all factors of a given Z it is at least sum_i sqrt(sigma_i(Z)): less convex than the
    nuclear norm, and closer to the rank.
    """
    start = _start(fit, rank)
    none, eye = torch.zeros_like(start["u"]), _eye(fit, rank)

    def factor(own: str, other: str) -> Callable[[Blocks, float], Tensor]:
        def solve(now: Blocks, mu: float) -> Tensor:
            target = _target(now, mu) if own == "u" else _target(now, mu).T
            right = target @ now[other] + now[f"copy_{own}"] - now[f"dual_{own}"] / mu
            return _divided(right, now[other].T @ now[other] + eye)

        return solve

    def shrink(own: str) -> Callable[[Blocks, float], Tensor]:
        return lambda now, mu: soft_spectrum(
            now[own] + now[f"dual_{own}"] / mu, strength / (2 * mu)
        )

    copies = {"copy_u": start["u"], "copy_v": start["v"], "dual_u": none, "dual_v": none}
    return admm(
        {**start, **copies},
        {
            "z": _solve_z(fit),
            "u": factor("u", "v"),
            "copy_u": shrink("u"),
            "v": factor("v", "u"),
            "copy_v": shrink("v"),
        },
        {
            "dual": lambda now: now["z"] - product(now),
            "dual_u": lambda now: now["u"] - now["copy_u"],
            "dual_v": lambda now: now["v"] - now["copy_v"],
        },
        pace,
        watch=("z",),
    )


def squares_of_factors(fit: Fit, strength: float, rank: int, pace: Pace) -> Solved:
    """Solve with (|U|^2 + |V|^2) / 2, without any singular value decomposition.

    Equal to the nuclear norm of Z where r is no less than the rank of the solution.
    """
    eye = _eye(fit, rank)

    def factor(own: str, other: str) -> Callable[[Blocks, float], Tensor]:
        def solve(now: Blocks, mu: float) -> Tensor:
            target = _target(now, mu) if own == "u" else _target(now, mu).T
            inner = now[other].T @ now[other] + strength / mu * eye
            return _divided(target @ now[other], inner)

        return solve

    return admm(
        _start(fit, rank),
        {"z": _solve_z(fit), "u": factor("u", "v"), "v": factor("v", "u")},
        {"dual": lambda now: now["z"] - product(now)},
        pace,
        watch=("z",),
    )


SOLVERS: dict[str, Solver] = {
    "none": nuclear_of_product,
    "nuclear": nuclear_of_factors,
    "fro": squares_of_factors,
}
"""By the penalty on the factors; without one the nuclear norm of Z is held down."""

PENALTIES: dict[str, Callable[[Blocks], Tensor]] = {
    "none": lambda now: nuclear_norm(product(now)),
    "nuclear": lambda now: (nuclear_norm(now["u"]) + nuclear_norm(now["v"])) / 2,
    "fro": lambda now: (now["u"].square().sum() + now["v"].square().sum()) / 2,
}
"""What each solver holds down, of its blocks."""


def _start(fit: Fit, rank: int) -> Blocks:
    """Begin with the projector on the first r eigenvectors of the Gram matrix."""
    top = fit.vectors[:, -rank:]
    return {"z": top @ top.T, "u": top, "v": top, "dual": torch.zeros_like(fit.gram)}


def _eye(fit: Fit, rank: int) -> Tensor:
    return torch.eye(rank, dtype=fit.gram.dtype, device=fit.gram.device)


def _solve_z(fit: Fit) -> Callable[[Blocks, float], Tensor]:
    linear = fit.linear
    return lambda now, mu: fit.least(linear + mu * product(now) - now["dual"], mu)


def _target(now: Blocks, mu: float) -> Tensor:
    return now["z"] + now["dual"] / mu


def _divided(right: Tensor, inner: Tensor) -> Tensor:
    """Solve X inner = right for X, where inner is symmetric."""
    return torch.linalg.solve(inner, right.T).T
