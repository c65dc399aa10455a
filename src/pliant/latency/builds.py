"""Builds what a plan would make of a network or a layer, only to be measured."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from pliant.cost import twin
from pliant.edits import Edit
from pliant.math.alone import forked


def built(model: nn.Module, edits: Sequence[Edit]) -> nn.Module:
    """Build a plan with numbers of no meaning: they do not change the time."""
    network = twin(model).cpu().eval()
    with torch.no_grad(), forked():
        for edit in edits:
            for parameter in edit.apply(network, weights=False).added:
                parameter.uniform_(-0.05, 0.05)
    return network


def edited(layer: nn.Module, edit: Edit) -> nn.Module:
    """Build what an edit makes of a layer, in shape only."""
    model = nn.Sequential()
    *path, child = edit.layer.split(".")
    inner = model
    for name in path:
        inner.add_module(name, nn.Sequential())
        inner = inner.get_submodule(name)  # type: ignore[assignment]
    inner.add_module(child, twin(layer))
    edit.apply(model, weights=False)
    return model.get_submodule(edit.layer)
