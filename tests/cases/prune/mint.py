"""MINT: the estimator against known dependences and trees, and blocks by hand."""

import networkx
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from pliant.budget import Budget
from pliant.data import Data
from pliant.errors import BudgetError, DataError, ModelError
from pliant.families.prune.columns import hold
from pliant.families.prune.dependence import (
    crossing,
    dependences,
    divergence,
    spanning_tree,
    squares,
    standard,
)
from pliant.families.prune.pairs import Block, blocks, chosen, dropped, masks_of, spans
from pliant.families.prune.sparse import bytes_with, unread
from pliant.methods.prune.mint import MINT
from pliant.nn.coded import Coded
from pliant.run import Run, start
from pliant.surgery.prove import cuttable
from pliant.testing import Case
from tests.cases.prune import TOYS, kept, pair, run_of

SAMPLES = 900


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(generator: torch.Generator, samples: int = SAMPLES) -> Tensor:
    return torch.randn(samples, 1, generator=generator, dtype=torch.float64)


def mean_of(x: Tensor, y: Tensor, *z: Tensor, repeats: int = 3) -> float:
    return float(dependences([x], [y, *z], draws(1), repeats)[0, 0])


# ---------------------------------------------------------------- the estimator


def trees_are_those_of_networkx() -> None:
    """Edge for edge in weight, and in how many join two sets; points at one place do not split."""
    for seed in range(3):
        points = torch.randn(60, 3, generator=draws(seed), dtype=torch.float64)
        distances = squares(points).numpy()
        graph = networkx.from_numpy_array(distances)
        tree = networkx.minimum_spanning_tree(graph)
        mine = spanning_tree(distances)
        assert {frozenset(e) for e in mine.tolist()} == {frozenset(e) for e in tree.edges}
        brute = sum((a < 25) != (b < 25) for a, b in tree.edges)
        assert crossing(distances, 25) == brute
    twice = torch.cat([points[:20], points[:20]])
    ends = spanning_tree(squares(twice).numpy())
    whole = networkx.Graph(ends.tolist())
    assert len(ends) == 39 and networkx.is_connected(whole) and len(whole) == 40


def a_shift_is_a_divergence() -> None:
    """Two clouds at one place, near and apart; each edge between counts (m + n) / 2mn."""
    found = []
    for shift in (0.0, 1.0, 5.0):
        points = torch.randn(120, 2, generator=draws(), dtype=torch.float64)
        points[60:, 0] += shift
        found.append(divergence(squares(points).numpy(), 60))
    assert abs(found[0]) < 0.2 and found[0] < found[1] < found[2] > 0.95
    assert crossing(squares(points).numpy(), 60) == round((1 - found[2]) * 60)


def independence_is_near_zero() -> None:
    """X and Y depend on Z alone: the mean over 20 draws."""
    values = []
    for seed in range(20):
        g = draws(seed)
        z = normal(g)
        x, y = z + normal(g), z + normal(g)
        values.append(float(dependences([x], [y, z], g)[0, 0]))
    assert sum(values) / 20 < 0.1


def a_copy_is_near_one() -> None:
    g = draws()
    x = normal(g)
    y = x + 0.01 * normal(g)
    assert mean_of(x, y) > 0.8 and mean_of(x, y, normal(g)) > 0.6


def dependence_rises_with_correlation() -> None:
    found = []
    for share in (0.0, 0.5, 0.9, 0.99):
        g = draws()
        x = normal(g)
        y = share * x + (1 - share**2) ** 0.5 * normal(g)
        found.append(mean_of(x, y, repeats=6))
    assert found == sorted(found) and found[0] < 0.1 and found[3] > found[2] + 0.1


def what_is_known_does_not_count() -> None:
    """Both are Z and noise: given Z little is left."""
    g = draws()
    z = normal(g)
    x, y = z + 0.1 * normal(g), z + 0.1 * normal(g)
    assert mean_of(x, y, z) < 0.3 * mean_of(x, y)


def what_is_known_may_be_needed() -> None:
    """Y is the product of signs X and Z: it tells of X only together with Z.

    Every second exchanged y has the sign it had, so the divergence is 1/3: of eight places that
    exchanged rows take, the true ones share four, with densities 1/8 and 1/4.
    """
    g = draws()
    x, z = (torch.randint(2, (SAMPLES, 1), generator=g).double() * 2 - 1 for _ in range(2))
    noise = [0.1 * normal(g) for _ in range(3)]
    assert mean_of(x + noise[0], x * z + noise[1]) < 0.1
    assert 0.25 < mean_of(x + noise[0], x * z + noise[1], z + noise[2]) < 0.5


def rows_belong_together() -> None:
    """With the rows of one side in another order nothing is left."""
    g = draws()
    x = normal(g)
    y = x + 0.01 * normal(g)
    assert mean_of(x, y[torch.randperm(SAMPLES, generator=g)]) < 0.1 < 0.8 < mean_of(x, y)


def constant_units_are_no_noise() -> None:
    rows = torch.tensor([[1.0, 5.0], [3.0, 5.0]])
    assert standard(rows).tolist() == [[-1.0, 0.0], [1.0, 0.0]]


# ---------------------------------------------------------------- blocks


def mlp(*sizes: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for a, b in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def told(layer: str, *levels: float) -> list[Block]:
    """Blocks of 2 x 2 weights of a 4 x 4 kernel."""
    places = [((a, a + 2), (b, b + 2)) for a in (0, 2) for b in (0, 2)]
    return [
        Block(layer, row, column, level, 1.0 - i / 10, 4)
        for i, ((row, column), level) in enumerate(zip(places, levels, strict=True))
    ]


def blocks_below_the_cutoff_go() -> None:
    """Of three layers 2 + 1 + 0 blocks of four weights are at most 0.2; a cap of 1/2 allows all."""
    model = mlp(4, 4, 4, 4)
    found = [*told("0", 0.1, 0.9, 0.2, 0.8), *told("2", 0.5, 0.2, 0.6, 0.7)]
    found += told("4", 0.3, 0.4, 0.5, 0.6)
    run = run_of_four(model)
    gone = dropped(found, 0.2, 0.5)
    masks = masks_of(run, ("0", "2", "4"), gone)
    assert [int((~mask).sum()) for mask in masks.values()] == [8, 4, 0]
    assert not masks["0"][:2, :2].any() and masks["0"][:2, 2:].all() and masks["2"][:2, :2].all()


def a_cap_holds_and_ties_go_by_weight() -> None:
    found = told("0", 0.0, 0.0, 0.0, 0.0)
    first, second = found[3], found[1]  # the weights of the last are the smallest
    assert dropped(found, 0.0, 0.5) == [first, second]
    assert dropped(found, 0.0, 0.49) == [first] and not dropped(found, 0.0, 0.24)


def every_output_keeps_an_input() -> None:
    """However little it depends on all of them: without any it would be a constant."""
    found = told("0", 0.1, 0.2, 0.8, 0.9)
    assert dropped(found, 1.0, 0.99) == [found[0], found[2]]


def run_of_four(model: nn.Module) -> Run:
    return start(model, MINT(share=0.0, samples=8), data=points(), steps=4)


def points(classes: int = 4) -> Data:
    inputs = torch.randn(64, 4, generator=draws())
    return Data((inputs, torch.arange(64) % classes), classes=classes)


def groups_need_not_divide() -> None:
    assert spans(7, 3) == [(0, 2), (2, 4), (4, 7)] and spans(2, 8) == [(0, 1), (1, 2)]


def samples_are_as_many_of_each_class() -> None:
    data = Data((torch.arange(300.0)[:, None], (torch.arange(300) % 3).clamp_max(1)), classes=2)
    found = torch.cat([example[0] for example in chosen(data, 20, 0)]).flatten()  # type: ignore[index]
    labels = (found % 3).clamp_max(1)
    assert int((labels == 0).sum()) == 20 and len(found.unique()) == len(found) >= 40


def unrelated_inputs_are_let_go() -> None:
    """Outputs 0, 1 copy inputs 0, 1 and so on: blocks off the diagonal tell nothing."""
    inputs = torch.randn(600, 4, generator=draws())
    data = Data((inputs, torch.arange(600) % 4), classes=4)
    model = mlp(4, 4, 4)
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(4) + 0.01)
    run = start(model, MINT(share=0.0), data=data, steps=1)
    found = blocks(run, {"0": 2}, 2, [(inputs,)], 1)
    levels = [block.level for block in found]
    assert min(levels[0], levels[3]) > 0.5 > 0.3 > max(levels[1], levels[2])


def zeros_stay_zeros() -> None:
    """Through 100 steps with momentum and weight decay, to the last bit."""
    model = mlp(4, 16, 16, 4)
    optimizer = SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(3):  # momentum from before
        model(torch.randn(8, 4)).square().sum().backward()
        optimizer.step()
    method = MINT(share=0.5, groups=4)
    run = start(model, method, data=points(), optimizer=optimizer, steps=100)
    for _ in range(100):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().mean().backward()
        run.before_step()
        optimizer.step()
        run.after_step()
    masks = run.state["masks"]
    assert sum(int((~mask).sum()) for mask in masks.values()) > 50
    for name, mask in masks.items():
        weight = model.get_parameter(f"{name}.weight")
        assert (weight[~mask] == 0).all() and (weight[mask] != 0).all()
        assert float((~mask).double().mean()) <= method.cap


def channels_that_nothing_reads_leave_exactly() -> None:
    model = mlp(4, 8, 4)
    run = run_of_four(model)
    mask = torch.ones(4, 8, dtype=torch.bool)
    mask[:, 2:4] = False
    hold(model, {"2": mask})
    groups, _ = cuttable(model, run.example)
    assert unread(model, groups) == {"0": [2, 3]}
    inputs = torch.randn(5, 4)
    before = model(inputs)
    run.step = 4
    run.finish()
    assert kept(run)["0", "out"] == (0, 1, 4, 5, 6, 7)
    assert torch.allclose(run.model(inputs), before, atol=1e-6)


def bytes_are_those_of_bitmaps() -> None:
    """Of 64 x 64 numbers 1,024 stay: 20 bytes of header at most, 8 a row, 4 a number."""
    run = run_of_four(mlp(4, 64, 64, 4))
    dense = run.planner.now().bytes
    head = bytes_with(run, {"2": 1024}) - (dense - 4 * 64 * 64) - 64 * 8 - 4 * 1024
    assert 0 < head <= 20
    assert bytes_with(run, {"2": 64 * 64}) == dense


def a_budget_takes_few_blocks() -> None:
    run = start(mlp(4, 64, 64, 4), MINT(samples=16), Budget(bytes=0.6), data=points(), steps=1)
    planned = bytes_with(run, {n: int(m.sum()) for n, m in run.state["masks"].items()})
    assert 0.57 * run.cost.bytes < planned <= 0.6 * run.cost.bytes
    run.step = 1
    assert run.finish().bytes <= planned
    assert any(isinstance(module, Coded) for module in run.model.modules())
    with pytest.raises(BudgetError, match="the least reachable is"):
        start(mlp(4, 64, 64, 4), MINT(samples=16), Budget(bytes=0.2), data=points())


def what_cannot_be_estimated_is_refused() -> None:
    with pytest.raises(DataError, match="looks at training inputs"):
        run_of(pair(1.0, 2.0), MINT())
    few = Data((torch.randn(8, 2), torch.arange(8) % 2), classes=2)
    with pytest.raises(DataError, match="12 samples or more, not 8"):
        start(pair(1.0, 2.0), MINT(), data=few)
    single = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    images = Data((torch.randn(16, 3, 6, 6), torch.arange(16) % 4), classes=4)
    with pytest.raises(ModelError, match="no two layers in a row"):
        start(single, MINT(), data=images)


def released_pairing_of_indices_is_not_the_tree() -> None:
    """Positions in a sparse matrix's index list are no rows: counted so, edges differ."""
    from scipy.sparse.csgraph import minimum_spanning_tree

    points = torch.randn(120, 2, generator=draws(), dtype=torch.float64)
    distances = squares(points).sqrt().numpy()
    sparse = minimum_spanning_tree(distances)
    rows, columns = sparse.tocoo().coords
    true = int(((rows < 60) != (columns < 60)).sum())
    wrong = int(((np.arange(sparse.nnz) < 60) != (sparse.indices < 60)).sum())
    assert crossing(distances, 60) == true != wrong


CASES = (
    Case(
        "mint",
        spec="mint(groups=4, samples=8)",
        budget=Budget(bytes=0.97),
        toys=TOYS,
        refuses={"single": "no two layers in a row"},
        variants=("mint(share=0.3, repeats=2)", "mint(share=1.0, cap=0.9)"),
        own=(
            trees_are_those_of_networkx,
            released_pairing_of_indices_is_not_the_tree,
            a_shift_is_a_divergence,
            independence_is_near_zero,
            a_copy_is_near_one,
            dependence_rises_with_correlation,
            what_is_known_does_not_count,
            what_is_known_may_be_needed,
            rows_belong_together,
            constant_units_are_no_noise,
            blocks_below_the_cutoff_go,
            a_cap_holds_and_ties_go_by_weight,
            every_output_keeps_an_input,
            groups_need_not_divide,
            samples_are_as_many_of_each_class,
            unrelated_inputs_are_let_go,
            zeros_stay_zeros,
            channels_that_nothing_reads_leave_exactly,
            bytes_are_those_of_bitmaps,
            a_budget_takes_few_blocks,
            what_cannot_be_estimated_is_refused,
        ),
    ),
)
