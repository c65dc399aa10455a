"""Low-rank methods: what their papers compute, done by hand on kernels with known spectra."""

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from pliant.api import compress
from pliant.api.report import layer_rows
from pliant.budget import Budget
from pliant.edits import Factor
from pliant.errors import MethodError
from pliant.families.lowrank.steering import PACE
from pliant.families.lowrank.times import due
from pliant.latency import Target
from pliant.method import Method
from pliant.methods.lowrank.energy import Energy
from pliant.methods.lowrank.evbmf import EVBMF
from pliant.methods.lowrank.nrmf import NRMF, PAPER, PLANS
from pliant.methods.lowrank.trp import TRP
from pliant.run import Run, start
from pliant.testing import Case


def linear(*sigma: float) -> nn.Sequential:
    """A square Linear layer with these singular values, on its diagonal."""
    model = nn.Sequential(nn.Linear(len(sigma), len(sigma), bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.diag(torch.tensor(sigma)))
    return model


def conv(entries: dict[tuple[int, ...], float], channels: int = 4) -> nn.Sequential:
    """A 3x3 convolution that is zero but for a few entries (out, in, row, column)."""
    model = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False))
    with torch.no_grad():
        model[0].weight.zero_()
        for place, value in entries.items():
            model[0].weight[place] = value
    return model


def run_of(
    model: nn.Module,
    method: Method,
    budget: Budget | None = None,
    *,
    steps: int = 0,
    lr: float = 0.1,
) -> Run:
    weight = model[0].weight
    example = (torch.zeros(2, weight.shape[1], *(5,) * (weight.dim() - 2)),)
    optimizer = SGD(model.parameters(), lr)
    return start(model, method, budget, example=example, optimizer=optimizer, steps=steps)


def close(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found, expected, atol=1e-5)


# One input channel holds all; three output channels hold the shares 4/6, 1/6 and 1/6.
PLANTED = {(0, 0, 0, 0): 2.0, (1, 0, 0, 1): 1.0, (2, 0, 1, 0): 1.0}

# The same singular values 3, 2, 1, 0.5 in both unfoldings: their energies are 9, 4, 1, 0.25.
DIAGONAL = {(i, i, 1, 1): s for i, s in enumerate((3.0, 2.0, 1.0, 0.5))}


# ------------------------------------------------------------------ nrmf


def prox_step_of_a_matrix() -> None:
    """tau = alpha * lr * k is taken off every singular value, once in k steps."""
    model = linear(3.0, 2.0, 0.1)
    method = NRMF(alpha=0.5, shrinkage="soft", interval=2, keep_norm=False, search=1.0)
    run = run_of(model, method, steps=9, lr=0.25)
    run.after_step()
    assert close(model[0].weight.diag(), torch.tensor([3.0, 2.0, 0.1]))
    run.after_step()
    tau = 0.5 * 0.25 * 2
    assert close(model[0].weight, torch.diag(torch.tensor([3 - tau, 2 - tau, 0.0])))


def prox_step_of_a_kernel() -> None:
    """Both unfoldings are shrunk, one after the other: a diagonal kernel loses tau twice."""
    model = conv(DIAGONAL)
    method = NRMF(alpha=0.5, shrinkage="soft", interval=1, keep_norm=False, search=1.0)
    run_of(model, method, steps=9, lr=0.8).after_step()
    tau = 0.5 * 0.8
    expected = torch.tensor([3 - 2 * tau, 2 - 2 * tau, 1 - 2 * tau, 0.0])
    assert close(model[0].weight[:, :, 1, 1], torch.diag(expected))


def prox_step_keeps_the_norm() -> None:
    """After the step the kernel is scaled back: 4, 3 less 1 is 3, 2, times 5 over root 13."""
    model = linear(4.0, 3.0)
    method = NRMF(alpha=1.0, shrinkage="soft", interval=1, keep_norm=True, search=1.0)
    run_of(model, method, steps=9, lr=1.0).after_step()
    assert close(model[0].weight.diag(), torch.tensor([3.0, 2.0]) * 5 / 13**0.5)


def gradient_is_alpha_times_the_polar_factor() -> None:
    """U V^T of a positive diagonal is the identity; it comes on top of what is in .grad."""
    method = NRMF(alpha=0.5, shrinkage="gradient", keep_norm=False, search=1.0)
    model = linear(3.0, 2.0, 1.0)
    run = run_of(model, method, steps=9)
    model[0].weight.grad = torch.ones(3, 3)
    run.before_step()
    assert close(model[0].weight.grad, 1 + 0.5 * torch.eye(3))
    before = model[0].weight.clone()
    run.after_step()  # this form moves weights by their gradients only
    assert torch.equal(model[0].weight, before)
    kernel = conv(DIAGONAL)
    run = run_of(kernel, method, steps=9)
    kernel[0].weight.grad = torch.zeros_like(kernel[0].weight)
    run.before_step()
    assert close(kernel[0].weight.grad[:, :, 1, 1], 2 * 0.5 * torch.eye(4))
    assert close(kernel[0].weight.grad.abs().sum(), torch.tensor(4.0))


def ranks_by_energy(method: Method) -> None:
    """R3 and R4 are the smallest that hold p: at 0.7 one input and two output channels."""
    run = run_of(conv(PLANTED), method)
    run.finish()
    assert run.edits == [Factor("0", "tucker2", (1, 2))]


def a_plan_pulls_at_what_the_budget_drops() -> None:
    """Of diag(3, 2, 1) the budget leaves rank one: 3 stays as it is, 2 and 1 are pulled to zero."""
    method = NRMF(alpha=0.5, shrinkage="planned", keep_norm=False, search=1.0, refresh=2)
    model = linear(3.0, 2.0, 1.0)
    run = run_of(model, method, Budget(params=0.7), steps=8)
    weight = model[0].weight
    weight.grad = torch.ones(3, 3)
    run.before_step()
    assert close(weight.grad, 1 + 0.5 * torch.diag(torch.tensor([0.0, 2.0, 1.0])))
    with torch.no_grad():
        weight.copy_(torch.diag(torch.tensor([1.0, 2.0, 4.0])))
    for _ in range(4):
        run.after_step()  # a plan is made anew in the middle: now 4 is what stays
    assert close(run.state["goals"]["0"], torch.diag(torch.tensor([0.0, 0.0, 4.0])))


def r3_and_r4_by_one_energy() -> None:
    ranks_by_energy(NRMF(p=0.7, form="tucker2", samples=0))
    run = run_of(conv(DIAGONAL), NRMF(p=13 / 14.25 + 1e-6, form="tucker2", samples=0))
    run.finish()  # 9 + 4 of 14.25 is not enough: 3 of 4, which has 24 + 81 of 144 weights
    assert run.edits == [Factor("0", "tucker2", (3, 3))]


def search_ends_in_the_middle() -> None:
    """With search = 0.5 of 4 steps the layer is factorized after the second."""
    run = run_of(conv(PLANTED), NRMF(search=0.5, interval=9, samples=0, p=0.7), steps=4)
    edits = []
    for _ in range(4):
        run.after_step()
        edits.append(len(run.edits))
    assert edits == [0, 1, 1, 1]


def a_search_does_not_grow_with_the_training_for_ever() -> None:
    """A tenth of 40 steps, and 100 of 5,000: the strength is for so many."""
    for steps, searched in ((40, 4), (1_000, 100), (5_000, 100)):
        run = run_of(conv(PLANTED), method := NRMF(samples=0, p=0.7), steps=steps)
        method.prepare(run)
        for run.step in range(1, searched + 1):
            assert not run.state["factorized"], (steps, run.step)
            method.after_step(run)
        assert run.state["factorized"], steps


def a_layer_leaves_the_search_early() -> None:
    """Ranks 2 and 2 lose 1.25 of 14.25; shrunken by 0.8, 0.04 of 6.32."""
    for alpha, edits in ((0.0, []), (0.5, [Factor("0", "tucker2", (2, 2))])):
        method = NRMF(
            alpha=alpha,
            shrinkage="soft",
            interval=1,
            keep_norm=False,
            search=1.0,
            p=0.92,
            form="tucker2",
            early=True,
        )
        run = run_of(conv(DIAGONAL), method, Budget(params=0.7), steps=PLANS, lr=0.8)
        run.after_step()
        assert run.edits == edits and not run.state["factorized"]
        run.after_step()  # what has left is not shrunken again
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the search is not over
            run.finish(strict=False)


def an_early_search_plans_as_often_however_long_it_is() -> None:
    """Five times before its end, and only after a shrinkage."""
    for steps, interval in ((60, 1), (600, 7)):
        found = [step for step in range(1, steps) if due(step, interval, steps, PLANS)]
        assert len(found) == PLANS - 1 and not any(step % interval for step in found)


def controller_steers_to_the_budget() -> None:
    """alpha rises while ranks at energy p are above the line to the budget, else it falls."""
    full, low = torch.eye(8), torch.zeros(8, 8)
    low[0, 0] = 1.0
    for matrix, factor in ((full, PACE), (low, 1 / PACE)):
        for budget in (Budget(params=0.5), Budget(macs=0.5), Budget(bytes=0.5, params=0.9)):
            model = linear(*[1.0] * 8)
            with torch.no_grad():
                model[0].weight.copy_(matrix)
            method = NRMF(alpha=None, interval=1, search=1.0)
            run = run_of(model, method, budget, steps=100, lr=1e-6)
            before = run.state["alpha"]
            run.after_step()
            assert run.state["alpha"] == pytest.approx(before * factor)
            assert run.log[-1]["alpha"] == run.state["alpha"]


def what_cannot_be_steered_to_is_refused() -> None:
    target = Target.of(lambda module, _: 1e-6 * sum(p.numel() for p in module.parameters()))
    for budget in (None, Budget(latency=1.0)):
        with pytest.raises(MethodError, match="budget of params, macs or bytes, and there is none"):
            start(
                linear(3.0, 2.0),
                NRMF(alpha=None),
                budget,
                example=(torch.zeros(1, 2),),
                steps=9,
                target=target,
            )


def patterns_choose_the_layers() -> None:
    def net() -> nn.Sequential:
        return nn.Sequential(*linear(3.0, 2.0, 1.0), *linear(3.0, 0.1, 0.1), *linear(3.0, 0.1, 0.1))

    for method in (NRMF(exclude=("0",), p=0.7), NRMF(only=("[12]",), p=0.7)):
        run = run_of(net(), method)
        run.finish()
        assert [edit.layer for edit in run.edits] == ["1", "2"]
        assert run.reasons["0"] in ("excluded by name", "not selected")
    with pytest.raises(MethodError, match="'conv1' matches none"):
        run_of(net(), NRMF(exclude=("conv1",)))


# ------------------------------------------------------------------ the others


def planted_ranks_are_found() -> None:
    """Three directions far above the noise of a 30 x 40 matrix: rank 3."""
    noise = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30, bias=False))
    left, right = (torch.randn(n, 3, generator=noise) for n in (30, 40))
    with torch.no_grad():
        model[0].weight.copy_(left @ right.T + 0.1 * torch.randn(30, 40, generator=noise))
    run = run_of(model, EVBMF())
    assert run.edits == [Factor("0", "svd", (3,))]
    assert run.log[0]["evbmf"] == {"0": [3]}


def a_rank_of_one_that_the_energy_belies_is_said_in_the_row() -> None:
    """A layer of noise goes to rank 1 and is warned of; one with a single direction is not."""
    noise = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30, bias=False), nn.Linear(30, 20, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(30, 40, generator=noise))
        one, other = torch.randn(20, 1, generator=noise), torch.randn(1, 30, generator=noise)
        model[1].weight.copy_(one @ other + 0.1 * torch.randn(20, 30, generator=noise))
    run = run_of(model, EVBMF())
    assert [edit.ranks for edit in run.edits] == [(1,), (1,)]  # type: ignore[attr-defined]
    run.finish()
    first, second = layer_rows(run)
    assert "all but one direction for noise" in first.reason and "11%" in first.reason
    assert 'exclude "0"' in first.reason and not second.reason


def weakening_scales_all_ranks() -> None:
    """A budget above the estimate's cost raises the rank, one below lowers it."""
    noise = torch.Generator().manual_seed(0)
    found = []
    for budget in (Budget(params=0.9), Budget(params=0.1)):
        model = nn.Sequential(nn.Linear(40, 40, bias=False))
        left, right = (torch.randn(40, 4, generator=noise) for _ in range(2))
        with torch.no_grad():
            model[0].weight.copy_(left @ right.T + 0.1 * torch.randn(40, 40, generator=noise))
        run = run_of(model, EVBMF(), budget)
        run.finish()
        found.append(run.edits[0].ranks[0])  # type: ignore[attr-defined]
    assert found == [18, 2]  # 80 r weights: at most 1440 and 160 of 1600


def a_cut_keeps_energy_and_lowers_rank() -> None:
    """Of the energies 9, 4 and 1 the first two hold 13/14: at e = 0.9 the third is cut."""
    model = linear(3.0, 2.0, 1.0)
    run = run_of(model, TRP(energy=0.9, interval=2), steps=9)
    run.after_step()
    assert close(model[0].weight, torch.diag(torch.tensor([3.0, 2.0, 1.0])))
    run.after_step()
    assert close(model[0].weight, torch.diag(torch.tensor([3.0, 2.0, 0.0])))


def the_spatial_cut_is_of_the_spatial_matrix() -> None:
    """Rows of the cut matrix are (input channel, kernel row): energies 4, 1 and 1 at 3 of them."""
    entries = {(0, 0, 0, 0): 2.0, (0, 0, 1, 0): 1.0, (0, 1, 0, 0): 0.5}
    model = conv(entries)
    run_of(model, TRP(form="spatial", energy=0.5, interval=1), steps=9).after_step()
    # One column only is not zero, so the matrix has rank 1 and nothing is lost.
    assert close(model[0].weight[0, :2, :2, 0], torch.tensor([[2.0, 1.0], [0.5, 0.0]]))
    diagonal = {(0, 0, 0, 0): 2.0, (1, 0, 1, 0): 1.0, (2, 1, 0, 1): 0.5}
    model = conv(diagonal)
    run_of(model, TRP(form="spatial", energy=0.9, interval=1), steps=9).after_step()
    kept = model[0].weight
    assert close(kept[0, 0, 0, 0], torch.tensor(2.0)) and close(kept[1, 0, 1, 0], torch.tensor(1.0))
    assert close(kept[2, 1, 0, 1], torch.tensor(0.0))  # 5 of 5.25 is above 0.9


def the_penalty_is_a_gradient() -> None:
    model = linear(3.0, 2.0, 1.0)
    run = run_of(model, TRP(weight=0.25), steps=9)
    model[0].weight.grad = torch.ones(3, 3)
    run.before_step()
    assert close(model[0].weight.grad, 1 + 0.25 * torch.eye(3))


def the_split_is_channel_wise_or_spatial() -> None:
    """Three outputs are not zero, but two rows of the spatial matrix: (0, first), (0, second)."""
    for form, rank in (("output", 3), ("spatial", 2)):
        run = run_of(conv(PLANTED), TRP(form=form, p=0.99))
        run.finish()
        assert run.edits == [Factor("0", form, (rank,))]


def energy_reads_r3_and_r4() -> None:
    ranks_by_energy(Energy(p=0.7))
    with pytest.raises(ValueError, match=r"p must be float in 0\.\.1, not 95"):
        run_of(conv(PLANTED), Energy(p=95))


def wide_layers_have_the_very_ranks_of_p() -> None:
    """Also where a plan for a budget would skip some: both sides as the report names them."""
    noise = torch.randn(96, 128, 3, 3, generator=torch.Generator().manual_seed(0))
    steep = 0.95 ** (torch.arange(96.0)[:, None] + torch.arange(128.0))
    for p in (0.8, 0.9, 0.95):
        model = nn.Sequential(nn.Conv2d(128, 96, 3, bias=False))
        model[0].weight.data = noise * steep[:, :, None, None]
        run = run_of(model, NRMF(p=p, form="tucker2", samples=0))
        ranks = run.log[0]["ranks"]["0"]
        run.finish()
        assert run.edits == [Factor("0", "tucker2", tuple(ranks))]


def a_layer_that_is_never_called_stays() -> None:
    """With a budget and a training too, which is refused beforehand if it is out of reach."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.never = nn.Linear(8, 8), nn.Conv2d(8, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    result = compress(Odd(), None, "nrmf", "params=97%", example=torch.zeros(1, 8))
    assert [edit.layer for edit in result.edits] == ["used"]
    reasons = {row.layer: row.reason for row in result.report.layers}
    assert reasons["never"] == "never called in a forward pass"


def one_energy_for_all_layers() -> None:
    """A budget is met by one p: the layer with the flatter spectrum keeps the higher rank."""
    steep, flat = linear(*[0.4**i for i in range(12)]), linear(*[0.8**i for i in range(12)])
    run = run_of(nn.Sequential(*steep, *flat), Energy(), Budget(params=0.5))
    steep_rank, flat_rank = (edit.ranks[0] for edit in run.edits)  # type: ignore[attr-defined]
    assert steep_rank < flat_rank and 24 * (steep_rank + flat_rank) <= 144


CASES = [
    Case(
        "nrmf",
        spec="nrmf(interval=1, search=0.5, alpha=0.3)",
        variants=(
            PAPER,
            'nrmf(shrinkage="relative", interval=1, search=1.0, alpha=1.0)',
            'nrmf(shrinkage="gradient", interval=1, search=0.5)',
            'nrmf(shrinkage="hoyer", space="whitened", samples=16, search=0.5)',
            'nrmf(space="whitened", samples=16, interval=1, search=1.0, refresh=2)',
            'nrmf(shrinkage="planned", search=0.5, refresh=2)',
            'nrmf(shrinkage="planned", space="whitened", samples=16, search=0.5)',
            'nrmf(alpha=None, interval=1, form="spatial")',
            'nrmf(search=0.0, form="input", samples=8)',
            'nrmf(form="output", samples=0)',
            "nrmf(early=True, interval=1, search=1.0, p=0.5, alpha=2.0)",
        ),
        own=(
            prox_step_of_a_matrix,
            prox_step_of_a_kernel,
            prox_step_keeps_the_norm,
            gradient_is_alpha_times_the_polar_factor,
            a_plan_pulls_at_what_the_budget_drops,
            r3_and_r4_by_one_energy,
            search_ends_in_the_middle,
            a_search_does_not_grow_with_the_training_for_ever,
            a_layer_leaves_the_search_early,
            an_early_search_plans_as_often_however_long_it_is,
            controller_steers_to_the_budget,
            what_cannot_be_steered_to_is_refused,
            patterns_choose_the_layers,
        ),
    ),
    Case(
        "evbmf",
        own=(
            planted_ranks_are_found,
            a_rank_of_one_that_the_energy_belies_is_said_in_the_row,
            weakening_scales_all_ranks,
        ),
    ),
    Case(
        "trp",
        spec="trp(interval=2)",
        variants=('trp(form="spatial", interval=1, search=1.0)',),
        own=(
            a_cut_keeps_energy_and_lowers_rank,
            the_spatial_cut_is_of_the_spatial_matrix,
            the_penalty_is_a_gradient,
            the_split_is_channel_wise_or_spatial,
        ),
    ),
    Case(
        "energy",
        variants=("energy(samples=16)", 'energy(form="auto", p=0.5)'),
        own=(
            energy_reads_r3_and_r4,
            wide_layers_have_the_very_ranks_of_p,
            a_layer_that_is_never_called_stays,
            one_energy_for_all_layers,
        ),
    ),
]
