"""VPU-NAS: searches blocks for accuracy and for milliseconds on one device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pliant.families.search import bilevel as search
from pliant.families.search import derive, objective, paths
from pliant.families.search.expected import By, axis_of, check_bottlenecks
from pliant.families.search.schedule import temper
from pliant.method import Method
from pliant.registry import In, Paper, register
from pliant.run import Run


@register(
    "vpu_nas",
    paper=Paper(
        "VPU Specific CNNs through Neural Architecture Search",
        "C. Donegan, H. Yous, S. Sinha, J. Byrne",
        "ICPR",
        2020,
        "https://doi.org/10.1109/ICPR48806.2021.9412794",
    ),
)
@dataclass(frozen=True)
class VPUNAS(Method):
    """Chooses inverted bottlenecks by the loss of the task and the expected milliseconds.

    The network is one to search in, such as ``zoo.build("vpu-search")``. With a target every
    candidate is priced by the table of that target, each shape measured once; without one by
    multiply-accumulates. Weights learn on the training split, after a warm-up the logits on the
    validation split. Mixtures are nearly one-hot samples whose temperature falls, or one of two
    sampled paths runs. At the end each block keeps its best candidate.

    *Measured* (bench ``search-family``: CIFAR-10 of 16 x 16 pixels, networks trained from
    scratch for six epochs, three seeds): 36.8 ± 1.5 % beside 34.9 ± 2.3 % of random blocks of equal
    cost, 1.9 ± 0.5 more seed by seed, and 30.4 ± 2.1 % of equal blocks at a smaller width; the
    search took 32 s. The table times each layer alone: networks so small took half to three
    quarters of its sum. It ranked 20 random ones by a Spearman correlation of 0.98 (bench
    ``search-items``). Found for onnxruntime, a network had half of the predicted milliseconds of
    MobileNetV2's blocks at a width as accurate, all at 25 % after four epochs. Two made-up devices
    got networks that take half of the other's time on their own; these were 17 and 11 points apart
    on digits, since kernels of 3 had learned less in six epochs than kernels of 7.

    *Departs from the paper*: only its abstract was at hand. What it says is here: a
    differentiable search for error and latency together, measured on the device that shall run
    the network. Candidates, samples, objective and schedule are those of the two methods that it
    can refer to, FBNet and ProxylessNAS (both 2019). What costs one is the mean of all
    architectures, if no reference is given.
    """

    estimator: Literal["gumbel", "gates"] = "gumbel"  # noisy mixtures, or two sampled paths
    strength: Annotated[float, In(0)] = 0.1  # lambda, or beta of the product
    form: objective.Form = "sum"  # or the product of the loss and a power of the cost's logarithm
    reference: search.Rate | None = None  # LAT_ref, in units of the cost
    by: By = "auto"  # the cost: milliseconds with a target, else multiply-accumulates
    alpha_lr: search.Rate = 0.01  # of Adam on the logits
    alpha_decay: Annotated[float, In(0)] = 5e-4  # weight decay of the logits, of mixtures only
    every: Annotated[int, In(1)] = 4  # weight steps between two architecture steps
    batch: Annotated[int, In(2)] = 64  # validation samples of an architecture step
    warmup: search.Share = 0.1  # share of the training in which only weights learn
    temperature: Annotated[float, In(0.01, 100)] = 5.0  # tau, of the first epoch's mixtures
    cooling: Annotated[float, In(0.5, 1)] = 0.956  # factor of tau after each epoch
    # of the result: those of the search, or drawn anew to train from scratch
    weights: Literal["kept", "fresh"] = "kept"

    def refuse(self, run: Run) -> None:
        check_bottlenecks(run, self.by, "vpu_nas", "vpu-search")

    def prepare(self, run: Run) -> None:
        search.begin(run, self._plan(), "vpu_nas")
        objective.price(run, axis_of(run, self.by), self.form, self.reference, "vpu_nas")
        if self.estimator == "gates":
            paths.alone(run)
        self._sample(run)

    def after_step(self, run: Run) -> None:
        if not run.steps:
            return
        if search.due(run, self._plan()):
            self._sample(run)
            gates = paths.pairs(run) if self.estimator == "gates" else None
            objective.step(run, self._plan(), self.form, self.strength, gates)
        self._sample(run)

    def after_epoch(self, run: Run) -> None:
        derive.noted(run)

    def finalize(self, run: Run) -> None:
        derive.settle(run)
        search.mend(run, fresh=self.weights == "fresh")

    def _sample(self, run: Run) -> None:
        if self.estimator == "gumbel":
            temper(run, max(0.01, self.temperature * self.cooling**run.epoch))
        paths.draw(run)

    def _plan(self) -> search.Bilevel:
        gates = self.estimator == "gates"
        return search.Bilevel(
            lr=self.alpha_lr,
            betas=(0.0, 0.999) if gates else (0.9, 0.999),
            decay=0.0 if gates else self.alpha_decay,
            every=self.every,
            warmup=self.warmup,
            batch=self.batch,
        )
