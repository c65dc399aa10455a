"""Plans and factors stay what they were: digests taken before the code was arranged anew.

Refitted factors alone are newer: one batch sums in another order than several did. So is the
data-aware plan of the wide network: few samples are damped as they are, not by what rounding makes
of them.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import pliant
from pliant import zoo
from pliant.latency.target import machine as processor

FILE = Path(__file__).parent / "digests.json"
TAKEN: dict[str, Any] = json.loads(FILE.read_text()) if FILE.exists() else {}
METHODS = {
    "resnet20": (
        "energy",
        "energy(form='auto', samples=128, reconstruct=64)",
        "evbmf",
        "magnitude",
        "group_fisher(samples=64)",
        "random",
        "elastic",
    ),
    "vgg16-bn-half": ("energy", "energy(form='auto', samples=32)", "evbmf", "magnitude"),
}
BUDGET = {"resnet20": "params=0.4", "vgg16-bn-half": "params=0.1"}
CASES = [(network, method) for network, methods in METHODS.items() for method in methods]


def digests(network: str, method: str) -> list[str]:
    """Of the plan, and of all tensors to the last bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums of threads come in another order
    try:
        torch.manual_seed(0)
        model = zoo.build(network)
        random = torch.Generator().manual_seed(1)
        inputs = torch.randn(256, 3, 32, 32, generator=random)
        labels = torch.randint(0, 10, (256,), generator=random)
        result = pliant.compress(model, (inputs, labels), method, BUDGET[network], strict=False)
    finally:
        torch.set_num_threads(threads)
    plan = [
        (edit.layer, edit.form, getattr(edit, "ranks", ()), getattr(edit, "keep", ()))
        for edit in result.edits
    ]
    bits = hashlib.sha256()
    for name, tensor in sorted(result.model.state_dict().items()):
        bits.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return [hashlib.sha256(json.dumps(plan).encode()).hexdigest()[:16], bits.hexdigest()[:16]]


def machine() -> list[str]:
    """What the last bit of a product depends on."""
    return [processor(), torch.backends.cpu.get_cpu_capability(), torch.__version__]


@pytest.mark.timeout(600)
@pytest.mark.slow  # data-aware plans of two whole networks
@pytest.mark.parametrize(("network", "method"), CASES)
def test_plans_and_factors_are_as_before(network: str, method: str) -> None:
    plan, bits = TAKEN["digests"][f"{network} {method}"]
    if machine() != TAKEN["machine"]:
        pytest.skip(f"digests were taken on {', '.join(TAKEN['machine'])}")
    assert digests(network, method) == [plan, bits]


if __name__ == "__main__":
    found = {f"{network} {method}": digests(network, method) for network, method in CASES}
    FILE.write_text(json.dumps({"machine": machine(), "digests": found}, indent=1) + "\n")
