"""Search methods: small supernets whose best operations are known beforehand."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pliant.data import Data
from pliant.errors import MethodError
from pliant.families.search.bilevel import mixed
from pliant.method import Method
from pliant.methods.search.edarts import DARTS, EDARTS
from pliant.nn.cells import CellNetwork
from pliant.nn.genotype import Genotype, dense
from pliant.registry import build
from pliant.run import Run, start
from pliant.testing import Case
from pliant.testing.toys import TOYS
from pliant.zoo.darts import supernet

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


def set_logits(model: nn.Module, values: Tensor) -> None:
    with torch.no_grad():
        for part in mixed(model).values():
            part.logits.copy_(values)


CASES = [
    Case(
        "edarts",
        spec="edarts(warmup=0.2, every=1, batch=4)",
        toys=("supernet",),
        refuses={name: "mixed operations" for name in TOYS},
        own=(
            works_as_darts_with_dropped_edges,
            prior_and_dropout_fade_on_time,
            the_prior_is_no_reason_to_be_chosen,
            surplus_skips_take_their_second_best,
            logits_move_after_the_warm_up_only,
            what_cannot_be_searched_is_refused,
        ),
    ),
]
