"""Adaptive ranks: rows of factors that lose and gain components, and what the optimizer keeps."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from pliant.budget import Budget
from pliant.cost import cost, layer_costs
from pliant.data import Data
from pliant.edits import Factor, Rerank, from_json, replay, to_json
from pliant.edits.rerank import merged
from pliant.errors import BudgetError, EditError, MethodError
from pliant.families.lowrank.ranks import changes, dense_again
from pliant.math.forms import FORMS, compose, decompose, forms_for, max_ranks
from pliant.methods.lowrank.adaptive_ranks import AdaptiveRanks
from pliant.nn.factorized import dense
from pliant.run import Run, start
from pliant.testing import Case
from tests.cases.witness import on_many

IMAGES = torch.randn(4, 6, 7, 7, generator=torch.Generator().manual_seed(1))
SHAPE = (8, 6, 3, 3)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 8, 3, stride=2, padding=1)
    return nn.Sequential(conv, nn.ReLU(), nn.Flatten(), nn.Linear(128, 5))


def planted(form: str, rank: int) -> Tensor:
    """A kernel that a form represents exactly at this rank, in every side."""
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))
    ranks = tuple(min(rank, top) for top in max_ranks(SHAPE, form))
    return compose(decompose(weight, form, ranks), form)


def of_form(form: str) -> tuple[nn.Sequential, Factor, list[Tensor]]:
    """A network whose first layer is of rank 2, split at rank 4: two components are idle."""
    model = network()
    with torch.no_grad():
        model[0].weight.copy_(planted(form, 2))
    high = tuple(min(4, top) for top in max_ranks(SHAPE, form))
    edit = Factor("0", form, high)
    edit.apply(model)
    return model, edit, [part.weight.detach().clone() for part in model[0]]  # type: ignore[attr-defined]


def gradients_of(model: nn.Sequential) -> list[Tensor]:
    row: Any = model[0]
    loss = model(IMAGES).square().sum()
    return list(torch.autograd.grad(loss, [part.weight for part in row]))


def close(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    scale = max(float(tensor.abs().max()) for tensor in expected)
    pairs = zip(found, expected, strict=True)
    return all(torch.allclose(a, b, atol=2e-4 * scale) for a, b in pairs)


def momentum_is_what_it_would_have_been_in_the_new_factors() -> None:
    """Momentum is linear in gradients: that of the old factors becomes that of the new ones."""
    for form in forms_for(SHAPE):
        model, edit, _ = of_form(form)
        optimizer = SGD(model.parameters(), 0.1, momentum=0.9)
        run = start(model, AdaptiveRanks(), Budget(params=0.9), example=(IMAGES,))
        run.optimizer = optimizer
        for part, gradient in zip(model[0], gradients_of(model), strict=True):  # type: ignore[call-overload]
            optimizer.state[part.weight]["momentum_buffer"] = gradient
        before = model(IMAGES)
        low = tuple(min(2, top) for top in edit.ranks)
        whole, layers = dense_again(run, {"0": form}, ["0"])
        plan = [Factor("0", form, low)]
        (change,) = changes(plan, run, layers, {}, {"0": form}, grow=0.0, wanted={})
        run.apply(change)
        assert torch.allclose(model(IMAGES), before, atol=1e-4), form
        row: Any = model[0]
        assert tuple(len(part.weight) for part in row)[:-1] == low
        kept = [optimizer.state[part.weight]["momentum_buffer"] for part in row]
        assert close(kept, gradients_of(model)), form
        parameters = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert parameters == {id(p) for p in model.parameters()}


def squares_follow_too() -> None:
    """Adam's squares of a component that is half of one and half of another are mixed alike."""
    model = nn.Sequential(nn.Linear(3, 3, bias=False))
    Factor("0", "svd", (2,)).apply(model)
    optimizer = AdamW(model.parameters(), 0.1)
    row: Any = model[0]
    for part in row:
        part.weight.grad = torch.ones_like(part.weight)
    optimizer.step()
    squares = torch.tensor([[4.0] * 3, [2.0] * 3])
    optimizer.state[row[0].weight]["exp_avg_sq"] = squares
    run = start(model, AdaptiveRanks(), Budget(params=10), example=(torch.zeros(1, 3),))
    run.optimizer = optimizer
    half = torch.tensor([[0.5**0.5, 0.5**0.5]])
    kernels = (half @ row[0].weight.detach(), row[1].weight.detach() @ half.T)
    run.apply(Rerank("0", "svd", (1,), kernels, ((half, half.T),)))
    state = optimizer.state[row[0].weight]
    assert torch.allclose(state["exp_avg_sq"], torch.full((1, 3), 3.0))
    assert state["step"] == 1 and state["exp_avg"].shape == (1, 3)


def new_components_read_the_gradient_and_change_nothing_yet() -> None:
    for form in forms_for(SHAPE):
        model, edit, _ = of_form(form)
        run = start(model, AdaptiveRanks(), Budget(params=0.9), example=(IMAGES,))
        before = model(IMAGES)
        whole, layers = dense_again(run, {"0": form}, ["0"])
        assert torch.allclose(layers["0"](IMAGES), model[0](IMAGES), atol=1e-4)
        wanted = {"0": torch.randn(SHAPE, generator=torch.Generator().manual_seed(5))}
        low = tuple(min(2, top) for top in edit.ranks)
        (change,) = changes(
            [Factor("0", form, low)], run, layers, {}, {"0": form}, grow=0.5, wanted=wanted
        )
        run.apply(change)
        assert change.ranks == tuple(rank + 1 for rank in low)  # type: ignore[attr-defined]
        assert torch.allclose(model(IMAGES), before, atol=1e-4), form
        pulls = gradients_of(model)
        reached = [pulls[1][:, low[0] :], pulls[-1][:, low[-1] :]]
        assert max(float(each.abs().max()) for each in reached) > 1e-3, "they can learn"


def cut_components_are_the_last_and_new_ones_are_zero_where_none_are_given() -> None:
    model, edit, kernels = of_form("output")
    Rerank("0", "output", (3,)).apply(model)
    row: Any = model[0]
    assert torch.equal(row[0].weight, kernels[0][:3]) and torch.equal(
        row[1].weight, kernels[1][:, :3]
    )
    Rerank("0", "output", (5,)).apply(model)
    assert row[0].weight.shape == (5, 6, 3, 3) and not row[0].weight[3:].any()
    assert (row[0].out_channels, row[1].in_channels) == (5, 5) and row.weight is row[0].weight
    for wrong in (
        Rerank("0", "input", (2,)),
        Rerank("3", "svd", (2,)),
        Rerank("0", "output", (9,)),
    ):
        with pytest.raises(EditError, match="no row of|do not fit"):
            wrong.apply(model)


def a_file_knows_the_last_ranks_only() -> None:
    edits = [Factor("0", "output", (4,)), Factor("3", "svd", (3,)), Rerank("0", "output", (2,))]
    edits += [Rerank("0", "output", (3,)), Rerank("3", "svd", (1,))]
    found = merged(edits)
    assert found == [Factor("0", "output", (3,)), Factor("3", "svd", (1,))]
    one, other = network(), network()
    replay(one, from_json(to_json(edits)), weights=False)
    replay(other, found, weights=False)
    assert str(one) == str(other)
    before = layer_costs(network(), (IMAGES,))["0"]
    assert edits[2].predict(before) == Factor("0", "output", (2,)).predict(before)


def the_dense_layer_of_a_row_is_the_row() -> None:
    for form in FORMS:
        layer: Any = (
            nn.Conv2d(6, 8, 1, stride=2) if form == "svd" else nn.Conv2d(6, 8, 3, padding=1)
        )
        model = nn.Sequential(layer)
        whole = nn.Sequential(model)
        Factor("0.0", form, tuple(2 for _ in max_ranks(layer.weight.shape, form))).apply(whole)
        row: Any = model[0]
        assert torch.allclose(dense(row, form)(IMAGES), row(IMAGES), atol=1e-5)
    linear = nn.Sequential(nn.Linear(6, 8))
    Factor("0", "svd", (3,)).apply(linear)
    row = linear[0]
    assert torch.allclose(dense(row, "svd")(torch.ones(2, 6)), row(torch.ones(2, 6)), atol=1e-6)


def two(steps: int = 8, **options: Any) -> Run:
    """Two equal layers side by side, whose outputs are added up."""

    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x) + self.other(x)

    torch.manual_seed(0)
    noise = torch.Generator().manual_seed(1)
    model = Beside()
    with torch.no_grad():
        model.other.weight.mul_(0.01)
    inputs = torch.randn(64, 16, generator=noise)
    data = Data((inputs, torch.randint(0, 16, (64,), generator=noise)), classes=16)
    method = AdaptiveRanks(search=1.0, power=1.0, samples=64, **options)
    optimizer = SGD(model.parameters(), 0.01, momentum=0.9)
    return start(model, method, Budget(params=0.5), data=data, optimizer=optimizer, steps=steps)


def ranks_fall_and_rise_as_directions_gain_worth() -> None:
    """The weaker of two layers loses its ranks first, and gets some back when it is needed."""
    run = two(plans=4, grow=0.5)
    for _ in range(4):
        run.after_step()
    fallen = [row["planned"] for row in run.log if "planned" in row]
    assert [list(row) for row in fallen] == [["other"]] * 2, "the other layer is dense so far"
    assert fallen[0]["other"][1] > fallen[1]["other"][1]
    row: Any = run.model.get_submodule("other")
    noise = torch.Generator().manual_seed(2)
    with torch.no_grad():  # as if the components that it was given to try had learned much
        for part in row:
            part.weight.copy_(torch.randn(part.weight.shape, generator=noise))
    for _ in range(4):
        run.after_step()
    run.finish()
    last = {edit.layer: edit.ranks[0] for edit in run.edits}  # type: ignore[attr-defined]
    assert last["other"] > fallen[1]["other"][1] and last["other"] > last["one"]
    assert 32 * sum(last.values()) <= 256 < 32 * (sum(last.values()) + 1)
    assert [type(edit) for edit in run.edits] == [Factor, Factor]


def the_budget_is_reached_by_the_share_that_was_named() -> None:
    run = two(steps=20, plans=5, grow=0.0)
    object.__setattr__(run.method, "search", 0.5)
    sizes = []
    for _ in range(20):
        run.after_step()
        sizes.append(cost(run.model, run.example).params)
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 5 + 1
    assert sizes[8] > 256 >= sizes[9] and sizes[9] == sizes[-1]
    planned = [row for row in run.log if "planned" in row]
    assert [row["step"] for row in planned] == [2, 4, 6, 8, 10]


def what_leads_nowhere_is_refused() -> None:
    example = (IMAGES,)
    with pytest.raises(BudgetError, match="plans ranks for a budget, and there is none"):
        start(network(), AdaptiveRanks(), example=example)
    for wrong in ({"search": 0.2, "start": 0.3}, {"plans": 0}, {"power": 0.0}, {"search": 1.5}):
        with pytest.raises(MethodError, match="adaptive_ranks: (start|plans|power|search) must be"):
            start(network(), AdaptiveRanks(**wrong), Budget(params=0.5), example=example)


CASES = [
    Case(
        "adaptive_ranks",
        spec="adaptive_ranks(search=1.0, plans=3, samples=16)",
        variants=(
            'adaptive_ranks(search=0.5, plans=2, samples=16, form="tucker2", grow=0.5)',
            "adaptive_ranks(start=0.3, search=1.0, plans=8, samples=0, power=1.0)",
        ),
        witnesses={
            "samples": on_many("adaptive_ranks", "samples", Budget(params=0.7)),
        },
        own=(
            momentum_is_what_it_would_have_been_in_the_new_factors,
            squares_follow_too,
            new_components_read_the_gradient_and_change_nothing_yet,
            cut_components_are_the_last_and_new_ones_are_zero_where_none_are_given,
            a_file_knows_the_last_ranks_only,
            the_dense_layer_of_a_row_is_the_row,
            ranks_fall_and_rise_as_directions_gain_worth,
            the_budget_is_reached_by_the_share_that_was_named,
            what_leads_nowhere_is_refused,
        ),
    ),
]
