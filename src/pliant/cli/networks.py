"""`pliant zoo`: the networks that can be named, what they read and how large they are."""

from typing import Any

import torch

from pliant import zoo
from pliant.cli import console
from pliant.render import table, words


@console.refusals
def networks(
    as_json: console.AsJson = False,
) -> None:
    """List the networks of the zoo: their input, classes and parameters, trained weights if any."""
    rows = [_row(name, network) for name, network in zoo.NETWORKS.items()]
    if as_json:
        console.print_json(rows)
        return
    console.out().print(table.inspect([_said(row) for row in rows]))


def _row(name: str, network: zoo.Network) -> dict[str, Any]:
    with torch.device("meta"):  # shapes are enough
        model = network.build(classes=network.classes)
    known = sorted(zoo.WEIGHTS.glob(f"{name}-*.safetensors"))
    return {
        "network": name,
        "input": list(network.input),
        "classes": network.classes,
        "params": sum(parameter.numel() for parameter in model.parameters()),
        "weights": [path.stem.removeprefix(f"{name}-") for path in known],
    }


def _said(row: dict[str, Any]) -> dict[str, Any]:
    size, weights = "x".join(map(str, row["input"])), " ".join(row["weights"]) or words.NONE
    return row | {"input": size, "weights": weights}
