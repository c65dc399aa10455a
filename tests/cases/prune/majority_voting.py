"""Majority voting: ballots by hand, and what they are blind to."""

import copy

import pytest
import torch
from torch import nn

from pliant.budget import Budget
from pliant.data import Data
from pliant.edits import Prune
from pliant.errors import DataError
from pliant.families.prune.votes import ballots, votes
from pliant.methods.prune.majority_voting import MajorityVoting
from pliant.run import start
from pliant.surgery.prove import cuttable, silence
from pliant.testing import Case, toys
from tests.cases.prune import REFUSES, TOYS, kept, run_of
from tests.cases.witness import on, on_many


def ballots_by_hand() -> None:
    seen = torch.tensor([[0.0, 1.0, 2.0, 5.0], [0.0, 4.0, 4.0, 0.0]])  # means 2 and 2
    assert ballots(seen, "mean").tolist() == [0, 1, 1, 1]
    assert ballots(seen, "most").tolist() == [0, 1, 2, 1]
    pairs = torch.tensor([0 + 0.5, 1 + 2.5, 2 + 2.5, 3 + 0.5]) / 3
    assert torch.allclose(ballots(seen, "pairwise"), pairs.double())


def pairwise_votes_sum_to_half_of_all() -> None:
    for units in (1, 2, 7):
        seen = torch.randn(50, units).relu()  # many ties at zero
        if units > 1:
            assert float(ballots(seen, "pairwise").sum()) == pytest.approx(50 * units / 2)


def a_dead_unit_gets_no_vote_and_order_does_not_count() -> None:
    seen = torch.randn(40, 6).relu()
    seen[:, 2] = 0
    assert ballots(seen, "mean")[2] == 0
    turn = torch.randperm(6)
    for ballot in ("mean", "pairwise"):
        found = ballots(seen, ballot)  # type: ignore[arg-type]
        assert torch.allclose(ballots(seen[:, turn], ballot), found[turn])  # type: ignore[arg-type]
        assert torch.allclose(ballots(seen[torch.randperm(40)], ballot), found)  # type: ignore[arg-type]


def batches_do_not_count() -> None:
    """Also behind a flattening, and for units that two layers read."""
    for name in ("bare", "residual"):
        toy = toys.TOYS[name]
        model, (images,) = toy.model().eval(), toy.inputs(11)
        groups, _ = cuttable(model, (images[:1],))
        whole = votes(model, groups, [(images,)], "mean")
        parts = votes(model, groups, [(part,) for part in images.split(4)], "mean")
        assert whole.keys() == parts.keys()
        assert all(torch.equal(whole[key], parts[key]) for key in whole)


def told(*sizes: float) -> tuple[nn.Sequential, Data]:
    """Units that are as large as this, for all inputs."""
    model = nn.Sequential(nn.Linear(2, len(sizes)), nn.ReLU(), nn.Linear(len(sizes), 2))
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.copy_(torch.tensor(sizes))
    return model, Data((torch.randn(16, 2), torch.arange(16) % 2), classes=2)


def losers_leave() -> None:
    model, data = told(3.0, 0.0, 4.0, 1.0)
    run = start(model, MajorityVoting(ratio=0.5, rounds=1), data=data)
    assert kept(run)["0", "out"] == (0, 2)
    assert sum(p.numel() for p in run.model.parameters()) == 3 * 2 + 3 * 2


def a_majority_decides_how_many() -> None:
    """Of shares 1, 0, 1, 1, 0 those below half of the median leave, whatever the ratio."""
    model, data = told(3.0, 0.0, 4.0, 5.0, 1.0)
    run = start(model, MajorityVoting(ratio=0.0, rounds=1, majority=0.5), data=data)
    assert kept(run)["0", "out"] == (0, 2, 3)


def masked_equals_compact() -> None:
    """In mid-training the cut network gives what the whole one does with losers silent."""
    toy = toys.TOYS["plain"]
    method = MajorityVoting(rounds=2)
    run = start(toy.model(), method, data=toy.data(), steps=10)
    masked = copy.deepcopy(run.model).eval()
    run.step = 2
    method.after_step(run)
    edits = [edit for edit in run.edits if isinstance(edit, Prune)]
    silence(masked, edits)
    with torch.no_grad():
        one, other = run.model.eval()(*toy.inputs(4)), masked(*toy.inputs(4))
    assert edits and torch.allclose(one, other, atol=1e-5)


def voters_are_needed() -> None:
    model, _ = told(1.0, 2.0)
    with pytest.raises(DataError, match="asks training inputs"):
        run_of(model, MajorityVoting())


CASES = (
    Case(
        "majority_voting",
        toys=TOYS,
        refuses=REFUSES,
        variants=(
            'majority_voting(ballot="pairwise", rounds=1)',
            "majority_voting(majority=0.5)",
        ),
        witnesses={
            "samples": on_many("majority_voting(rounds=4)", "samples", Budget(macs=0.7)),
            "end": on(toys.TOYS["plain"], "majority_voting(rounds=4)", "end"),
        },
        own=(
            ballots_by_hand,
            pairwise_votes_sum_to_half_of_all,
            a_dead_unit_gets_no_vote_and_order_does_not_count,
            batches_do_not_count,
            losers_leave,
            a_majority_decides_how_many,
            masked_equals_compact,
            voters_are_needed,
        ),
    ),
)
