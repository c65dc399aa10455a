"""Sampled paths, gradients of gates, counts of a released network, and rounded weights."""

import json
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pliant.cost import cost, layer_costs
from pliant.data import Train, load
from pliant.drivers.loop import evaluate, fit
from pliant.errors import MethodError, ModelError
from pliant.families.search import bilevel as search
from pliant.families.search import paths, rounding
from pliant.families.search.expected import expected
from pliant.math.quantize import span_grid, unit_grid
from pliant.methods.search.kws_nas import KWSNAS
from pliant.nn.mixed import MixedOp
from pliant.nn.mobile import MobileNetwork, Space, Stage, block
from pliant.run import start
from pliant.testing import Case
from pliant.testing.toys import SPECIAL, TOYS
from pliant.zoo.mobile import DEVICE, KEYWORDS, evaluation, supernet

TOY = SPECIAL["mobile"]


def the_released_network_has_the_published_size() -> None:
    """273,312 weights; 23.48 M products where every map has its true size.

    The published 23.44 M count a first map of 51 // 2 = 25 columns, which has 26.
    """
    rows = ((7, 5), (7, 2), (7, 2), (7, 2), (7, 2), (7, 1), (7, 2), (7, 1), (7, 1), (5, 1))
    ops = [f"mbconv_k{k}_e{e}" for k, e in (*rows, (7, 1), (5, 1))]
    model = evaluation(KEYWORDS, ops, classes=12)
    assert rounding.memory(model, 8) == 273_312
    counts = layer_costs(model, (torch.zeros(1, 1, 10, 51),))
    found = sum(row.macs for row in counts.values())
    assert round(found / 1e6, 2) == 23.48, found
    assert round((found - counts["stem.0"].macs / 26) / 1e6, 2) == 23.44


def a_search_space_is_plain_data() -> None:
    for space in (KEYWORDS, DEVICE):
        assert Space.from_plain(json.loads(json.dumps(space.plain()))) == space
    assert KEYWORDS.scaled(0.75).stages[0].channels == 56  # 54, to a multiple of 8
    ops = [row[3] for row in KEYWORDS.blocks()]
    assert [len(names) for names in ops] == [18, *[19] * 11]
    with pytest.raises(ModelError, match="has the fields"):
        Space.from_plain({"stem": 3})
    with pytest.raises(ModelError, match="not 'mbconv_k4_e1'"):
        Space(3, 4, (3, 3), (1, 1), (Stage(4, 1, 1, ("mbconv_k4_e1",)),), 8)
    with pytest.raises(ModelError, match="one of its candidates"):
        evaluation(KEYWORDS, ["skip_connect"] * 12)


def gates_get_the_gradient_of_a_sum() -> None:
    """That of L(sum of g_j out_j) at the sampled gates, chained through the softmax."""
    torch.manual_seed(0)
    ops = ("mbconv_k3_e1", "mbconv_k5_e2", "skip_connect")
    parts = [MixedOp({n: block(n, 3, 3, 1) for n in ops}, single=True).double() for _ in range(2)]
    model, x = nn.Sequential(*parts, nn.Flatten(), nn.Linear(48, 2)).double().eval(), None
    x = torch.randn(4, 3, 4, 4, dtype=torch.float64)
    labels = torch.tensor([0, 1, 0, 1])
    for part, place in zip(parts, (1, 0), strict=True):
        part.logits.requires_grad_(True).data.normal_()
        part.logits.data[place] += 5  # it is the sample in evaluation, too
        part.gates = (0, 1, 2)
    found = torch.autograd.grad(F.cross_entropy(model(x), labels), [part.logits for part in parts])
    gates = [torch.eye(3, dtype=torch.float64)[p].clone().requires_grad_() for p in (1, 0)]
    out = x
    for part, gate in zip(parts, gates, strict=True):
        out = sum(g * op(out) for g, op in zip(gate, part.ops.values(), strict=True))
    # A sampled path alone hands gradients on, so the first gates see the second path as it is.
    pulls = torch.autograd.grad(F.cross_entropy(model[2:](out), labels), gates)
    for part, pull, logits in zip(parts, pulls, found, strict=True):
        share = part.logits.detach().softmax(0)
        expected_one = share * (pull - share @ pull)
        assert torch.allclose(logits, expected_one, rtol=1e-5, atol=1e-12)


def the_expected_cost_is_that_of_the_derived_network() -> None:
    """For one-hot shares, on both axes; its derivative is that of central differences."""
    model, x = TOY.model().double(), (torch.zeros(1, 3, 6, 6, dtype=torch.float64),)
    for axis in ("macs", "params"):
        found = expected(model, x, axis)  # type: ignore[arg-type]
        for seed in range(3):
            torch.manual_seed(seed)
            plain, names = TOY.model().double(), {}
            for name, part in search.mixed(plain).items():
                names[name] = part.names[int(torch.randint(len(part.names), ()))]
                search.mixed(model)[name].logits.fill_(-1e3)[part.names.index(names[name])] = 0
                holder, _, child = name.rpartition(".")
                setattr(plain.get_submodule(holder), child, part.ops[names[name]])
            assert float(found.of(model)) == found.at(names, model)
            assert found.at(names, model) == getattr(cost(plain, x), axis)
    logits = search.architecture(model)
    for one in logits:
        one.requires_grad_(True).data.normal_()
    slopes = torch.autograd.grad(found.of(model), logits)
    for one, slope in zip(logits, slopes, strict=True):
        for place in range(len(one)):
            sides = []
            for step in (1e-5, -2e-5):
                one.data[place] += step
                sides.append(float(found.of(model)))
            one.data[place] += 1e-5
            assert abs((sides[0] - sides[1]) / 2e-5 - float(slope[place])) < 1e-4


def grids_have_the_published_levels() -> None:
    w = torch.linspace(-1.3, 1.3, 200)  # 0 would lie between two levels
    fake = torch.fake_quantize_per_tensor_affine(w + 1, 2 / 255, 0, 0, 255) - 1
    assert torch.allclose(unit_grid(w, 8), fake, atol=1e-6)
    assert unit_grid(w, 1).unique().tolist() == [-1, 1]
    assert torch.allclose(unit_grid(w, 2).unique(), torch.tensor([-1, -1 / 3, 1 / 3, 1]))
    spread = span_grid(torch.linspace(0, 1, 101), 2)
    assert spread.unique().tolist() == [0, 0.25, 0.5, 0.75]  # 1 is never reached
    assert torch.equal(span_grid(torch.ones(3), 2), torch.ones(3))


def rounded_weights_follow_what_is_exact() -> None:
    """Small steps add up until a weight reaches its next level; the network is always rounded."""
    model = TOY.model()
    run = start(model, KWSNAS(bits=1, warmup=0.9), data=TOY.data(), steps=4)
    weight = model.stem[0].weight
    exact = run.state[rounding.KEY]["stem.0.weight"].clone()
    assert set(weight.unique().tolist()) == {-1.0, 1.0}
    for _ in range(4):
        with torch.no_grad():
            weight += 0.02
        run.after_step()
        exact += 0.02
        assert torch.allclose(run.state[rounding.KEY]["stem.0.weight"], exact, atol=1e-6)
        assert torch.equal(weight, unit_grid(exact, 1))
    run.finish()
    assert set(run.model.classify.weight.unique().tolist()) <= {-1.0, 1.0}
    assert rounding.KEY not in run.state


def one_path_runs_and_others_get_no_gradient() -> None:
    """Samples come as often as the probabilities say; a sampled skip moves nothing if so told."""
    model = TOY.model()
    run = start(model, KWSNAS(bits=0), data=TOY.data(), steps=4)
    F.cross_entropy(model(torch.randn(4, 3, 6, 6)), torch.arange(4)).backward()
    part = search.mixed(model)["blocks.1"]
    for place, op in enumerate(part.ops.values()):
        assert all((p.grad is not None) == (place == part.place()) for p in op.parameters())
    with torch.no_grad():
        part.logits.copy_(torch.tensor([2.0, 1.0, 0.0]))
    counts = torch.zeros(3)
    for _ in range(2000):
        paths.draw(run)
        counts[part.place()] += 1
    assert torch.allclose(counts / 2000, part.logits.softmax(0), atol=0.04)
    part.noise.copy_(torch.tensor([0.0, 0.0, 9.0]))
    assert paths.full(run, skips_learn=False)["blocks.1"] == ()
    assert paths.full(run)["blocks.1"] == (0, 1, 2)


def the_rate_of_logits_rises_to_its_end() -> None:
    """lr (1 + cos(pi (1 + t / 2))): 0 when the warm-up is over, all of it at the end."""
    run = start(TOY.model(), KWSNAS(alpha_lr=0.1, warmup=0.5, every=9), data=TOY.data(), steps=8)
    rates = []
    for _ in range(8):
        run.after_step()
        rates.append(KWSNAS(alpha_lr=0.1, warmup=0.5)._plan(run).lr)
    assert rates[3] == pytest.approx(0, abs=1e-9) and rates[7] == pytest.approx(0.1)
    assert rates[5] == pytest.approx(0.1 * (1 - math.sqrt(0.5)))


def a_higher_power_makes_the_network_cheaper() -> None:
    costs = []
    for strength in (0.0, 10.0, 100.0):
        method = KWSNAS(strength=strength, alpha_lr=0.5, every=1, batch=8, warmup=0.0, bits=0)
        model = TOY.model()
        run = start(model, method, data=TOY.data(), steps=12)
        for _ in range(12):
            run.after_step()
        run.finish()
        costs.append(cost(model, TOY.inputs(1)).macs)
    assert costs[0] >= costs[1] >= costs[2] and costs[2] < costs[0]


def rounding_while_training_beats_rounding_after() -> None:
    """At 1 and at 2 bits, on digits: rounded afterwards at 1 bit the network guesses."""
    data = load("digits").subset(train=512, test=300)
    stages = (Stage(16, 1, 2, ("mbconv_k3_e2",)), Stage(16, 1, 1, ("mbconv_k3_e2",)))
    for bits in (1, 2):
        found = {}
        for way in ("during", "after"):
            torch.manual_seed(0)
            model = supernet(Space(1, 16, (3, 3), (1, 1), stages, 32))
            train = Train(epochs=4, batch=64, lr=0.1, device="cpu")
            method = KWSNAS(bits=bits, rounding=way)  # type: ignore[arg-type]
            run = start(model, method, data=data, steps=train.steps(data.steps(64)))
            fit(run, data, train)
            found[way] = evaluate(model, data, "test").accuracy
        assert found["during"] > found["after"] + 0.1, (bits, found)
        assert bits > 1 or found["after"] < 0.25, found


def a_network_without_a_choice_is_only_rounded() -> None:
    model = supernet(Space(3, 4, (3, 3), (1, 1), (Stage(4, 1, 1, ("mbconv_k3_e2",)),), 8))
    options: tuple[dict[str, Any], ...] = ({"bits": 2}, {"bits": 2, "rounding": "after"})
    for more in options:
        run = start(model, KWSNAS(**more), data=TOY.data(), steps=2)
        run.finish()
        assert all(len(w.unique()) <= 4 for w in (model.stem[0].weight, model.head[0].weight))
    with pytest.raises(MethodError, match="inverted bottlenecks"):
        start(nn.Sequential(nn.Linear(2, 2)), KWSNAS(), example=(torch.zeros(1, 2),))
    with pytest.raises(MethodError, match="none was named"):
        start(TOY.model(), KWSNAS(by="latency"), data=TOY.data())
    assert isinstance(TOY.model(), MobileNetwork)


CASES = [
    Case(
        "kws_nas",
        spec="kws_nas(batch=4, every=1)",
        variants=(
            "kws_nas(batch=4, every=1, bits=0, form='sum', by='params')",
            "kws_nas(batch=4, every=2, bits=2, rounding='after', skips_learn=True)",
        ),
        toys=("mobile",),
        refuses={name: "inverted bottlenecks" for name in TOYS},
        own=(
            the_released_network_has_the_published_size,
            a_search_space_is_plain_data,
            gates_get_the_gradient_of_a_sum,
            the_expected_cost_is_that_of_the_derived_network,
            grids_have_the_published_levels,
            rounded_weights_follow_what_is_exact,
            one_path_runs_and_others_get_no_gradient,
            the_rate_of_logits_rises_to_its_end,
            a_higher_power_makes_the_network_cheaper,
            rounding_while_training_beats_rounding_after,
            a_network_without_a_choice_is_only_rounded,
        ),
    ),
]
