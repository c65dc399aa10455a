"""SRFP and ASRFP, softer filter pruning: weak filters fade epoch by epoch, and may recover."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pliant.errors import MethodError
from pliant.families.prune import soft
from pliant.families.prune.allocate import Goal, by_ratios, uniform_ratios
from pliant.families.prune.pruner import ChannelPruning, Ratio, Share
from pliant.families.prune.ranking import Scope
from pliant.families.prune.schedule import Schedule
from pliant.families.prune.scores import Groups, Scores, magnitudes
from pliant.plan.pace import until
from pliant.registry import In, Paper, register
from pliant.run import Run
from pliant.surgery.prove import Leaving
from pliant.surgery.select import readable

AtLeast0 = Annotated[float, In(0)]
RENAMED = {"rate": "ratio", "search": "start"}
PAPER = Paper(
    "Softer Pruning, Incremental Regularization",
    "L. Cai, Z. An, C. Yang, Y. Xu",
    "ICPR",
    2020,
    "https://arxiv.org/abs/2010.09498",
)


@register("asrfp", paper=PAPER, saves="params macs bytes latency", renamed=RENAMED)
@dataclass(frozen=True)
class ASRFP(ChannelPruning):
    """Multiplies the weakest filters after every epoch by a factor that falls to 0.

    The filters are chosen anew each time, and all of them train between. The share that fades
    rises to its end value (``ramp``), or is constant (``ramp=0``: SRFP). With ``alpha=0`` weak
    filters are zeroed at once: ASFP, and SFP with ``ramp=0``. At the end the weakest filters
    leave the network. While training, a batch norm behind a filter undoes its fading, and the
    gradient grows as the filter fades: leave many steps between two maskings (``epochs``), or
    fade batch norms too (``norms=True``).

    *Departs from the paper*: by default only filters that can leave fade (those of channels that
    meet in a sum together), since zeros that stay cost accuracy and save nothing; ``every=True``
    lets every convolution fade by itself as in the paper. A hidden linear layer is treated as a
    convolution. The cut at the end is inferred, and re-estimates batch norms where there is data.

    *Measured* (bench ``prune-family``): with 50 % of its multiply-accumulates, trained for 2 epochs
    on 2,000 images, ResNet-20 was right on 23.3 % by ``asrfp(epochs=20)`` and on 68.8 % by
    ``magnitude`` (means of 3 seeds). Given time (bench ``prune-soft``): with 50 % of its
    multiply-accumulates, trained for 10 epochs on 1,280 images, ResNet-56 was right on 65.5 % by
    ``asrfp(start=1.0)`` and on 77.2 % by ``magnitude``; with norms that fade too and half of the
    epochs to recover in, on 75.8 %.

    >>> ASRFP(alpha=0.0, ramp=0.0).ratio  # SFP
    0.4
    """

    ratio: Ratio = 0.4  # P, share of the filters that leaves, if there is no budget
    scope: Scope = field(default="local", init=False)
    rounds: int = field(default=1, init=False)
    # share of the training before the filters leave; None: all but 100 steps, or 60 %
    start: Share | None = None  # type: ignore[assignment]
    end: float = field(default=1.0, init=False)
    alpha: Share = 1.0  # alpha_0, factor at the beginning
    sigma: Annotated[float, In(0, open="low")] = 1e-5  # factor at the end of exponential decay
    ramp: AtLeast0 = 0.125  # D, share of the training in which the ratio reaches three quarters
    decay: soft.Decay = "exponential"  # of the factor
    zero_from: AtLeast0 = 0.9  # share of the epochs from which the factor is 0
    interval: Annotated[int, In(1)] = 1  # epochs between two maskings
    epochs: Annotated[int, In(0)] = 0  # T, parts after which filters fade; 0: epochs as they are
    norm: Literal["l1", "l2"] = "l2"  # of a filter
    unit: Literal["filter", "weight"] = "filter"  # what fades; single weights never leave
    norms: bool = False  # fade the batch norms of these channels too
    every: bool = False  # fade filters that cannot leave too, as in the paper

    def prepare(self, run: Run) -> None:
        if self.unit == "weight" and run.limits():
            raise MethodError(
                "asrfp: single weights that are zero save nothing that a budget counts; leave the "
                'budget out, or use unit="filter".'
            )
        self._choose(run)
        self.cut_if_due(run)
        if run.steps and self.pending(run):
            self._fade(run, 0, math.inf)

    def after_step(self, run: Run) -> None:
        end, parts = self._end(run), run.step * self.epochs
        if self.pending(run) and parts // end > (parts - self.epochs) // end:
            self._fade(run, parts // end - 1, self.epochs)
        super().after_step(run)

    def after_epoch(self, run: Run) -> None:
        if self.pending(run) and not self.epochs:
            self._fade(run, run.epoch - 1, self._end(run) * run.epoch / run.step)

    def schedule(self, run: Run) -> Schedule:
        start = until(self.start, 1.0, run.steps if self.unit == "filter" else 0)
        return Schedule(self.rounds, start, self.end)

    def groups(self, run: Run) -> Groups:
        if self.unit == "weight":
            return []
        return [g for g in super().groups(run) if not self.every or len(g.makers) == 1]

    def scores(self, run: Run, groups: Groups) -> Scores:
        filters, order = run.state["filters"], 1 if self.norm == "l1" else 2
        return {name: magnitudes(run.model, rows, order=order) for name, rows in filters.items()}

    def allocation(self, run: Run, groups: Groups, goal: Goal) -> Leaving:
        chosen = self._weakest(run, 1.0)
        return {group.name: chosen[group.name] for group in groups}

    def adjust(self, run: Run, groups: Groups, leaving: Leaving) -> None:
        self._multiply(run, 1.0, 0.0)  # for good, those that stay too

    def _choose(self, run: Run) -> None:
        """Note what fades together, and at which ratio."""
        layers, _ = readable(run.model, only=self.only, exclude=self.exclude)
        groups = self.groups(run)
        ratios = uniform_ratios(run, groups, self.ratio, least=self.least)
        run.state.update(soft.chosen(groups, ratios, layers if self.every else {}, self.ratio))
        run.state["weights"] = list(layers) if self.unit == "weight" else []

    def _end(self, run: Run) -> int:
        return max(1, round(self.schedule(run).start * run.steps))

    def _fade(self, run: Run, epoch: int, epochs: float) -> None:
        """Mask after an epoch, if it is one of the interval's or the last."""
        if epoch % self.interval and epoch + 1 < epochs:
            return
        part = soft.ramp_at(epoch, epochs, self.ramp)
        factor = soft.factor_at(epoch, epochs, self.alpha, self.sigma, self.decay, self.zero_from)
        if factor != 1:
            self._multiply(run, part, factor)
            run.first.anew()
        run.note(alpha=factor, rate=part * max(run.state["ratios"].values(), default=self.ratio))

    def _weakest(self, run: Run, part: float) -> dict[str, list[int]]:
        ratios = {name: part * ratio for name, ratio in run.state["ratios"].items()}
        return by_ratios(self.scores(run, ()), ratios, least=self.least)

    def _multiply(self, run: Run, part: float, factor: float) -> None:
        soft.fade_weights(run.model, run.state["weights"], part * self.ratio, factor)
        norms = run.state["norms"] if self.norms else {}
        weak = self._weakest(run, part)
        soft.fade_groups(run.model, run.state["filters"], norms, weak, factor)
