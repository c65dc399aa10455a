"""Arguments of other types than asked for: every public function says so in a sentence."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pliant
from pliant.errors import PliantError
from tests.test_early import DATA, trained

OTHERS: tuple[Any, ...] = (
    None,
    3,
    "x",
    [],
    {"a": 1},
    nn.Linear(2, 2),
    torch.ones(2),
    (1, 2),
    object,
)
EXAMPLE = (torch.zeros(1, 8),)
CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "compress": (pliant.compress, {"model": trained(), "data": DATA, "method": "energy"}),
    "start": (pliant.start, {"model": trained(), "method": "energy", "example": EXAMPLE}),
    "conclude": (pliant.conclude, {"run": None}),
    "analyze": (
        pliant.analyze,
        {"model": trained(), "data": DATA, "method": "output_sensitivity(samples=8, draws=1)"},
    ),
    "evaluate": (pliant.evaluate, {"model": trained(), "data": DATA}),
    "cost": (pliant.cost, {"model": trained(), "example": EXAMPLE}),
    "layer_costs": (pliant.layer_costs, {"model": trained(), "example": EXAMPLE}),
    "load": (pliant.load, {"path": "none.pliant"}),
    "to_onnx": (pliant.to_onnx, {"model": trained(), "example": EXAMPLE, "path": None}),
    "method": (pliant.method, {"spec": "energy"}),
    "Budget.parse": (pliant.Budget.parse, {"text": "params=0.5"}),
    "Data.of": (pliant.Data.of, {"data": DATA}),
}
ASKED = [
    *(("compress", name) for name in ("model", "data", "method", "budget", "train", "example")),
    *(("compress", name) for name in ("seed", "task", "loss", "metrics")),
    *(("start", name) for name in ("model", "method", "budget", "data", "example", "optimizer")),
    *(("start", name) for name in ("steps", "epochs", "batch", "seed", "task", "metrics")),
    *(("conclude", name) for name in ("run",)),
    *(("analyze", name) for name in ("model", "data", "method", "seed")),
    *(("evaluate", name) for name in ("model", "data", "split", "batch", "device", "task")),
    *((name, key) for name in ("cost", "layer_costs") for key in ("model", "example")),
    *(("to_onnx", name) for name in ("path", "model", "example", "tolerance")),
    *(("load", "path"), ("method", "spec"), ("Budget.parse", "text"), ("Data.of", "data")),
]


@pytest.mark.parametrize(("name", "argument"), ASKED)
def test_arguments_of_other_types_are_taken_or_refused_in_a_sentence(
    name: str, argument: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    call, given = CALLS[name]
    refused = 0
    for other in OTHERS if argument != "path" else set(OTHERS[:2]):  # text is a path
        try:
            call(**{**given, argument: other})
        except PliantError as error:
            refused += 1
            assert len(str(error)) > 20, (other, error)
    assert refused, "nothing was refused"
