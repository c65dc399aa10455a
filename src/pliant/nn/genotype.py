"""Cells as plain data: who reads whom, and what stands on each edge.

Cells number their states: 0 and 1 are the outputs of the last but one and of the last cell, 2 is
the first node. A node is the sum of its edges; the nodes, concatenated, are the cell's output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pliant.errors import ModelError
from pliant.nn.operations import OPERATIONS

Wiring = tuple[tuple[int, ...], ...]
"""For every node the states it reads, such as ((0, 1), (0, 1), (1, 0), (0, 2))."""

Nodes = tuple[tuple[tuple[str, int], ...], ...]
"""For every node its edges: (operation, state it reads)."""

DARTS_V2_WIRING: Wiring = ((0, 1), (0, 1), (1, 0), (0, 2))


def dense(nodes: int = 4) -> Wiring:
    """Return the wiring of DARTS: every node reads all states before it (14 edges for 4 nodes)."""
    return tuple(tuple(range(2 + node)) for node in range(nodes))


def chain(nodes: int = 4) -> Wiring:
    """Return a deep wiring: every node reads the node before it and the last cell's output."""
    return ((0, 1), *((1 + node, 1) for node in range(1, nodes)))


@dataclass(frozen=True)
class Layout:
    """What one kind of cell looks like: its wiring, and the candidates of every edge.

    Args:
        wiring: see `Wiring`.
        ops: names of candidates for every edge, node by node; one name is a fixed operation.

    Raises:
        ModelError: a node reads a state that is not before it or one state twice, or an edge has
            no candidates or unknown ones.
    """

    wiring: Wiring
    ops: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        for node, reads in enumerate(self.wiring):
            if not reads or len(set(reads)) < len(reads) or set(reads) - set(range(2 + node)):
                raise ModelError(
                    f"Node {node} of a cell must read different states below {2 + node}, "
                    f"not {reads}."
                )
        if len(self.ops) != len(self.edges):
            raise ModelError(
                f"A wiring of {len(self.edges)} edges needs candidates for each, not "
                f"{len(self.ops)} rows of them."
            )
        for names in self.ops:
            unknown = [name for name in names if name not in OPERATIONS]
            if not names or unknown or len(set(names)) < len(names):
                raise ModelError(
                    f"An edge needs different operations out of {', '.join(OPERATIONS)}, "
                    f"not {', '.join(map(str, names)) or 'none at all'}."
                )

    @classmethod
    def of(cls, wiring: Wiring, ops: Sequence[str]) -> Layout:
        """Make a layout with the same candidates on every edge."""
        return cls(wiring, (tuple(ops),) * sum(map(len, wiring)))

    @property
    def edges(self) -> tuple[tuple[int, int], ...]:
        """All edges in order, as (node, state it reads)."""
        return tuple((node, state) for node, reads in enumerate(self.wiring) for state in reads)


@dataclass(frozen=True)
class Genotype:
    """What a search found: the edges and operations of the normal and of the reduction cell.

    >>> Genotype.of((("skip_connect", 0), ("sep_conv_3x3", 1))).normal
    ((('skip_connect', 0), ('sep_conv_3x3', 1)),)
    """

    normal: Nodes
    reduce: Nodes

    @classmethod
    def of(cls, *nodes: tuple[tuple[str, int], ...]) -> Genotype:
        """Make a genotype whose two cells are alike."""
        return cls(nodes, nodes)

    def __post_init__(self) -> None:
        self.layouts()  # refuses what is no cell

    def layouts(self) -> tuple[Layout, Layout]:
        """Return the normal and the reduction cell as layouts with one operation per edge."""
        return _layout(self.normal), _layout(self.reduce)

    def count(self, op: str, *, reduction: bool = False) -> int:
        """Count the edges of a cell that hold an operation."""
        nodes = self.reduce if reduction else self.normal
        return sum(name == op for node in nodes for name, _ in node)

    def plain(self) -> dict[str, Any]:
        """Return lists and strings, for JSON."""
        return {
            "normal": [[list(edge) for edge in node] for node in self.normal],
            "reduce": [[list(edge) for edge in node] for node in self.reduce],
        }

    @classmethod
    def from_plain(cls, value: Any) -> Genotype:
        """Read a genotype from what `plain` returned.

        Raises:
            ModelError: it is something else.
        """
        try:
            kinds = (value["normal"], value["reduce"])
            read = [
                tuple(tuple((str(op), int(state)) for op, state in node) for node in nodes)
                for nodes in kinds
            ]
        except (TypeError, KeyError, ValueError) as error:
            raise ModelError(
                "A genotype must have normal and reduce, each a list of nodes with edges "
                f"[operation, state], not {str(value)[:80]}."
            ) from error
        return cls(*read)


def _layout(nodes: Nodes) -> Layout:
    wiring = tuple(tuple(state for _, state in node) for node in nodes)
    return Layout(wiring, tuple((op,) for node in nodes for op, _ in node))


DARTS_V2 = Genotype(
    normal=(
        (("sep_conv_3x3", 0), ("sep_conv_3x3", 1)),
        (("sep_conv_3x3", 0), ("sep_conv_3x3", 1)),
        (("sep_conv_3x3", 1), ("skip_connect", 0)),
        (("skip_connect", 0), ("dil_conv_3x3", 2)),
    ),
    reduce=(
        (("max_pool_3x3", 0), ("max_pool_3x3", 1)),
        (("skip_connect", 2), ("max_pool_3x3", 1)),
        (("max_pool_3x3", 0), ("skip_connect", 2)),
        (("skip_connect", 2), ("max_pool_3x3", 1)),
    ),
)
"""The cell that second-order DARTS found on CIFAR-10, as its authors published it."""
