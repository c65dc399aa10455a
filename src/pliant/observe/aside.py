"""What a method keeps beside a network while a run lasts: hooks, masks, a teacher."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from pliant.cost import Example, call, tensors, twin
from pliant.errors import ModelError
from pliant.observe.outputs import logits


class Removable(Protocol):
    """Something put beside a model that can be taken away again, as a hook's handle can."""

    def remove(self) -> None:
        """Take it away."""


T = TypeVar("T", bound=Removable)


@dataclass
class Aside:
    """Holds what lies beside the network, each thing under the scope of the method it is for.

    Nothing of it is saved: ``prepare`` makes it again on resuming.

    Args:
        kept: every thing with its scope, shared by all scopes of a run.
        path: the scope that this view stands for; those within it begin with it.
    """

    kept: list[tuple[str, Removable]] = field(default_factory=list)
    path: str = ""

    def put(self, thing: T) -> T:
        """Keep a thing until the method's part of the run ends, and return it."""
        self.kept.append((self.path, thing))
        return thing

    def get(self, kind: type[T]) -> T:
        """Return the thing of this kind that was put under this very scope."""
        return self.all(kind)[0]

    def all(self, kind: type[T]) -> list[T]:
        """Return all things of this kind that were put under this very scope."""
        return [thing for at, thing in self.kept if at == self.path and isinstance(thing, kind)]

    def clear(self) -> None:
        """Take everything away that lies in this scope or within it, the last first."""
        mine = [thing for at, thing in self.kept if at.startswith(self.path)]
        self.kept[:] = [pair for pair in self.kept if not pair[0].startswith(self.path)]
        for thing in reversed(mine):
            thing.remove()

    def scope(self, key: str) -> Aside:
        """Return the view of a scope within this one."""
        return Aside(self.kept, f"{self.path}{key}/")


class Teacher:
    """A frozen copy of a network as it is now."""

    def __init__(self, model: nn.Module) -> None:
        self.network: nn.Module | None = twin(model).eval().requires_grad_(False)

    @torch.no_grad()
    def scores(self, inputs: Example, device: torch.device) -> Tensor:
        """Return its class scores for the inputs of a forward call, computed where they are."""
        return logits(self.answer(inputs, device))

    @torch.no_grad()
    def answer(self, inputs: Example, device: torch.device) -> Any:
        """Return all that it says."""
        assert self.network is not None, "the run has ended"
        if next((p.device for p in self.network.parameters()), device) != device:
            self.network.to(device)
        return call(self.network, inputs)

    def remove(self) -> None:
        """Let the copy go."""
        self.network = None


_OTHER = ContextVar("other", default=False)


@contextmanager
def other_batch() -> Iterator[None]:
    """Call the network with another batch than the loop's: what is watched of that one stays."""
    token = _OTHER.set(True)
    try:
        yield
    finally:
        _OTHER.reset(token)


def is_other_batch() -> bool:
    """Say whether the network is called with another batch than the loop's."""
    return _OTHER.get()


class Tap:
    """Remembers what a layer read last, gradients included."""

    def __init__(self, layer: nn.Module) -> None:
        self.value: Tensor | None = None
        self._handle = layer.register_forward_pre_hook(self._see, with_kwargs=True)

    def take(self) -> Tensor:
        """Return what the layer read in its last call, and forget it.

        Raises:
            ModelError: it was not called since.
        """
        value, self.value = self.value, None
        if value is None:
            raise ModelError(
                "The network did not call the layer whose inputs are needed, since it was "
                "replaced or left out: keep other methods from changing it."
            )
        return value

    def remove(self) -> None:
        """Take the hook out of the layer."""
        self._handle.remove()
        self.value = None

    def _see(self, layer: nn.Module, args: Any, kwargs: Any) -> None:
        if layer.training and not is_other_batch():
            self.value = next(tensors((args, kwargs)), None)
