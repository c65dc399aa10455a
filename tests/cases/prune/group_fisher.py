"""Group Fisher: damages and savings, by hand."""

import copy
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from pliant.budget import Budget
from pliant.data import Data
from pliant.errors import DataError, MethodError
from pliant.families.prune.allocate import savings
from pliant.families.prune.fisher import group_fisher
from pliant.families.prune.ranking import Unit
from pliant.methods.prune.group_fisher import GroupFisher
from pliant.run import start
from pliant.surgery.prove import cuttable
from pliant.testing import Case
from tests.cases.prune import REFUSES, TOYS, kept, pair, run_of
from tests.cases.witness import on_many


def mirrored(seen: tuple[float, ...], told: tuple[float, ...]) -> nn.Sequential:
    """One number goes to all units, ``seen`` times as large; each tells one class from the other.

    What the units say sums to 0: whatever is drawn, a label is a surprise of 1/2.
    """
    model = nn.Sequential(nn.Linear(1, len(seen), bias=False), nn.Linear(len(told), 2))
    assert sum(a * b for a, b in zip(seen, told, strict=True)) == 0
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor(seen)[:, None])
        model[1].weight.copy_(torch.stack([torch.tensor(told), torch.zeros(len(told))]))
        model[1].bias.zero_()
    return model


def fisher_of(model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    groups, _ = cuttable(model, (inputs[:1],))
    return group_fisher(model, groups, [(inputs,)], torch.Generator().manual_seed(0))


def fisher_is_half_the_mean_square_of_a_masks_gradient() -> None:
    """dL/dm = (p - y) a w x with (p - y)^2 = 1/4 and x = -1, 1: the damage is (a w)^2 / 8."""
    model = mirrored((1.0, 2.0, 3.0), (5.0, -1.0, -1.0))
    signs = torch.tensor([[1.0], [-1.0]])
    damage = torch.tensor([25.0, 4.0, 9.0], dtype=torch.float64) / 8
    assert torch.allclose(fisher_of(model, signs)["0"], damage)
    assert torch.allclose(fisher_of(model, signs + 3)["0"], damage)  # a mean costs nothing
    data = Data((signs.repeat(4, 1), torch.zeros(8, dtype=torch.long)), classes=2)
    run = start(model, GroupFisher(ratio=0.34, samples=8), data=data)
    assert kept(run)["0", "out"] == (0, 2)  # the smallest norm is that of the first


class Twice(nn.Module):
    """Two layers read the same units, and their outputs are added."""

    def __init__(self) -> None:
        super().__init__()
        self.one = mirrored((1.0, 2.0, 3.0), (5.0, -1.0, -1.0))
        self.other = copy.deepcopy(self.one[1])

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.one[0](x)
        out: Tensor = self.one[1](hidden) + self.other(hidden)
        return out


def readers_of_one_unit_are_summed_before_the_square() -> None:
    """Readers that say the same make it four times the damage, those that contradict none."""
    signs, model = torch.tensor([[1.0], [-1.0]]), Twice()
    (damage,) = fisher_of(model, signs).values()
    assert torch.allclose(damage, torch.tensor([25.0, 4.0, 9.0], dtype=torch.float64) / 2)
    with torch.no_grad():
        model.other.weight.neg_()
    (damage,) = fisher_of(model, signs).values()
    assert damage.abs().max() < 1e-9


def damage_is_divided_by_what_leaves() -> None:
    """Of 40 weights, 4 -> 2 -> 8 -> 2, a unit of the first layer has 4 + 8, of the second 2 + 2."""
    layers = nn.Linear(4, 2, bias=False), nn.Linear(2, 8, bias=False), nn.Linear(8, 2, bias=False)
    data = Data((torch.randn(8, 4), torch.arange(8) % 2), classes=2)
    run = start(nn.Sequential(*layers), GroupFisher(ratio=0.0), data=data)
    groups, _ = cuttable(run.model, run.example)
    assert savings(run, groups, [], ("macs",)) == {"0": 12 / 40, "1": 4 / 40}
    assert savings(run, groups, [], ()) == {"0": 1.0, "1": 1.0}
    gone = [Unit(0.1, "1", unit) for unit in range(4)]  # half of the second layer has left
    assert savings(run, groups, gone, ("macs",)) == {"0": 8 / 40, "1": 4 / 40}


def what_has_left_counts_in_the_next_pass() -> None:
    """Each pass is over a copy in which nothing reads the units that have left."""
    unread = []

    def watched(model: nn.Sequential, *others: Any) -> dict[str, Tensor]:
        unread.append(int((model[1].weight == 0).all(0).sum()))
        return group_fisher(model, *others)

    inputs = torch.tensor([[1.0], [-1.0]]).repeat(16, 1)
    data = Data((inputs, torch.arange(32) % 2), classes=2)
    model = mirrored((1.0, 1.0, 1.0, 1.0), (6.0, -1.0, -2.0, -3.0))
    with patch("pliant.methods.prune.group_fisher.group_fisher", watched):
        run = start(model, GroupFisher(ratio=0.75, samples=32, passes=3), data=data)
    assert unread == [0, 1, 2] and kept(run)["0", "out"] == (0,)


def rounds_take_what_the_first_pass_took_first() -> None:
    """Damages fall with the number: 36, 9, 4, 1; passes go all the way, the first cut a third."""
    data = Data((torch.tensor([[1.0], [-1.0]]).repeat(16, 1), torch.arange(32) % 2), classes=2)
    model = mirrored((1.0, 1.0, 1.0, 1.0), (6.0, -3.0, -2.0, -1.0))
    method = GroupFisher(ratio=0.75, samples=32, passes=3, rounds=3)
    run = start(model, method, data=data, steps=9)
    assert kept(run)["0", "out"] == (0, 1, 2)


def units_worth_nothing_leave_up_to_the_floor() -> None:
    """Where all scores are 0, those that have left count first."""
    data = Data((torch.tensor([[1.0], [-1.0]]).repeat(8, 1), torch.arange(16) % 2), classes=2)
    method = GroupFisher(ratio=1 - 1e-9, least=0.25, samples=16)
    run = start(mirrored((1.0,) * 8, (0.0,) * 8), method, data=data)
    assert len(kept(run)["0", "out"]) == 2


def fisher_needs_inputs_and_sound_options() -> None:
    with pytest.raises(DataError, match="give data, or take magnitude"):
        run_of(pair(1.0, 2.0), GroupFisher())
    for options in ({"samples": 0}, {"passes": 0}, {"passes": 1000}):
        with pytest.raises(MethodError, match="(samples|passes) must be int"):
            run_of(pair(1.0, 2.0), GroupFisher(**options))


CASES = (
    Case(
        "group_fisher",
        toys=TOYS,
        refuses=REFUSES,
        variants=(
            "group_fisher(passes=1, samples=8)",
            "group_fisher(rounds=2)",
            'group_fisher(samples=8, scope="local")',
        ),
        witnesses={
            "samples": on_many("group_fisher", "samples", Budget(macs=0.7)),
        },
        own=(
            fisher_is_half_the_mean_square_of_a_masks_gradient,
            readers_of_one_unit_are_summed_before_the_square,
            damage_is_divided_by_what_leaves,
            what_has_left_counts_in_the_next_pass,
            rounds_take_what_the_first_pass_took_first,
            units_worth_nothing_leave_up_to_the_floor,
            fisher_needs_inputs_and_sound_options,
        ),
    ),
)
