"""A row of factors gets other ranks while it trains: it loses components, or gets new ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pliant.cost import LayerCost
from pliant.edits.edit import Replaced, layer_of
from pliant.edits.factor import Factor
from pliant.errors import EditError
from pliant.math import forms
from pliant.nn import factorized as layers

if TYPE_CHECKING:
    from pliant.edits.edit import Edit

Turn = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Rerank:
    """Changes the ranks of a layer that `Factor` has split; lower and higher ones are possible.

    Args:
        layer: name of the row of factors.
        form: of the row.
        ranks: from now on, in the order of `Factor`.
        kernels: weights of the row's layers. Without them components are cut off at the end, and
            new ones are zero. Not part of the plan.
        turns: for each inner side of the row the pair (P, Q) that makes the new components out of
            the old ones, (new, old) and (old, new): what reads becomes P times it, what is read
            becomes it times Q. The state of an optimizer is turned so too. Without them components
            stay what they are. Not part of the plan.

    Raises:
        EditError: the layer is no row of this form, or the ranks do not fit it.
    """

    layer: str
    form: str
    ranks: tuple[int, ...]
    kernels: tuple[Tensor, ...] | None = field(default=None, compare=False, repr=False)
    turns: tuple[Turn, ...] | None = field(default=None, compare=False, repr=False)

    def apply(self, model: nn.Module, *, weights: bool = True) -> Replaced:
        """Give every layer of the row a weight of its new shape."""
        row = self._row(model)
        old: list[nn.Parameter] = [child.weight for child in row]  # type: ignore[misc]
        found = self.kernels
        if found is None or not weights:
            sides = pairwise((old[0].shape[1], *self.ranks, len(old[-1])))
            found = tuple(
                _resized(weight.detach(), rows, columns)
                for weight, (columns, rows) in zip(old, sides, strict=True)
            )
        for child, kernel in zip(row, found, strict=True):
            _put(child, kernel)
        layers.answer_anew(model, f"{self.layer}.{layers.NAMES[self.form][0]}")
        new: list[nn.Parameter] = [child.weight for child in row]  # type: ignore[misc]
        turns = self.turns or tuple(
            (_identity(after, before), _identity(before, after))
            for before, after in zip(map(len, old[:-1]), self.ranks, strict=True)
        )
        squared = [(p.square(), q.square()) for p, q in turns]
        return Replaced(tuple(old), tuple(new), cuts=_maps(turns), squares=_maps(squared))

    def predict(self, before: LayerCost) -> LayerCost:
        """Return what the row will cost, from the cost of its dense layer."""
        return Factor(self.layer, self.form, self.ranks).predict(before)

    def _row(self, model: nn.Module) -> nn.Sequential:
        row: Any = layer_of(model, self.layer)
        names = tuple(name for name, _ in row.named_children())
        if not isinstance(row, nn.Sequential) or names != layers.NAMES.get(self.form):
            raise EditError(
                f"{self.layer} is no row of {self.form} layers: factorize it before its ranks are "
                "changed."
            )
        most = forms.max_ranks(layers.dense_shape(row), self.form)
        if len(self.ranks) != len(most) or not all(
            1 <= rank <= top for rank, top in zip(self.ranks, most, strict=True)
        ):
            raise EditError(
                f"Ranks {self.ranks} do not fit {self.layer}: {self.form} takes whole numbers "
                f"from 1 to {most}."
            )
        return row


def merged(edits: Iterable[Edit]) -> list[Edit]:
    """Return edits in which every factorization has its last ranks at once."""
    found: list[Edit] = []
    for edit in edits:
        if isinstance(edit, Rerank):
            places = [
                i
                for i, other in enumerate(found)
                if isinstance(other, Factor) and other.layer == edit.layer
            ]
            if places:
                found[places[-1]] = replace(found[places[-1]], ranks=edit.ranks, kernels=None)  # type: ignore[type-var]
                continue
        found.append(edit)
    return found


def _put(child: Any, kernel: Tensor) -> None:
    """Give a plain layer another weight, and the numbers of channels that go with it."""
    old, sizes = child.weight, kernel.shape[:2]
    # A fresh one: the strides of a 1x1 kernel would else depend on where it is from.
    new = torch.empty(*sizes, *old.shape[2:], dtype=old.dtype, device=old.device)
    new.copy_(kernel.reshape(new.shape))
    new = layers.in_layout_of(old, new)
    child.weight = nn.Parameter(new, requires_grad=old.requires_grad)
    linear = isinstance(child, nn.Linear)
    names = ("out_features", "in_features") if linear else ("out_channels", "in_channels")
    for name, size in zip(names, sizes, strict=True):
        setattr(child, name, size)


def _resized(weight: Tensor, rows: int, columns: int) -> Tensor:
    new = weight.new_zeros(rows, columns, *weight.shape[2:])
    both = min(rows, len(weight)), min(columns, weight.shape[1])
    new[: both[0], : both[1]] = weight[: both[0], : both[1]]
    return new


def _identity(rows: int, columns: int) -> Tensor:
    return torch.eye(max(rows, columns))[:rows, :columns]


def _maps(turns: Sequence[Turn]) -> tuple[Callable[[Tensor], Tensor], ...]:
    """For every layer of the row what turns a quantity linear in its gradient.

    With L R = L' R', L' = P L and R' = R Q, the gradient by L' is Q^T times that by L, and the one
    by R' is that by R times P^T.
    """

    def of(rows: Tensor | None, columns: Tensor | None) -> Callable[[Tensor], Tensor]:
        def turned(value: Tensor) -> Tensor:
            if rows is not None:
                value = torch.einsum("ab,b...->a...", rows.to(value), value)
            if columns is not None:
                value = torch.einsum("ab...,cb->ac...", value, columns.to(value))
            return value

        return turned

    rows = [q.T for _, q in turns]
    columns = [p for p, _ in turns]
    return tuple(of(*pair) for pair in zip([*rows, None], [None, *columns], strict=True))
