"""What helps the network of a found cell to train, and is gone afterwards.

Source: Liu et al., "DARTS: Differentiable architecture search", ICLR 2019: paths are dropped more
and more often, and a head at two thirds of the depth learns the classes too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pliant.data import unpack
from pliant.nn.cells import Cell, CellNetwork, core
from pliant.nn.mixed import MixedOp
from pliant.observe import heads
from pliant.observe.heads import Reading
from pliant.run import Run

WIDTH = 128  # hidden features of the head
DECAY = 3e-4  # of its weights


class Handles:
    """Several hooks that come off together."""

    def __init__(self, handles: Sequence[RemovableHandle]) -> None:
        self.handles = handles

    def remove(self) -> None:
        """Take them out."""
        for handle in self.handles:
            handle.remove()


def paths(network: CellNetwork) -> list[nn.Module]:
    """Return the operations of all edges that can be dropped: not plain skips, nor mixtures."""
    edges = [edge for cell in network.cells if isinstance(cell, Cell) for edge in cell.edges]
    return [edge for edge in edges if not isinstance(core(edge), nn.Identity | MixedOp)]


def begin(run: Run, drop_path: float, auxiliary: float) -> None:
    """Hook what drops paths, and what the head reads.

    Args:
        run: whose network of cells has nothing to choose.
        drop_path: share of paths that is dropped at the end of the training; it rises from 0.
        auxiliary: weight of the loss of the head; there is none at 0.
    """
    network = run.model
    assert isinstance(network, CellNetwork)

    def drop(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        rate = drop_path * run.step / run.steps if run.steps else 0.0
        if not module.training or not rate:
            return None
        kept = torch.rand(len(output), 1, 1, 1, device=output.device) >= rate
        return output * kept / (1 - rate)

    if drop_path:
        run.hook(Handles([path.register_forward_hook(drop) for path in paths(network)]))
    run.state.update(heads={}, momentum={})
    if auxiliary and run.steps:
        run.hook(Reading(network, [f"cells.{2 * len(network.cells) // 3}"]))


def loss(run: Run, loss: Tensor, output: Any, batch: Any, weight: float) -> Tensor:
    """Add the loss of the head, on the labels of the network; of a search there is none.

    Args:
        run: of a network of cells.
        loss: of the network.
        output: of the network.
        batch: from which it came.
        weight: of the head.
    """
    if "heads" not in run.state or not weight or not run.steps:
        return loss
    reading = run.aside.get(Reading)
    (given,) = reading.take().values()
    answers = run.class_scores(output).shape[1]
    head = heads.leaves(run.state, reading, "auxiliary", given, answers, width=WIDTH, seed=run.seed)
    own = run.criterion(heads.answer(head, given.relu()), unpack(batch)[1])
    heads.collect(reading, "auxiliary", head, own)
    reading.batches += 1
    return loss + weight * own


def step(run: Run) -> None:
    """Move the weights of the head, if there is one."""
    if run.state["heads"]:
        rate = run.lr if run.optimizer is not None else 0.01
        heads.step(run.state, run.aside.get(Reading), run.optimizer, rate, DECAY)
