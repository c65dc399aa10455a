"""Fixed operations in networks of cells: they begin as nothing, cost what is said, stay fixed."""

from typing import Any

import pytest
import torch

from pliant.edits import Remove
from pliant.errors import BudgetError
from pliant.families.search import bilevel as search
from pliant.families.search.fixed import MENU, places, select
from pliant.methods.search.edarts import EDARTS
from pliant.methods.search.fine_tuned_darts import FineTunedDARTS
from pliant.nn.cells import CellNetwork, derive
from pliant.nn.gates import (
    BlockAttention,
    DepthwiseResidual,
    EfficientAttention,
    SqueezeExcite,
)
from pliant.nn.genotype import DARTS_V2
from pliant.run import Run, start
from pliant.testing import Case
from pliant.testing.toys import SPECIAL, TOYS
from pliant.zoo.darts import evaluation


def network(cells: int = 3) -> CellNetwork:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return evaluation(DARTS_V2, cells=cells, channels=4, classes=4)


def inserted(model: CellNetwork, **options: Any) -> Run:
    method = FineTunedDARTS(**{"growth": 100.0, **options})
    return start(model, method, example=(torch.zeros(1, 3, 8, 8),))


def every_operation_begins_as_next_to_nothing() -> None:
    """Nothing at all for a residual, below 2 % for each gate; taken out, all is as before."""
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for op, point in MENU:
        model = network().eval()
        names, before = list(model.state_dict()), model(x).detach()
        run = inserted(model, op=op, point=point)
        model.eval()
        change = float((model(x) - before).detach().norm() / before.norm())
        count = len(run.edits)
        assert change == 0 if op == "res3" else 0 < change < 0.02 * count, (op, point, change)
        with torch.no_grad():  # it is really there
            for name, parameter in model.named_parameters():
                if name not in names:
                    parameter.sub_(3.0)
        assert not torch.allclose(model(x), before, rtol=1e-3)
        for edit in run.edits:
            row = model.get_submodule(edit.layer)
            Remove(f"{edit.layer}.{list(row._modules)[-1]}").apply(model)  # type: ignore[union-attr]
        assert list(model.state_dict()) == names and torch.equal(model(x), before)


def gates_begin_as_one_number() -> None:
    """0.982 for a single gate, and the product of two of 0.9933, wherever and whatever comes."""
    x = torch.randn(2, 8, 4, 4)
    for gate, number in (
        (SqueezeExcite(8, 2), 0.98201), (EfficientAttention(8), 0.98201),
        (BlockAttention(8, 2), 0.98666),
    ):  # fmt: skip
        assert torch.allclose(gate(x), number * x, atol=1e-4)
    assert torch.equal(DepthwiseResidual(8)(x), x)


def gates_cost_two_layers_each() -> None:
    """2 C^2 / r weights and C biases for each cell of C channels; 5.8 % of DARTS-V2 at r = 32."""
    model, before = network(4), sum(p.numel() for p in network(4).parameters())
    inserted(model, reduction=2)
    channels = [16, 32, 64, 64]
    added = sum(2 * c * (c // 2) + c for c in channels)
    assert sum(p.numel() for p in model.parameters()) - before == added
    assert places(model, "reductions") == ["cells.1.after", "cells.2.after"]
    assert len(places(model, "nodes")) == 16
    full = [144] * 6 + [288] * 7 + [576] * 7  # of the published network
    assert 0.05 < sum(2 * c * (c // 32) + c for c in full) / 3_349_342 < 0.0625
    assert [EfficientAttention(c).near.kernel_size[0] for c in (8, 64, 256, 512)] == [3, 3, 5, 5]


def what_is_fixed_is_no_part_of_a_search() -> None:
    """Logits and genotype stay as they are, and a search step moves none of what was added."""
    toy = SPECIAL["supernet"]
    model = toy.model()
    assert isinstance(model, CellNetwork)
    before, shapes = derive(model), [one.shape for one in search.architecture(model)]
    inserted(model)
    assert [one.shape for one in search.architecture(model)] == shapes and derive(model) == before
    fixed = {n: p.detach().clone() for n, p in model.named_parameters() if "after" in n}
    run = start(model, EDARTS(warmup=0.0, every=1, batch=4), data=toy.data(), steps=2)
    logits = search.architecture(model)[0].clone()
    run.after_step()
    assert not torch.equal(search.architecture(model)[0], logits)
    assert fixed and all(torch.equal(model.get_parameter(n), p) for n, p in fixed.items())


def more_growth_than_allowed_is_refused() -> None:
    with pytest.raises(BudgetError, match="growth=0.01 allows"):
        inserted(network(), growth=0.01)


def a_selection_stops_where_chance_begins() -> None:
    """Worth by growth decides, and what adds less than two deviations of the base does not."""
    gains = {("se", "cells"): 0.05, ("cbam", "nodes"): 0.06, ("eca", "cells"): 0.01}
    sizes = {("cbam", "nodes"): 0.09, ("res3", "nodes"): 0.2}
    asked: list[Any] = []

    def score(chosen: Any) -> float:
        asked.append(chosen)
        return 0.5 + sum(gains.get(one, 0.0) for one in chosen)

    def growth(chosen: Any) -> float:
        return sum(sizes.get(one, 0.01) for one in chosen)

    base = [0.49, 0.5, 0.51]  # two deviations are 0.02
    assert select(score, growth, base, most=0.1) == (("cbam", "nodes"), ("se", "cells"))
    assert select(score, growth, base, most=0.1, dear=10.0)[0] == ("se", "cells")
    assert not any(("res3", "nodes") in chosen for chosen in asked)
    assert select(score, growth, [0.4, 0.5, 0.6]) == ()


CASES = [
    Case(
        "fine_tuned_darts",
        spec="fine_tuned_darts(growth=100)",
        variants=tuple(
            f"fine_tuned_darts(growth=100, op='{op}', point='{point}')"
            for op, point in (("cbam", "nodes"), ("eca", "stem"), ("res3", "reductions"))
        ),
        toys=("cells", "supernet"),
        refuses={name: "network of cells" for name in TOYS},
        witnesses={
            "growth": more_growth_than_allowed_is_refused,
        },
        own=(
            every_operation_begins_as_next_to_nothing,
            gates_begin_as_one_number,
            gates_cost_two_layers_each,
            what_is_fixed_is_no_part_of_a_search,
            more_growth_than_allowed_is_refused,
            a_selection_stops_where_chance_begins,
        ),
    ),
]
