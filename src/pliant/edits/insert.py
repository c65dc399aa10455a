"""Something new comes before or behind a layer, or into a row of layers.

A kind that can be inserted is written as one that is swapped in (see `pliant.edits.swap`), and
stands in `INSERTS` of `pliant.nn.catalogue`. Its ``build(layer, spec)`` and
``predict(before, spec)`` are handed the neighbour: ``before.output`` is the shape at the place,
and what is returned is the cost of the new one alone, for as many calls.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from pliant.cost import LayerCost
from pliant.edits.build import build, kind_of
from pliant.edits.edit import OPTIONAL, Replaced, exchanged, layer_of
from pliant.edits.record import forget
from pliant.errors import EditError
from pliant.nn import layers
from pliant.nn.catalogue import INSERTS, Spec
from pliant.nn.factorized import answer_for

OLD, ADDED = "layer", "added"  # names in the row that a single layer becomes
END = -1


@dataclass(frozen=True)
class Insert:
    """Puts a new operation or block behind or before a layer, or at a place in a row.

    If the layer is an ``nn.Sequential``, such as a stage of blocks, the new one goes into it; all
    others keep their names, and one that comes to the end of a numbered row has the next number,
    as if the network had been built so. Any other layer or block becomes a row of two, ``layer``
    and ``added``.

    Args:
        layer: the name of the layer or row; "" for a model that is a row itself.
        form: what is put in, of `INSERTS`: ``conv``, ``linear`` or ``residual``, which may begin
            as identities, ``copy`` for the neighbour once more, ``gather`` and ``scatter`` for
            channels that change places.
        spec: what is set of it, as its kind declares.
        at: its place, from 0 (before all that is there) on; -1 for behind all.
        seed: of the random numbers that it begins with.

    Raises:
        EditError: the form is unknown, takes other settings, or does not fit; there is no such
            place.

    >>> stage = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU())
    >>> spec = {"channels": 8, "kernel": 3, "dims": 2, "identity": True}
    >>> for at in (1, -1):
    ...     _ = Insert("", "conv", spec, at).apply(stage)
    >>> [name for name, _ in stage.named_children()]
    ['0', 'added', '1', '2']
    """

    layer: str
    form: str
    spec: Spec = field(default_factory=dict, hash=False, metadata=OPTIONAL)
    at: int = field(default=END, metadata=OPTIONAL)
    seed: int = field(default=0, metadata=OPTIONAL)

    def __post_init__(self) -> None:
        object.__setattr__(self, "spec", dict(self.spec))  # nobody else changes it

    def apply(self, model: nn.Module, *, weights: bool = True) -> Replaced:
        """Put the new module in."""
        module = layer_of(model, self.layer)
        kind = kind_of(INSERTS, self.layer, self.form, self.spec)
        row = type(module) is nn.Sequential
        names = [name for name, _ in module.named_children()] if row else [""]
        place = self._place(len(names))
        if not row and not self.layer:
            raise EditError("The model is no row of layers: wrap it in nn.Sequential.")
        near = ".".join(part for part in (self.layer, _neighbour(names, place)) if part)
        before = list(model.parameters())
        new = build(kind, model, near, self.spec, seed=self.seed, weights=weights, freeze=False)
        forget(new)
        if row:
            _put(module, new, place)
        else:
            _become_row(model, self.layer, new, place)
        return exchanged(model, before)

    def predict(self, before: LayerCost) -> LayerCost:
        """Return the cost of the layer or row with what is new in it.

        Args:
            before: of a row, as `pliant.cost.module_cost` gives it: the costs of its children
                are asked for.
        """
        kind = kind_of(INSERTS, self.layer, self.form, self.spec)
        row = before.kind == nn.Sequential.__name__
        parts = list(before.parts) if row else [(OLD, before)]
        place = self._place(len(parts))
        near = parts[max(0, place - 1)][1] if parts else before
        try:
            new = kind.predict(near if place else replace(near, output=near.input), self.spec)
        except EditError as error:
            raise EditError(f"{self.layer} {error}") from None
        parts.insert(place, (_name([name for name, _ in parts], place) if row else ADDED, new))
        return replace(
            before,
            kind=nn.Sequential.__name__,
            params=before.params + new.params,
            macs=before.macs + new.macs,
            bytes=before.bytes + new.bytes,
            weight=(),
            output=new.output if place == len(parts) - 1 else before.output,
            parts=tuple(parts),
        )

    def _place(self, count: int) -> int:
        if not END <= self.at <= count:
            raise EditError(
                f"{self.layer or 'The model'} has places 0 to {count} for something new, and -1 "
                f"for the last of them, not {self.at}."
            )
        return count if self.at == END else self.at


def _neighbour(names: list[str], place: int) -> str:
    """The name in the row of what comes before a place, of the first at its beginning."""
    return names[max(0, place - 1)] if names else ""


def _name(names: list[str], place: int) -> str:
    """A name in a row that no other has."""
    numbers = [name for name in names if name.isdecimal()]
    following = str(len(numbers))
    if place == len(names) and following not in names and (numbers or not names):
        return following
    return next(
        name
        for count in range(len(names) + 1)
        if (name := f"{ADDED}{count + 1 if count else ''}") not in names
    )


def _put(row: nn.Sequential, new: nn.Module, place: int) -> None:
    children = list(row.named_children())
    children.insert(place, (_name([name for name, _ in children], place), new))
    row._modules.clear()
    row._modules.update(children)


def _become_row(model: nn.Module, name: str, new: nn.Module, place: int) -> None:
    old: Any = model.get_submodule(name)
    parts = [(OLD, old)]
    parts.insert(place, (ADDED, new))
    row = nn.Sequential(OrderedDict(parts)).train(old.training)
    answer_for(row, old)
    layers.replace(model, name, row)
