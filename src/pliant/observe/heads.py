"""Heads that read layers of a network while it trains, and leave with the end of the training.

Their weights and momentum are plain tensors in a state, ``{"heads": {}, "momentum": {}}``; what a
batch gave, and the gradients since the last step, lie in a `Reading`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pliant.edits.build import drawing
from pliant.observe.aside import is_other_batch

Head = dict[str, Tensor]
_CONVS = (F.conv1d, F.conv2d, F.conv3d)


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


def leaves(
    state: dict[str, Any],
    reading: Reading,
    number: str,
    given: Tensor,
    answers: int,
    *,
    width: int,
    seed: int,
) -> Head:
    """Return the weights of a head as leaves of a graph of this batch.

    One that reads another number of channels than before begins anew.

    Args:
        state: see above.
        reading: holds its gradients.
        number: its name.
        given: what it reads, (N, channels, ...).
        answers: how many numbers it gives.
        width: of its hidden layer.
        seed: of its first weights.
    """
    heads = state["heads"]
    if number not in heads or heads[number]["first"].shape[1] != given.shape[1]:
        heads[number] = drawn(given, width, answers, seed, f"head {number}")
        state["momentum"].pop(number, None)
        reading.gradients.pop(number, None)
    return {key: value.detach().requires_grad_() for key, value in heads[number].items()}


def collect(reading: Reading, number: str, head: Head, loss: Tensor) -> None:
    """Add the gradients of a head, which no scaling of the loss reaches."""
    if not torch.is_grad_enabled():
        return
    found = torch.autograd.grad(loss, list(head.values()), retain_graph=True)
    sums = reading.gradients.setdefault(number, {})
    for key, gradient in zip(head, found, strict=True):
        sums[key] = sums[key] + gradient if key in sums else gradient


@torch.no_grad()
def step(
    state: dict[str, Any],
    reading: Reading,
    optimizer: torch.optim.Optimizer | None,
    rate: float,
    decay: float,
) -> None:
    """Move the weights of all heads, by the mean gradient of the batches since the last step.

    Args:
        state: see above.
        reading: forgets the gradients.
        optimizer: of the network; the momentum of its first group is theirs, or 0.9.
        rate: learning rate.
        decay: weight decay.
    """
    group = optimizer.param_groups[0] if optimizer is not None else {}
    momentum = float(group.get("momentum", 0.9))
    for number, gradients in reading.gradients.items():
        head = state["heads"][number]
        past = state["momentum"].setdefault(
            number, {key: torch.zeros_like(value) for key, value in head.items()}
        )
        for key, gradient in gradients.items():
            mean = _shared(gradient / max(1, reading.batches))
            past[key].mul_(momentum).add_(mean + decay * head[key])
            head[key].sub_(past[key], alpha=rate)
    reading.gradients, reading.batches = {}, 0


def _shared(gradient: Tensor) -> Tensor:
    """The mean over all processes."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(gradient)
        gradient = gradient / torch.distributed.get_world_size()
    return gradient
