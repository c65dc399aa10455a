"""KD structure: costs by channels, their gradients, and blocks that stay as wide as they are."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.flop_counter import FlopCounterMode

from pliant.budget import Budget
from pliant.cost import layer_costs
from pliant.edits import replay
from pliant.errors import MethodError
from pliant.families.distill import resource
from pliant.families.distill.resource import Resource
from pliant.math.divergence import divergence
from pliant.methods.distill.kd_structure import KDStructure
from pliant.run import Run, start
from pliant.surgery.prove import cuttable, edits_of
from pliant.testing import Case
from pliant.testing.toys import TOYS
from pliant.zoo.resnet_cifar import CifarResNet
from tests.cases.prune import REFUSES

TOY = TOYS["residual"]


def priced(model: nn.Module, example: Any, by: resource.Axis = "macs") -> Resource:
    groups, _ = cuttable(model, example)
    found = resource.terms(model, layer_costs(model, example), groups, by, lambda *_: "all")
    return Resource(groups, found, 1e-3)


class Inverted(nn.Module):
    """Two inverted bottlenecks, the second with a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8))
        self.one, self.two = _bottleneck(8, 24, 12), _bottleneck(12, 36, 12)
        self.head = nn.Linear(12, 5)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.one(F.relu6(self.stem(images)))
        return self.head((hidden + self.two(hidden)).mean((2, 3)))


def _bottleneck(ins: int, wide: int, outs: int) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(ins, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()),
        *(nn.Conv2d(wide, wide, 3, 1, 1, groups=wide, bias=False), nn.BatchNorm2d(wide)),
        *(nn.ReLU6(), nn.Conv2d(wide, outs, 1, bias=False), nn.BatchNorm2d(outs)),
    )


def kill(model: nn.Module, resource_: Resource, seed: int = 0) -> dict[str, list[int]]:
    """Let about a third of the units die, all scales and shifts of theirs being 0."""
    g = torch.Generator().manual_seed(seed)
    dead = {}
    for group in resource_.groups:
        count = len(group.units)
        dead[group.name] = torch.randperm(count, generator=g)[: count // 3].tolist()
        for slot in group.slots:
            module: Any = model.get_submodule(slot[0])
            if isinstance(module, nn.BatchNorm2d):
                rows = group.rows(slot)[dead[group.name]].flatten()
                module.weight.data[rows] = 0
                module.bias.data[rows] = 0
        for slot in group.makers:
            module = model.get_submodule(slot[0])
            for tensor in (module.weight, module.bias):
                if tensor is not None:
                    tensor.data[group.rows(slot)[dead[group.name]].flatten()] = 0
    return dead


def networks() -> list[tuple[nn.Module, Tensor]]:
    torch.manual_seed(0)
    return [
        (CifarResNet(8), torch.randn(2, 3, 16, 16)),
        (Inverted(), torch.randn(2, 3, 8, 8)),
        (TOYS["grouped"].model(), torch.randn(2, 3, 6, 6)),
    ]


def the_cost_is_that_of_the_network_without_what_died() -> None:
    """To the last number, counted by torch; and no output changes, shortcuts included."""
    for model, images in networks():
        model.eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias)
                nn.init.normal_(module.running_mean, 0, 0.3)  # type: ignore[arg-type]
        macs, params = priced(model, (images,)), priced(model, (images,), "params")
        dead = kill(model, macs)
        gates = resource.strengths(model, macs.groups)
        before = model(images)
        found = macs.cost(gates), params.cost(gates)
        replay(model, edits_of(model, macs.groups, dead))
        assert torch.allclose(model(images), before, atol=1e-5)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(images[:1])
        kernels = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        assert 2 * found[0] == counter.get_total_flops()
        assert found[1] == sum(kernel.numel() for kernel in kernels)
        assert found[0] < sum(macs.whole.values())


def the_gradient_of_the_price() -> None:
    """sign(gamma) c (inputs that live) from the layer that makes a channel, and as much from
    the one that reads it; finite differences say the same."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 2), nn.Flatten(1)
    ).double()
    scale = model.get_parameter("1.weight")
    with torch.no_grad():
        scale.copy_(torch.tensor([0.5, -2.0, 1e-4, 1.0]))
    costs = priced(model, (torch.zeros(1, 3, 5, 5, dtype=torch.double),))
    total = sum(costs.whole.values())
    assert total == 9 * 9 * 3 * 4 + 4 * 4 * 4 * 5

    def price() -> Tensor:
        return costs.surrogate(resource.strengths(model, costs.groups), lambda _: 0.5)

    price().backward()
    each = 0.5 / total * (81 * 3 + 16 * 5)  # of three alive outputs none counts here
    assert scale.grad is not None
    assert torch.allclose(scale.grad, each * torch.tensor([1.0, -1, 1, 1], dtype=torch.double))
    for place in range(4):
        values = []
        for move in (1e-5, -1e-5):
            with torch.no_grad():
                scale[place] += move
                values.append(float(price()))
                scale[place] -= move
        assert abs((values[0] - values[1]) / 2e-5 - float(scale.grad[place])) < 1e-6
    gates = resource.strengths(model, costs.groups)
    assert costs.cost(gates) == 81 * 3 * 3 + 16 * 3 * 5  # three of four live


def tied_channels_live_as_long_as_one_of_them_does() -> None:
    """Those that meet in a sum share the largest scale; filters count where no norm stands."""
    model = TOY.model()
    (group,) = (g for g in cuttable(model, TOY.inputs(1))[0] if g.name == "branch.3")
    gate = resource.strengths(model, [group])["branch.3"]
    assert len(gate) == 12 and torch.equal(gate, model.get_parameter("branch.4.weight").abs())
    whole = CifarResNet(8)
    norms = [whole.get_parameter(f"{n}.weight").detach() for n in ("bn1", "layer1.0.bn2")]
    found = cuttable(whole, (torch.zeros(1, 3, 16, 16),))[0]
    for module in whole.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.zeros_(module.weight)
    norms[0][0], norms[1][1] = 0.25, -0.75
    (first,) = (g for g in found if g.name == "conv1")
    gate = resource.strengths(whole, [first])["conv1"]
    assert gate[:3].tolist() == [0.25, 0.75, 0.0]
    bare = TOYS["bare"].model()
    (first,) = (g for g in cuttable(bare, TOYS["bare"].inputs(1))[0] if g.name == "0")
    gate = resource.strengths(bare, [first])["0"]
    weight = bare.get_parameter("0.weight")
    assert torch.allclose(gate, weight.flatten(1).square().mean(1).sqrt())


# ------------------------------------------------------------------ runs


def trained(
    method: KDStructure,
    budget: Budget | None = None,
    steps: int = 20,
    lr: float = 0.1,
    seed: int = 0,
    *,
    spread: bool = False,
) -> Run:
    model = TOYS["plain"].model(seed).train()
    draws = torch.Generator().manual_seed(seed)
    for norm in model.modules():
        if spread and isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.6, 1.4, generator=draws)
    optimizer = SGD(model.parameters(), lr, momentum=0.9, weight_decay=0.1)
    data = TOYS["plain"].data()
    run = start(model, method, budget, data=data, optimizer=optimizer, steps=steps)
    inputs, labels = TOYS["plain"].inputs(16)[0], torch.arange(16) % 4
    for _ in range(steps):
        optimizer.zero_grad()
        output = model(inputs)
        loss = run.loss(F.cross_entropy(output, labels), output, (inputs, labels))
        loss.backward()
        run.before_step()
        optimizer.step()
        run.after_step()
        run.after_epoch()
    run.finish()
    return run


def widths(run: Run) -> dict[str, int]:
    return {n: m.out_channels for n, m in run.model.named_modules() if isinstance(m, nn.Conv2d)}


def a_block_without_price_keeps_its_width() -> None:
    run = trained(
        KDStructure(blocks=("0", "3"), strengths=(0.0, 5.0), strength=5.0), Budget(macs=0.6)
    )
    found = widths(run)
    assert found["0"] == 8 and found["3"] < 12
    assert "strength of 0" in run.reasons["0"]
    with pytest.raises(MethodError, match="strength 0"):
        start(
            TOYS["plain"].model(),
            KDStructure(blocks=("*",), strengths=(0.0,)),
            example=TOY.inputs(1),
        )


def a_higher_price_leaves_less() -> None:
    """Of one block, without a budget; the threshold is what lives."""
    found = []
    for strength in (0.0, 1.0, 20.0):
        method = KDStructure(
            blocks=("3",), strengths=(strength or 1e-9,), strength=1e-9, start=1.0, threshold=0.3
        )
        found.append(widths(trained(method, steps=30))["3"])
    assert found[0] == 12 and found[0] >= found[1] >= found[2] and found[2] < 12


def twice_the_price_never_makes_a_block_dearer() -> None:
    """In three networks, whose scales are spread at first: it is as wide as before or less."""
    left = []
    for factor in (1.0, 2.0):
        method = KDStructure(
            blocks=("0", "3"), strengths=(0.2 * factor, 0.2), start=1.0, threshold=0.5
        )
        runs = [trained(method, steps=24, lr=0.05, seed=seed, spread=True) for seed in range(3)]
        left.append([widths(run)["0"] for run in runs])
    assert all(twice <= once for once, twice in zip(*left, strict=True)), left
    assert sum(left[1]) < sum(left[0]), left


def the_price_rises_while_the_budget_is_missed() -> None:
    run = trained(KDStructure(start=0.5, growth=2.0), Budget(macs=0.5), steps=8)
    rows = [row["factor"] for row in run.log if "factor" in row]
    assert rows == [1.0, 2.0, 4.0]  # the fourth step cuts
    rows = [
        row["factor"] for row in trained(KDStructure(start=0.5), steps=8).log if "factor" in row
    ]
    assert set(rows) == {1.0}


def the_factor_multiplies_the_price() -> None:
    run = start(TOYS["plain"].model(), KDStructure(), data=TOYS["plain"].data(), steps=9)
    before: Any = run.method.penalty(run)  # type: ignore[attr-defined]
    run.state["factor"] = 3.0
    assert before > 0
    assert torch.isclose(run.method.penalty(run), 3 * before)  # type: ignore[attr-defined]


def scales_do_not_decay() -> None:
    """The price alone pulls them: without it and without loss they stay, while kernels decay."""
    model = TOYS["plain"].model().train()
    optimizer = SGD(model.parameters(), 0.1, weight_decay=0.1)
    run = start(
        model, KDStructure(strength=0.0), data=TOYS["plain"].data(), optimizer=optimizer, steps=9
    )
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    (0.0 * model(TOYS["plain"].inputs(4)[0]).sum()).backward()
    run.before_step()
    optimizer.step()
    after = dict(model.named_parameters())
    assert torch.equal(after["1.weight"], before["1.weight"])
    assert not torch.equal(after["0.weight"], before["0.weight"])


def the_whole_network_teaches_before_and_after() -> None:
    dense = TOYS["plain"].model().eval()
    model = TOYS["plain"].model()
    run = start(
        model,
        KDStructure(start=0.0, weight=0.25),
        Budget(macs=0.5),
        data=TOYS["plain"].data(),
        steps=9,
    )
    assert run.edits  # it is narrower already
    inputs, labels = TOYS["plain"].inputs(8)[0], torch.arange(8) % 4
    output = model.eval()(inputs)
    loss = run.loss(torch.tensor(2.0), output, (inputs, labels))
    assert torch.isclose(loss, 0.75 * 2 + 0.25 * divergence(output, dense(inputs), 4.0))
    assert run.method.penalty(run) is None  # type: ignore[attr-defined]


def strengths_belong_to_blocks() -> None:
    with pytest.raises(MethodError, match="one strength"):
        start(TOY.model(), KDStructure(blocks=("stem",)), example=TOY.inputs(1))


OWN: tuple[Callable[[], None], ...] = (
    the_cost_is_that_of_the_network_without_what_died,
    the_gradient_of_the_price,
    tied_channels_live_as_long_as_one_of_them_does,
    a_block_without_price_keeps_its_width,
    a_higher_price_leaves_less,
    twice_the_price_never_makes_a_block_dearer,
    the_price_rises_while_the_budget_is_missed,
    the_factor_multiplies_the_price,
    scales_do_not_decay,
    the_whole_network_teaches_before_and_after,
    strengths_belong_to_blocks,
)

CASES = [
    Case(
        "kd_structure",
        variants=(
            'kd_structure(by="params", start=0.5, strength=2.0)',
            "kd_structure(start=1.0)",
            'kd_structure(blocks=("3",), strengths=(50.0,))',
        ),
        refuses=REFUSES,
        witnesses={"growth": the_price_rises_while_the_budget_is_missed},
        own=OWN,
    ),
]
