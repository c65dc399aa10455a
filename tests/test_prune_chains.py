"""Pruning beside what else makes a network smaller: each through a file, and through ONNX."""

from pathlib import Path

import pytest
import torch

import pliant
from pliant.edits import Prune
from pliant.testing.toys import TOYS

INT8 = "groupwise_ptq(bits=8, activations=8, independent=1, joint=1, samples=8)"
PRUNERS = {
    "magnitude": "plain",
    "lre_amc": "plain",
    "sspruning": "residual",
    "discriminant_information(search='none')": "residual",
}


def stages(order: str, pruner: str) -> list[pliant.Stage]:
    pruned = pliant.Stage(pliant.method(pruner), pliant.Budget(macs=0.8))
    if order == "int8 after it":
        return [pruned, pliant.Stage(pliant.method(INT8))]
    less = 0.5 if order == "factors after it" else 0.85
    factors = pliant.Stage(pliant.method("energy"), pliant.Budget(params=less))
    return [pruned, factors] if order == "factors after it" else [factors, pruned]


@pytest.mark.slow  # onnxruntime
@pytest.mark.parametrize("pruner", PRUNERS)
@pytest.mark.parametrize("order", ["factors after it", "factors before it", "int8 after it"])
def test_a_chain_comes_back_from_a_file_and_through_onnx(
    order: str, pruner: str, tmp_path: Path
) -> None:
    toy = TOYS[PRUNERS[pruner]]
    torch.manual_seed(0)
    result = pliant.compress(toy.model(), toy.data(), pliant.chain(*stages(order, pruner)))
    other = {"int8 after it": "w8a8"}.get(order, "tucker2")
    assert {"pruned", other} <= {getattr(edit, "form", "") for edit in result.edits}
    assert any(isinstance(edit, Prune) for edit in result.edits)

    loaded = pliant.load(result.save(tmp_path / "small.pliant"), toy.model()).eval()
    inputs = toy.inputs(4)
    with torch.no_grad():
        assert torch.equal(loaded(*inputs), result.model.eval()(*inputs))
    close = 0.05 if order == "int8 after it" else 1e-4
    pliant.to_onnx(loaded, tmp_path / "small.onnx", inputs, tolerance=close)  # raises beyond it
