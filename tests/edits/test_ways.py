"""Networks that change shape in the middle of a training, in every loop, killed and resumed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pliant import compress
from pliant.edits import Edit, Insert, Prune, Remove, Swap, Widen
from pliant.method import Method
from pliant.run import Run
from tests.test_drivers import ADAMW, SGD, STEPS, WAYS, assert_same, net, plain, samples

WIDER = (*range(8), 0, -1, 3)
SPEC = {"channels": 8, "kernel": 3, "dims": 2, "identity": True}
PLANS: dict[str, tuple[Edit, ...]] = {
    "swap": (Swap("third", "separable", {"multiplier": 2}),),
    "widen": (Widen("second", "out", WIDER, 8), Widen("third", "in", WIDER, 8, spread=0.5)),
    "insert": (Insert("second", "residual", SPEC), Insert("last", "copy", {"start": "same"})),
    "remove": (Remove("last", relu=True),),
    "scatter": (
        Prune("second", "out", (1, 4), 8),
        Insert("second", "scatter", {"places": (4, 1), "of": 8}),
    ),
}
PLANS["all"] = (
    *(*PLANS["widen"], *PLANS["swap"], Insert("second", "residual", {**SPEC, "channels": 11})),
    *(Insert("last", "copy", {"start": "fresh"}), Remove("norm", relu=True)),
)
HALF = STEPS // 2
DEATHS = [*((plan, HALF) for plan in PLANS), ("all", HALF - 1), ("all", HALF + 1)]


@dataclass(frozen=True)
class Rebuilding(Method):
    """Changes the network when half of the steps are taken."""

    plan: str

    def after_step(self, run: Run) -> None:
        if run.step == run.steps // 2:
            run.apply(*PLANS[self.plan])


@pytest.mark.slow  # the first case of a trainer pays for its import
@pytest.mark.parametrize("way", WAYS)
def test_the_four_ways_agree_to_the_last_bit(way: str) -> None:
    method = Rebuilding("all")
    for train in (SGD, ADAMW):
        expected, run = plain(method, train), WAYS[way](method, train, 1)
        assert run.finished and run.edits == list(PLANS["all"])
        assert_same(expected, run)
        known = {id(p) for each in expected.optimizers for g in each.param_groups
                 for p in g["params"]}  # fmt: skip
        assert {id(p) for p in expected.model.parameters()} == known


class Killed(Exception):
    """Ends a training where it stands."""


@pytest.mark.parametrize(("plan", "at"), DEATHS)
def test_a_killed_training_goes_on_to_the_same_weights(plan: str, at: int, tmp_path: Path) -> None:
    train = replace(SGD, finetune=1, checkpoint_every=1)

    def go(**more: Any) -> Any:
        return compress(net(), samples(), Rebuilding(plan), train=train, seed=3, **more)

    def watch(row: dict[str, Any]) -> None:
        if row.get("step") == at + 1:
            raise Killed

    whole = go()
    with pytest.raises(Killed):
        go(folder=tmp_path, watch=watch)
    resumed = go(folder=tmp_path, resume=True)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    assert whole.edits == resumed.edits == PLANS[plan]
