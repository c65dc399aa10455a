"""KWS-NAS: samples one path of a supernet at a time, with weights rounded to a few bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pliant.families.search import bilevel as search
from pliant.families.search import derive, objective, paths, rounding
from pliant.families.search.expected import By, axis_of, check_bottlenecks
from pliant.families.search.schedule import rising
from pliant.method import Method
from pliant.registry import In, Paper, register
from pliant.run import Run


@register(
    "kws_nas",
    paper=Paper(
        "Resource-efficient DNNs for Keyword Spotting using Neural Architecture Search and "
        "Quantization",
        "D. Peter, W. Roth, F. Pernkopf",
        "ICPR",
        2020,
        "https://arxiv.org/abs/2012.10138",
    ),
)
@dataclass(frozen=True)
class KWSNAS(Method):
    """Searches blocks by gates of which one is open, and rounds all weights meanwhile.

    The network is one to search in, such as ``zoo.build("kws-search")``. At every step each
    mixed operation runs one candidate, sampled by the probabilities. After a warm-up the logits
    learn every few steps: the gradient of a candidate's gate is the product of what the candidate
    gives with the gradient of the output. The loss of the task is multiplied by a power of the
    logarithm of the expected cost. At the end every operation keeps its best candidate with the
    weights it has. A network that has nothing to choose from is trained with rounded weights
    only: so is the derived one, ``chain("kws_nas", "kws_nas(bits=2)")``.

    *Measured* (bench ``search-family``: CIFAR-10 of 16 x 16 pixels, networks trained from
    scratch for six epochs, three seeds): 33.8 ± 2.0 % beside 31.7 ± 3.9 % of random blocks of equal
    cost, more in two seeds of three, so a lead over random search is not beyond doubt, and
    30.6 ± 0.4 % of equal blocks at a smaller width; the search took 6 s.

    *Departs from the paper*: biases of the linear layer are kept. The reference cost is what the
    search begins with, if none is given, since that of the paper belongs to one network. Weight
    decay acts on rounded weights. They are stored as numbers of their grid, in floating point:
    coding them is another method's work.
    """

    strength: Annotated[float, In(0, 100)] = 1.0  # beta, power of the cost; 0 ignores it
    form: objective.Form = "product"  # or the sum of the loss and strength times the cost
    reference: search.Rate | None = None  # F_ref, in units of the cost
    by: By = "macs"  # the cost; "params" for memory
    alpha_lr: search.Rate = 4e-3  # of Adam, to which it rises
    every: Annotated[int, In(1)] = 5  # weight steps between two architecture steps
    batch: Annotated[int, In(2)] = 100  # validation samples of an architecture step
    warmup: search.Share = 0.25  # share of the training in which only weights learn
    skips_learn: bool = False  # whether a sampled skip connection moves its logits
    bits: Literal[0] | Annotated[int, In(1, 8)] = 8  # of a weight; 0 rounds none
    rounding: Literal["during", "after"] = "during"  # the training, or at its end only

    def refuse(self, run: Run) -> None:
        check_bottlenecks(run, self.by, "kws_nas", "kws-search")

    def prepare(self, run: Run) -> None:
        if search.choices(run.model):
            search.begin(run, self._plan(run), "kws_nas")
            objective.price(run, axis_of(run, self.by), self.form, self.reference, "kws_nas")
            paths.alone(run)
            paths.draw(run)
        if self.bits and self.rounding == "during":
            rounding.begin(run, self.bits)

    def after_step(self, run: Run) -> None:
        if self.bits and self.rounding == "during":
            rounding.follow(run, self.bits)
        if not search.choices(run.model) or not run.steps:
            return
        plan = self._plan(run)
        if search.due(run, plan):
            paths.draw(run)
            gates = paths.full(run, skips_learn=self.skips_learn)
            objective.step(run, plan, self.form, self.strength, gates)
        paths.draw(run)

    def after_epoch(self, run: Run) -> None:
        derive.noted(run)

    def finalize(self, run: Run) -> None:
        derive.settle(run)
        rounding.end(run, self.bits, now=self.rounding == "after")
        search.mend(run)

    def _plan(self, run: Run) -> search.Bilevel:
        """Adam without momentum or decay, at a rate that rises along half a cosine."""
        return search.Bilevel(
            lr=rising(run, self.alpha_lr, after=self.warmup),
            betas=(0.0, 0.999),
            decay=0.0,
            every=self.every,
            warmup=self.warmup,
            batch=self.batch,
        )
