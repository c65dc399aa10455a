"""A weight that holds few distinct values: how it comes about, moves, and what it takes coded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pliant.codecs import address_map, tensors
from pliant.errors import BudgetError, ModelError
from pliant.families.code.sharing import draw, kmeans, mask, nearest, representatives
from pliant.nn.layers import Factorizable
from pliant.run import Run

MOST = 0.999  # highest pruning level that a budget may ask for
HALVINGS = 12  # of the interval in which that level is searched


@dataclass(frozen=True)
class Shared:
    """Weights that share values: ``levels[index]``, and zero where the mask is not set."""

    mask: Tensor
    index: Tensor
    levels: Tensor

    @property
    def weight(self) -> Tensor:
        """The weights."""
        return self.levels[self.index.long()] * self.mask

    def move(self, weight: Tensor, rate: float | None) -> None:
        """Move each value, in place, by what its weights have moved.

        Args:
            weight: as a step has left it.
            rate: on the sum of the moves; their mean if None.
        """
        moved = (weight.float() - self.weight) * self.mask
        places = self.index.flatten().long()
        step = torch.zeros_like(self.levels).index_add_(0, places, moved.flatten())
        if rate is None:
            counts = torch.zeros_like(self.levels)
            step /= counts.index_add_(0, places, self.mask.flatten().float()).clamp(1)
        self.levels.add_(step, alpha=1.0 if rate is None else rate)


def shared(
    weight: Tensor,
    level: float,
    values: int,
    how: Literal["pq", "ws"],
    generator: torch.Generator,
    *,
    zeros: bool = False,
) -> Shared:
    """Prune a weight and share a few values among what is left.

    Args:
        weight: of one layer.
        level: share of the weights that become zero.
        values: distinct values at most.
        how: ``pq`` draws quantiles without bias, ``ws`` takes k-means.
        generator: of the draws.
        zeros: share values among the pruned weights too.

    Raises:
        ModelError: a weight is not finite.
    """
    if not torch.isfinite(weight).all():
        raise ModelError("hac: weights must be finite to share values, and some are not.")
    kept = mask(weight, level)
    pruned = (weight * kept).float()
    known = pruned if zeros or not kept.any() else pruned[kept]
    if how == "ws":
        levels = kmeans(known, values)
        return Shared(kept, nearest(pruned, levels), levels)
    levels = representatives(known, values)
    return Shared(kept, draw(pruned, levels, generator), levels)


def coded_bytes(found: Shared, weight: Tensor, form: str) -> int:
    """Predict the size of a coded kernel, with pruned weights apart from values that are zero.

    Args:
        found: the values of its weights.
        weight: the kernel.
        form: of `pliant.codecs.address_map`, or ``auto`` for the smallest.
    """
    index = found.index[found.mask].cpu().numpy()
    counts = np.bincount(index, minlength=1)
    zeros, shape = weight.numel() - len(index), tensors.matrix(tuple(weight.shape))
    return min(
        address_map.predict(counts[counts > 0], zeros, shape, weight.element_size(), each)
        for each in (address_map.FORMS if form == "auto" else (form,))
    )


@dataclass(frozen=True)
class Sharing:
    """How the weights of every layer come to share values.

    Args:
        values: distinct ones of a layer at most.
        how: see `shared`.
        zeros: share values among the pruned weights too.
        form: as which kernels are coded: see `coded_bytes`.
    """

    values: int
    how: Literal["pq", "ws"]
    zeros: bool
    form: str

    def of(self, weight: Tensor, level: float, generator: torch.Generator) -> Shared:
        """Prune a weight and share a few values among it: see `shared`."""
        return shared(weight, level, self.values, self.how, generator, zeros=self.zeros)

    def gains(self, found: Shared, weight: Tensor) -> bool:
        """Whether a kernel is smaller when it is coded."""
        return coded_bytes(found, weight, self.form) < weight.nbytes

    def lowest(self, run: Run, layers: Mapping[str, Factorizable], least: float) -> float:
        """Return the lowest pruning level from ``least`` on that meets the budget in bytes.

        Raises:
            BudgetError: no level does.
        """
        bound = run.limits().get("bytes")
        if bound is None:
            return least
        weights = [module.weight.detach() for module in layers.values()]
        rest = run.planner.now().bytes - sum(weight.nbytes for weight in weights)

        def total(level: float) -> int:
            generator = same_draws(run.generator)
            found = [(weight, self.of(weight, level, generator)) for weight in weights]
            return rest + sum(min(w.nbytes, coded_bytes(f, w, self.form)) for w, f in found)

        return lowest_level(total, least, bound, rest)


def lowest_level(total: Callable[[float], int], least: float, bound: float, rest: int) -> float:
    """Return the lowest pruning level at which a network takes no more bytes than a bound.

    Args:
        total: bytes of the network at a level; falls with it.
        least: the level to begin with.
        bound: bytes allowed.
        rest: bytes that no level changes, for the refusal.

    Raises:
        BudgetError: no level reaches the bound.
    """
    found = {level: total(level) for level in (least, MOST)}
    if found[least] <= bound:
        return least
    if found[MOST] > bound:
        raise BudgetError(
            f"hac reaches {found[MOST]:,} bytes where {bound:,.0f} are asked for, and "
            f"{rest:,} of them are not of layers that it codes: ask for less."
        )
    low, high = least, MOST
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if total(middle) <= bound else (middle, high)
    return high


def same_draws(generator: torch.Generator) -> torch.Generator:
    """Return a generator that will draw the same numbers, and leave this one as it is."""
    return torch.Generator().set_state(generator.get_state())
