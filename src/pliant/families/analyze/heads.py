"""The last map of a network and the affine head that reads it: scores as a sum over positions.

Found by what they do, not by their names: one forward pass is watched operation by operation for
the map whose means over positions, or whose numbers, are what the head reads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pliant.cost import call, tensors
from pliant.errors import ModelError
from pliant.families.analyze.inputs import check_logits, logits
from pliant.observe.watch import capture

CLOSE = 1e-5  # of the largest number: what is nearer is the same but for rounding


@dataclass(frozen=True, eq=False)
class Head:
    """How class scores come from the last map.

    Args:
        layer: the name of the affine layer; "" where the means of the map are the scores.
        pooled: whether the head reads means over positions, or else every number of the map.
        weight: (classes, channels), or (classes, channels, *positions) of a head on every number.
        bias: (classes,).
        shape: of the map of one sample, (channels, *positions).
    """

    layer: str
    pooled: bool
    weight: Tensor
    bias: Tensor
    shape: tuple[int, ...]

    @property
    def positions(self) -> int:
        """How many positions the map has."""
        count = 1
        for size in self.shape[1:]:
            count *= size
        return count

    def evidence(self, maps: Tensor) -> Tensor:
        """Return what each position adds to each score: over positions they sum to score - bias.

        E_k(u, v) = sum_c W[k, c] phi[c, u, v] / (H W) of a head on means; without the division and
        with W[k, c, u, v] of a head on every number.

        Args:
            maps: (samples, channels, *positions).

        Returns:
            (samples, classes, *positions), float64.
        """
        flat = maps.double().flatten(2)
        if self.pooled:
            each = torch.einsum("kc,bcp->bkp", self.weight.double(), flat) / self.positions
        else:
            each = torch.einsum("kcp,bcp->bkp", self.weight.double().flatten(2), flat)
        return each.reshape(len(maps), -1, *self.shape[1:])

    def scores(self, maps: Tensor) -> Tensor:
        """Return the class scores of maps, (samples, classes), float64."""
        return self.evidence(maps).flatten(2).sum(2) + self.bias.double()


def find_head(model: nn.Module, inputs: Tensor) -> Head:
    """Recognise the head of a network, in eval mode.

    Args:
        model: any network that gives class scores.
        inputs: (samples, channels, *positions), a few of them.

    Raises:
        ModelError: the scores are no affine function of the last map's means or numbers: a hidden
            layer, attention or a sum stands between, or there is no map.
    """
    scores, candidates = _affine(model, inputs)
    for name, read in candidates:
        seen = _Watch(read, flat=bool(name))
        with capture(model, (), lambda *_: None), seen:
            call(model, (inputs,))
        if seen.found is None:
            continue
        weight, bias = _matrix(model.get_submodule(name), read) if name else _identity(scores)
        shape = tuple(seen.found.shape[1:])
        if not seen.pooled:
            weight = weight.reshape(len(weight), *shape)
        head = Head(name, seen.pooled, weight, bias, shape)
        if _same(head.scores(seen.found), scores):
            return head
    raise ModelError(
        f"Evidence is exact where class scores are an affine function of a last map, or of its "
        f"means over positions, but those of {type(model).__name__} are not: a hidden layer, "
        "attention or a sum stands between, or there is no map with positions."
    )


def maps(model: nn.Module, head: Head, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return the last map of inputs and their class scores.

    Raises:
        ModelError: the head does not read this map.
    """
    seen = _Last(head.shape)
    with capture(model, (), lambda *_: None), seen:
        scores = logits(model, (inputs,))
    if seen.found is None or not _same(head.scores(seen.found), scores):
        raise ModelError(
            f"The class scores of {type(model).__name__} do not follow from its last map for all "
            "inputs: it does not always do the same, and cannot be looked at in this way."
        )
    return seen.found, scores


# ---------------------------------------------------------------- how it is found


def _affine(model: nn.Module, inputs: Tensor) -> tuple[Tensor, list[tuple[str, Tensor]]]:
    """Return the scores, and modules that map rows to them with the rows; "" reads the scores."""
    called: list[tuple[str, Tensor, Tensor]] = []

    def see(name: str, given: Tensor, output: Any) -> None:
        rows = isinstance(given, Tensor) and isinstance(output, Tensor) and given.dim() == 2
        if name and rows:
            called.append((name, given, output))

    with capture(model, [name for name, _ in model.named_modules() if name], see):
        scores = logits(model, (inputs,))
    check_logits(scores)
    ended = [(name, read) for name, read, gave in called if _is(gave, scores)]
    return scores, [*ended, ("", scores)]


def _is(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


def _matrix(layer: nn.Module, read: Tensor) -> tuple[Tensor, Tensor]:
    """Return weight and bias of an affine layer, (outputs, inputs) and (outputs,)."""
    if type(layer) is nn.Linear:
        weight = layer.weight.detach()
        bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach()
        return weight, bias
    with capture(layer, (), lambda *_: None):
        bias = layer(torch.zeros_like(read[:1]))[0]
        eye = torch.eye(read.shape[1], dtype=read.dtype, device=read.device)
        return (layer(eye) - bias).T, bias


def _identity(scores: Tensor) -> tuple[Tensor, Tensor]:
    classes = scores.shape[1]
    return torch.eye(classes, dtype=scores.dtype, device=scores.device), scores.new_zeros(classes)


def _same(one: Tensor, other: Tensor) -> bool:
    limit = CLOSE * max(1.0, float(other.abs().max()))
    return one.shape == other.shape and float((one - other).abs().max()) <= limit


class _Watch(TorchDispatchMode):
    """Finds the last tensor made whose position means, or whose numbers, are what is read."""

    def __init__(self, read: Tensor, *, flat: bool) -> None:
        super().__init__()
        self.read, self.flat = read, flat
        self.found: Tensor | None = None
        self.pooled = False

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for made in tensors(out):
            if made.dim() > 2 and made.is_floating_point() and len(made) == len(self.read):
                self._see(made)
        return out

    def _see(self, made: Tensor) -> None:
        again = self.found is not None and made.data_ptr() == self.found.data_ptr()
        if made.shape[2:].numel() < 2 or again:
            return
        if made.shape[1] == self.read.shape[1] and _same(made.flatten(2).mean(2), self.read):
            self.found, self.pooled = made, True
        elif self.flat and _is(made.flatten(1), self.read):
            self.found, self.pooled = made, False


class _Last(TorchDispatchMode):
    """Keeps the last tensor of a shape."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape
        self.found: Tensor | None = None

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for made in tensors(out):
            if tuple(made.shape[1:]) == self.shape:
                self.found = made
        return out
