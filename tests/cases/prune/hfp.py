"""HFP: gains by hand and against the divergence, and what the table of a target decides."""

import copy

import pytest
import torch
from torch import Tensor, nn

from pliant.budget import Budget
from pliant.cost import Example, count
from pliant.data import Data
from pliant.edits import Prune
from pliant.errors import BudgetError, DataError
from pliant.families.prune.fisher import group_fisher
from pliant.families.prune.gain import ENUMERATED, fisher, gains, gated
from pliant.families.prune.times import estimated, saved_ms
from pliant.latency import Target
from pliant.methods.prune.hfp import HFP
from pliant.run import start
from pliant.surgery.graph import Group
from pliant.surgery.prove import cuttable, edits_of
from pliant.testing import Case, toys
from tests.cases.prune import REFUSES, TOYS, kept, pair, run_of
from tests.cases.witness import on_many


def softmax_layer(classes: int = 5) -> tuple[nn.Sequential, Tensor, list[Group]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, classes)).double()
    inputs = torch.randn(40, 6, dtype=torch.float64)
    return model, inputs, cuttable(model, (inputs[:1],))[0]


def divergence(model: nn.Module, group: Group, unit: int, gate: float, inputs: Tensor) -> float:
    with torch.no_grad():
        before = model(inputs).log_softmax(1)
        with gated(model, group, unit, gate):
            after = model(inputs).log_softmax(1)
    return float((before.exp() * (before - after)).sum(1).mean())


def fisher_is_the_divergence_to_second_order() -> None:
    """KL at a gate of 1 - d over d^2 F / 2 tends to 1; at d = 1 it is another criterion."""
    model, inputs, (group,) = softmax_layer()
    half = fisher(model, [group], [(inputs,)], torch.Generator())[group.name]
    exact = gains(model, [group], [(inputs,)], "exact", torch.Generator())[group.name]
    for unit, each in enumerate(half.tolist()):
        if each < 1e-6:
            continue
        near = divergence(model, group, unit, 0.99, inputs) / (0.01**2 * each)
        less = divergence(model, group, unit, 0.9, inputs) / (0.1**2 * each)
        assert abs(near - 1) < 0.02 and abs(less - 1) < 0.2
        assert float(exact[unit]) == pytest.approx(divergence(model, group, unit, 0.0, inputs))
    assert (half >= 0).all() and (exact >= -1e-12).all()


def fisher_by_hand() -> None:
    """One unit a tells class 0 by w: with p = 1/2 each, (dlog p / dm)^2 is (w a / 2)^2."""
    model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.Linear(2, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0], [1.0]]))
        model[1].weight.copy_(torch.tensor([[3.0, -3.0], [0.0, 0.0]]))
        model[1].bias.zero_()
    ones = torch.ones(4, 1)
    groups, _ = cuttable(model, (ones[:1],))
    found = fisher(model, groups, [(ones[:3],), (ones[3:],)], torch.Generator())
    assert torch.allclose(found["0"], torch.full((2,), 9 / 8).double())
    (centred,) = group_fisher(model, groups, [(ones,)], torch.Generator()).values()
    assert centred.abs().max() < 1e-9  # there, what is always the same counts for nothing


def a_dead_unit_gives_nothing() -> None:
    model, inputs, (group,) = softmax_layer()
    with torch.no_grad():
        model[2].weight[:, 3] = 0  # type: ignore[operator, index]
    for form in ("fisher", "exact", "entropy"):
        found = gains(model, [group], [(inputs,)], form, torch.Generator())[group.name]  # type: ignore[arg-type]
        assert found[3] == 0 and (found[:3] != 0).any()


def entropy_is_the_loss_of_certainty() -> None:
    model, inputs, (group,) = softmax_layer()
    found = gains(model, [group], [(inputs,)], "entropy", torch.Generator())[group.name]

    def entropy() -> float:
        log = model(inputs).detach().log_softmax(1)
        return -float((log.exp() * log).sum(1).mean())

    certain = entropy()
    with gated(model, group, 1, 0.0):
        assert float(found[1]) == pytest.approx(entropy() - certain)


def many_classes_are_drawn() -> None:
    """With one class more than are enumerated the mean over many draws is the same sum."""
    model, inputs, (group,) = softmax_layer(ENUMERATED + 1)
    drawn = fisher(model, [group], [(inputs,)] * 200, torch.Generator().manual_seed(0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pliant.families.prune.gain.ENUMERATED", ENUMERATED + 1)
        every = fisher(model, [group], [(inputs,)], torch.Generator())
    assert torch.allclose(drawn[group.name], every[group.name], rtol=0.1)


def units_that_meet_in_a_sum_are_one() -> None:
    """In the residual toy the gain of a unit is that of all its channels together."""
    toy = toys.TOYS["residual"]
    model, (images,) = toy.model().eval(), toy.inputs(6)
    groups, _ = cuttable(model, (images[:1],))
    found = gains(model, groups, [(images,)], "exact", torch.Generator())
    for group in groups:
        cut = copy.deepcopy(model)
        for edit in edits_of(cut, groups, {group.name: [0]}):
            edit.apply(cut)
        with torch.no_grad():
            before, after = (net(images).double().log_softmax(1) for net in (model, cut))
        lost = float((before.exp() * (before - after)).sum(1).mean())
        assert float(found[group.name][0]) == pytest.approx(lost, rel=1e-3, abs=1e-7)


# ---------------------------------------------------------------- milliseconds


def stairs(model: nn.Module, example: Example) -> float:
    """Seconds that rise in steps of 8 channels, most in the first layer."""
    total = 1e-4
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            slow = 20.0 if module.in_channels == 3 else 1.0
            total += 1e-4 * slow * (-(-module.in_channels // 8)) * (-(-module.out_channels // 8))
    return total


def convolutions() -> tuple[nn.Sequential, Data]:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(32, 4),
    )
    return model, Data((torch.randn(32, 3, 6, 6), torch.arange(32) % 4), classes=4)


def sums_over_layers_are_those_of_the_target() -> None:
    """Of a target whose layers add up: for widths it has never seen, and after a cut."""
    model, data = convolutions()
    run = start(model, HFP(ratio=0.0, samples=8), data=data, target=Target.of(stairs), steps=4)
    groups, _ = cuttable(model, run.example)
    for widths in ((5, 9, 20), (0, 16, 31), (24, 24, 24)):
        leaving = {g.name: range(w) for g, w in zip(groups, widths, strict=True)}
        edits = edits_of(model, groups, leaving)
        cut = copy.deepcopy(model)
        for edit in edits:
            edit.apply(cut)
        wanted = 1000 * stairs(cut, ())
        assert estimated(run, edits) == pytest.approx(wanted, rel=0.02)


def a_step_counts_for_each_of_its_units() -> None:
    """Fewer than eight units save nothing, eight of the first layer 20 + 4 tenths of a ms."""
    model, data = convolutions()
    run = start(model, HFP(ratio=0.0, samples=8), data=data, target=Target.of(stairs), steps=4)
    groups, _ = cuttable(model, run.example)
    found = saved_ms(run, groups)
    assert found["0"] == pytest.approx((20 + 4) * 0.1 / 8, rel=0.05)
    assert found["2"] == pytest.approx((4 + 4) * 0.1 / 8, rel=0.05)


def milliseconds_lead_elsewhere_than_macs() -> None:
    """The same gains, divided by what leaves: the slow layer shrinks more where it is measured."""
    widths = {}
    for axis, bound in (("latency", 7.0), ("macs", 0.6)):
        model, data = convolutions()
        method = HFP(per_cost=True, rounds=1, samples=32)
        target = Target.of(stairs) if axis == "latency" else None
        run = start(model, method, Budget(**{axis: bound}), data=data, target=target)
        widths[axis] = [len(kept(run).get((name, "out"), range(32))) for name in ("0", "2", "4")]
    assert widths["latency"] != widths["macs"] and widths["latency"][0] < widths["macs"][0]


# ---------------------------------------------------------------- budgets


def milliseconds_are_met_or_refused() -> None:
    """A budget that the whole network meets takes nothing, one below all widths is refused."""
    method, target = HFP(rounds=1, samples=16, least=0.25), Target.of(stairs)
    for bound, met in ((6.0, True), (1e3, True), (0.4, False)):
        model, data = convolutions()
        if not met:
            with pytest.raises(BudgetError, match="cannot be met"):
                start(model, method, Budget(latency=bound), data=data, target=target)
            continue
        run = start(model, method, Budget(latency=bound), data=data, target=target)
        assert 1000 * stairs(model, ()) <= bound and bool(run.edits) is (bound < 10)


def as_few_leave_as_the_budget_asks() -> None:
    """The filter that left last put back, the budget is missed; without any need none leaves."""
    model, data = convolutions()
    whole = copy.deepcopy(model)
    method = HFP(rounds=1, samples=32)
    run = start(model, method, Budget(macs=0.5), data=data)
    assert run.planner.now().macs <= run.limits()["macs"]
    groups, _ = cuttable(whole, run.example)
    scores = gains(whole, groups, run.inputs(32, batch=64), "fisher", torch.Generator())
    cuts = [edit for edit in run.edits if isinstance(edit, Prune) and edit.side == "out"]
    gone = {(edit.layer, channel) for edit in cuts for channel in edit.removed()}
    outs = [(g.name, u) for g in groups for u in range(32) if (g.name, u) in gone]
    last = max(outs, key=lambda unit: float(scores[unit[0]][unit[1]]))
    leaving = {g.name: [u for n, u in outs if n == g.name and (n, u) != last] for g in groups}
    for edit in edits_of(whole, groups, leaving):
        edit.apply(whole)
    assert count(whole, run.example)[0].macs > run.limits()["macs"]
    free = start(convolutions()[0], method, Budget(macs=1.0), data=data)
    assert not free.edits
    with pytest.raises(BudgetError, match="the least reachable is"):
        start(convolutions()[0], method, Budget(macs=0.001), data=data)


def gains_need_inputs() -> None:
    with pytest.raises(DataError, match="looks at training inputs"):
        run_of(pair(1.0, 2.0), HFP())


CASES = (
    Case(
        "hfp",
        spec="hfp(samples=16, rounds=2)",
        toys=TOYS,
        refuses=REFUSES,
        variants=(
            'hfp(gain="exact", samples=8, rounds=1)',
            'hfp(gain="entropy", samples=8, per_cost=True, rounds=1)',
        ),
        witnesses={
            "samples": on_many("hfp", "samples", Budget(macs=0.7)),
        },
        own=(
            fisher_is_the_divergence_to_second_order,
            fisher_by_hand,
            a_dead_unit_gives_nothing,
            entropy_is_the_loss_of_certainty,
            many_classes_are_drawn,
            units_that_meet_in_a_sum_are_one,
            sums_over_layers_are_those_of_the_target,
            a_step_counts_for_each_of_its_units,
            milliseconds_lead_elsewhere_than_macs,
            milliseconds_are_met_or_refused,
            as_few_leave_as_the_budget_asks,
            gains_need_inputs,
        ),
    ),
)
