"""The alternating direction method of multipliers, for any number of blocks and constraints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

Blocks = dict[str, Tensor]


@dataclass(frozen=True)
class Pace:
    """How the weight of the constraints grows, and when to stop.

    Args:
        mu: their weight in the first iteration.
        growth: what it is multiplied by after each.
        most: what it never exceeds.
        iterations: at most.
        tolerance: of residuals and changes, the largest absolute entry.
    """

    mu: float = 1e-3
    growth: float = 1.1
    most: float = 1e10
    iterations: int = 300
    tolerance: float = 1e-7


@dataclass(frozen=True, eq=False)
class Solved:
    """Where the iterations ended.

    Args:
        blocks: the last values, multipliers included.
        converged: whether residuals and changes came below the tolerance.
        iterations: how many were made.
        residuals: after each iteration the largest absolute entry of all constraints.
    """

    blocks: Blocks
    converged: bool
    iterations: int
    residuals: tuple[float, ...]

    @property
    def residual(self) -> float:
        """How far the constraints are from being met at the end."""
        return self.residuals[-1]


def admm(
    blocks: Blocks,
    steps: Mapping[str, Callable[[Blocks, float], Tensor]],
    constraints: Mapping[str, Callable[[Blocks], Tensor]],
    pace: Pace,
    *,
    watch: tuple[str, ...] = (),
) -> Solved:
    """Minimise over one block after the other, then move each multiplier by its residual.

    A fixed point that is not yet feasible cannot stop it, nor can a residual that is small only
    because mu is large: changes and residuals must both be below the tolerance.

    Args:
        blocks: where to begin: every block, and a multiplier for every constraint.
        steps: in order, what each block becomes, given all blocks and mu.
        constraints: for each multiplier what must become zero; the sign is that of <Y, residual>
            in the Lagrangian.
        pace: of mu, and when to stop.
        watch: blocks whose change must vanish; all that have a step if empty.
    """
    now, mu = dict(blocks), pace.mu
    residuals: list[float] = []
    for number in range(1, pace.iterations + 1):
        before = {name: now[name] for name in watch or steps}
        for name, step in steps.items():
            now[name] = step(now, mu)
        left = {name: constraint(now) for name, constraint in constraints.items()}
        for name, row in left.items():
            now[name] = now[name] + mu * row
        mu = min(mu * pace.growth, pace.most)
        residuals.append(max(float(row.abs().max()) for row in left.values()))
        change = max(float((now[name] - old).abs().max()) for name, old in before.items())
        if max(residuals[-1], change) < pace.tolerance:
            return Solved(now, True, number, tuple(residuals))
    return Solved(now, False, pace.iterations, tuple(residuals))
