"""Concave penalties of numbers that are not negative: like |x| near zero, but large ones go free.

Every penalty rises with slope 1 from zero, so all agree with the sum of absolute values on what
is small, and has one scale a: what is far above it is hardly shrunk at all. With this
normalisation the exponential-type penalty (ETP) is Laplace's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from pliant.errors import PliantError

Name = Literal["l1", "mcp", "scad", "log", "geman", "laplace", "lp"]
KNEE = 3.7  # of SCAD: the scale over the point up to which its slope stays 1 (Fan and Li 2001)
STEPS = 200  # towards a proximal point


@dataclass(frozen=True)
class Concave:
    """A concave penalty g with g(0) = 0 and g'(0) = 1.

    Args:
        value: g(x) for x >= 0, elementwise, given the scale.
        slope: g'(x), between 0 and 1 and falling.
    """

    value: Callable[[Tensor, float], Tensor]
    slope: Callable[[Tensor, float], Tensor]

    def prox(self, x: Tensor, threshold: float, scale: float) -> Tensor:
        """Minimise threshold * g(y) + (y - x)^2 / 2 over y >= 0, elementwise, for x >= 0.

        Repeats y <- x - threshold * g'(y) from y = x, which falls to the largest stationary
        point, and compares that with zero.
        """
        y = x
        for _ in range(STEPS):
            y = (x - threshold * self.slope(y, scale)).clamp_min(0)
        cost = threshold * self.value(y, scale) + (y - x).square() / 2
        return torch.where(cost < x.square() / 2, y, 0)


def named(name: str) -> Concave:
    """Return a penalty by its name.

    Raises:
        PliantError: there is none.
    """
    if name not in PENALTIES:
        raise PliantError(f"One of the penalties {get_args(Name)} was expected, not {name!r}.")
    return PENALTIES[name]


def _mcp(x: Tensor, a: float) -> Tensor:
    return torch.where(x < a, x - x.square() / (2 * a), a / 2)


def _scad(x: Tensor, a: float) -> Tensor:
    knee = a / KNEE
    fall = (x.clamp(knee, a) - knee) * (1 - (x.clamp(knee, a) - knee) / (2 * (a - knee)))
    return x.clamp_max(knee) + fall


PENALTIES: dict[str, Concave] = {
    "l1": Concave(lambda x, a: x, lambda x, a: torch.ones_like(x)),
    "mcp": Concave(_mcp, lambda x, a: (1 - x / a).clamp_min(0)),
    "scad": Concave(_scad, lambda x, a: ((a - x) / (a - a / KNEE)).clamp(0, 1)),
    "log": Concave(lambda x, a: a * torch.log1p(x / a), lambda x, a: a / (a + x)),
    "geman": Concave(lambda x, a: a * x / (a + x), lambda x, a: (a / (a + x)).square()),
    "laplace": Concave(lambda x, a: -a * torch.expm1(-x / a), lambda x, a: torch.exp(-x / a)),
    "lp": Concave(lambda x, a: 2 * a * ((1 + x / a).sqrt() - 1), lambda x, a: (1 + x / a).rsqrt()),
}
"""All penalties by name: "mcp" (minimax concave), "lp" with p = 1/2, "l1" for comparison."""
