"""Convolutions that become shifts: which can, and those of a network that attend to their taps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from pliant.families.layers.choose import refused
from pliant.nn.shifted import ShiftAttentionConv2d, check_shiftable
from pliant.observe.order import order
from pliant.run import Run
from pliant.surgery.select import weighted


def shiftable(run: Run, *, stem: bool) -> Callable[[str, Any], str]:
    """Return an obstacle, which says why a layer cannot become shifts; nothing if it can.

    Args:
        run: of the network.
        stem: whether the first layer may too.
    """
    run.unwrap()
    called = [] if stem else order(run.model, run.example, list(weighted(run.model))).called
    first = next(iter(called), "")

    def obstacle(name: str, layer: Any) -> str:
        if name == first:
            return "the first layer stays a convolution"
        if type(layer) is not nn.Conv2d:
            return "not a 2-d convolution"
        odd = refused(check_shiftable, layer)
        return "a kernel of 1 x 1 or of even size, groups or dilation" if odd else ""

    return obstacle


def attending(run: Run) -> list[ShiftAttentionConv2d]:
    """Return the layers of a run that attend to their taps."""
    layers: list[Any] = [run.model.get_submodule(name) for name in run.state["layers"]]
    return layers
