"""eDARTS: searches the operations of cells whose wiring is fixed, in a shallow supernet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch

from pliant.errors import MethodError
from pliant.families.search import bilevel as search
from pliant.families.search.derive import choose
from pliant.method import Method
from pliant.nn.cells import CellNetwork, derive, placed
from pliant.nn.operations import SKIP
from pliant.registry import In, Paper, register
from pliant.run import Run

FAVOURED = "sep_conv_3x3"  # the operation that the paper's analysis found to pay most


@register(
    "edarts",
    paper=Paper(
        "Operation and Topology Aware Fast Differentiable Architecture Search",
        "S. Siddiqui, C. Kyrkou, T. Theocharides",
        "ICPR",
        2020,
        "https://zenodo.org/records/6678111",
    ),
)
@dataclass(frozen=True)
class EDARTS(Method):
    """Finds the operations of a cell by gradient descent, on a wiring that is given.

    The network is a supernet whose edges hold all candidates at once, such as
    ``zoo.build("edarts-search")``. Weights learn on the training split. After a warm-up, every
    few steps the logits of the candidates learn on the validation split (`search.halves` makes
    both). A prior helps the most useful operation and dropout holds skip connections back; both
    fade while the search goes on. At the end every edge keeps its best operation, with its
    weights: the result is a plain network, and its history holds the genotype.

    *Departs from the paper*: only its abstract was at hand. What it says is here: the wiring is
    fixed, important operations get more attention, the supernet is shallow, the optimisation is
    fast. How, is DARTS and its known repairs: the wiring is that of the published DARTS cell, and
    rates, prior, warm-up and the limit on skip connections are ours. `DARTS` has the options of
    first-order DARTS, for ``zoo.darts.supernet(DENSE, DARTS_OPS, cells=8)``.
    """

    alpha_lr: Annotated[float, In(0, open="low")] = 6e-4  # of Adam on the logits alpha
    alpha_decay: Annotated[float, In(0)] = 1e-3  # weight decay of the logits
    every: Annotated[int, In(1)] = 2  # m, weight steps between two architecture steps
    # share of the training in which only weights learn
    warmup: Annotated[float, In(0, 1, "high")] = 0.3
    batch: Annotated[int, In(2)] = 256  # validation samples of an architecture step
    order: Literal[1, 2] = 1  # 2 looks one weight step ahead, at more than twice the cost
    prior: Annotated[float, In(0)] = 1.0  # beta, added at first to the logits of sep_conv_3x3
    anneal: Annotated[float, In(0, 1)] = 0.5  # share of the training after which the prior is gone
    # of the outputs of skip connections at first; falls to 0
    skip_dropout: Annotated[float, In(0, 1, "high")] = 0.3
    most_skips: Annotated[int, In(0)] | None = 2  # in a derived cell

    def prepare(self, run: Run) -> None:
        if not isinstance(run.model, CellNetwork):
            raise MethodError(
                "edarts searches the mixed operations of a network of cells, not of a "
                f"{type(run.model).__name__}: begin with pliant.zoo.build('edarts-search')."
            )
        search.begin(run, self._plan(), "edarts")
        self._fade(run)

    def after_step(self, run: Run) -> None:
        if run.steps:
            search.step(run, self._plan())
            self._fade(run)

    def after_epoch(self, run: Run) -> None:
        genotype = derive(_network(run), most_skips=None)
        run.note(genotype=genotype.plain(), skips=genotype.count(SKIP))

    def finalize(self, run: Run) -> None:
        network = _network(run)
        genotype = derive(network, most_skips=self.most_skips)
        run.note(genotype=genotype.plain(), skips=genotype.count(SKIP))
        choose(run, placed(network, genotype))
        search.mend(run)

    def _plan(self) -> search.Bilevel:
        return search.Bilevel(
            lr=self.alpha_lr,
            decay=self.alpha_decay,
            every=self.every,
            warmup=self.warmup,
            batch=self.batch,
            order=self.order,
        )

    @torch.no_grad()
    def _fade(self, run: Run) -> None:
        """Set prior and dropout for the next step; without training there are none."""
        done = run.step / run.steps if run.steps else 1.0
        prior = self.prior * max(0.0, 1 - done / self.anneal) if self.anneal else 0.0
        for part in search.mixed(run.model).values():
            part.drop.fill_(self.skip_dropout * (1 - done))
            for place, name in enumerate(part.ops):
                part.prior[place] = prior if name == FAVOURED else 0.0


DARTS = (
    "edarts(alpha_lr=3e-4, every=1, warmup=0.0, batch=64, prior=0.0, skip_dropout=0.0, "
    "most_skips=None)"
)
"""First-order DARTS (Liu et al., ICLR 2019), as options."""


def _network(run: Run) -> CellNetwork:
    assert isinstance(run.model, CellNetwork)
    return run.model
