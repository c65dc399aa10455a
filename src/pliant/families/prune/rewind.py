"""Iterative magnitude pruning: which weights go, when, and learning rates that begin anew."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from pliant.families.prune import sparse
from pliant.families.prune.allocate import fewest
from pliant.run import Run

Annealing = Literal["cosine", "step", "none"]


def iterations(sparsity: float, rate: float) -> int:
    """Return how many prunings at a rate lead to a sparsity, the last one maybe at a smaller rate.

    >>> iterations(0.893, 0.2), iterations(0.988, 0.2)
    (11, 20)
    """
    return max(1, math.ceil(math.log(1 - sparsity) / math.log(1 - rate) - 1e-9))


def kept_after(total: int, number: int, sparsity: float, rate: float) -> int:
    """Return how many weights are left after a pruning: each takes a share of those left.

    Shares are rounded down; the last pruning ends at the sparsity, rounded up in weights kept.

    >>> [kept_after(100, number, 0.5, 0.2) for number in range(5)]
    [100, 80, 64, 52, 50]
    """
    if number >= iterations(sparsity, rate):
        return math.ceil(total * (1 - sparsity) - 1e-9)
    left = total
    for _ in range(number):
        left -= math.floor(rate * left + 1e-9)
    return left


def smallest(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor], kept: int) -> Any:
    """Return masks that keep so many of the weights kept so far, the largest of all layers.

    Of equal magnitudes the first go, so that the number is exact.

    Args:
        weights: by layer.
        masks: which of them are kept so far.
        kept: how many are to be kept, at most as many as now.
    """
    sizes = [masks[name].numel() for name in weights]
    flat = torch.cat([weights[name].detach().abs().flatten().float().cpu() for name in weights])
    known = torch.cat([masks[name].flatten().cpu() for name in weights])
    left = known.nonzero().flatten()
    order = flat[left].argsort(stable=True)
    known[left[order[: len(left) - kept]]] = False
    parts = known.split(sizes)
    return {
        name: part.view(masks[name].shape).to(masks[name].device)
        for name, part in zip(weights, parts, strict=True)
    }


def within_bytes(
    run: Run, weights: Mapping[str, Tensor], masks: Mapping[str, Tensor], kept: int
) -> int:
    """Return how many weights may be kept for a budget of bytes, at most so many.

    Args:
        run: with the budget.
        weights: by layer.
        masks: which of them are kept so far.
        kept: the most.
    """
    bound = run.limits().get("bytes")
    if bound is None:
        return kept

    def fits(gone: int) -> bool:
        found = smallest(weights, masks, kept - gone)
        counts = {name: int(mask.sum()) for name, mask in found.items()}
        return sparse.bytes_with(run, counts) <= bound

    return kept - (fewest(kept, fits) or 0)


def sparsity_for(run: Run, masks: Mapping[str, Tensor], asked: float) -> float:
    """Return about the sparsity that a budget of bytes asks, were all layers alike.

    Args:
        run: with the budget.
        masks: of all weights that may become zero.
        asked: the sparsity without a budget.

    Raises:
        BudgetError: it cannot be met.
    """
    bound = run.limits().get("bytes")
    if bound is None:
        return asked

    def size(thousandths: int) -> int:
        share = 1 - thousandths / 1000
        return sparse.bytes_with(run, {n: int(share * m.numel()) for n, m in masks.items()})

    found = fewest(999, lambda thousandths: size(thousandths) <= bound)
    if found is None:
        raise sparse.missed(bound, size(999))
    return found / 1000


def beginnings(count: int, short: float, *, dense: bool) -> list[float]:
    """Return at which share of the training each iteration begins; all but the last are short.

    Args:
        count: of iterations.
        short: length of a short one, where the last one has 1.
        dense: whether a length of 1 comes before them.

    >>> [round(46 * share) for share in beginnings(10, 0.4, dense=False)]
    [0, 4, 8, 12, 16, 20, 24, 28, 32, 36]
    """
    whole = dense + (count - 1) * short + 1
    return [(dense + number * short) / whole for number in range(count)]


def factor(
    share: float, starts: Sequence[float], annealing: Annealing, short: float, *, cut_off: bool
) -> float:
    """Return the factor of the learning rate: it begins anew with each iteration.

    Args:
        share: of the training that is over.
        starts: of iterations: see `beginnings`.
        annealing: how it falls from 1: as half a cosine to 0, or to a tenth at 1/2 and at 3/4.
        short: length of all iterations but the last.
        cut_off: let a short iteration end early in the course of a full one, not go through it.
    """
    bounds = [0.0, *starts, 1.0]
    place = max(i for i, bound in enumerate(bounds[:-1]) if share >= bound - 1e-9)
    at = (share - bounds[place]) / max(1e-9, bounds[place + 1] - bounds[place])
    if cut_off and 0 < place < len(starts):
        at *= short
    if annealing == "cosine":
        return (1 + math.cos(math.pi * min(1.0, at))) / 2
    return 0.1 ** ((at >= 0.5 - 1e-9) + (at >= 0.75 - 1e-9)) if annealing == "step" else 1.0


class Rates:
    """Multiplies the learning rates of optimizers during their steps, and nowhere else."""

    def __init__(self) -> None:
        self.factor = 1.0
        self._handles: dict[int, list[Any]] = {}
        self._rates: dict[int, list[Any]] = {}

    def attach(self, optimizers: Sequence[Optimizer]) -> None:
        """Follow these optimizers from now on."""
        for optimizer in optimizers:
            if id(optimizer) not in self._handles:
                before = optimizer.register_step_pre_hook(self._before)
                after = optimizer.register_step_post_hook(self._after)
                self._handles[id(optimizer)] = [before, after]

    def remove(self) -> None:
        """Leave them alone."""
        for handles in self._handles.values():
            for handle in handles:
                handle.remove()
        self._handles.clear()

    def _before(self, optimizer: Optimizer, *others: Any) -> None:
        self._rates[id(optimizer)] = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * self.factor

    def _after(self, optimizer: Optimizer, *others: Any) -> None:
        known = self._rates.pop(id(optimizer), [])
        for group, rate in zip(optimizer.param_groups, known, strict=False):
            group["lr"] = rate
