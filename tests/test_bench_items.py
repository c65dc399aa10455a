"""What the bench of the claims of pruning papers builds, chooses and counts."""

from typing import Any

import torch
from torch import nn

from bench import experiments
from bench.experiments import prune_controls as controls
from bench.experiments import prune_items as items
from pliant.data import Data
from pliant.run import start


def digits(count: int = 32) -> Data:
    images = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return Data((images, torch.arange(count) % 10), classes=10)


def test_a_narrow_network_is_the_widest_within_its_share() -> None:
    def params(share: float) -> int:
        plan = {"widths": [16, 32], "narrowed": share}
        return sum(p.numel() for p in items.network(plan, digits()).parameters())

    whole = params(1.0)
    assert 0.18 * whole < params(0.2) <= 0.2 * whole


def test_of_several_settings_the_best_that_is_accurate_enough_counts() -> None:
    def cell(rival: str, accuracy: float, macs: int) -> dict[str, Any]:
        key = {"study": "s", "rival": rival, "seed": 0}
        return {"key": key, "values": {"accuracy": accuracy, "macs": macs}}

    rows = [cell("dense", 0.95, 9), cell("a", 0.93, 1), cell("b", 0.941, 3), cell("c", 0.96, 5)]
    asked = {"best": "least", "beside": "dense"}
    assert items._of(rows, "s", "macs", ["a", "b", "c"], asked) == {0: 3}
    assert items._of(rows, "s", "macs", ["b", "c"], asked | {"best": "most"}) == {0: 5}
    assert items._of(rows, "s", "macs", ["a"], asked) == {}


def test_filters_and_inputs_near_zero_are_counted_by_layer() -> None:
    conv = nn.Conv2d(4, 5, 3)
    with torch.no_grad():
        conv.weight[0] *= 1e-4
        conv.weight[:, :2] *= 1e-4
    found = controls.nearly_dead(nn.Sequential(conv, nn.ReLU()))
    assert found == {"dead_filters": 0.2, "dead_inputs": 0.5}


def test_layers_count_as_denser_by_the_first_and_the_last_look() -> None:
    first, last = {"a": 0.5, "b": 0.5}, {"a": 0.6, "b": 0.4}
    assert controls.risen([{"densities": first}, {"loss": 1}, {"densities": last}]) == 0.5
    assert controls.risen([{"densities": first}]) is None


def test_a_device_in_steps_of_eight_channels() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 17, 1))
    assert controls.steps_of_eight(model, ()) == 1e-4 * (1 + 1 + 3)


def test_a_threshold_keeps_as_many_weights_as_l11() -> None:
    data = digits()
    kept = []
    for method in (controls.Threshold(radius=0.2, least=0.0), "threshold 0.05"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 30), nn.ReLU(), nn.Linear(30, 10))
        how = method if not isinstance(method, str) else controls.method(method)
        run = start(model, how, data=data, steps=4)
        run.finish()
        kept.append(int((model[3].weight != 0).sum()))  # type: ignore[union-attr, operator]
    assert 300 > kept[0] > kept[1] > 0


def test_zeros_stay_zeros_where_votes_are_cast_in_a_sparse_network() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 30), nn.ReLU(), nn.Linear(30, 10))
    method = controls.SparseVoting(ratio=0.5, rounds=1, start=0.5)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    run = start(model, method, data=digits(), optimizer=optimizer, steps=4)
    for _ in range(4):
        optimizer.zero_grad()
        model(digits().train[0]).square().sum().backward()
        run.before_step()
        optimizer.step()
        run.after_step()
    run.finish()
    weight: Any = model[1].weight
    assert weight.shape[0] == 15 and float((weight == 0).double().mean()) > 0.5


def test_every_rival_of_the_plan_can_be_built_and_every_claim_names_rivals() -> None:
    settings = experiments.load("prune-items").settings
    for cell in items.cells(settings):
        if "probe" not in cell.plan:
            controls.method(cell.plan["spec"])
    for claim in settings["claims"]:
        rivals = settings["studies"][claim["study"]]["rivals"]
        for side in ("own", "other"):
            named = claim.get(side, [])
            assert {named} <= set(rivals) if isinstance(named, str) else set(named) <= set(rivals)
