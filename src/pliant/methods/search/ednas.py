"""E-DNAS: learns the size of kernels, all sizes merged into one kernel while it searches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pliant.edits import Swap
from pliant.errors import MethodError
from pliant.families.search import bilevel as search
from pliant.families.search import objective
from pliant.families.search.expected import By, axis_of, check_clock, expect
from pliant.families.search.kernels import crop, report, searchable
from pliant.families.search.schedule import anneal
from pliant.method import Method
from pliant.nn.meta_kernel import wrong
from pliant.registry import In, Paper, register
from pliant.run import Run


@register(
    "ednas",
    paper=Paper(
        "E-DNAS: Differentiable Neural Architecture Search for Embedded Systems",
        "J. Garcia Lopez, A. Agudo, F. Moreno-Noguer",
        "ICPR",
        2020,
        "https://doi.org/10.1109/ICPR48806.2021.9412130",
    ),
)
@dataclass(frozen=True)
class EDNAS(Method):
    """Finds the kernel size of every depthwise convolution, at the cost of one kernel per layer.

    Kernels of all sizes are centred in the largest one and added up, each weighted by its share,
    before they are applied: the network that is searched in runs one convolution per layer.
    Weights learn on the training split. After a warm-up the logits of the sizes learn on the
    validation split, from the loss of the task and the logarithm of the expected cost:
    milliseconds on the target if one was named, else multiply-accumulates. While the temperature
    of the shares falls they become nearly one-hot. At the end every layer keeps its best size.

    *Measured* (bench ``search-family``: CIFAR-10 of 16 x 16 pixels, networks trained from
    scratch for six epochs, three seeds): 36.8 ± 0.2 % beside 36.2 ± 1.6 % of random sizes of equal
    cost and 36.6 ± 0.7 % of kernels of 3, wider: it does not beat random search there. In bench
    ``search-items`` one of three random assignments was as accurate at less cost, in one of two
    seeds. A step took 0.66 of the time of a mixture of what each kernel gives, and as many products
    as one kernel of 7. Where only pixels of a known distance tell the classes apart, it found the
    size 3 in 9 of 10 seeds and 7 in all, but 5 in one: the weights had learned the task while the
    shares were nearly even, so the cost decided.

    *Departs from the paper*: only its abstract was at hand. What it says is here: kernels of
    several resolutions are merged, their sizes are learned by gradients, the cost is that of a
    device. The form of the shares, the objective, warm-up and temperatures are ours. Nested
    kernels compare the mean over filters of the squared norm of a ring with its threshold.
    """

    sizes: tuple[int, ...] = (3, 5, 7)  # S, odd and rising
    mode: Literal["sum", "nested"] = "sum"  # kernels of their own, or rings of one kernel
    scope: Literal["depthwise", "all"] = "depthwise"  # which convolutions
    by: By = "auto"  # the cost: milliseconds with a target, else multiply-accumulates
    strength: Annotated[float, In(0)] = 0.1  # lambda, weight of the logarithm of the cost
    alpha_lr: search.Rate = 3e-3  # of Adam on the logits
    alpha_decay: Annotated[float, In(0)] = 1e-3  # weight decay of the logits
    every: Annotated[int, In(1)] = 1  # weight steps between two architecture steps
    batch: Annotated[int, In(2)] = 128  # validation samples of an architecture step
    warmup: search.Share = 0.2  # share of the training in which only weights learn
    start: Annotated[float, In(0.01, 100)] = 5.0  # temperature of the shares, first
    end: Annotated[float, In(0.01, 100)] = 0.5  # and last
    # of the result: the centres of the merged kernels, or drawn anew to train from scratch
    weights: Literal["cropped", "fresh"] = "cropped"

    def refuse(self, run: Run) -> None:
        if reason := wrong(self.sizes):
            raise MethodError(f"ednas: sizes must be {reason}.")
        check_clock(run, self.by, "ednas")

    def prepare(self, run: Run) -> None:
        layers = searchable(run, everything=self.scope == "all")
        spec = {"sizes": self.sizes, "nested": self.mode == "nested"}
        run.apply(*[Swap(name, "meta_kernel", spec, run.seed) for name in layers])
        search.begin(run, self._plan(), "ednas")
        axis = axis_of(run, self.by)
        run.state["expected"] = expect(run, axis).plain()
        run.note(counted=axis, kernels=len(layers))
        anneal(run, self.start, self.end, after=self.warmup)

    def after_step(self, run: Run) -> None:
        if run.steps:
            objective.step(run, self._plan(), "log", self.strength)
            anneal(run, self.start, self.end, after=self.warmup)

    def after_epoch(self, run: Run) -> None:
        report(run)

    def finalize(self, run: Run) -> None:
        crop(run)
        search.mend(run, fresh=self.weights == "fresh")

    def _plan(self) -> search.Bilevel:
        return search.Bilevel(
            lr=self.alpha_lr,
            decay=self.alpha_decay,
            every=self.every,
            warmup=self.warmup,
            batch=self.batch,
        )
