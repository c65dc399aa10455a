"""Two processes on one CPU search, grow and distil: both choose alike and end with one network."""

import json
from typing import Any

import pytest
import torch

from pliant.data import Train
from pliant.drivers.loop import fit
from pliant.edits import to_json
from pliant.registry import build
from pliant.run import start
from pliant.testing.toys import SPECIAL, TOYS
from tests.ranks import both, join, leave

PLAN = Train(epochs=2, batch=4, lr=0.05, device="cpu", devices=2, schedule="constant")
WORK = {
    "edarts(warmup=0.0, every=1, batch=4)": "supernet",
    "edarts(drop_path=0.5)": "cells",
    "fine_tuned_darts(growth=100)": "cells",
    "ednas(batch=4, scope='all')": "plain",
    "kws_nas(batch=4, every=1, warmup=0.0)": "mobile",
    "vpu_nas(batch=4, every=1, warmup=0.0, estimator='gates')": "mobile",
    "stage_wise(growth=1, iterations=1)": "staged",
    "planting(width=0.5, first=0.25, rounds=1)": "plain",
    "ssal(width=8)": "plain",
    "oskd(warmup=0.0, ramp=0.0, memory=8)": "plain",
    "kd_structure(start=0.5)": "plain",
}


def worker(rank: int, port: int, folder: str) -> None:
    """Train with every method, and keep what came out of it, or what went wrong."""
    join(rank, port)
    found: dict[str, Any] = {}
    for spec, name in WORK.items():
        toy = (SPECIAL | TOYS)[name]
        model, data = toy.model(), toy.data()
        steps = PLAN.steps(data.steps(4, 2))
        run = start(model, build(spec), data=data, steps=steps, seed=1)
        sums: list[list[float]] = []

        def look(row: Any, model: Any = model, sums: Any = sums) -> None:
            sums.append([float(p.detach().double().sum()) for p in model.parameters()])

        fit(run, data, PLAN, watch=look)
        made = {"model": model.state_dict(), "edits": json.dumps(to_json(run.edits))}
        found[spec] = made | {"steps": sums}
    leave(rank, folder, found)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return both(worker, tmp_path_factory.mktemp("ranks"))


@pytest.mark.slow  # two processes, each of which imports torch
@pytest.mark.parametrize("spec", WORK)
def test_both_processes_end_with_the_same_network(spec: str, ranks: list[dict[str, Any]]) -> None:
    zero, one = (found[spec] for found in ranks)
    assert zero["edits"] == one["edits"]
    assert len(zero["steps"]) > 2 and zero["steps"] == one["steps"]  # also within an epoch
    assert zero["model"].keys() == one["model"].keys()
    assert [n for n, v in zero["model"].items() if not torch.equal(v, one["model"][n])] == []
