"""Progressive stepwise training: the data grow in steps, and batch and rate are set by them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from torch import Tensor

from pliant.data import Data, Epoch
from pliant.families.train.steps import check_steps, coupled, seen_in, step_of
from pliant.families.train.subsets import class_numbers, nested
from pliant.method import Method
from pliant.registry import In, Paper, register
from pliant.run import Run


@register(
    "progressive_stepwise",
    paper=Paper(
        "Rethinking of Deep Models Parameters with Respect to Data Distribution",
        "S. Prasad, D. Lin, Y. Li, S. Dong, Z. M. Oo",
        "ICPR",
        2020,
    ),
)
@dataclass(frozen=True)
class ProgressiveStepwise(Method):
    """Trains in steps on a growing part of the data, with batch and learning rate coupled to it.

    Each part holds the one before, and the classes of the whole. The noise of SGD, rate times
    samples over batch, follows a rule from step to step: held with the batch as it is, so that
    the rate falls only because the data grow; held with a batch that grows instead; or lowered
    at every step. With four equal steps 62.5 % of the samples are seen that as many epochs on
    all of them would take. The rate is a factor of the loop's own: let that be constant.

    *Measured*: it trailed. Bench ``train-family-cifar`` (a small CNN on 3,000 reduced photographs,
    three seeds): 50.2 ± 1.7 %, and 48.0 ± 0.6 % by "anneal", beside 51.9 ± 0.7 % of plain training
    of as many samples, whose rate falls in steps, and 54.7 ± 0.8 % of as many epochs. Bench
    ``train-family`` (3,500 digits, five seeds): 94.7 ± 0.9 % beside 96.2 ± 0.5 and 96.5 ± 0.4 %.

    The first epoch on each larger part raised the accuracy by 38 ± 11, 12 ± 9 and 5 ± 4 points, and
    the training took 0.67 of the time of as many epochs on all of the data (``layers-items``,
    3,000 digits, eight epochs at a constant rate).

    *Departs from the paper*: its abstract names the growing data and that rate, batch and data
    belong together; the rules are our reading. Steps end after their epochs: an accuracy that no
    longer rises cannot end one, since loops count their steps beforehand.

    >>> ProgressiveStepwise(fractions=(0.5, 1.0)).rule
    'noise'
    """

    # r, parts of the data, rising to 1
    fractions: tuple[Annotated[float, In(0, 1, "low")], ...] = (0.25, 0.5, 0.75, 1.0)
    # of each step, as shares of all; none: equal ones
    epochs: tuple[Annotated[float, In(0, open="low")], ...] = ()
    # noise: hold it by the rate; batch: hold it by the batch; anneal: lower it at each step
    rule: Literal["noise", "batch", "anneal", "given"] = "noise"
    kappa: Annotated[float, In(0, 1, "low")] = 0.5  # of "anneal": factor of the noise at each step
    most: Annotated[int, In(1)] = 4096  # of "batch": its largest; the rate makes up for the rest
    batches: tuple[Annotated[int, In(1)], ...] = ()  # of "given": of each step
    rates: tuple[Annotated[float, In(0, open="low")], ...] = ()  # of "given": factors of the rate
    # root: for Adam, whose noise goes with the square root of the rate's factor
    scaling: Literal["linear", "root"] = "linear"
    seed: Annotated[int, In(0)] = 0  # of the parts, added to the training's own

    def refuse(self, run: Run) -> None:
        """Refuse steps that do not rise to all of the data."""
        check_steps(self)

    def epoch(self, epoch: Epoch, data: Data) -> Epoch:
        """Choose samples, batch and factor of the rate by the step to which an epoch belongs."""
        check_steps(self)
        at = self.step_of(epoch)
        first, rows = (self.part(data, step, epoch.seed) for step in (0, at))
        if self.rule == "given":
            batch, rate = self.batches[at], self.rates[at]
        else:
            most = self.most if self.rule == "batch" else epoch.batch
            noise = self.kappa**at if self.rule == "anneal" else 1.0
            batch, rate = coupled(len(first), len(rows), epoch.batch, most=most, noise=noise)
            rate = rate**0.5 if self.scaling == "root" else rate
        samples: Tensor | float = 1.0 if self.fractions[at] == 1 else rows
        return replace(epoch, samples=samples, batch=batch, rate=rate)

    def prepare(self, run: Run) -> None:
        """Begin to count samples."""
        run.state["samples"] = 0

    def after_epoch(self, run: Run) -> None:
        """Note how many samples were seen so far, and batch and rate of this epoch."""
        now, samples = seen_in(run)
        run.state["samples"] += samples
        run.note(samples=run.state["samples"], batch=now.batch, rate=now.rate)

    def step_of(self, epoch: Epoch) -> int:
        """Return the step of an epoch; the last epoch is always of the last step."""
        return step_of(self.epochs or [1.0] * len(self.fractions), epoch)

    def part(self, data: Data, step: int, seed: int) -> Tensor:
        """Return the rows of a step."""
        return nested(class_numbers(data), data.rows(), self.fractions[step], self.seed + seed)
