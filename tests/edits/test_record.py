"""Compressions in a row: what has been made of a network goes with it, into every file."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pliant
from pliant.edits import Edit, Factor, Fold, Insert, Prune, Remove, Swap, Widen, made, replay
from pliant.errors import ArtifactError, EditError
from pliant.files import artifact
from pliant.testing.compressed import same_tensors

X = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))
BUDGET = "params=0.8"


def build() -> Any:
    torch.manual_seed(1)
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 24, 3), nn.ReLU(), nn.Conv2d(24, 24, 3), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 4)),
    )


def compressed(net: nn.Module, method: str, budget: str | None = BUDGET) -> pliant.Result:
    return pliant.compress(net, (X, torch.arange(len(X)) % 4), method, budget)


def loads(path: Path, wanted: nn.Module, dense: Callable[[], nn.Module] = build) -> nn.Module:
    back = artifact.load(path, dense).eval()
    same_tensors(wanted, back, "loaded")
    with torch.no_grad():
        assert torch.equal(back(X), wanted.eval()(X))
    return back


ROWS = {
    "twice": ("magnitude", "magnitude"),
    "four times": ("magnitude",) * 4,
    "pruned, then factorized": ("magnitude", "energy"),
    "folded, pruned, quantized": ("fold", "magnitude", "groupwise_ptq"),
    "random, then pruned": ("random", "magnitude", "random"),
    "pruned, then elastic": ("magnitude", "elastic"),
    "pruned, then coded": ("magnitude", "hac"),
}


@pytest.mark.parametrize("row", ROWS)
def test_a_network_is_compressed_again_and_again(row: str, tmp_path: Path) -> None:
    net = build()
    for method in ROWS[row]:
        free = method in ("fold", "hac", "groupwise_ptq", "elastic")
        result = compressed(net, method, None if free else BUDGET)
        net = result.model
        loads(result.save(tmp_path / "a.pliant"), net)


def test_a_file_is_loaded_compressed_and_saved_again(tmp_path: Path) -> None:
    net, path = build(), tmp_path / "a.pliant"
    rows: tuple[Edit, ...] = ()
    for _ in range(3):
        result = compressed(net, "magnitude")
        net, rows = loads(result.save(path), result.model), (*rows, *result.edits)
        assert artifact.inspect(path).edits == rows


def copied(net: nn.Module) -> nn.Module:
    return copy.deepcopy(net)


def pickled(net: nn.Module) -> Any:
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def cast(net: nn.Module) -> nn.Module:
    return net.double().float().train()


@pytest.mark.parametrize("change", [copied, pickled, cast])
def test_what_was_made_survives_what_happens_between(change: Any, tmp_path: Path) -> None:
    net = change(compressed(build(), "magnitude").model)
    result = compressed(net, "magnitude")
    loads(result.save(tmp_path / "a.pliant"), result.model)


def test_runs_in_loops_of_ones_own_follow_one_another(tmp_path: Path) -> None:
    net, path = build(), tmp_path / "a.pliant"
    for method in ("magnitude", "energy"):
        run = pliant.start(net, pliant.method(method), pliant.Budget(params=0.8), example=(X,))
        run.finish()
        loads(artifact.save(path, net, run.edits), net)
    assert artifact.inspect(path).edits == made(net)


def test_a_network_that_grew_shrinks_again(tmp_path: Path) -> None:
    """New kinds of edits and old ones in one row."""
    net, wider = build().eval(), (*range(16), 0, -1)
    edits: list[Edit] = [
        *(Widen("0", "out", wider, 16), Widen("1", "channels", wider, 16)),
        *(Widen("3", "in", wider, 16), Insert("5", "copy", {"start": "fresh"})),
        *(Swap("3", "separable", {"multiplier": 2}), Remove("5.layer")),
    ]
    replay(net, edits)
    result = compressed(net, "magnitude")
    loads(result.save(tmp_path / "a.pliant"), result.model)
    assert artifact.inspect(tmp_path / "a.pliant").edits[:6] == tuple(edits)


class Head(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.last = body, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(x).relu())


def test_a_compressed_network_becomes_a_part_of_another(tmp_path: Path) -> None:
    """Its edits are those of its part then, also where they name several layers."""
    body = compressed(compressed(build(), "fold", None).model, "magnitude").model
    torch.manual_seed(2)
    result = compressed(Head(body), "magnitude")
    path = result.save(tmp_path / "a.pliant")
    loads(path, result.model, lambda: Head(build()))
    first = next(edit for edit in artifact.inspect(path).edits if isinstance(edit, Fold))
    assert (first.layer, first.into) == ("body.1", "body.0")


def test_a_size_of_an_elastic_network_is_compressed_further(tmp_path: Path) -> None:
    path = tmp_path / "a.pliant"
    compressed(compressed(build(), "magnitude").model, "elastic", None).save(path)
    small = pliant.load(path, build, at=0.6).eval()
    result = compressed(small, "magnitude")
    loads(result.save(path), result.model)


def test_a_long_row_of_prunings_can_be_read(tmp_path: Path) -> None:
    """A unit at a time, as many times as there are units to spare: more edits than modules."""
    net = nn.Sequential(nn.Linear(48, 4))
    edits = [Prune("0", "in", tuple(range(size - 1)), size) for size in range(48, 2, -1)]
    replay(net, edits)
    path = artifact.save(tmp_path / "a.pliant", net, edits[-1:])
    back = artifact.load(path, nn.Sequential(nn.Linear(48, 4)))
    same_tensors(net, back, "loaded")


# ---------------------------------------------------------------- who says what was made


def test_edits_made_without_us_are_the_callers_to_name(tmp_path: Path) -> None:
    edits: list[Edit] = [Factor("3", "spatial", (4,)), Factor("9", "svd", (2,))]
    net = build().eval()
    replay(net, edits[:1])
    edits[1].apply(net)  # by itself, it leaves no note
    loads(artifact.save(tmp_path / "a.pliant", net, edits), net)


def test_other_edits_than_those_made_are_refused(tmp_path: Path) -> None:
    net = build().eval()
    edits: list[Edit] = [Factor("3", "spatial", (4,)), Factor("9", "svd", (2,))]
    replay(net, edits)
    for wrong in (edits[:1], edits[::-1], [Factor("9", "svd", (3,))], [*edits, edits[0]][1:]):
        with pytest.raises(EditError, match="made by 2 edits, of which"):
            artifact.save(tmp_path / "a.pliant", net, wrong)
    assert not list(tmp_path.iterdir())
    for right in ((), edits[1:], edits):
        loads(artifact.save(tmp_path / "a.pliant", net, right), net)


def test_the_note_is_a_plan_without_tensors() -> None:
    net = build()
    kernels = (torch.zeros(2, 24), torch.zeros(4, 2))
    replay(net, [Factor("9", "svd", (2,), kernels)])
    (noted,) = made(net)
    assert isinstance(noted, Factor) and noted.kernels is None and noted.ranks == (2,)
    with pytest.raises(EditError):
        replay(net, [Factor("9", "svd", (2,))])
    assert len(made(net)) == 1  # what failed was not made
    assert not any("edits" in name for name in net.state_dict())


# ---------------------------------------------------------------- files that ask for too much


def spec(**others: Any) -> dict[str, Any]:
    return {"channels": 16, "kernel": 3, "dims": 2, "identity": True} | others


HUGE: dict[str, tuple[Edit, ...]] = {
    "channels": (Insert("3", "conv", spec(channels=10**6)),),
    "kernel": (Insert("3", "residual", spec(kernel=10**9 + 1)),),
    "features": (Insert("9", "linear", {"features": 10**9, "identity": True}),),
    "places": (Insert("3", "scatter", {"places": (0,), "of": 10**11}),),
    "copies": (
        *(Insert(f"9{'.layer' * depth}", "copy", {"start": "same"}) for depth in range(40)),
        *(
            Insert(f"9{'.layer' * depth}", "copy", {"start": "same"}, 1)
            for depth in range(38, 0, -1)
        ),
    ),
}


@pytest.mark.parametrize("given", ["built", "function"])
@pytest.mark.parametrize("what", HUGE)
def test_a_file_that_asks_for_too_much_is_refused_at_once(
    what: str, given: str, tmp_path: Path
) -> None:
    path = artifact.save(tmp_path / "a.pliant", build(), HUGE[what])
    says = "more than .* modules" if what == "copies" else "another architecture|below|damaged"
    with pytest.raises(ArtifactError, match=says):
        artifact.load(path, build() if given == "built" else build)
