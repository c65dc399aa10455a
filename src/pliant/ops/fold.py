"""Finds the batch norms that can be folded, and proves it by a forward pass."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from pliant.cost import Example, call
from pliant.ops.capture import capture
from pliant.ops.edits import Fold, replay
from pliant.ops.layers import readable

TOLERANCE = 1e-3  # of the largest output: rounding stays far below, a wrong fold far above


def foldable(model: nn.Module, example: Example) -> list[Fold]:
    """Return an edit for every batch norm that reads nothing but the output of one layer.

    Candidates are found by following tensors through one forward pass; then they are folded in
    a copy, whose outputs must stay as they are. If they do not, each is tried on its own.

    Args:
        model: any module; it stays as it is.
        example: inputs of one forward call.
    """
    found = _candidates(model, example)
    if not found or _same(model, found, example):
        return found
    proven: list[Fold] = []
    for fold in found:
        if _same(model, [*proven, fold], example):
            proven.append(fold)
    return proven


def _candidates(model: nn.Module, example: Example) -> list[Fold]:
    layers, _ = readable(model)
    norms = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }
    said: dict[str, list[tuple[Tensor, int]]] = {name: [] for name in layers}
    read: dict[str, list[str | None]] = {name: [] for name in norms}

    def see(name: str, inputs: Tensor, output: Tensor) -> None:
        if name in layers:
            said[name].append((output, output._version))
            return
        # The very tensor, not changed in place since the layer gave it.
        before = [n for n, row in said.items() for t, v in row if t is inputs and t._version == v]
        read[name].append(before[-1] if before else None)

    with capture(model, [*layers, *norms], see):
        call(model, example)
    return [
        Fold(norm, into)
        for norm, sources in read.items()
        if len(sources) == 1
        and (into := sources[0]) is not None
        and len(said[into]) == 1
        and _fits(layers[into], norms[norm], said[into][0][0])
    ]


def _fits(layer: Any, norm: _BatchNorm, output: Tensor) -> bool:
    """A Linear has its channels last and a batch norm second: the same only in a matrix."""
    same = len(layer.weight) == norm.num_features
    return same and (not isinstance(layer, nn.Linear) or output.dim() == 2)


def _same(model: nn.Module, folds: Sequence[Fold], example: Example) -> bool:
    folded = copy.deepcopy(model)
    replay(folded, folds)
    for mine, other in zip(_outputs(model, example), _outputs(folded, example), strict=True):
        close = TOLERANCE * float(mine.abs().max())
        if not torch.allclose(mine, other, rtol=0, atol=close):
            return False
    return True


def _outputs(model: nn.Module, example: Example) -> list[Tensor]:
    with capture(model, [], lambda *_: None):  # eval mode, no gradients
        found = tree_leaves(call(model, example))
    return [t for t in found if isinstance(t, Tensor) and t.is_floating_point() and t.numel()]
