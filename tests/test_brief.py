"""Passes with marks may be brief: what is found is the same, in time that grows with the depth."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.families.prune.allocate import after, savings
from pliant.families.prune.ranking import Unit
from pliant.run import start
from pliant.surgery.brief import Brief, Enough
from pliant.surgery.graph import trace
from pliant.surgery.probe import Probe
from pliant.surgery.prove import cuttable, edits_of

X = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """Adds what two layers in a row make."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 40), nn.Linear(40, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu(self.up(x)))


class Deep(nn.Module):
    """Many blocks; if asked, what a layer in front of them made is added at the end."""

    def __init__(self, depth: int, *, across: bool = False) -> None:
        super().__init__()
        self.first, self.other = nn.Linear(6, 16), nn.Linear(6, 16) if across else None
        self.blocks = nn.Sequential(*(Block(16) for _ in range(depth)))
        self.last = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Any:
        other = 0.0 if self.other is None else self.other(x)
        return self.last(self.blocks(self.first(x)) + other)


def test_brief_passes_find_what_whole_ones_find() -> None:
    model, seen = Deep(24), dict[str, Any]()
    found = trace(model, (X,), brief=True, seen=seen)
    assert "short" in seen
    assert found == trace(model, (X,))


def test_what_brief_passes_miss_is_found_in_full() -> None:
    """A tie that shows only behind many layers: the proof fails, so passes are made in full."""
    model, seen = Deep(24, across=True), dict[str, Any]()
    brief, whole = trace(model, (X,), brief=True, seen=seen), trace(model, (X,))
    assert "short" in seen
    assert len(brief[0]) == len(whole[0]) + 1
    assert cuttable(model, (X,))[0] == whole[0]


def test_layers_are_read_as_often_as_the_network_is_deep(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    plain = Probe._arrive

    def counted(self: Probe, *args: Any) -> None:
        reads.append(1)
        plain(self, *args)

    monkeypatch.setattr(Probe, "_arrive", counted)
    counts = []
    for depth in (20, 40):
        reads.clear()
        trace(Deep(depth), (X,), brief=True)
        counts.append(len(reads))
    assert counts[1] < 2.4 * counts[0]


def test_a_block_gives_again_what_it_gave_until_something_is_marked() -> None:
    calls: list[int] = []

    class Counted(Block):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(len(x))
            return super().forward(x)

    block, brief = Counted(4), Brief(True)
    forward = brief.passing("block", block)
    row = torch.randn(1, 4)
    for samples in (3, 5):
        brief.begin([("elsewhere", "out")], samples)
        found = forward(row.repeat(samples, 1))
        assert torch.allclose(found, block.forward(row).repeat(samples, 1), atol=1e-6)
    assert calls == [3, 1, 1]
    brief.begin([("block.up", "out")], 2)  # a layer in it is to be marked
    forward(row.repeat(2, 1))
    brief.begin([("elsewhere", "out")], 2)
    brief.wrote(("elsewhere", "out"))
    forward(row.repeat(2, 1))
    assert calls == [3, 1, 1, 2, 2]


def test_a_pass_ends_only_when_all_is_marked_and_nothing_new_comes() -> None:
    brief = Brief(True)
    brief.begin([("a", "out"), ("b", "out")], 4)
    brief.wrote(("a", "out"))
    for _ in range(30):
        brief.read(new=False)
    brief.wrote(("b", "out"))
    for _ in range(11):
        brief.read(new=False)
    brief.read(new=True)
    with pytest.raises(Enough):
        for _ in range(12):
            brief.read(new=False)
    assert brief.short


def test_savings_of_a_unit_are_those_of_the_whole_network() -> None:
    """What is counted of the layers that a unit passes is what its leaving saves."""
    run = start(Deep(3), "magnitude(start=1.0)", example=(X,), steps=1)
    groups = cuttable(run.model, (X,))[0]
    gone = [Unit(0.0, group.name, index) for group in groups for index in (0, 3)]
    found = savings(run, groups, gone, ("params", "macs"))
    members = {group.name: [0, 3] for group in groups}
    now, rows = run.planner.now(), run.planner.rows()
    here = after(now, rows, edits_of(run.model, groups, members))
    for group in groups:
        more = edits_of(run.model, groups, {**members, group.name: [0, 3, 1]})
        there = after(now, rows, more)
        share = (here.params - there.params) / now.params + (here.macs - there.macs) / now.macs
        assert found[group.name] == pytest.approx(share)
