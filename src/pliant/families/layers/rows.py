"""Rows of blocks: which blocks keep the shape of what they read, one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from torch import nn

from pliant.cost import LayerCost, module_cost
from pliant.nn.filters import WEIGHTED
from pliant.run import Run
from pliant.surgery.select import check_names, matches


@dataclass(frozen=True)
class Row:
    """An ``nn.Sequential`` with blocks in it.

    Args:
        name: of the row.
        channels: for every child, how many it keeps; 0 where it joins no trunk.
    """

    name: str
    channels: tuple[int, ...]


def rows(run: Run, least: int, only: Sequence[str] = (), exclude: Sequence[str] = ()) -> list[Row]:
    """Return the rows with enough blocks that give maps of the shape that they read.

    A block is a module with a forward of its own, or a row, in which there are layers. Of rows
    within rows the outer one is taken.

    Args:
        run: of the network.
        least: blocks of one shape that must follow one another.
        only: name patterns of the rows to take.
        exclude: name patterns of those to leave alone.

    Raises:
        MethodError: a name pattern fits no row.
    """
    names = [n for n, m in run.model.named_modules() if n and type(m) is nn.Sequential]
    check_names(names, (*only, *exclude))
    found: list[Row] = []
    for name in names:
        inner = any(name.startswith(f"{row.name}.") for row in found)
        if inner or (only and not matches(name, only)) or matches(name, exclude):
            continue
        channels = _long(tuple(_kept(run, name)), least)
        if any(channels):
            found.append(Row(name, channels))
    return found


def _long(channels: Sequence[int], least: int) -> tuple[int, ...]:
    """Put 0 where too few blocks of one shape follow one another."""
    runs = [(count, len([*run])) for count, run in groupby(channels)]
    return tuple(count if size >= least else 0 for count, size in runs for _ in range(size))


def _kept(run: Run, name: str) -> Iterator[int]:
    whole = module_cost(run.model, run.example, name)
    module = run.model.get_submodule(name)
    costs = dict(whole.parts)
    for child, part in module.named_children():
        yield _channels(part, costs[child])


def _channels(part: nn.Module, row: LayerCost) -> int:
    composite = not isinstance(part, WEIGHTED) and any(
        isinstance(inner, WEIGHTED) for inner in part.modules()
    )
    same = row.calls == 1 and len(row.input) == 3 and row.input == row.output
    return row.output[0] if composite and same else 0
