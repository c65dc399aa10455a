"""Search methods: small supernets whose best operations are known beforehand."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.cost import cost
from pliant.data import Data
from pliant.edits import Choose
from pliant.errors import MethodError, ModelError
from pliant.families.search.bilevel import architecture, mixed
from pliant.families.search.evaluation import paths
from pliant.method import Method
from pliant.methods.search.edarts import DARTS, EDARTS
from pliant.nn.cells import CellNetwork, derive, placed
from pliant.nn.genotype import Genotype, dense
from pliant.nn.mixed import MixedOp, Partial
from pliant.nn.operations import operation
from pliant.observe.heads import Reading, answer
from pliant.registry import build
from pliant.run import Run, start
from pliant.testing import Case
from pliant.testing.toys import TOYS
from pliant.zoo.darts import evaluation, supernet

OPS = ("skip_connect", "sep_conv_3x3")


def small(wiring: Any = ((0, 1),), ops: tuple[str, ...] = OPS) -> CellNetwork:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return supernet(wiring, ops, cells=3, channels=2, classes=4)


def noise() -> Data:
    inputs = torch.randn(24, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(24) % 4
    splits = (inputs[:16], labels[:16]), (inputs[16:], labels[16:])
    return Data(*splits, classes=4, name="noise")


def run_of(model: nn.Module, method: Method, *, steps: int = 0) -> Run:
    return start(model, method, data=noise(), steps=steps)


def works_as_darts_with_dropped_edges() -> None:
    """Dense wiring with ``none``: the third node keeps two of its four edges."""
    model = small(dense(3), ("none", *OPS))
    run = run_of(model, build(DARTS))
    run.finish()
    genotype = Genotype.from_plain(run.log[-1]["genotype"])
    assert [len(node) for node in genotype.normal] == [2, 2, 2]
    assert model(torch.randn(2, 3, 6, 6)).isfinite().all()


def prior_and_dropout_fade_on_time() -> None:
    """beta = 2 is gone after a half of 8 steps, dropout of 0.4 only at the end."""
    model = small()
    method = EDARTS(prior=2.0, anneal=0.5, skip_dropout=0.4, warmup=0.9)
    run, seen = run_of(model, method, steps=8), []
    for _ in range(8):
        part = next(iter(mixed(model).values()))
        seen.append((part.prior.tolist(), round(float(part.drop), 4)))
        run.after_step()
    assert [prior[1] for prior, _ in seen] == [2.0, 1.5, 1.0, 0.5, 0.0, 0.0, 0.0, 0.0]
    assert all(prior[0] == 0.0 for prior, _ in seen)
    assert [drop for _, drop in seen] == [0.4, 0.35, 0.3, 0.25, 0.2, 0.15, 0.1, 0.05]


def the_prior_is_no_reason_to_be_chosen() -> None:
    """Derived in mid-search, with the prior still there, an edge goes by its logits alone."""
    model = small()
    run = run_of(model, EDARTS(prior=3.0, most_skips=None), steps=8)
    set_logits(model, torch.tensor([0.1, 0.0]))
    assert mixed(model)["cells.0.edges.0"].probabilities()[1] > 0.9
    run.finish()
    assert {edit.form for edit in run.edits} == {"skip_connect"}


def surplus_skips_take_their_second_best() -> None:
    """Of three edges with skips 3, 2 and 1, the limit of two leaves the first two."""
    model = small(((0, 1), (2,)))
    with torch.no_grad():
        for name, part in mixed(model).items():
            part.logits[0] = 3.0 - int(name.rpartition(".")[2])
    run = run_of(model, EDARTS(most_skips=2))
    run.finish()
    kept = [edit.form for edit in run.edits if edit.layer.startswith("cells.0.")]
    assert kept == ["skip_connect", "skip_connect", "sep_conv_3x3"]


def logits_move_after_the_warm_up_only() -> None:
    """With m = 2 and a warm-up of 4 of 8 steps, architecture steps come after 4, 6 and 8."""
    model = small()
    run, moved = run_of(model, EDARTS(warmup=0.5, every=2, batch=8), steps=8), []
    for _ in range(8):
        before = mixed(model)["cells.0.edges.0"].logits.clone()
        run.after_step()
        after = mixed(model)["cells.0.edges.0"].logits
        moved.append(not torch.equal(before, after))
        assert not after.requires_grad
    assert moved == [False, False, False, True, False, True, False, True]


def what_cannot_be_searched_is_refused() -> None:
    for method, sentence in (
        (EDARTS(warmup=1.0), "warmup"),
        (EDARTS(batch=1), "batch must be int of at least 2"),
        (EDARTS(anneal=2.0), "anneal"),
    ):
        with pytest.raises(MethodError, match=sentence):
            run_of(small(), method)
    with pytest.raises(MethodError, match="give Data"):
        start(small(), EDARTS(), data=Data(noise().train), steps=4)


def skip_connections_lose_a_share_of_their_outputs() -> None:
    """In training only, and no other operation does; what is left is scaled up."""
    torch.manual_seed(0)
    ops = {name: operation(name, 4, 1, affine=False) for name in OPS}
    part, x = MixedOp(ops).train(), torch.ones(16, 4, 16, 16)
    part.drop.fill_(0.25)
    part.logits.copy_(torch.tensor([1e4, 0.0]))
    out = part(x)
    assert float((out == 0).float().mean()) == pytest.approx(0.25, abs=0.02)
    assert torch.allclose(out[out != 0], torch.tensor(1 / 0.75))
    assert torch.equal(part.eval()(x), x)
    part.train().logits.copy_(torch.tensor([0.0, 1e4]))
    assert torch.allclose(part(x), ops["sep_conv_3x3"](x))


def a_search_drops_all_skips_and_stops_at_its_end() -> None:
    """With dropout two passes differ, without it, or in evaluation, they are alike."""
    model = small(ops=("skip_connect", "max_pool_3x3"))
    set_logits(model, torch.tensor([1e4, 0.0]))
    x, run = torch.randn(4, 3, 6, 6), run_of(model, EDARTS(skip_dropout=0.5, warmup=0.9), steps=2)
    stride_1 = [
        p for n, p in mixed(model).items() if isinstance(p.ops["skip_connect"], nn.Identity)
    ]
    assert stride_1 and all(float(p.drop) == 0.5 for p in mixed(model).values())
    model.train()
    assert not torch.allclose(model(x), model(x))
    run.after_step()
    run.after_step()
    assert all(float(p.drop) == 0 for p in mixed(model).values())
    assert torch.allclose(model(x), model(x), atol=1e-6)


# ---------------------------------------------------------------- partial channels


def a_share_of_the_channels_is_seen() -> None:
    """The first of every two go through the operation; the rest go round, and they alternate."""
    part, x = Partial(nn.Conv2d(2, 2, 1, bias=False), 2, 1), torch.randn(3, 4, 5, 5)
    seen = part.op(x[:, :2])
    assert torch.equal(part(x), torch.stack([seen[:, 0], x[:, 2], seen[:, 1], x[:, 3]], 1))
    halved = Partial(operation("max_pool_3x3", 2, 2, affine=False).eval(), 2, 2)
    assert halved(x).shape == (3, 4, 3, 3)
    assert torch.equal(halved(x)[:, 1], F.max_pool2d(x[:, 2], 2, 2, ceil_mode=True))


def a_search_on_some_channels_is_cheaper_and_derives_as_any() -> None:
    """One-hot shares give what the derived network gives, and the logits are shared by kind."""
    found = []
    for share in (1, 2):
        torch.manual_seed(0)
        model = supernet(((0, 1),), OPS, cells=3, channels=4, classes=4, share=share).eval()
        set_logits(model, torch.tensor([0.0, 1e4]))
        found.append(cost(model, (torch.zeros(1, 3, 6, 6),)).macs)
    assert found[1] < found[0] and len(architecture(model)) == 4
    x = torch.randn(4, 3, 6, 6)
    before, run = model(x), run_of(model, EDARTS())
    placed_ = placed(model, derive(model))
    assert list(placed_)[0] == "cells.0.edges.0.op"
    run.apply(*[Choose(layer, op) for layer, op in placed_.items()])
    assert not mixed(model) and torch.allclose(model.eval()(x), before, atol=1e-5)
    with pytest.raises(ModelError, match="3 equal parts"):
        supernet(channels=4, share=3)


# ---------------------------------------------------------------- the network that was found


def found_network() -> CellNetwork:
    torch.manual_seed(0)
    cell = Genotype.of((("sep_conv_3x3", 0), ("skip_connect", 1)))
    return evaluation(cell, cells=3, channels=2, classes=4)


def paths_are_dropped_more_and_more_often() -> None:
    """At three of four steps a rate of 0.4 is one of 0.3; skip connections stay."""
    model = found_network().train()
    run = run_of(model, EDARTS(drop_path=0.4, auxiliary=0.0), steps=4)
    path, x = model.cells[0].edges[0], torch.randn(2000, 2, 3, 3)
    assert len(paths(model)) == 5  # three convolutions, two skips that halve; no identity
    whole = path(x)
    assert whole.abs().flatten(1).sum(1).all()
    run.step = 3
    kept = path(x)
    gone = kept.abs().flatten(1).sum(1) == 0
    assert float(gone.float().mean()) == pytest.approx(0.3, abs=0.04)
    assert torch.allclose(kept[~gone], whole[~gone] / 0.7, atol=1e-5)
    assert path.eval()(x).abs().flatten(1).sum(1).all()
    run.finish()
    assert not any(m._forward_hooks for m in model.modules())


def a_head_within_learns_the_classes_too() -> None:
    """Its weighted loss is added, reaches two thirds of the depth, and moves its own weights."""
    model = found_network().train()
    names = list(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    run = start(
        model, EDARTS(drop_path=0.0, auxiliary=0.5), data=noise(), steps=4, optimizer=optimizer
    )
    x, labels = noise().train
    output = model(x)
    given = run.aside.get(Reading).values["cells.2"]
    loss = run.loss(0.0 * output.sum(), output, (x, labels))
    head = {k: v.clone() for k, v in run.state["heads"]["auxiliary"].items()}
    assert torch.isclose(loss, 0.5 * F.cross_entropy(answer(head, given.relu()), labels))
    loss.backward()
    assert model.head.weight.grad is not None and not model.head.weight.grad.any()
    assert model.stem[0].weight.grad is not None and model.stem[0].weight.grad.any()
    run.after_step()
    assert not torch.equal(head["last"], run.state["heads"]["auxiliary"]["last"])
    run.finish()
    assert list(model.state_dict()) == names and not model.cells[2]._forward_hooks


def set_logits(model: nn.Module, values: Tensor) -> None:
    with torch.no_grad():
        for part in mixed(model).values():
            part.logits.copy_(values)


CASES = [
    Case(
        "edarts",
        spec="edarts(warmup=0.2, every=1, batch=4)",
        toys=("supernet", "cells"),
        refuses={name: "mixed operations" for name in TOYS},
        own=(
            works_as_darts_with_dropped_edges,
            prior_and_dropout_fade_on_time,
            the_prior_is_no_reason_to_be_chosen,
            surplus_skips_take_their_second_best,
            logits_move_after_the_warm_up_only,
            what_cannot_be_searched_is_refused,
            skip_connections_lose_a_share_of_their_outputs,
            a_search_drops_all_skips_and_stops_at_its_end,
            a_share_of_the_channels_is_seen,
            a_search_on_some_channels_is_cheaper_and_derives_as_any,
            paths_are_dropped_more_and_more_often,
            a_head_within_learns_the_classes_too,
        ),
    ),
]
