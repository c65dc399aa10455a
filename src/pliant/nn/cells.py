"""Networks made of cells whose edges hold one operation, or a mixture of several to search in."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from operator import add

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.errors import ModelError
from pliant.nn.genotype import Genotype, Layout, Nodes
from pliant.nn.mixed import MixedOp, Partial
from pliant.nn.operations import NONE, SKIP, FactorizedReduction, mix_channels, operation


class Cell(nn.Module):
    """Reads the outputs of the two cells before it; its nodes, concatenated, are its output.

    Behind each node and behind the output is an empty row, into which edits can put operations.

    Args:
        layout: wiring, and the candidates of every edge: one is a plain operation, more are a
            `MixedOp`.
        inputs: channels of the last but one and of the last cell's output.
        channels: of every node.
        reduction: whether the edges from the two inputs halve the sides.
        after_reduction: whether the cell before did, so that the two inputs differ in size.
        affine: whether batch norms scale and shift; of candidates they never do, since that
            would blur the logits.
        share: one of so many channels goes through the candidates, see `Partial`.

    Raises:
        ModelError: the channels cannot be divided so.
    """

    def __init__(
        self,
        layout: Layout,
        inputs: tuple[int, int],
        channels: int,
        *,
        reduction: bool,
        after_reduction: bool,
        affine: bool,
        share: int = 1,
    ) -> None:
        super().__init__()
        if share < 1 or channels % share:
            raise ModelError(f"{channels} channels cannot be divided into {share} equal parts.")
        self.layout, self.reduction = layout, reduction
        fit = FactorizedReduction if after_reduction else mix_channels
        self.first = fit(inputs[0], channels, affine=affine)
        self.second = mix_channels(inputs[1], channels, affine=affine)
        self.edges = nn.ModuleList(
            _edge(names, channels, 2 if reduction and state < 2 else 1, affine=affine, share=share)
            for names, (_, state) in zip(layout.ops, layout.edges, strict=True)
        )
        self.nodes = nn.ModuleList(nn.Sequential() for _ in layout.wiring)
        self.after = nn.Sequential()

    def forward(self, before: Tensor, last: Tensor) -> Tensor:
        """Map the outputs of two cells to (N, nodes * channels, H, W)."""
        states = [self.first(before), self.second(last)]
        edges = iter(self.edges)
        for reads, behind in zip(self.layout.wiring, self.nodes, strict=True):
            states.append(behind(reduce(add, [next(edges)(states[state]) for state in reads])))
        out: Tensor = self.after(torch.cat(states[2:], dim=1))
        return out


def _edge(
    names: tuple[str, ...], channels: int, stride: int, *, affine: bool, share: int
) -> nn.Module:
    if len(names) == 1:
        return operation(names[0], channels, stride, affine=affine)
    seen = channels // share
    found = MixedOp({name: operation(name, seen, stride, affine=False) for name in names})
    return Partial(found, share, stride) if share > 1 else found


def core(edge: nn.Module) -> nn.Module:
    """Return what stands on an edge, without what leads some channels round it."""
    return edge.op if isinstance(edge, Partial) else edge


class CellNetwork(nn.Module):
    """Classifies images by a stack of cells; those at a third and at two thirds halve the sides.

    Cells of one kind share the logits of their mixed operations. With one operation on every
    edge it is an ordinary network.

    Args:
        normal: layout of the cells that keep the size.
        reduce: layout of the two cells that halve it.
        cells: how many in all, at least 3.
        channels: of a node in the first cells; doubled at each reduction.
        classes: number of logits.
        inputs: channels of the images.
        affine: whether the cells' batch norms scale and shift; not in a network to search in.
        share: one of so many channels goes through the candidates, see `Partial`.

    Raises:
        ModelError: fewer than 3 cells, or channels that cannot be divided.
    """

    def __init__(
        self,
        normal: Layout,
        reduce: Layout,
        *,
        cells: int,
        channels: int,
        classes: int = 10,
        inputs: int = 3,
        affine: bool,
        share: int = 1,
    ) -> None:
        super().__init__()
        if cells < 3:
            raise ModelError(f"A network of cells needs at least 3 of them, not {cells}.")
        before = last = 3 * channels
        self.stem = nn.Sequential(
            nn.Conv2d(inputs, last, 3, padding=1, bias=False), nn.BatchNorm2d(last)
        )
        self.cells = nn.ModuleList()
        reductions, after = {cells // 3, 2 * cells // 3}, False
        for number in range(cells):
            small = number in reductions
            channels = 2 * channels if small else channels
            layout = reduce if small else normal
            cell = Cell(
                *(layout, (before, last), channels),
                reduction=small, after_reduction=after, affine=affine, share=share,
            )  # fmt: skip
            self.cells.append(cell)
            before, last, after = last, channels * len(layout.wiring), small
        self.head = nn.Linear(last, classes)
        self._share()

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, inputs, H, W) to class scores (N, classes)."""
        before = last = self.stem(x)
        for cell in self.cells:
            before, last = last, cell(before, last)
        out: Tensor = self.head(torch.flatten(F.adaptive_avg_pool2d(last, 1), 1))
        return out

    def kinds(self) -> dict[bool, Cell]:
        """Return the first cell of each kind; the key says whether it reduces."""
        found: dict[bool, Cell] = {}
        for cell in self.cells:
            assert isinstance(cell, Cell)
            found.setdefault(cell.reduction, cell)
        return found

    def _share(self) -> None:
        kinds = self.kinds()
        for cell in self.cells:
            assert isinstance(cell, Cell)
            for edges in zip(cell.edges, kinds[cell.reduction].edges, strict=True):
                own, first = map(core, edges)
                if isinstance(own, MixedOp) and isinstance(first, MixedOp):
                    own.logits = first.logits


# ---------------------------------------------------------------- derivation


def derive(network: CellNetwork, *, keep: int = 2, most_skips: int | None = None) -> Genotype:
    """Read the architecture off the logits: the best operation of every edge, without priors.

    Where a node has more than ``keep`` edges and ``none`` is a candidate, the edges whose best
    operation is most probable stay, as in DARTS. A wiring of two edges per node stays as it is.

    Args:
        network: with mixed operations.
        keep: edges of a node that stay where edges can be dropped.
        most_skips: skip connections allowed in a cell; of more, those with the smallest logits
            take their second best operation.

    Raises:
        ModelError: an edge has been derived already.
    """
    found = {small: _nodes(cell, keep, most_skips) for small, cell in network.kinds().items()}
    return Genotype(found[False], found[True])


def _nodes(cell: Cell, keep: int, most_skips: int | None) -> Nodes:
    scores = [_scores(cell, place) for place in range(len(cell.edges))]
    kept: list[tuple[int, int]] = []  # (node, place of the edge)
    for node in range(len(cell.layout.wiring)):
        places = [i for i, (target, _) in enumerate(cell.layout.edges) if target == node]
        if all(NONE in cell.layout.ops[i] for i in places):
            ranked = sorted(places, key=lambda i: -_strength(scores[i]))
            places = sorted(ranked[:keep])
        kept += [(node, i) for i in places]
    chosen = {i: _best(scores[i]) for _, i in kept}
    skips = sorted((i for i, op in chosen.items() if op == SKIP), key=lambda i: -scores[i][SKIP])
    for i in skips[most_skips:] if most_skips is not None else ():
        rest = {name: score for name, score in scores[i].items() if name != SKIP}
        chosen[i] = _best(rest) if rest else SKIP
    nodes: list[list[tuple[str, int]]] = [[] for _ in cell.layout.wiring]
    for node, i in kept:
        nodes[node].append((chosen[i], cell.layout.edges[i][1]))
    return tuple(map(tuple, nodes))


def _scores(cell: Cell, place: int) -> dict[str, float]:
    """The logits of an edge by the names of its candidates."""
    edge, names = core(cell.edges[place]), cell.layout.ops[place]
    if isinstance(edge, MixedOp):
        return dict(zip(names, edge.logits.tolist(), strict=True))
    if len(names) > 1:
        raise ModelError("This network has been derived already: its edges are not mixed any more.")
    return {names[0]: 0.0}


def _strength(scores: Mapping[str, float]) -> float:
    """The probability of the best operation but ``none``."""
    shares = torch.tensor(list(scores.values()), dtype=torch.float64).softmax(0).tolist()
    named = zip(scores, shares, strict=True)
    return max((share for name, share in named if name != NONE), default=0.0)


def _best(scores: Mapping[str, float]) -> str:
    """The name with the highest score; ``none`` only where there is nothing else."""
    real = {name: score for name, score in scores.items() if name != NONE} or scores
    return max(real, key=real.__getitem__)


def placed(network: CellNetwork, genotype: Genotype) -> dict[str, str]:
    """Say which operation a genotype puts on each mixed edge, by the edge's name in the network.

    An edge that the genotype dropped gets ``none``.
    """
    found = {}
    for number, cell in enumerate(network.cells):
        assert isinstance(cell, Cell)
        nodes = genotype.reduce if cell.reduction else genotype.normal
        ops = {(node, state): op for node, edges in enumerate(nodes) for op, state in edges}
        for place, edge in enumerate(cell.layout.edges):
            if isinstance(core(cell.edges[place]), MixedOp):
                inner = ".op" if isinstance(cell.edges[place], Partial) else ""
                found[f"cells.{number}.edges.{place}{inner}"] = ops.get(edge, NONE)
    return found
