"""Places the levels of a rounding, and says how much it changes what layers give."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from pliant.cost import Example, call
from pliant.edits import Edit, Pack, Quantize
from pliant.math.quantize import Grouping, best_range, best_scales, even_scales, grouping, rounded
from pliant.nn import kinds
from pliant.nn.packed import Values
from pliant.nn.several import quantized, weights_of
from pliant.observe.ranges import Flow, Sample
from pliant.observe.watch import capture


def begun(
    model: nn.Module, edit: Quantize, rule: Grouping, flow: Flow | None = None, step: float = 0.0
) -> Values:
    """Return groups, scales and ranges of least squared error for one layer.

    Args:
        model: holds the layer.
        edit: how its numbers shall be written.
        rule: which channels share a scale.
        flow: what passes the layer; None leaves ranges of activations out.
        step: the scale, more only where weights would lie beyond all levels; 0 finds it.
    """
    layer: Any = model.get_submodule(edit.layer)
    rows = kinds.to_rows(layer, layer.weight.detach())
    index = grouping(rows, edit.groups, rule)
    scales = (
        even_scales(rows, index, edit.bits, step) if step else best_scales(rows, index, edit.bits)
    )
    bias = getattr(layer, "bias", None)
    return Values(
        layer.weight.detach(),
        scales,
        index,
        None if bias is None else bias.detach(),
        _range(flow.input, edit.inputs) if flow and edit.inputs else None,
        _range(flow.output, edit.outputs) if flow and edit.outputs else None,
    )


def _range(sample: Sample, bits: int) -> tuple[float, int]:
    return best_range(sample.kept(), sample.low, sample.high, bits)


def shared_step(model: nn.Module, layers: Iterable[str], share: float) -> float:
    """Return a share of the root mean square of all weights of some layers."""
    weights = [weight for name in layers for weight in _all(model.get_submodule(name)).values()]
    energy, count = sum(map(_energy, weights)), sum(weight.numel() for weight in weights)
    return float(share * (energy / max(1, count)) ** 0.5)


def gaps(model: nn.Module, edit: Edit, rule: Grouping) -> dict[str, Tensor]:
    """Return by how much rounding moves the weights of a layer, by name; in their shapes."""
    layer: Any = model.get_submodule(edit.layer)
    if isinstance(edit, Pack):
        new = quantized(layer, edit.bits, edit.groups, indexed=edit.indexed, rule=rule)
        return {name: weight.detach() - _named(new, name) for name, weight in _all(layer).items()}
    assert isinstance(edit, Quantize)
    values = begun(model, edit, rule)
    rows = kinds.to_rows(layer, values.weight)
    level = rounded(rows, values.scales[values.index], edit.bits)
    return {"weight": kinds.from_rows(layer, rows - level)}


def _all(layer: nn.Module) -> dict[str, Tensor]:
    return weights_of(layer) or {"weight": layer.weight}  # type: ignore[dict-item]


def _named(layer: Any, name: str) -> Tensor:
    *path, last = name.split(".")
    found: Tensor = getattr(layer.get_submodule(".".join(path)), last)
    return found


def damages(
    model: nn.Module,
    moved: Mapping[str, Sequence[Mapping[str, Tensor]]],
    batch: Example | None = None,
) -> dict[str, list[float]]:
    """Return how much each way to write a layer's weights changes what the layer gives.

    Args:
        model: gives the inputs of every layer.
        moved: for every layer and every way, by how much its weights move, as `gaps` gives it.
        batch: inputs of one forward call; without them, and for layers with several weights, the
            change of the weights themselves counts.

    Returns:
        Squared change over squared size, for every layer and every way.
    """
    known = {name: _all(model.get_submodule(name)) for name in moved}
    sizes = {name: sum(map(_energy, row.values())) or 1.0 for name, row in known.items()}
    found = {
        name: [sum(map(_energy, way.values())) / sizes[name] for way in ways]
        for name, ways in moved.items()
    }
    single = [name for name, row in known.items() if list(row) == ["weight"]]
    if batch is None or not single:
        return found
    seen = {name: [0.0] * len(moved[name]) for name in single}

    def see(name: str, inputs: Tensor, output: Tensor) -> None:
        layer: Any = model.get_submodule(name)
        size = _energy(kinds.applied(layer, inputs, layer.weight, None)) or 1.0
        for place, way in enumerate(moved[name]):
            gap = way["weight"].to(layer.weight.dtype)
            seen[name][place] += _energy(kinds.applied(layer, inputs, gap, None)) / size

    with capture(model, single, see):
        call(model, batch)
    return found | seen


def _energy(values: Tensor) -> float:
    return float(values.detach().float().square().sum())
