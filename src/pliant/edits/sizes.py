"""Networks of several sizes in one: rows of ordered factors, and batch norms with a table each."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pliant.budget import Budget
from pliant.cost import Cost, Example, cost, twin
from pliant.edits import Edit, Nest, Settle, complete, layer_of, note
from pliant.edits.nest import cut
from pliant.edits.settle import MEANS, VARIANCES
from pliant.errors import ArtifactError, BudgetError


def count(edits: Iterable[Edit]) -> int:
    """Say how many sizes a network with these edits has; 1 if it is not elastic."""
    return max((edit.count for edit in edits if isinstance(edit, Nest)), default=1)


def weights_at(model: nn.Module, edits: Iterable[Edit], size: int) -> dict[str, Tensor]:
    """Return the weights of one size by parameter name, for `torch.func.functional_call`.

    They are views of the model's own parameters: gradients flow into those.
    """
    found: dict[str, Tensor] = {}
    for edit in edits:
        if isinstance(edit, Nest):
            row = _row(model, edit)
            names = [f"{edit.layer}.{name}.weight" for name, _ in row.named_children()]
            found |= dict(
                zip(names, cut([child.weight for child in row], edit.at(size)), strict=True)
            )
    return found


def shrink(model: nn.Module, edits: Sequence[Edit], size: int) -> tuple[Edit, ...]:
    """Cut an elastic network to one of its sizes, in place; plain modules are left.

    Args:
        model: as the edits have made it.
        edits: what was done to the dense network.
        size: 0 for the largest.

    Returns:
        The edits that make a network of this size alone from the dense one: with them it can be
        saved anew.

    Raises:
        ArtifactError: the network has no such size, or was changed further since.
    """
    sizes = count(edits)
    if not 0 <= size < sizes:
        raise ArtifactError(f"The network has sizes 0 to {sizes - 1}, not {size}: choose one.")
    whole = complete(model, edits)
    kept: list[Edit] = []
    for edit in whole:
        if isinstance(edit, Nest):
            _shorten(_row(model, edit), edit.at(size))
            kept.append(edit.factor(size))
        elif isinstance(edit, Settle):
            if edit.sizes != sizes:
                raise ArtifactError(
                    f"{edit.layer} keeps statistics of {edit.sizes} sizes, and the network has "
                    f"{sizes}: it is damaged, or was put together by hand."
                )
            _use(layer_of(model, edit.layer), size)
        else:
            kept.append(edit)
    note(model, kept)
    return tuple(kept)


def cuttable(edits: Iterable[Edit]) -> bool:
    """Say whether sizes can be cut: the network has several, and was not changed since."""
    rows = list(edits)
    own = [isinstance(edit, Nest | Settle) for edit in rows]
    return count(rows) > 1 and all(own[own.index(True) :])


def of_size(model: nn.Module, edits: Sequence[Edit], size: int) -> nn.Module:
    """Return a copy of an elastic network that is cut to one of its sizes."""
    found = twin(model)
    shrink(found, edits, size)
    return found


def costs(model: nn.Module, edits: Sequence[Edit], example: Example) -> list[Cost]:
    """Return what each size costs by itself, from the largest; the model stays as it is."""
    return [counted(of_size(model, edits, size), example) for size in range(count(edits))]


def counted(model: nn.Module, example: Example) -> Cost:
    """Count a network: parameters and bytes without an example, all with one."""
    if example:
        return cost(model, example)
    tensors = {id(t): t for t in model.state_dict(keep_vars=True).values()}.values()
    return Cost(
        params=sum(p.numel() for p in model.parameters()),
        macs=0,
        bytes=sum(t.numel() * t.element_size() for t in tensors),
    )


def choose(
    sizes: Sequence[Cost],
    budget: Budget,
    dense: Cost,
    latency: Callable[[int], float] | None = None,
) -> int:
    """Return the largest size that a budget allows; few of them are looked at.

    Args:
        sizes: the cost of each, from the largest; none is larger than the one before.
        budget: what the size may cost.
        dense: what its fractions refer to.
        latency: milliseconds of a size, for a budget that bounds them.

    Raises:
        BudgetError: even the smallest is too large; the message says what it costs.
    """
    limits = budget.limits(dense)
    longest = limits.pop("latency", None)
    first = bisect_left(sizes, x=True, key=lambda cost: _fits(cost, limits))
    if first == len(sizes):
        smallest = sizes[-1]
        least = ", ".join(f"{axis}={getattr(smallest, axis):,}" for axis in limits)
        raise BudgetError(f"No size is this small: the smallest has {least}; allow as much.")
    if longest is None or latency is None:
        return first
    return _fastest(first, len(sizes) - 1, longest, latency)


def _fastest(first: int, last: int, most: float, latency: Callable[[int], float]) -> int:
    """Halve the sizes that are left: smaller ones are taken to be faster."""
    if (least := latency(last)) > most:
        raise BudgetError(
            f"No size takes {most:g} ms: the smallest takes {least:.3g} ms; allow as much."
        )
    while first < last:
        middle = (first + last) // 2
        first, last = (first, middle) if latency(middle) <= most else (middle + 1, last)
    return last


def _fits(found: Cost, limits: Mapping[str, float]) -> bool:
    return all(getattr(found, axis) <= bound for axis, bound in limits.items())


def _row(model: nn.Module, edit: Nest) -> Any:
    row = layer_of(model, edit.layer)
    known = isinstance(row, nn.Sequential)
    ranks = [child.weight.shape[0] for child in row][:-1] if known else []
    if tuple(ranks) != edit.ranks:
        raise ArtifactError(
            f"{edit.layer} was to be a row of ranks {edit.ranks}, but is not: an elastic network "
            "must be cut before it is changed further."
        )
    return row


def put(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Let parameters hold other tensors, by name."""
    for name, value in weights.items():
        model.get_parameter(name).data = value


def _shorten(row: Any, ranks: Sequence[int]) -> None:
    children = list(row)
    for child, part in zip(children, cut([c.weight for c in children], ranks), strict=True):
        child.weight.data = part.detach().clone(memory_format=torch.contiguous_format)
        word = "features" if isinstance(child, nn.Linear) else "channels"
        setattr(child, f"in_{word}", part.shape[1])
        setattr(child, f"out_{word}", part.shape[0])


def _use(norm: _BatchNorm, size: int) -> None:
    for name, table in (("running_mean", MEANS), ("running_var", VARIANCES)):
        getattr(norm, name).copy_(getattr(norm, table)[size])
        delattr(norm, table)
