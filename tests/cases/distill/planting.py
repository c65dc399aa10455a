"""Planting: growing changes nothing, holds all that is older fast, and counts as it should."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from pliant.budget import Budget
from pliant.cost import cost
from pliant.data import Data
from pliant.edits import Prune, from_json, replay
from pliant.errors import BudgetError, MethodError
from pliant.families.distill import growth, rounds
from pliant.families.distill.growth import candidates, joined, judged, planted, plants
from pliant.math.divergence import divergence
from pliant.method import Method
from pliant.methods.distill.planting import Planting
from pliant.run import Run, start
from pliant.testing import Case
from pliant.testing.toys import TOYS
from tests.cases.witness import on_many

TOY = TOYS["plain"]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4)),
    )


def blank(model: nn.Module) -> Run:
    return start(model, Method(), data=TOY.data(), example=TOY.inputs(1), steps=4)


def planting_changes_no_output() -> None:
    for toy in TOYS.values():
        if toy.name in ("single", "shared"):
            continue
        run = start(toy.model(), Method(), data=toy.data(), example=toy.inputs(1))
        model, inputs = run.model.eval(), toy.inputs(4)
        before = model(*inputs)
        edits = plants(run, 3, seed=0)
        assert edits, toy.name
        run.apply(*edits)
        assert torch.allclose(model(*inputs), before, atol=1e-6), toy.name


def growth_is_counted_by_hand() -> None:
    """p I k^2 + O p k^2 + 2 p between convolutions, and C p where a classifier reads them."""
    for name, grown in (("0", 3 * 3 * 9 + 12 * 3 * 9 + 2 * 3), ("3", 3 * 8 * 9 + 4 * 3 + 2 * 3)):
        run = blank(net())
        edits = plants(run, 3, seed=0)
        before = cost(run.model, TOY.inputs(1)).params
        new = planted(run.model, edits)
        run.apply(*edits)
        after = {n: tuple(p.shape) for n, p in run.model.named_parameters()}
        assert {n: tuple(mask.shape) for n, mask in new.items()} == after
        whole = cost(run.model, TOY.inputs(1)).params - before
        assert sum(int(mask.sum()) for mask in new.values()) == whole
        cuts = candidates(run, edits)[name]
        run.apply(*cuts)
        assert cost(run.model, TOY.inputs(1)).params - before == grown
        other = net()
        replay(other, joined(edits, cuts))
        shapes = [p.shape for p in other.parameters()]
        assert shapes == [p.shape for p in run.model.parameters()]


def without_its_plants_a_network_is_what_it_was() -> None:
    run = blank(net())
    before = copy.deepcopy(run.model.state_dict())
    edits = plants(run, 2, seed=0)
    run.apply(*edits)
    run.apply(*candidates(run, edits)[""])
    after = run.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def stepped(run: Run, optimizer: Optimizer, steps: int) -> None:
    inputs, labels = torch.randn(8, 3, 6, 6), torch.arange(8) % 4
    for _ in range(steps):
        optimizer.zero_grad()
        output = run.model(inputs)
        loss = run.loss(nn.functional.cross_entropy(output, labels), output, (inputs, labels))
        loss.backward()
        run.before_step()
        optimizer.step()
        run.after_step()


def only_what_is_new_trains() -> None:
    """With momentum and decay; and the momentum of what is old survives the planting."""
    method = Planting(width=1.0, first=0.25, rounds=1, channels=2)
    for make in (
        lambda p: SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
        lambda p: AdamW(p, 0.01, weight_decay=0.1),
    ):
        model = net().train()
        optimizer = make(model.parameters())
        run = start(
            model, method, data=TOY.data(), example=TOY.inputs(1), optimizer=optimizer, steps=24
        )
        stepped(run, optimizer, 6)  # the last of them plants
        assert run.state["edits"]
        old = {n: p.detach().clone() for n, p in model.named_parameters()}
        new = run.state["new"]
        assert {tuple(p.shape) for p in old.values()} == {tuple(m.shape) for m in new.values()}
        assert sum(int(mask.sum()) for mask in new.values()) > 0
        stepped(run, optimizer, 5)
        moved = 0
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter[~new[name]], old[name][~new[name]]), name
            moved += int((parameter != old[name]).sum())
        assert moved > sum(int(mask.sum()) for mask in new.values()) * 0.9
        weight = model.get_parameter("3.weight")
        state = optimizer.state[weight]
        assert state and all(v.shape == weight.shape for v in state.values() if v.dim())


def frozen_weights_have_no_gradient() -> None:
    """So that the norm of the gradient, by which loops clip, is that of what trains."""
    model = net().train()
    optimizer = SGD(model.parameters(), 0.1)
    method = Planting(width=1.0, first=0.25, rounds=1, channels=2)
    run = start(
        model, method, data=TOY.data(), example=TOY.inputs(1), optimizer=optimizer, steps=24
    )
    stepped(run, optimizer, 7)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and not parameter.grad[~run.state["new"][name]].any()


def the_layer_that_gains_most_keeps_its_channels() -> None:
    """Losses by hand: with those of "3" alone it falls most; per parameter "0" gains more."""
    run = start(net(), Planting(width=1.0), data=TOY.data(), example=TOY.inputs(1), steps=50)
    found: dict[str, list[Prune]] = {"": [], "0": [], "3": []}
    values = {"": (1.0, 100), "0": (0.8, 110), "3": (0.5, 200)}
    kept, growth.judged = growth.judged, lambda run, cuts, samples: values[cuts]  # type: ignore
    told: Any = {name: name for name in found}
    try:
        assert rounds.best(run, told, "validation", 64) == ("3", 0.5)
        assert rounds.best(run, told, "gain", 64) == ("0", 0.8)
        values |= {"0": (1.0, 110), "3": (1.2, 200)}
        assert rounds.best(run, told, "validation", 64) == ("", 1.0)
    finally:
        growth.judged = kept


def candidates_are_judged_alone() -> None:
    """New channels of another layer that do harm have no part in the loss of a candidate."""
    run = start(net(), Planting(width=1.0), data=TOY.data(), example=TOY.inputs(1), steps=50)
    rounds.plant(run, 4)
    edits: Any = from_json(run.state["edits"])
    base = judged(run, candidates(run, edits)[""], 64)[0]
    with torch.no_grad():
        weight = run.model.get_parameter("8.weight")
        weight[run.state["new"]["8.weight"]] = 50.0 * torch.randn(16)  # reads what "3" got
    losses = {name: judged(run, cuts, 64)[0] for name, cuts in candidates(run, edits).items()}
    assert abs(losses[""] - base) < 1e-5 and abs(losses["0"] - base) < 1e-5
    assert losses["3"] > base + 0.1


def a_round_that_gains_nothing_keeps_nothing() -> None:
    """New channels that are not trained change no output, so no loss falls."""
    run = start(net(), Planting(width=1.0), data=TOY.data(), example=TOY.inputs(1), steps=50)
    before = copy.deepcopy(run.model.state_dict())
    rounds.plant(run, 4)
    rounds.choose(run, "validation", 64)
    assert not run.edits and run.log[-1]["planted"] == ""
    after = run.model.state_dict()
    same = [n for n in before if "running" not in n and "tracked" not in n]
    assert all(torch.equal(after[n], before[n]) for n in same)


def learnable(seed: int = 0) -> Data:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(256, 3, 6, 6, generator=g)
    labels = torch.arange(256) % 4
    x[:, 0] += (labels % 2 * 2 - 1)[:, None, None] * 0.5
    x[:, 1] += (labels // 2 * 2 - 1)[:, None, None] * 0.5
    return Data((x[:192], labels[:192]), (x[192:], labels[192:]), classes=4)


def a_network_grows_within_its_budget() -> None:
    """The loss on validation data falls from plant to plant, and the budget holds."""
    model, data = net().train(), learnable()
    optimizer = SGD(model.parameters(), 0.05, momentum=0.9)
    method = Planting(rounds=5, channels=2, first=0.2)
    run = start(
        model, method, Budget(params=0.6), data=data, optimizer=optimizer, epochs=20, batch=64
    )
    small = run.planner.now().params
    for _ in range(20):
        for inputs, labels in run.batches():
            optimizer.zero_grad()
            output = model(inputs)
            loss = nn.functional.cross_entropy(output, labels)
            run.loss(loss, output, (inputs, labels)).backward()
            run.before_step()
            optimizer.step()
            run.after_step()
        run.after_epoch()
    after = run.finish()
    assert small < after.params <= 0.6 * run.cost.params
    rows = [row for row in run.log if "planted" in row]
    assert any(row["planted"] for row in rows)
    losses = [row["loss"] for row in rows]
    assert losses[-1] < losses[0]
    again = net()
    replay(again, run.edits, weights=False)
    assert [p.shape for p in again.parameters()] == [p.shape for p in model.parameters()]


def layers_that_the_budget_cannot_bear_do_not_grow() -> None:
    run = start(net(), Planting(width=0.5), Budget(params=10**6), data=TOY.data(), steps=50)
    small = run.planner.now().params
    edits, costs = plants(run, 2, 0), {}
    for group, cuts in candidates(_grown(run, edits), edits).items():
        other = copy.deepcopy(run.model)
        replay(other, [*edits, *cuts])
        costs[group] = sum(p.numel() for p in other.parameters())
    assert costs[""] == small
    cheap, dear = sorted(costs.values())[1:]
    for most, grown in ((dear, 2), (cheap, 1), (cheap - 1, 0)):
        run = start(net(), Planting(width=0.5), Budget(params=most), data=TOY.data(), steps=50)
        edits = plants(run, 2, 0)
        assert len({e.layer for e in edits if e.side == "out"}) == grown


def _grown(run: Run, edits: Any) -> Run:
    other = run.rehearsal()
    other.apply(*edits)
    return other


def the_teacher_is_the_whole_network() -> None:
    model = net()
    teacher = copy.deepcopy(model).eval()
    run = start(model, Planting(weight=0.25), data=TOY.data(), example=TOY.inputs(1), steps=50)
    inputs, labels = TOY.inputs(8)[0], torch.arange(8) % 4
    output: Tensor = model(inputs)
    assert model[0].out_channels == 2  # a quarter of 8, of which two stay in any case
    loss = run.loss(torch.tensor(2.0), output, (inputs, labels))
    assert torch.isclose(loss, 0.75 * 2 + 0.25 * divergence(output, teacher(inputs), 4.0))


def what_cannot_be_met_is_refused() -> None:
    with pytest.raises(BudgetError, match="smaller width"):
        start(net(), Planting(width=0.9), Budget(params=0.3), example=TOY.inputs(1))
    with pytest.raises(MethodError, match="on data"):
        start(net(), Planting(), example=TOY.inputs(1), steps=10)


CASES = [
    Case(
        "planting",
        spec="planting(width=0.1, channels=2, rounds=2)",
        variants=('planting(choice="random", channels=1)', 'planting(choice="gain", width=0.4)'),
        refuses={"single": "two layers in a row", "shared": "two layers in a row"},
        witnesses={
            "samples": on_many(
                "planting(width=0.1, channels=2, rounds=1)",
                "samples",
                Budget(macs=0.7),
                samples=600,
            ),
        },
        own=(
            planting_changes_no_output,
            growth_is_counted_by_hand,
            without_its_plants_a_network_is_what_it_was,
            only_what_is_new_trains,
            frozen_weights_have_no_gradient,
            the_layer_that_gains_most_keeps_its_channels,
            candidates_are_judged_alone,
            a_round_that_gains_nothing_keeps_nothing,
            a_network_grows_within_its_budget,
            layers_that_the_budget_cannot_bear_do_not_grow,
            the_teacher_is_the_whole_network,
            what_cannot_be_met_is_refused,
        ),
    ),
]
