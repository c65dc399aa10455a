"""Splitting projection: columns by hand, the cut that changes nothing, the support that stays."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, Optimizer

from pliant.budget import Budget
from pliant.errors import MethodError, TrainingError
from pliant.families.prune.columns import columns, norm_of, project, set_columns
from pliant.methods.prune.constrained_projection import ConstrainedProjection
from pliant.run import Run, start
from pliant.testing import Case, toys
from tests.cases.prune import REFUSES, TOYS, kept, run_of


def read(*norms: float) -> nn.Sequential:
    """Units that are read by columns of these l1 norms."""
    model = nn.Sequential(nn.Linear(2, len(norms)), nn.ReLU(), nn.Linear(len(norms), 2))
    with torch.no_grad():
        model[2].weight.copy_(torch.tensor([[0.75], [-0.25]]) * torch.tensor(norms))
    return model


def columns_share_the_radius_by_hand() -> None:
    """Of 1, 2, 5 the ball of 4 leaves 0, 1/2, 7/2: each loses 3/2, as the first does too.

    Inside of the second 3/2 and 1/2 are to sum to 1/2; of the third 15/4 and 5/4 to 7/2.
    """
    run = run_of(read(1.0, 2.0, 5.0), ConstrainedProjection(radius=0.5, least=0.0))
    run.finish()
    assert kept(run)["0", "out"] == (1, 2)
    expected = torch.tensor([[0.5, 3.0], [0.0, -0.5]])
    assert torch.allclose(run.model[2].weight, expected)  # type: ignore[index, arg-type]


def a_euclidean_ball_scales_columns() -> None:
    run = run_of(read(1.0, 2.0, 5.0), ConstrainedProjection(radius=0.5, norm="l21", least=0.0))
    run.finish()
    expected = torch.tensor([[0.75], [-0.25]]) * torch.tensor([0.5, 3.5])
    assert torch.allclose(run.model[2].weight, expected)  # type: ignore[index, arg-type]


def weights_within_the_ball_stay_as_they_are() -> None:
    """Of a pointwise convolution columns are the weight itself, not a copy of it."""
    for norm in ("l11", "l21", "l1"):
        model = nn.Sequential(nn.Conv2d(4, 6, 1))
        weight = model.get_parameter("0.weight")
        before = weight.detach().clone()
        project(model, {"0": 2 * norm_of(model[0], norm)}, norm)  # type: ignore[arg-type]
        assert torch.equal(weight, before)


def trained(method: ConstrainedProjection, kind: type[Optimizer], **options: Any) -> list[Run]:
    """Ten steps by hand; the run after each of them, as it was."""
    toy = toys.TOYS["plain"]
    model, states = toy.model(), []
    optimizer = kind(model.parameters(), 0.01, **options)  # type: ignore[call-arg]
    run = start(model, method, example=toy.inputs(1), optimizer=optimizer, steps=10)
    inputs, labels = next(iter(toy.data().batches("train", 16)))
    for _ in range(10):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        run.before_step()
        optimizer.step()
        run.after_step()
        states.append(copy.copy(run))
        states[-1].model = copy.deepcopy(model)
    return states


def zeros_stay_zeros() -> None:
    """At every step of the second run, whatever momentum says."""
    method = ConstrainedProjection(radius=0.3)
    for kind, options in ((Adam, {}), (SGD, {"momentum": 0.9, "weight_decay": 0.1})):
        with torch.random.fork_rng(devices=[]):
            runs = trained(method, kind, **options)
        masks = runs[-1].state["masks"]
        assert masks and not all(mask.all() for mask in masks.values())
        for run in runs[4:]:
            for name, mask in masks.items():
                weight: Any = run.model.get_submodule(name).weight
                assert not weight[~mask].any() and weight[mask].all()


def survivors_go_back_to_their_first_values() -> None:
    """W0 times the mask, without the channels that left; batch norms as they were too."""
    dense = toys.TOYS["plain"].model()
    with torch.random.fork_rng(devices=[]):
        run = trained(ConstrainedProjection(radius=0.05, least=0.0), SGD, momentum=0.9)[4]
    (edit,) = (e for e in run.edits if (e.layer, e.side) == ("3", "out"))  # type: ignore[attr-defined]
    before: Any = dense.get_submodule("1")
    norm: Any = run.model.get_submodule("1")
    inputs = kept(run).get(("0", "out"), tuple(range(8)))
    assert torch.equal(norm.running_mean, before.running_mean[list(inputs)])
    weight: Any = run.model.get_submodule("3").weight
    first: Any = dense.get_submodule("3").weight
    first = first[list(edit.keep)][:, list(inputs)]  # type: ignore[attr-defined]
    assert torch.equal(weight, first * run.state["masks"]["3"]) and (weight == 0).sum() > 0
    assert len(edit.keep) < 12  # type: ignore[attr-defined]


def empty_columns_leave_and_nothing_changes() -> None:
    """The logits of the projected network are those of the cut one."""
    toy = toys.TOYS["plain"]
    for norm in ("l11", "l21"):
        method = ConstrainedProjection(radius=0.1, least=0.0, norm=norm, rewind=False, start=1.0)
        whole = toy.model().eval()
        run = start(copy.deepcopy(whole), method, example=toy.inputs(1))
        run.finish()
        assert run.edits
        for name, radius in start_radii(whole, method).items():
            layer = whole.get_submodule(name)
            onto = {"l11": _l11, "l21": _l21}[norm]
            set_columns(layer, onto(columns(layer).detach(), radius))
        with torch.no_grad():
            one, other = run.model.eval()(*toy.inputs(4)), whole(*toy.inputs(4))
        assert torch.allclose(one, other, atol=1e-5)


def start_radii(model: nn.Module, method: ConstrainedProjection) -> dict[str, float]:
    run = start(copy.deepcopy(model), method, example=toys.TOYS["plain"].inputs(1), steps=4)
    found: dict[str, float] = run.state["radii"]
    return found


def _l11(weight: torch.Tensor, radius: float) -> torch.Tensor:
    """By bisection: the columns' shares, then their entries."""
    shares = _lowered(weight.abs().sum(1), radius)
    rows = [_lowered(row.abs(), float(share)) for row, share in zip(weight, shares, strict=True)]
    return torch.stack(rows) * weight.sign()


def _l21(weight: torch.Tensor, radius: float) -> torch.Tensor:
    norms = weight.norm(dim=1)
    return weight * (_lowered(norms, radius) / norms)[:, None]


def _lowered(sizes: torch.Tensor, radius: float) -> torch.Tensor:
    low, high = 0.0, float(sizes.max())
    for _ in range(60):
        middle = (low + high) / 2
        over = float((sizes - middle).clamp_min(0).sum()) > radius
        low, high = (middle, high) if over else (low, middle)
    return (sizes - high).clamp_min(0)


def a_budget_sets_one_radius() -> None:
    """The least that leave: half of the parameters are met by the columns of the least norm."""
    run = run_of(read(1.0, 2.0, 3.0, 4.0), ConstrainedProjection(), Budget(params=12))
    run.finish()
    assert kept(run)["0", "out"] == (2, 3)


def grouped_columns_belong_to_their_inputs() -> None:
    conv = nn.Conv2d(6, 4, 3, groups=2)
    found = columns(conv).detach()
    assert found.shape == (6, 18)
    assert torch.equal(found[4], conv.weight[2:, 1].flatten())
    set_columns(conv, torch.arange(6.0)[:, None].expand(6, 18))
    assert (conv.weight[0, 2] == 2).all() and (conv.weight[3, 2] == 5).all()


def projected_while_training() -> None:
    """With every=1 the first run never leaves the balls of its first weights."""
    with torch.random.fork_rng(devices=[]):
        runs = trained(ConstrainedProjection(radius=0.5, every=1), SGD, momentum=0.9)
    for run in runs[:4]:
        for name, radius in run.state["radii"].items():
            if name in runs[0].state["radii"] and not run.edits:
                weight = columns(run.model.get_submodule(name))
                assert float(weight.abs().sum()) <= radius * (1 + 1e-5)


def bad_numbers_are_refused() -> None:
    for options in ({"radius": 0.0}, {"radius": 1.5}, {"every": -1}):
        with pytest.raises(MethodError):
            run_of(read(1.0, 2.0), ConstrainedProjection(**options))  # type: ignore[arg-type]
    run = run_of(read(1.0, 2.0), ConstrainedProjection(), steps=4)
    run.model[2].weight.data[0] = float("nan")  # type: ignore[index, union-attr, operator]
    with pytest.raises(TrainingError, match="must stay finite"):
        run.finish()


CASES = (
    Case(
        "constrained_projection",
        toys=TOYS,
        refuses=REFUSES,
        variants=(
            "constrained_projection(every=1, rewind=False)",
            'constrained_projection(norm="l21", start=1.0)',
            'constrained_projection(norm="l1")',
        ),
        own=(
            weights_within_the_ball_stay_as_they_are,
            columns_share_the_radius_by_hand,
            a_euclidean_ball_scales_columns,
            zeros_stay_zeros,
            survivors_go_back_to_their_first_values,
            empty_columns_leave_and_nothing_changes,
            a_budget_sets_one_radius,
            grouped_columns_belong_to_their_inputs,
            projected_while_training,
            bad_numbers_are_refused,
        ),
    ),
)
