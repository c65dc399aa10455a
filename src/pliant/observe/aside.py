"""What a method keeps beside a network while a run lasts, handed over by `run.hook`."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pliant.cost import Example, call
from pliant.errors import ModelError
from pliant.observe.outputs import logits

T = TypeVar("T")


def held(handles: Iterable[tuple[str, Any]], path: str, kind: type[T]) -> T:
    """Return what of this kind was handed over under a path: ``held(run.handles, run.path, ...)``.

    It is in none of the run's state, so it is not saved: ``prepare`` makes it again on resuming.
    """
    return next(thing for at, thing in handles if at == path and isinstance(thing, kind))


class Teacher:
    """A frozen copy of a network as it is now."""

    def __init__(self, model: nn.Module) -> None:
        self.network: nn.Module | None = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def scores(self, inputs: Example, device: torch.device) -> Tensor:
        """Return its class scores for the inputs of a forward call, computed where they are."""
        assert self.network is not None, "the run has ended"
        if next((p.device for p in self.network.parameters()), device) != device:
            self.network.to(device)
        return logits(call(self.network, inputs))

    def remove(self) -> None:
        """Let the copy go."""
        self.network = None


class Tap:
    """Remembers what a layer read last, gradients included."""

    def __init__(self, layer: nn.Module) -> None:
        self.value: Tensor | None = None
        self._handle = layer.register_forward_pre_hook(self._see)

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

    def _see(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if layer.training:
            self.value = inputs[0]
