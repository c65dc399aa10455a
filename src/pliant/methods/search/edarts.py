"""eDARTS: searches the operations of cells whose wiring is fixed, in a shallow supernet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from torch import Tensor

from pliant.families.search import bilevel as search
from pliant.families.search import cells, evaluation
from pliant.families.search.schedule import fade
from pliant.method import Method
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
    weights: the result is a plain network, and its history holds the genotype. A network of cells
    that has nothing to choose, such as ``zoo.darts.evaluation(genotype)``, is trained as DARTS
    does: paths are dropped more and more often, and a head at two thirds of the depth learns the
    classes too, until the training is over. ``supernet(share=4)`` searches on a quarter of the
    channels, as PC-DARTS does.

    *Measured* (bench ``search-family``: CIFAR-10 of 16 x 16 pixels, networks trained from
    scratch for six epochs, three seeds): 42.9 % beside 41.8 ± 1.2 % of random cells, so it is
    not told apart from random search, and 40.8 ± 2.0 % of first-order DARTS. Searched on for 80
    epochs on 64 digits (``skip-collapse``, three seeds), DARTS ends with 6.7 ± 2.1 skip connections
    of 16 edges, where chance would give 4, and this with 2.7 ± 0.6; without its dropout of skips
    there are 2.7 ± 2.1, so what that adds was not shown.

    *Departs from the paper*: only its abstract was at hand. What it says is here: the wiring is
    fixed, important operations get more attention, the supernet is shallow, the optimisation is
    fast. How, is DARTS and its known repairs: the wiring is that of the published DARTS cell, and
    rates, prior, warm-up and the limit on skip connections are ours. `DARTS` has the options of
    first-order DARTS, for ``zoo.darts.supernet(DENSE, DARTS_OPS, cells=8)``.
    """

    alpha_lr: search.Rate = 6e-4  # of Adam on the logits alpha
    alpha_decay: Annotated[float, In(0)] = 1e-3  # weight decay of the logits
    every: Annotated[int, In(1)] = 2  # m, weight steps between two architecture steps
    warmup: search.Share = 0.3  # share of the training in which only weights learn
    batch: Annotated[int, In(2)] = 256  # validation samples of an architecture step
    order: Literal[1, 2] = 1  # 2 looks one weight step ahead, at more than twice the cost
    prior: Annotated[float, In(0)] = 1.0  # beta, added at first to the logits of sep_conv_3x3
    anneal: Annotated[float, In(0, 1)] = 0.5  # share of the training after which the prior is gone
    skip_dropout: search.Share = 0.3  # of the outputs of skip connections at first; falls to 0
    most_skips: Annotated[int, In(0)] | None = 2  # in a derived cell
    # weight of the loss of a head within a network that has nothing to choose
    auxiliary: Annotated[float, In(0)] = 0.4
    drop_path: search.Share = 0.2  # of the paths of such a network, at the end; rises from 0

    def prepare(self, run: Run) -> None:
        if not search.choices(cells.network(run, "edarts")):
            return evaluation.begin(run, self.drop_path, self.auxiliary)
        search.begin(run, self._plan(), "edarts")
        fade(run, FAVOURED, self.prior, self.anneal, self.skip_dropout)

    def loss(self, run: Run, loss: Tensor, output: Any, batch: Any) -> Tensor:
        return evaluation.loss(run, loss, output, batch, self.auxiliary)

    def after_step(self, run: Run) -> None:
        if not search.choices(run.model):
            evaluation.step(run)
        elif run.steps:
            search.step(run, self._plan())
            fade(run, FAVOURED, self.prior, self.anneal, self.skip_dropout)

    def after_epoch(self, run: Run) -> None:
        cells.noted(run, "edarts")

    def finalize(self, run: Run) -> None:
        cells.settle(run, "edarts", self.most_skips)

    def _plan(self) -> search.Bilevel:
        return search.Bilevel(
            lr=self.alpha_lr, decay=self.alpha_decay, every=self.every,
            warmup=self.warmup, batch=self.batch, order=self.order,
        )  # fmt: skip


DARTS = (
    "edarts(alpha_lr=3e-4, every=1, warmup=0.0, batch=64, prior=0.0, skip_dropout=0.0, "
    "most_skips=None)"
)
"""First-order DARTS (Liu et al., ICLR 2019), as options."""
