"""`pliant inspect`: how much rank every layer has, before anything is trained."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import nn

from pliant.cli import console, images, source
from pliant.cli import sensitivity as layerwise
from pliant.cost import Example, LayerCost, cost, layer_costs
from pliant.data import load
from pliant.edits import Factor
from pliant.math.forms import max_ranks
from pliant.math.rank import energy_rank, evbmf_rank
from pliant.math.svd import unfold
from pliant.nn.layers import Factorizable
from pliant.observe.finite import check_example, check_weights
from pliant.observe.spectra import spectra
from pliant.render import table, words
from pliant.surgery.select import factorizable

SHARES = (0.9, 0.95, 0.98)


@console.refusals
def inspect(
    model: source.Model,
    data: Annotated[str | None, typer.Option(help="takes the input shape from data")] = None,
    size: images.Size = None,
    weights: source.Weights = None,
    architecture: source.Architecture = None,
    shape: source.Shape = None,
    sensitivity: Annotated[
        str | None,
        typer.Option(help="rank or width: what each layer costs when it shrinks alone; needs data"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="page (.html) or numbers (.json) of the sensitivity")
    ] = None,
    seed: Annotated[int, typer.Option(help="of random weights")] = 0,
    as_json: console.AsJson = False,
) -> None:
    """Show what every layer's spectrum allows: ranks by energy and by EVBMF, and break-even.

    Ranks are those of Tucker-2 (input/output channels), or the one of a matrix; behind them
    stands what they would save of the layer's parameters. Below break-even a layer shrinks.

    With --sensitivity every layer is made smaller alone, at several sizes, and scored; the page
    lets sizes be chosen and predicts what they cost together.
    """
    layerwise.check(sensitivity, data, out)
    samples = load(data, **images.prepared(size, "auto", "auto")) if data else None
    classes = samples.class_count or None if samples else None
    found = source.find(
        model, weights=weights, architecture=architecture, classes=classes, seed=seed
    )
    example = samples.example() if samples else source.example(found, shape, data=True)
    check_weights(found.model)
    check_example(example)
    if sensitivity is not None and samples is not None:
        layerwise.run(sensitivity, found, samples, out, as_json=as_json)
        return
    rows = look(found.model, example)
    whole = cost(found.model, example)
    if as_json:
        console.print_json(
            {"model": found.name, "params": whole.params, "macs": whole.macs, "layers": rows}
        )
        return
    shown = console.out()
    shown.print(
        f"{found.name}: {whole.params:,} parameters, {words.human(whole.macs)} MACs"
        + ("" if found.trained else "; its weights are random"),
        markup=False,
    )
    shown.print(table.inspect([_short(row) for row in rows if "ranks" in row]))
    for row in rows:
        if "ranks" not in row:
            shown.print(f"  {row['layer']}: {row['reason']}", style="dim", markup=False)


def look(model: nn.Module, example: Example) -> list[dict[str, Any]]:
    """Return a row of plain data for every layer with a kernel, in order.

    A row has layer, kernel, params, macs; form, spectrum (by unfolding), full (ranks), and under
    ``ranks`` for each of p=0.9, p=0.95, p=0.98, evbmf and break_even: ranks, params, macs and the
    share of parameters that they save. A layer that cannot be factorized has a reason instead.
    """
    layers, reasons = factorizable(model)
    costs = layer_costs(model, example)
    rows: list[dict[str, Any]] = []
    for name, before in costs.items():
        row = {
            "layer": name,
            "kernel": list(before.weight),
            "params": before.params,
            "macs": before.macs,
        }
        if name in layers:
            rows.append(row | _row(name, layers[name], before))
        elif name in reasons:
            rows.append(row | {"reason": reasons[name]})
    return rows


def _row(name: str, module: Factorizable, before: LayerCost) -> dict[str, Any]:
    weight = module.weight.detach()
    form = "svd" if weight[0, 0].numel() == 1 else "tucker2"
    values = spectra(weight)
    sides = ("in", "out") if form == "tucker2" else ("out",)
    ranks: dict[str, Sequence[int]] = {
        f"p={p}": [energy_rank(values[side], p) for side in sides] for p in SHARES
    }
    ranks["evbmf"] = [
        max(1, evbmf_rank(values[side], unfold(weight, int(side == "in")).shape)) for side in sides
    ]
    most = max_ranks(weight.shape, form)
    ranks["break_even"] = _break_even(name, form, most, before)
    return {
        "form": form,
        "full": list(most),
        "spectrum": {side: [float(f"{v:.5g}") for v in values[side].tolist()] for side in sides},
        "ranks": {
            key: _saving(Factor(name, form, tuple(value)), before) for key, value in ranks.items()
        },
    }


def _saving(edit: Factor, before: LayerCost) -> dict[str, Any]:
    after = edit.predict(before)
    saved = 1 - after.params / before.params
    return {
        "ranks": list(edit.ranks),
        "params": after.params,
        "macs": after.macs,
        "saved": round(saved, 4),
    }


def _break_even(name: str, form: str, most: Sequence[int], before: LayerCost) -> tuple[int, ...]:
    """Find the highest ranks, in the proportion of full ones, that still save parameters."""
    low, high = 1, max(most)
    while low < high:
        middle = (low + high + 1) // 2
        edit = Factor(name, form, _scaled(most, middle))
        saves = edit.predict(before).params < before.params
        low, high = (middle, high) if saves else (low, middle - 1)
    return _scaled(most, low)


def _scaled(most: Sequence[int], top: int) -> tuple[int, ...]:
    return tuple(max(1, rank * top // max(most)) for rank in most)


def _short(row: dict[str, Any]) -> dict[str, Any]:
    """Make one row of the table: ranks with what they save."""
    shown: dict[str, Any] = {"layer": f"{row['layer']} {'×'.join(map(str, row['kernel']))}"}
    shown["spectrum"] = row["spectrum"]["out"]
    for key, value in row["ranks"].items():
        ranks = "/".join(map(str, value["ranks"]))
        even = key == "break_even"
        shown[key] = ranks if even else f"{ranks} {_percent(value['saved'])}"
    return shown


def _percent(saved: float) -> str:
    return f"{'−' if saved >= 0 else '+'}{abs(100 * saved):.0f}%"
