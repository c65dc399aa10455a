"""A cube split into a part of low tubal rank and a rest, by weighted norms and ADMM.

The rest is sparse errors where the whole cube is given, and whatever is unknown where a mask says
what is known.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pliant.families.solve.admm import Blocks, Pace, Solved, admm
from pliant.families.solve.concave import Concave
from pliant.families.solve.tsvd import mean_over_slices, singular_values, spectral_map

NOTHING = 1e-12  # a size below which there is nothing to weigh by


@dataclass(frozen=True)
class Bound:
    """An upper bound of a concave penalty: a weighted norm less a linear term.

    Args:
        weights: of the sizes: singular values (n3 // 2 + 1, m), or entries of the cube.
        shift: what the linear term pulls towards, a cube.
    """

    weights: Tensor | float = 1.0
    shift: Tensor | float = 0.0


def split(
    cube: Tensor,
    mask: Tensor | None,
    start: Blocks,
    low: Bound,
    rest: Bound,
    strength: float,
    pace: Pace,
) -> Solved:
    """Minimise bound(low) + strength * bound(rest) where cube = low + rest.

    Args:
        cube: (n1, n2, n3).
        mask: true where the rest must be zero; elsewhere it is free and costs nothing.
        start: the blocks "low" and "rest" to begin with.
        low: of the singular values of the Fourier slices.
        rest: of the entries, without a mask.
        strength: lambda.
        pace: of the iteration.
    """

    def shrink_spectrum(now: Blocks, mu: float) -> Tensor:
        target = cube - now["rest"] + (now["dual"] + low.shift) / mu
        return spectral_map(target, lambda s: (s - low.weights / mu).clamp_min(0))

    def shrink_errors(now: Blocks, mu: float) -> Tensor:
        target = cube - now["low"] + (now["dual"] + rest.shift) / mu
        if mask is not None:
            return target.masked_fill(mask, 0)
        return target.sign() * (target.abs() - strength * rest.weights / mu).clamp_min(0)

    return admm(
        {**start, "dual": torch.zeros_like(cube)},
        {"low": shrink_spectrum, "rest": shrink_errors},
        {"dual": lambda now: cube - now["low"] - now["rest"]},
        pace,
    )


@dataclass(frozen=True)
class Objective:
    """R(low) + strength * P(rest), of concave penalties; with a mask the rest costs nothing.

    Args:
        rank: R, on the singular values of the Fourier slices.
        sparse: P, on entries.
        strength: lambda.
        masked: whether a mask says what is known.
        rank_scale: a of R.
        sparse_scale: a of P.
    """

    rank: Concave
    sparse: Concave
    strength: float
    masked: bool
    rank_scale: float = 1.0
    sparse_scale: float = 1.0

    def value(self, at: Blocks) -> float:
        """Return the objective."""
        sigma = singular_values(at["low"])
        sizes = self.rank.value(sigma, self.rank_scale)
        found = float(mean_over_slices(sizes, at["low"].shape[2]))
        if not self.masked:
            errors = self.sparse.value(at["rest"].abs(), self.sparse_scale)
            found += self.strength * float(errors.sum())
        return found

    def weighted(self, at: Blocks) -> tuple[Bound, Bound]:
        """Bound both penalties from above by weighted norms, with equality at these values."""
        slopes = self.rank.slope(singular_values(at["low"]), self.rank_scale)
        return Bound(slopes), Bound(self.sparse.slope(at["rest"].abs(), self.sparse_scale))

    def shifted(self, at: Blocks) -> tuple[Bound, Bound]:
        """Bound both penalties by their norms less linear terms, with equality at these values."""
        pull = spectral_map(at["low"], lambda s: 1 - self.rank.slope(s, self.rank_scale))
        slopes = self.sparse.slope(at["rest"].abs(), self.sparse_scale)
        push = self.strength * (at["rest"].sign() * (1 - slopes))
        return Bound(shift=pull), Bound(shift=0.0 if self.masked else push)

    def scaled(self, at: Blocks, rank_scale: float, sparse_scale: float) -> Objective:
        """Set the scales, in units of the largest singular value and of the typical error."""
        largest = float(singular_values(at["low"]).max())
        size = at["rest"].abs()  # weighed by itself, so that many tiny errors do not count
        typical = float(size.square().sum() / size.sum().clamp_min(NOTHING))
        a, b = rank_scale * largest, sparse_scale * typical
        return replace(self, rank_scale=max(a, NOTHING), sparse_scale=max(b, NOTHING))
