"""What an edit is: one change to one layer, as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from pliant.cost import LayerCost
from pliant.errors import EditError


@dataclass(frozen=True)
class Replaced:
    """What an edit did to the parameters, for whoever keeps state about them.

    Args:
        removed: parameters that are no longer part of the model.
        added: parameters that take their place.
        project: turns the momentum of ``removed[0]`` into that of each parameter in ``added``, by
            the chain rule; None where momentum cannot be carried over.
        cuts: one function for each pair of old and new parameter, where the new one is a part of
            the old one or made of it: it makes a tensor of the new shape from one of the old
            shape. The whole state of the optimizer is carried over with it.
        squares: the same for mean squares of gradients (Adam's), where it differs.
        beside: where parameters came and none left, those that were there, the nearest first:
            the new ones join the group of the first that the optimizer knows.
    """

    removed: tuple[nn.Parameter, ...] = ()
    added: tuple[nn.Parameter, ...] = ()
    project: Callable[[Tensor], list[Tensor]] | None = None
    cuts: tuple[Callable[[Tensor], Tensor], ...] = ()
    squares: tuple[Callable[[Tensor], Tensor], ...] = ()
    beside: tuple[nn.Parameter, ...] = ()


OPTIONAL: Mapping[str, Any] = {"optional": True}
"""Metadata of a field that may be missing in a file, and is where it has its default."""

LAYER = "layer"
"""Key in the metadata of a field, besides ``layer``, that holds the name of a layer."""


@runtime_checkable
class Edit(Protocol):
    """One change to one layer: a frozen dataclass whose compared fields are plain data.

    An edit may also have ``ranks`` (of a factorization) or ``kept`` (channels kept of how many)
    for the report.
    """

    @property
    def layer(self) -> str:
        """The name of the layer to change."""

    @property
    def form(self) -> str:
        """What the layer becomes, in a word for the report: ``tucker2``, ``pruned``, ``int8``."""

    def apply(self, model: nn.Module, *, weights: bool = True) -> Replaced:
        """Change the model in place; ``weights=False`` gives the shapes only, for loading."""

    def predict(self, before: LayerCost) -> LayerCost:
        """Return what the layer will cost, without touching the model."""


def layer_of(model: nn.Module, name: str) -> Any:
    """Return the layer that an edit names.

    Raises:
        EditError: the model has no such layer.
    """
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise EditError(
            f"The model has no layer {name!r}: was it built as the one that was edited?"
        ) from None


def exchanged(model: nn.Module, before: Sequence[nn.Parameter]) -> Replaced:
    """Say which parameters left a model and which came.

    Args:
        model: as it is now.
        before: the parameters that it had, in order.
    """
    now = list(model.parameters())
    kept, known = {id(p) for p in now}, {id(p) for p in before}
    removed = tuple(p for p in before if id(p) not in kept)
    places = [place for place, p in enumerate(now) if id(p) not in known]
    if removed or not places:
        return Replaced(removed, tuple(now[place] for place in places))
    stayed = [place for place, p in enumerate(now) if id(p) in known]
    near = sorted(stayed, key=lambda place: abs(place - places[0]))
    return Replaced(
        added=tuple(now[place] for place in places), beside=tuple(now[place] for place in near)
    )
