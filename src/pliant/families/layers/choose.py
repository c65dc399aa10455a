"""Which layers a method takes, and what it says of those that it leaves alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from pliant.errors import EditError, MethodError, ModelError
from pliant.observe.order import order
from pliant.run import Run

NOT_NEGATIVE = (nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Softplus, nn.Hardsigmoid)


def chosen(
    run: Run,
    only: Sequence[str],
    exclude: Sequence[str],
    obstacle: Callable[[str, Any], str],
    needs: str,
    see: str = "only and exclude",
) -> dict[str, Any]:
    """Return the layers to take by name, and note of the others why they are left alone.

    Args:
        run: of the network.
        only: name patterns of the layers to take.
        exclude: name patterns of those to leave alone.
        obstacle: of a name and a layer, says why it cannot be taken; nothing if it can.
        needs: what the method needs, for the error where no layer is left; "" where none need be.
        see: the options to look at then.

    Raises:
        ModelError: no layer is left.
    """
    layers, reasons = run.readable(only, exclude)
    reasons |= {name: why for name, layer in layers.items() if (why := obstacle(name, layer))}
    taken = {name: layer for name, layer in layers.items() if name not in reasons}
    if needs and not taken:
        raise ModelError(f"{needs}, but the model has none that it may take: see {see}.")
    run.keep_all(reasons)
    return taken


def refused(check: Callable[[Any], None], layer: Any) -> bool:
    """Say whether an edit's check refuses a layer."""
    try:
        check(layer)
    except EditError:
        return True
    return False


def unless(check: Callable[[Any], None], reason: str) -> Callable[[str, Any], str]:
    """Return an obstacle for `chosen`: a reason wherever an edit's check refuses a layer."""
    return lambda name, layer: reason if refused(check, layer) else ""


def channels_behind(run: Run, name: str) -> int:
    """Count the channels of the maps (N, channels, H, W) that a layer gives.

    Raises:
        MethodError: it gives none, or of a single channel.
    """
    row = run.planner.rows().get(name)
    if row is None or len(row.output) != 3 or row.output[0] < 2:
        raise MethodError(
            "fassd_net puts modules behind layers that give maps (N, channels, H, W) of 2 channels "
            f"or more, but {name!r} is none: see the names of model.named_modules()."
        )
    return row.output[0]


def behind_rectifiers(run: Run, kind: type[nn.Module]) -> list[str]:
    """Name the layers of a kind that read what is never negative, at every call."""
    known = dict(run.model.named_modules())
    followed = [name for name, part in known.items() if isinstance(part, (kind, *NOT_NEGATIVE))]
    return [
        name
        for name, source in order(run.model, run.example, followed).reads.items()
        if isinstance(known[name], kind) and source and isinstance(known[source], NOT_NEGATIVE)
    ]
