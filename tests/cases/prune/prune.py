"""Pruning methods: what leaves, worked out by hand; the limits of soft pruning, bit for bit."""

import copy
import math
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from pliant.budget import Budget
from pliant.data import Data
from pliant.edits import Prune
from pliant.errors import BudgetError, DataError, MethodError, TrainingError
from pliant.families.prune.channels import Place
from pliant.families.prune.fisher import group_fisher
from pliant.method import Method
from pliant.methods.prune.asrfp import ASRFP, alpha_at, ramp_at
from pliant.methods.prune.group_fisher import GroupFisher, prices
from pliant.methods.prune.magnitude import Magnitude
from pliant.methods.prune.random import Random
from pliant.run import Run, start
from pliant.surgery.batchnorm import recalibrate
from pliant.surgery.prove import cuttable, silence
from pliant.testing import Case, toys

NONE = "no channels that can be removed"
REFUSES = {"shared": NONE, "single": NONE}


def pair(*norms: float) -> nn.Sequential:
    """Filters of these norms, then a layer that reads them."""
    model = nn.Sequential(nn.Linear(2, len(norms), bias=False), nn.ReLU(), nn.Linear(len(norms), 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor(norms)[:, None] * torch.tensor([0.6, 0.8]))
    return model


def run_of(model: nn.Module, method: Method, budget: Budget | None = None) -> Run:
    return start(model, method, budget, example=(torch.zeros(2, 2),))


def kept(run: Run) -> dict[tuple[str, str], tuple[int, ...]]:
    return {(e.layer, e.side): e.keep for e in run.edits if isinstance(e, Prune)}


# ------------------------------------------------------------------ magnitude and random


def weakest_filters_leave_with_their_readers() -> None:
    run = run_of(pair(3.0, 1.0, 2.0, 0.5), Magnitude(share=0.5))
    assert kept(run) == {("0", "out"): (0, 2), ("2", "in"): (0, 2)}
    assert run.model[0].weight.shape == (2, 2)  # type: ignore[index, union-attr]


def norms_differ() -> None:
    """(1, 1) has the larger l1 norm, (1.5, 0) the larger l2 norm."""
    for norm, stays in (("l1", 0), ("l2", 1)):
        model = pair(1.0, 1.0)
        with torch.no_grad():
            model[0].weight.copy_(torch.tensor([[1.0, 1.0], [1.5, 0.0]]))
        run = run_of(model, Magnitude(share=0.5, norm=norm))  # type: ignore[arg-type]
        assert kept(run)["0", "out"] == (stays,)


def stacked() -> nn.Sequential:
    """Two layers of filters: 1, 1, 1, 9 (mean 3) and 4, 5, 5, 6 (mean 5)."""
    first, second = pair(1.0, 1.0, 1.0, 9.0), pair(4.0, 5.0, 5.0, 6.0)
    return nn.Sequential(*first, nn.ReLU(), *second)


def global_ranking_is_in_units_of_the_layer_mean() -> None:
    run = run_of(stacked(), Magnitude(share=0.3, least=0.0))  # 2 -> 2 is a group as well
    assert kept(run)["0", "out"] == (3,)
    local = run_of(stacked(), Magnitude(share=0.3, least=0.0, scope="local"))
    assert kept(local)["0", "out"] == (1, 2, 3) and kept(local)["4", "out"] == (1, 2, 3)


def floors_hold() -> None:
    run = run_of(stacked(), Magnitude(share=0.9, least=0.5, scope="local"))
    assert [len(keep) for (_, side), keep in kept(run).items() if side == "out"] == [2, 1, 2]


def a_budget_is_met_with_as_few_channels_as_it_takes() -> None:
    """Weights 4 n + 2 of n filters: half of 34 allows three of eight."""
    run = run_of(pair(8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0), Magnitude(), Budget(params=0.5))
    assert kept(run)["0", "out"] == (0, 1, 2)
    with pytest.raises(BudgetError, match="params=3 .the least reachable is 6."):
        run_of(pair(1.0, 2.0), Magnitude(least=0.0), Budget(params=3))


def lots_are_of_the_seed() -> None:
    found = []
    for seed in (0, 0, 1):
        model = pair(*[1.0] * 32)
        run = start(model, Random(), example=(torch.zeros(2, 2),), seed=seed)
        found.append(kept(run)["0", "out"])
    assert found[0] == found[1] != found[2] and len(found[0]) == 16


# ------------------------------------------------------------------ group fisher


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
    run = start(model, GroupFisher(share=0.34, samples=8), data=data)
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
    run = start(nn.Sequential(*layers), GroupFisher(share=0.0), data=data)
    groups, _ = cuttable(run.model, run.example)
    assert prices(run, groups, [], ("macs",)) == {"0": 12 / 40, "1": 4 / 40}
    assert prices(run, groups, [], ()) == {"0": 1.0, "1": 1.0}
    line = [Place(0.1, "1", unit) for unit in range(4)]  # half of the second layer has left
    assert prices(run, groups, line, ("macs",)) == {"0": 8 / 40, "1": 4 / 40}


def what_has_left_is_seen_by_the_next_look() -> None:
    """Each look is at a copy in which nothing reads the units that have left."""
    unread = []

    def look(model: nn.Sequential, *others: Any) -> dict[str, Tensor]:
        unread.append(int((model[1].weight == 0).all(0).sum()))
        return group_fisher(model, *others)

    inputs = torch.tensor([[1.0], [-1.0]]).repeat(16, 1)
    data = Data((inputs, torch.arange(32) % 2), classes=2)
    model = mirrored((1.0, 1.0, 1.0, 1.0), (6.0, -1.0, -2.0, -3.0))
    with patch("pliant.methods.prune.group_fisher.group_fisher", look):
        run = start(model, GroupFisher(share=0.75, samples=32, looks=3), data=data)
    assert unread == [0, 1, 2] and kept(run)["0", "out"] == (0,)


def units_worth_nothing_leave_up_to_the_floor() -> None:
    """Where all scores are 0, those that have left count first."""
    data = Data((torch.tensor([[1.0], [-1.0]]).repeat(8, 1), torch.arange(16) % 2), classes=2)
    method = GroupFisher(share=1 - 1e-9, least=0.25, samples=16)
    run = start(mirrored((1.0,) * 8, (0.0,) * 8), method, data=data)
    assert len(kept(run)["0", "out"]) == 2


def fisher_needs_inputs_and_sound_options() -> None:
    with pytest.raises(DataError, match="give data, or take magnitude"):
        run_of(pair(1.0, 2.0), GroupFisher())
    for options in ({"samples": 0}, {"looks": 0}, {"looks": 1000}):
        with pytest.raises(MethodError, match="(samples|looks) must be int"):
            run_of(pair(1.0, 2.0), GroupFisher(**options))


# ------------------------------------------------------------------ asrfp

EPOCHS, BATCHES = 3, 2


def images() -> tuple[nn.Sequential, list[tuple[Tensor, Tensor]]]:
    toy = toys.TOYS["plain"]
    return toy.model(), list(toy.data().batches("train", 16))


def train(method: Method) -> Run:
    """Three epochs of two steps with momentum, through a run."""
    model, batches = images()
    optimizer = SGD(model.parameters(), 0.05, momentum=0.9)
    example = (batches[0][0][:1],)
    run = start(model, method, example=example, optimizer=optimizer, steps=EPOCHS * BATCHES)
    for _ in range(EPOCHS):
        for step, (inputs, labels) in enumerate(batches):
            learn(model, optimizer, inputs, labels, step)
            run.after_step()
        run.after_epoch()
    return run


def learn(model: nn.Module, optimizer: SGD, inputs: Tensor, labels: Tensor, step: int) -> None:
    torch.manual_seed(step)  # of dropout
    model.train()
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(inputs), labels).backward()
    optimizer.step()


def same(one: nn.Module, other: nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return all(torch.equal(mine[name], theirs[name]) for name in mine)


def alpha_0_is_soft_filter_pruning() -> None:
    """Check 1: bit for bit what a loop does that knows nothing of it."""
    with torch.random.fork_rng(devices=[]):
        found = train(ASRFP(rate=0.5, alpha=0.0, ramp=0.0, least=0.0)).model
        model, batches = images()
        optimizer = SGD(model.parameters(), 0.05, momentum=0.9)
        convs = [layer for layer in model if isinstance(layer, nn.Conv2d)]
        for epoch in range(EPOCHS + 1):
            for conv in convs:
                norms = conv.weight.detach().double().flatten(1).norm(dim=1)
                weak = norms.argsort(stable=True)[: len(norms) // 2]
                conv.weight.detach()[weak] *= 0.0
            for step, (inputs, labels) in enumerate(batches if epoch < EPOCHS else ()):
                learn(model, optimizer, inputs, labels, step)
    assert same(found, model)


def alpha_1_is_plain_training() -> None:
    with torch.random.fork_rng(devices=[]):
        soft = train(ASRFP(decay="constant", zero_from=2.0)).model
        plain = train(Method()).model
    assert same(soft, plain)


def a_masking_is_a_step_of_weight_decay() -> None:
    """Check 2: of size lr on (lambda / 2) W^2 with lambda = (1 - alpha) / lr, on weak filters."""
    alpha, rate = 0.3, 0.05
    model, _ = images()
    dense = copy.deepcopy(model)
    method = ASRFP(rate=0.5, alpha=alpha, ramp=0.0, decay="constant", least=0.0)
    start(model, method, example=toys.TOYS["plain"].inputs(1), steps=1)  # masks before epoch 0
    for found, before in zip(model, dense, strict=True):
        if not isinstance(before, nn.Conv2d):
            continue
        norms = before.weight.detach().flatten(1).norm(dim=1)
        weak = (norms.argsort(stable=True).argsort() < len(norms) // 2).float()
        gradient = (1 - alpha) / rate * before.weight * weak.view(-1, 1, 1, 1)
        assert torch.allclose(found.weight, before.weight - rate * gradient, atol=1e-7)


def surgery_is_the_masked_network() -> None:
    """Check 3: floor(N P) filters are zero and leave; with silent norms nothing else changes."""
    share = 0.4
    with torch.random.fork_rng(devices=[]):
        run = train(ASRFP(rate=share, least=0.0))
    masked, inputs = copy.deepcopy(run.model).eval(), toys.TOYS["plain"].inputs(4)
    run.finish()
    outs = {e.layer: e for e in run.edits if isinstance(e, Prune) and e.side == "out"}
    convs = [name for name, layer in masked.named_modules() if isinstance(layer, nn.Conv2d)]
    assert set(outs) == set(convs)
    for name, edit in outs.items():
        assert edit.of - len(edit.keep) == math.floor(edit.of * share)
        masked.get_submodule(name).weight.detach()[list(edit.removed())] = 0  # type: ignore[union-attr, operator]
    small = run.model.eval()
    with torch.no_grad():
        assert not torch.allclose(small(*inputs), masked(*inputs), atol=1e-5)  # beta is still there
        silence(masked, [e for e in run.edits if isinstance(e, Prune)])
        assert torch.allclose(small(*inputs), masked(*inputs), atol=1e-5)


def batch_norm_hides_a_fading() -> None:
    """Check 5: in training it is invisible, in evaluation not, until norms are mended."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3))
    x = torch.randn(64, 3, 8, 8)
    recalibrate(model, [(x,)])
    faded = copy.deepcopy(model)
    with torch.no_grad():
        faded[0].weight[:4] *= 0.5

        def difference(*, training: bool) -> float:
            one, other = (copy.deepcopy(net).train(training)(x) for net in (model, faded))
            return float((one - other).norm() / one.norm())

        assert difference(training=True) < 1e-3
        assert difference(training=False) > 0.05
        recalibrate(faded, [(x,)])
        assert difference(training=False) < 1e-3


def schedules_are_those_of_the_card() -> None:
    for sigma, values in (
        (1e-5, {10: 0.562, 50: 0.0562, 100: 0.0032}),
        (1e-7, {10: 0.447, 50: 0.0178, 100: 0.0003}),
    ):
        for epoch, value in values.items():
            found = alpha_at(epoch, 200, 1.0, sigma, "exponential", 0.9)
            assert found == pytest.approx(value, rel=0.1)
    assert alpha_at(179, 200, 1.0, 1e-3, "exponential", 0.9) > 0
    assert alpha_at(180, 200, 1.0, 1e-3, "exponential", 0.9) == 0
    assert alpha_at(50, 201, 0.8, 1e-5, "linear", 0.9) == pytest.approx(0.6)
    assert ramp_at(25, 200, 0.125) == pytest.approx(0.75)
    assert ramp_at(50, 200, 0.125) == pytest.approx(0.9375)
    assert ramp_at(0, 200, 0.125) == 0 and ramp_at(190, 200, 0.125) == ramp_at(0, 200, 0.0) == 1


def fading_counts_epochs_or_parts_of_the_training() -> None:
    def factors(**options: float) -> list[float]:
        with torch.random.fork_rng(devices=[]):
            run = train(ASRFP(decay="linear", zero_from=2.0, **options))  # type: ignore[arg-type]
        return [round(row["alpha"], 4) for row in run.log if "alpha" in row]

    assert factors() == [1.0, 1.0, 0.5, 0.0]  # before the first epoch, and after each
    assert factors(epochs=6) == [1.0, 1.0, 0.8, 0.6, 0.4, 0.2, 0.0]
    assert factors(interval=2) == [1.0, 1.0, 0.0]


def single_weights_fade_too() -> None:
    with torch.random.fork_rng(devices=[]):
        run = train(ASRFP(unit="weight", rate=0.25))
    run.finish()
    weight = run.model.get_submodule("3").weight
    assert int((weight == 0).sum()) == weight.numel() // 4 and not run.edits  # type: ignore[operator, union-attr]
    with pytest.raises(MethodError, match="single weights"):
        run_of(pair(1.0, 2.0), ASRFP(unit="weight"), Budget(params=0.5))


def every_convolution_fades_if_asked() -> None:
    """Those that end in a sum become zero and stay."""
    model, inputs = toys.TOYS["residual"].model(), toys.TOYS["residual"].inputs(1)
    run = start(model, ASRFP(rate=0.5, every=True), example=inputs)
    run.finish()
    shortcut = run.model.get_submodule("shortcut").weight
    assert int((shortcut.flatten(1).norm(dim=1) == 0).sum()) == 6  # type: ignore[operator, union-attr]
    assert shortcut.shape[0] == 12  # type: ignore[union-attr]
    assert {layer for layer, side in kept(run) if side == "out"} == {"stem", "branch.0"}


def bad_options_and_norms_are_refused() -> None:
    for options in ({"rate": 1.0}, {"alpha": 1.5}, {"sigma": 0.0}, {"interval": 0}):
        with pytest.raises(MethodError):
            run_of(pair(1.0, 2.0), ASRFP(**options))  # type: ignore[arg-type]
    run = run_of(pair(1.0, 2.0), ASRFP())
    run.model[0].weight.data[0] = math.nan
    with pytest.raises(TrainingError, match="must stay finite"):
        run.finish()


def a_budget_sets_the_rate() -> None:
    data = Data((torch.randn(8, 2), torch.arange(8) % 2), classes=2)
    run = start(pair(*map(float, range(1, 9))), ASRFP(), Budget(params=0.5), data=data)
    run.finish()
    assert kept(run)["0", "out"] == (5, 6, 7)


CASES = [
    Case(
        "magnitude",
        refuses=REFUSES,
        variants=('magnitude(norm="l1", scope="local")', "magnitude(rounds=3)"),
        own=(
            weakest_filters_leave_with_their_readers,
            norms_differ,
            global_ranking_is_in_units_of_the_layer_mean,
            floors_hold,
            a_budget_is_met_with_as_few_channels_as_it_takes,
        ),
    ),
    Case(
        "random",
        refuses=REFUSES,
        variants=('random(scope="global", rounds=2)',),
        own=(lots_are_of_the_seed,),
    ),
    Case(
        "group_fisher",
        refuses=REFUSES,
        variants=("group_fisher(looks=1, samples=8)", "group_fisher(rounds=2)"),
        own=(
            fisher_is_half_the_mean_square_of_a_masks_gradient,
            readers_of_one_unit_are_summed_before_the_square,
            damage_is_divided_by_what_leaves,
            what_has_left_is_seen_by_the_next_look,
            units_worth_nothing_leave_up_to_the_floor,
            fisher_needs_inputs_and_sound_options,
        ),
    ),
    Case(
        "asrfp",
        refuses=REFUSES,
        variants=(
            "asrfp(alpha=0.0, ramp=0.0)",
            "asrfp(epochs=4, search=0.5)",
            "asrfp(every=True, norms=True)",
        ),
        own=(
            alpha_0_is_soft_filter_pruning,
            alpha_1_is_plain_training,
            a_masking_is_a_step_of_weight_decay,
            surgery_is_the_masked_network,
            batch_norm_hides_a_fading,
            schedules_are_those_of_the_card,
            fading_counts_epochs_or_parts_of_the_training,
            single_weights_fade_too,
            every_convolution_fades_if_asked,
            bad_options_and_norms_are_refused,
            a_budget_sets_the_rate,
        ),
    ),
]
