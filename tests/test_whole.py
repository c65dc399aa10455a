"""Channels leave networks whose example is one sample as a whole, as a graph is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import pliant
from pliant.surgery.batch import Batch, in_one
from pliant.surgery.marks import codes_of
from pliant.surgery.prove import cuttable

NODES, EDGES = 9, 20
DRAWN = torch.Generator().manual_seed(0)
X = torch.randn(NODES, 6, generator=DRAWN)
LINKS = torch.randint(0, NODES, (2, EDGES), generator=DRAWN)
ADJACENT = (torch.rand(NODES, NODES, generator=DRAWN) < 0.4).float()
GRAPH_OF = torch.tensor([0] * 4 + [1] * 5)


class Graph(nn.Module):
    """Two layers on nodes, and what happens between nodes."""

    def __init__(self, run: Callable[..., Tensor], norm: bool = False) -> None:
        super().__init__()
        self.run = run
        self.first, self.second, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.norm = nn.BatchNorm1d(8) if norm else nn.Identity()

    def forward(self, x: Tensor, how: Any) -> Any:
        return self.run(self, x, how)


def passed(x: Tensor, links: Tensor) -> Tensor:
    return torch.zeros(len(x), x.shape[1]).index_add(0, links[1], x[links[0]])


def messages(net: Any, x: Tensor, links: Tensor) -> Tensor:
    x = F.relu(passed(net.norm(net.first(x)), links))
    return net.head(F.relu(passed(net.second(x), links)) + x)


def products(net: Any, x: Tensor, adjacent: Tensor) -> Tensor:
    return net.head(adjacent @ F.relu(net.second(adjacent @ F.relu(net.first(x)))))


def means(net: Any, x: Tensor, graph_of: Tensor) -> Tensor:
    x = F.relu(net.second(F.relu(net.first(x))))
    total = torch.zeros(2, x.shape[1]).index_add_(0, graph_of, x)
    return net.head(total / torch.bincount(graph_of)[:, None])


def scattered(net: Any, x: Tensor, links: Tensor) -> Tensor:
    x = net.first(x)
    sent = x[links[0]]
    x = torch.zeros_like(x).scatter_add(0, links[1][:, None].expand_as(sent), sent)
    return net.head(F.relu(net.second(x)).mean(0))


NETS: dict[str, tuple[Callable[[], Graph], Tensor, int]] = {
    "messages": (lambda: Graph(messages, norm=True), LINKS, 1),
    "products": (lambda: Graph(products), ADJACENT, 2),
    "means": (lambda: Graph(means), GRAPH_OF, 2),
    "scattered": (lambda: Graph(scattered), LINKS, 2),
}


@pytest.mark.parametrize("name", NETS)
def test_channels_of_nodes_leave(name: str) -> None:
    build, how, kinds = NETS[name]
    groups, reasons = cuttable(build(), (X, how))
    assert [len(group.units) for group in groups] == [8] * kinds
    assert reasons == {"head": "its channels are outputs of the network"}


def test_a_cut_graph_network_comes_back_from_its_file(tmp_path: Path) -> None:
    build, how, _ = NETS["messages"]
    found = pliant.compress(build(), None, "magnitude", "params=0.7", example=(X, how))
    assert found.report.met
    found.save(tmp_path / "net.pliant")
    again = pliant.load(tmp_path / "net.pliant", build()).eval()
    assert torch.equal(again(X, how), found.model.eval()(X, how))


def test_channels_leave_between_packed_sequences() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.rows = nn.Linear(4, 8), nn.Linear(8, 2), nn.GRU(2, 3)

        def forward(self, x: PackedSequence) -> Any:
            rows = self.second(F.relu(self.first(x.data)))
            return self.rows(PackedSequence(rows, x.batch_sizes))[1][0]

    example = (pack_sequence([torch.randn(3, 4), torch.randn(2, 4)]),)
    assert [group.name for group in cuttable(Packed(), example)[0]] == ["first"]


def test_what_not_every_pass_has_seen_is_not_used() -> None:
    """Where a network goes another way in some passes, marks cannot be put together."""
    batch, used = Batch(whole=True), list[Tensor]()
    codes = {("a", "out"): codes_of(2)}
    for place in range(3):
        batch.begin(in_one({("a", "out"): codes["a", "out"][place][None]}))
        batch.when(torch.ones(1, 2), used.append)
        if place:
            batch.when(torch.ones(1, 2), used.append)
    batch.end(in_one(codes))
    assert [len(marks) for marks in used] == [3]
