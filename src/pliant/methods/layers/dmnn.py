"""DMNN: every input chooses which paths of which blocks run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from pliant.data import unpack
from pliant.edits import Swap
from pliant.families.layers import routes
from pliant.method import Method
from pliant.registry import In, Paper, register
from pliant.run import Run
from pliant.surgery.prove import prove_same


@register(
    "dmnn",
    paper=Paper(
        "Dynamic Multi-Path Neural Network",
        "Y. Su, Y. Wu, K. Chen, D. Liang, X. Hu",
        "ICPR",
        2020,
        "https://arxiv.org/abs/1902.10949",
    ),
)
@dataclass(frozen=True)
class DMNN(Method):
    """Divides residual blocks into paths with gates, so that each input chooses its network.

    A small recurrent controller for each block opens and closes its paths; a block whose paths are
    all closed is skipped. A penalty holds the mean share of multiply-accumulates that run at
    ``rate``, and where labels are classes, heads that guess them from the controllers' states
    teach these while they train. Paths divide the hidden channels, so the network begins as it
    was. It does not become smaller, and its counted cost is that of all paths: what runs depends
    on the input, and its share is noted at the end. Set ``sparse`` of a stage to run open paths
    alone; whether that is faster is for a measurement to say.

    *Measured* (bench ``layers-items``: a small ResNet, six epochs of 1,024 reduced photographs, two
    seeds): asked for 0.4, 0.6 and 0.8 of the products, 0.48, 0.80 and 1.00 of them ran on test
    images: training holds the rate of gates that are drawn, and those that are decided lie above it
    in a training so short. Asked for half, 24.5 ± 4.0 % are right with two paths, 23.3 ± 0.6 %
    with one, and 29.8 ± 1.1 % in a narrower network without gates, of fewer products: it trailed.

    *Departs from the paper*: controllers have a layer norm in the place of a batch norm, states
    begin anew in each stage, and the categories are the labels themselves. Paths of a block are a
    share of it, also where the paper makes bottlenecks anew, which are left alone here.

    >>> DMNN(paths=4, rate=0.7).width
    64
    """

    paths: Annotated[int, In(1, 64)] = 2  # N, of each block
    rate: Annotated[float, In(0, 1)] = 0.5  # t, share of the blocks' products that shall run
    width: Annotated[int, In(1, 1024)] = 64  # d, of the controllers' states
    strength: Annotated[float, In(0, 100)] = 2.0  # lambda_r, weight of (R - t)^2
    category: Annotated[float, In(0, 10)] = 0.1  # lambda_c, weight of the heads' loss
    temperature: Annotated[float, In(0.1, 10)] = 1.0  # tau, of the softmax gradients go through
    warm: Annotated[float, In(0, 1)] = 0.05  # share of the training in which all gates are open
    only: tuple[str, ...] = ()  # name patterns of the rows (nn.Sequential) to take
    exclude: tuple[str, ...] = ()  # name patterns of the rows to leave alone

    def prepare(self, run: Run) -> None:
        """Divide the blocks."""
        rows = routes.divisible(run.model, self.paths, self.only, self.exclude)
        costs = routes.products_of(run, rows)
        for name in run.layers:
            run.keep(name, "no residual block of a row holds it, or the block cannot be divided")
        classes = routes.classes_of(run) if self.category else 0
        spec = {"paths": self.paths, "width": self.width, "classes": classes}
        edits = [Swap(n, "multi_path", {"blocks": b, **spec}, run.seed) for n, b in rows.items()]
        prove_same(run.model, run.example, edits, "dmnn divides blocks into paths that add up")
        run.apply(*edits)
        run.state.update(stages=list(rows), costs=costs)
        routes.watch(run, self.temperature)
        self._force(run)

    def loss(self, run: Run, loss: Tensor, output: Any, batch: Any) -> Tensor:
        """Add the distance from the rate, and what the heads lose."""
        gates, states = run.aside.get(routes.Seen).take()
        if not gates:
            return loss
        share = routes.rate_of([gate.mean(0) for gate in gates], run.state["costs"])
        loss = loss + self.strength * (share - self.rate) ** 2
        guessed = routes.guesses(run, states, unpack(batch)[1]) if self.category else None
        return loss if guessed is None else loss + self.category * guessed

    def after_step(self, run: Run) -> None:
        """Let gates close when the warm-up is over."""
        self._force(run)

    @torch.no_grad()
    def finalize(self, run: Run) -> None:
        """Take the heads out, and note the share that runs and how many patterns of gates occur."""
        routes.force(run, opened=False)
        run.apply(*(Swap(name, "multi_path_routed") for name in routes.with_heads(run)))
        gates = routes.gates_of(run)
        share = routes.rate_of([gate.mean(0) for gate in gates], run.state["costs"])
        run.note(rate=float(share), patterns=len(torch.cat(gates, 1).unique(dim=0)))

    def _force(self, run: Run) -> None:
        routes.force(run, opened=bool(run.steps) and run.step < self.warm * run.steps)
