"""Latency tables in a search: what is predicted, what the cost's weight does, two devices."""

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import nn

from pliant.errors import MethodError
from pliant.families.search import bilevel as search
from pliant.families.search import derive, paths
from pliant.families.search.expected import Expected, expected
from pliant.families.search.objective import now, objective
from pliant.latency import LatencyTable, Target
from pliant.methods.search.vpu_nas import VPUNAS
from pliant.nn.mobile import MBConv, MobileNetwork, Space, Stage, mbconvs
from pliant.nn.operations import SKIP
from pliant.run import Run, start
from pliant.testing import Case
from pliant.testing.toys import SPECIAL, TOYS

TOY = SPECIAL["mobile"]
OPS = (*mbconvs((3, 7), (1, 4)), SKIP)


def device(kernels: float, expansions: float) -> Any:
    """A made-up device: so many milliseconds for every tap of a filter, and for every factor."""

    def seconds(model: nn.Module, example: Any) -> float:
        total = 0.5 if isinstance(model, nn.Conv2d | nn.Linear) else 0.0
        for part in model.modules():
            if isinstance(part, MBConv):
                convs = [c for c in part.layers if isinstance(c, nn.Conv2d)]
                deep = next(c for c in convs if c.groups > 1)
                total += kernels * deep.kernel_size[0] + expansions * len(convs)
        return total / 1000

    return seconds


def network(ops: tuple[str, ...] = OPS) -> MobileNetwork:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        space = Space(3, 4, (3, 3), (1, 1), (Stage(4, 2, 1, ops), Stage(8, 2, 2, ops)), head=8)
        return MobileNetwork(space, 4)


def searched(target: Any, ops: tuple[str, ...] = OPS, **options: Any) -> Run:
    given = {"warmup": 0.0, "every": 1, "batch": 8, "alpha_lr": 0.3, **options}
    run = start(network(ops), VPUNAS(**given), data=TOY.data(), steps=20, target=target)
    for _ in range(20):
        run.after_step()
    return run


def the_prediction_is_the_sum_of_the_table() -> None:
    """For one-hot shares; a skip is free, and the slope is that of central differences."""
    table = LatencyTable.of(Target.of(device(1.0, 10.0)))
    model, x = network().double().eval(), (torch.zeros(1, 3, 6, 6, dtype=torch.float64),)
    found = expected(copy.deepcopy(model).float(), (x[0].float(),), "latency", table)
    assert found.fixed == pytest.approx(
        1.5, abs=1e-5
    )  # stem, head and classifier; norms cost nothing
    assert found.prices["blocks.0"].tolist() == pytest.approx([23, 33, 27, 37, 0])
    assert found.prices["blocks.2"].tolist() == pytest.approx([23, 33, 27, 37])
    for part in search.mixed(model).values():
        part.logits.fill_(-1e3)[1] = 0
    names = {name: part.names[1] for name, part in search.mixed(model).items()}
    assert abs(float(found.of(model)) - found.at(names, model)) < 1e-9
    assert found.at(names, model) == pytest.approx(1.5 + 4 * 33)
    logits = search.architecture(model)
    for one in logits:
        one.requires_grad_(True).data.normal_()
    slopes = torch.autograd.grad(found.of(model), logits)
    for one, slope in zip(logits, slopes, strict=True):
        one.data[0] += 1e-4
        above = float(found.of(model))
        one.data[0] -= 2e-4
        below = float(found.of(model))
        one.data[0] += 1e-4
        assert abs((above - below) / 2e-4 - float(slope[0])) < 1e-5


def equal_shapes_are_measured_once() -> None:
    calls: list[str] = []
    inner = device(1.0, 1.0)

    def counting(model: nn.Module, example: Any) -> float:
        calls.append(f"{model!r} {example[0].shape}")
        return inner(model, example)

    table = LatencyTable.of(Target.of(counting))
    x = (torch.zeros(1, 3, 6, 6),)
    expected(network(), x, "latency", table)
    once = len(calls)
    expected(network(), x, "latency", table)
    assert len(calls) == once


def nothing_but_cost_ends_at_the_cheapest_candidates() -> None:
    """And without its weight the search does not look at the table."""
    run = searched(device(1.0, 10.0), strength=1e4)
    chosen = derive.best(run)
    assert [chosen[f"blocks.{n}"] for n in range(4)] == [SKIP, SKIP, "mbconv_k3_e1", SKIP]
    one, other = (searched(d, strength=0.0) for d in (device(1.0, 10.0), device(9.0, 1.0)))
    for a, b in zip(*(search.architecture(r.model) for r in (one, other)), strict=True):
        assert torch.equal(a, b)


def each_device_gets_its_own_network() -> None:
    """No large filters where these are slow, no wide blocks where those are."""
    ops, slow = OPS[:-1], {"k7": device(4.0, 0.1), "e4": device(0.1, 4.0)}
    for estimator, strength in (("gumbel", 3.0), ("gates", 30.0)):
        for word, target in slow.items():
            run = searched(target, ops, strength=strength, estimator=estimator)
            found = derive.best(run).values()
            assert not [op for op in found if word in op], (estimator, word, found)


def each_network_is_the_faster_one_on_its_own_device() -> None:
    """Under the table of either device, that which was searched for the other takes longer."""
    ops, devices = ("mbconv_k3_e4", "mbconv_k7_e1"), (device(4.0, 0.1), device(0.1, 4.0))
    runs = [searched(target, ops, strength=3.0) for target in devices]
    chosen = [derive.best(run) for run in runs]
    for own, run in enumerate(runs):
        times = [now(run, names) for names in chosen]
        assert times[own] < times[1 - own]


def more_weight_of_the_cost_never_costs_more() -> None:
    """Expected milliseconds for rising weights; one rise of 2 % is allowed."""
    target, found = device(1.0, 10.0), []
    for strength in (0.0, 0.05, 0.2, 1.0):
        run = searched(target, strength=strength)
        found.append(float(Expected.from_plain(run.state["expected"]).of(run.model.eval())))
    rises = [b / a - 1 for a, b in itertools.pairwise(found) if b > a]
    assert len(rises) < 2 and max(rises, default=0.0) <= 0.02 and found[-1] < found[0], found


def two_paths_leave_others_as_probable_as_before() -> None:
    run = searched(None, estimator="gates", alpha_lr=0.05)
    before = {n: p.logits.softmax(0) for n, p in search.mixed(run.model).items()}
    paths.draw(run)
    gates = paths.pairs(run)
    for name, part in search.mixed(run.model).items():
        assert gates[name][0] == part.train().place() and len(set(gates[name])) == 2
    plan = run.method._plan()  # type: ignore[attr-defined]
    search.step(run, plan, lambda loss: objective(run, loss, "sum", 1.0), gates)
    for name, part in search.mixed(run.model).items():
        now = part.logits.softmax(0)
        rest = [i for i in range(len(part.names)) if i not in gates[name]]
        assert torch.allclose(now[rest], before[name][rest], atol=1e-6)
        assert not torch.allclose(now, before[name], atol=1e-4)


def noise_makes_samples_and_cools_down() -> None:
    run = start(TOY.model(), VPUNAS(), data=TOY.data(), steps=4)
    part = search.mixed(run.model)["blocks.0"]
    assert float(part.temperature) == 5.0
    wanted = ((part.logits + part.noise) / 5.0).softmax(0)
    assert torch.equal(part.train().probabilities(), wanted)
    assert torch.allclose(part.eval().probabilities(), (part.logits / 5.0).softmax(0))
    run.after_epoch()
    run.after_step()
    assert float(part.temperature) == pytest.approx(5.0 * 0.956)


def what_has_no_logarithm_or_no_clock_is_refused() -> None:
    for options, sentence in (
        ({"by": "latency"}, "none was named"),
        ({"form": "product", "reference": 0.5}, "take form='sum'"),
    ):
        with pytest.raises(MethodError, match=sentence):
            start(TOY.model(), VPUNAS(**options), data=TOY.data())  # type: ignore[arg-type]


CASES = [
    Case(
        "vpu_nas",
        spec="vpu_nas(batch=4, every=1)",
        variants=(
            "vpu_nas(batch=4, every=1, estimator='gates', form='product')",
            "vpu_nas(batch=4, every=2, by='params', weights='fresh')",
        ),
        toys=("mobile",),
        refuses={name: "inverted bottlenecks" for name in TOYS},
        own=(
            the_prediction_is_the_sum_of_the_table,
            equal_shapes_are_measured_once,
            nothing_but_cost_ends_at_the_cheapest_candidates,
            each_device_gets_its_own_network,
            each_network_is_the_faster_one_on_its_own_device,
            more_weight_of_the_cost_never_costs_more,
            two_paths_leave_others_as_probable_as_before,
            noise_makes_samples_and_cools_down,
            what_has_no_logarithm_or_no_clock_is_refused,
        ),
    ),
]
