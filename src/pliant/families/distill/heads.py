"""Heads that read layers of a network while it trains, and leave with the end of the training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pliant.edits.build import drawing
from pliant.errors import ModelError
from pliant.observe.aside import is_other_batch
from pliant.observe.order import order
from pliant.run import Run
from pliant.surgery.select import weighted

Head = dict[str, Tensor]
_CONVS = (F.conv1d, F.conv2d, F.conv3d)


def places(run: Run, count: int) -> list[str]:
    """Name so many layers with weights, at equal distances in the order in which they are called.

    The last layer, whose outputs are the classes, is none of them.

    Raises:
        ModelError: the network has no layer before its last one.
    """
    called = order(run.model, run.example, list(weighted(run.model))).called[:-1]
    if not called:
        raise ModelError(
            "Heads read layers within the network, but it has none with weights before its last "
            "one: train it without them."
        )
    at = [len(called) * (n + 1) // (count + 1) for n in range(count)]
    return [called[min(place, len(called) - 1)] for place in at]


def drawn(features: Tensor, width: int, answers: int, seed: int, name: str) -> Head:
    """Return the weights of a head: a convolution, a norm, and a linear layer on the means.

    Args:
        features: what it is to read, (N, channels, ...).
        width: of its hidden layer.
        answers: how many numbers it gives.
        seed: of its weights.
        name: of what it reads, part of the seed.
    """
    axes, channels = features.dim() - 2, features.shape[1]
    kernel = (3,) * axes if axes <= len(_CONVS) else ()
    with drawing(seed, name):
        first = torch.randn(width, channels, *kernel) * (2 / (channels * 3 ** len(kernel))) ** 0.5
        last = torch.randn(answers, width) / width**0.5
    tensors = {
        "first": first,
        "scale": torch.ones(width),
        "shift": torch.zeros(width),
        "last": last,
        "bias": torch.zeros(answers),
    }
    return {key: value.to(features.device) for key, value in tensors.items()}


def answer(head: Mapping[str, Tensor], features: Tensor) -> Tensor:
    """Return what a head says of features (N, channels, ...), one row for each of the N."""
    first = head["first"]
    features = features.to(first.dtype)
    if first.dim() > 2:
        hidden = _CONVS[first.dim() - 3](features, first, padding=1)
    else:
        hidden = F.linear(_mean(features), first)
    hidden = F.group_norm(hidden, 1, head["scale"], head["shift"]).relu()
    return F.linear(_mean(hidden), head["last"], head["bias"])


def _mean(values: Tensor) -> Tensor:
    """The mean over places, (N, channels)."""
    return values.flatten(2).mean(2) if values.dim() > 2 else values


class Reading:
    """Remembers what layers gave last, gradients included, channels on axis 1.

    Args:
        model: has the hooks until `remove`.
        names: of modules that return one tensor. Of a module other than a convolution that
            returns rows or rows of rows, the last axis holds the channels.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.names, self.values = list(names), dict[str, Tensor]()
        self.gradients: dict[str, Head] = {}  # of the heads, summed since the last step
        self.batches = 0
        self._always = False
        self._hooked: dict[str, tuple[nn.Module, RemovableHandle]] = {}
        self.follow(model)

    def follow(self, model: nn.Module) -> None:
        """Hook the layers that took the place of others."""
        for name in self.names:
            module, known = model.get_submodule(name), self._hooked.get(name)
            if known is None or known[0] is not module:
                if known is not None:
                    known[1].remove()
                self._hooked[name] = module, module.register_forward_hook(self._hook(name))

    def take(self) -> dict[str, Tensor]:
        """Return what the layers gave in the last call, and forget it."""
        found, self.values = self.values, {}
        return found

    @contextmanager
    def always(self) -> Iterator[None]:
        """Remember in eval mode too."""
        self._always = True
        try:
            yield
        finally:
            self._always = False

    def remove(self) -> None:
        """Take the hooks out of the layers."""
        for _, handle in self._hooked.values():
            handle.remove()
        self._hooked, self.values, self.gradients = {}, {}, {}

    def _hook(self, name: str) -> Any:
        def see(module: nn.Module, args: Any, output: Any) -> None:
            mine = (module.training and not is_other_batch()) or self._always
            if mine and isinstance(output, Tensor):
                conv = isinstance(module, nn.Conv1d) or output.dim() > 3
                self.values[name] = output if conv else output.movedim(-1, 1)

        return see
