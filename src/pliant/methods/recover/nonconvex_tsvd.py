"""Non-convex t-SVD: recovers tensors of low tubal rank where the nuclear norm shrinks too much."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from pliant.errors import DataError, MethodError
from pliant.families.solve.admm import Blocks, Pace, Solved, admm
from pliant.families.solve.concave import Name, named
from pliant.families.solve.tsvd import mean_over_slices, singular_values, spectral_map
from pliant.registry import In, Paper, register
from pliant.result import Solution

MOST_ROUNDS = 50
NOTHING = 1e-12  # a size below which there is nothing to weigh by


@register(
    "nonconvex_tsvd",
    paper=Paper(
        "T-SVD Based Non-Convex Tensor Completion and Robust Principal Component Analysis",
        "T. Li, J. Ma",
        "ICPR",
        2020,
        "https://arxiv.org/abs/1904.10165",
    ),
    verb="recover",
)
@dataclass(frozen=True)
class NonconvexTSVD:
    """Recovers a tensor of low tubal rank from some of its entries, or under gross errors.

    With a mask it completes: min R(X) with X as given where it is known. Without one it separates
    x = L + E into low rank and sparse errors: min R(L) + lambda P(E). R sums a concave penalty
    over the singular values of the Fourier slices, P over entries: what is large is hardly
    shrunk, unlike by the nuclear and the l1 norm. Each round minimises a bound of the objective
    by ADMM, a nuclear norm with weights taken from the round before; round 0 has weights 1 and
    *is* the tubal nuclear norm (TNN). The objective never rises from round to round.

    Matrices are tensors with one slice. The values are ``recovered``, ``errors`` where they were
    looked for, and ``convex``, the TNN solution of round 0.

    *Departs from the paper*: its figures and its exact penalty could not be read; the penalties
    here all begin with slope 1, and their scales are shares of what round 0 found.

    >>> NonconvexTSVD(penalty="log").rounds
    6
    """

    penalty: Name = "mcp"  # g, on singular values; "l1" is the TNN itself
    error_penalty: Name = "mcp"  # h, on errors
    # of g: a, in units of the largest singular value of round 0
    scale: Annotated[float, In(0, open="low")] = 0.5
    # of h, in units of the typical error of round 0
    error_scale: Annotated[float, In(0, open="low")] = 0.5
    # lambda, in units of 1 / sqrt(max(n1, n2) n3)
    strength: Annotated[float, In(0, open="low")] = 1.0
    majorizer: Literal["weights", "shift"] = "weights"  # bound by a weighted norm, or a linear term
    rounds: Annotated[int, In(0, MOST_ROUNDS)] = 6  # after the first, at most
    # relative change of a round at which it stops
    settled: Annotated[float, In(0, open="low")] = 1e-4
    axis: Annotated[int, In(-3, 2)] = -1  # of the tubes: bands, frames or colours
    iterations: Annotated[int, In(1)] = 600  # of each round, at most
    tolerance: Annotated[float, In(0, open="low")] = 1e-7  # of each round, for numbers of at most 1
    growth: Annotated[float, In(1, 10, "low")] = 1.05  # rho, of the penalty mu in each iteration

    def recover(self, x: Tensor, known: Tensor | None, generator: torch.Generator) -> Solution:
        """Complete x where it is not known, or free it from errors if all of it is."""
        self._check(x)
        size = float(x.abs().max()) or 1.0
        cube = _to_cube(x.double(), self.axis) / size
        mask = None if known is None else _to_cube(known, self.axis)
        _check_mask(mask)
        found, rows = _Rounds(self, cube, mask).run()
        values = {name: _from_cube(value, x, self.axis) * size for name, value in found.items()}
        if known is not None:
            values = {name: torch.where(known, x, value) for name, value in values.items()}
        inner = sum(row["iterations"] for row in rows)
        return Solution(values, tuple(rows), rows[-1]["settled"], inner)

    def _check(self, x: Tensor) -> None:
        if x.dim() not in (2, 3) or not -x.dim() <= self.axis < x.dim():
            raise DataError(
                f"nonconvex_tsvd recovers matrices and tensors of third order along one of their "
                f"axes, not shape {tuple(x.shape)} along axis {self.axis}; reshape it."
            )
        for name in ("scale", "error_scale", "strength", "tolerance", "settled"):
            if not getattr(self, name) > 0:
                raise MethodError(f"nonconvex_tsvd: {name} must be positive.")
        whole = 0 <= self.rounds <= MOST_ROUNDS and self.iterations >= 1
        if not whole or not 1 < self.growth <= 10:
            raise MethodError(
                f"nonconvex_tsvd: rounds must be 0 to {MOST_ROUNDS}, iterations 1 or more, growth "
                f"above 1 and at most 10, not {self.rounds}, {self.iterations} and {self.growth}."
            )


# ---------------------------------------------------------------- shapes


def _to_cube(x: Tensor, axis: int) -> Tensor:
    return x[..., None] if x.dim() == 2 else x.movedim(axis, -1).contiguous()


def _from_cube(cube: Tensor, like: Tensor, axis: int) -> Tensor:
    return cube[..., 0] if like.dim() == 2 else cube.movedim(-1, axis)


def _check_mask(mask: Tensor | None) -> None:
    """Refuse what no low-rank model can fill in."""
    for axis, name in ((0, "row"), (1, "column")) if mask is not None else ():
        assert mask is not None
        empty = (~mask.any(2).any(1 - axis)).nonzero().flatten()
        if len(empty):
            raise DataError(
                f"Every {name} of x needs a known entry, but {name} {int(empty[0])} has none along "
                "the whole axis of the tubes; leave it out, or choose another axis."
            )


# ---------------------------------------------------------------- majorize, minimise


@dataclass(frozen=True)
class _Bound:
    """Upper bounds of both penalties: thresholds are times the weights, targets plus the shift."""

    weights: Tensor | float = 1.0
    shift: Tensor | float = 0.0


class _Rounds:
    """One call of `recover`, scaled to numbers of at most 1."""

    def __init__(self, method: NonconvexTSVD, cube: Tensor, mask: Tensor | None) -> None:
        self.method, self.cube, self.mask = method, cube, mask
        self.rank, self.sparse = named(method.penalty), named(method.error_penalty)
        longest = max(cube.shape[:2]) * cube.shape[2]
        self.strength = method.strength / math.sqrt(longest)
        self.pace = Pace(
            growth=method.growth, iterations=method.iterations, tolerance=method.tolerance
        )
        self.a, self.b = 1.0, 1.0  # scales of both penalties, set after round 0

    def run(self) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        """Minimise one bound after the other."""
        zero = torch.zeros_like(self.cube)
        blocks: Blocks = {"low": zero, "rest": zero}
        rows: list[dict[str, Any]] = []
        for number in range(self.method.rounds + 1):
            before = blocks["low"]
            solved = self._minimise(blocks, *self._bounds(blocks, number))
            blocks = solved.blocks
            if number == 0:
                convex = blocks["low"]
                self.a = self.method.scale * float(singular_values(blocks["low"]).max())
                self.b = self.method.error_scale * _typical(blocks["rest"])
                self.a, self.b = max(self.a, NOTHING), max(self.b, NOTHING)
            rows.append(self._row(number, solved, before))
            if rows[-1]["settled"]:
                break
        values = {"recovered": blocks["low"], "convex": convex}
        return values | ({"errors": blocks["rest"]} if self.mask is None else {}), rows

    def _minimise(self, start: Blocks, low: _Bound, rest: _Bound) -> Solved:
        """Solve one weighted problem: x = low + rest, where rest is errors or what is unknown."""

        def shrink_spectrum(now: Blocks, mu: float) -> Tensor:
            target = self.cube - now["rest"] + (now["dual"] + low.shift) / mu
            return spectral_map(target, lambda s: (s - low.weights / mu).clamp_min(0))

        def shrink_errors(now: Blocks, mu: float) -> Tensor:
            target = self.cube - now["low"] + (now["dual"] + rest.shift) / mu
            if self.mask is not None:
                return target.masked_fill(self.mask, 0)
            return target.sign() * (target.abs() - self.strength * rest.weights / mu).clamp_min(0)

        return admm(
            {**start, "dual": torch.zeros_like(self.cube)},
            {"low": shrink_spectrum, "rest": shrink_errors},
            {"dual": lambda now: self.cube - now["low"] - now["rest"]},
            self.pace,
        )

    def _bounds(self, at: Blocks, number: int) -> tuple[_Bound, _Bound]:
        """Bound both penalties from above, with equality at the present values."""
        if number == 0:
            return _Bound(), _Bound()
        if self.method.majorizer == "weights":
            slopes = self.rank.slope(singular_values(at["low"]), self.a)
            return _Bound(slopes), _Bound(self.sparse.slope(at["rest"].abs(), self.b))
        pull = spectral_map(at["low"], lambda s: 1 - self.rank.slope(s, self.a))
        push = at["rest"].sign() * (1 - self.sparse.slope(at["rest"].abs(), self.b))
        none = self.mask is not None
        return _Bound(shift=pull), _Bound(shift=0.0 if none else self.strength * push)

    def _row(self, number: int, solved: Solved, before: Tensor) -> dict[str, Any]:
        low = solved.blocks["low"]
        change = float((low - before).norm() / low.norm().clamp_min(NOTHING))
        convex = self.method.penalty == "l1" and (
            self.mask is not None or self.method.error_penalty == "l1"
        )
        last = convex or change < self.method.settled
        return {
            "round": number,
            "objective": self._objective(solved.blocks),
            "change": change,
            "iterations": solved.iterations,
            "residual": solved.residual,
            "settled": bool(solved.converged and last),
        }

    def _objective(self, blocks: Blocks) -> float:
        """R + lambda P, with the scales that hold from round 0 on."""
        sigma = singular_values(blocks["low"])
        found = float(mean_over_slices(self.rank.value(sigma, self.a), self.cube.shape[2]))
        if self.mask is None:
            found += self.strength * float(self.sparse.value(blocks["rest"].abs(), self.b).sum())
        return found


def _typical(errors: Tensor) -> float:
    """The mean size of errors, each weighted by its size, so that many tiny ones do not count."""
    size = errors.abs()
    return float(size.square().sum() / size.sum().clamp_min(NOTHING))
