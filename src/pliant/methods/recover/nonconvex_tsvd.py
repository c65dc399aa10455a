"""Non-convex t-SVD: recovers tensors of low tubal rank where the nuclear norm shrinks too much."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from pliant.families.solve.admm import Pace, Solved
from pliant.families.solve.concave import Name, named
from pliant.families.solve.cubes import check_mask, check_shape, from_cube, to_cube
from pliant.families.solve.split import NOTHING, Bound, Objective, split
from pliant.registry import In, Paper, register
from pliant.result import Solution

MOST_ROUNDS = 50


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
        check_shape("nonconvex_tsvd", x, self.axis)
        size = float(x.abs().max()) or 1.0
        cube = to_cube(x.double(), self.axis) / size
        mask = None if known is None else to_cube(known, self.axis)
        if mask is not None:
            check_mask(mask)
        found, rows = self._rounds(cube, mask)
        values = {name: from_cube(value, x, self.axis) * size for name, value in found.items()}
        if known is not None:
            values = {name: torch.where(known, x, value) for name, value in values.items()}
        inner = sum(row["iterations"] for row in rows)
        return Solution(values, tuple(rows), rows[-1]["settled"], inner)

    def _rounds(
        self, cube: Tensor, mask: Tensor | None
    ) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        """Minimise one bound after the other, for numbers of at most 1."""
        strength = self.strength / math.sqrt(max(cube.shape[:2]) * cube.shape[2])
        penalties = named(self.penalty), named(self.error_penalty)
        whole = Objective(*penalties, strength, masked=mask is not None)
        pace = Pace(growth=self.growth, iterations=self.iterations, tolerance=self.tolerance)
        blocks = {"low": torch.zeros_like(cube), "rest": torch.zeros_like(cube)}
        bounds = Bound(), Bound()
        rows: list[dict[str, Any]] = []
        for number in range(self.rounds + 1):
            before = blocks["low"]
            solved = split(cube, mask, blocks, *bounds, strength, pace)
            blocks = solved.blocks
            if number == 0:
                convex = blocks["low"]
                whole = whole.scaled(blocks, self.scale, self.error_scale)
            rows.append(_row(number, whole.value(blocks), before, solved))
            last = self._convex(mask) or rows[-1]["change"] < self.settled
            rows[-1]["settled"] = bool(solved.converged and last)
            if rows[-1]["settled"]:
                break
            bounds = (whole.weighted if self.majorizer == "weights" else whole.shifted)(blocks)
        values = {"recovered": blocks["low"], "convex": convex}
        return values | ({"errors": blocks["rest"]} if mask is None else {}), rows

    def _convex(self, mask: Tensor | None) -> bool:
        """Say whether the problem is that of round 0."""
        return self.penalty == "l1" and (mask is not None or self.error_penalty == "l1")


def _row(number: int, objective: float, before: Tensor, solved: Solved) -> dict[str, Any]:
    low = solved.blocks["low"]
    return {
        "round": number,
        "objective": objective,
        "change": float((low - before).norm() / low.norm().clamp_min(NOTHING)),
        "iterations": solved.iterations,
        "residual": solved.residual,
    }
