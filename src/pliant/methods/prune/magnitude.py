"""Magnitude pruning: filters of small norm leave, for good."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pliant.families.prune.channels import Place, Scope, filter_norms, ranking, relative
from pliant.families.prune.cut import MOST_ROUNDS, Rounds, cut_in_rounds
from pliant.method import Method
from pliant.registry import In, Paper, register
from pliant.run import Run
from pliant.surgery.graph import Group


@register(
    "magnitude",
    paper=Paper(
        "Pruning Filters for Efficient ConvNets",
        "H. Li, A. Kadav, I. Durdanovic, H. Samet, H. P. Graf",
        "ICLR",
        2017,
        "https://arxiv.org/abs/1608.08710",
    ),
    saves="params macs bytes latency",
)
@dataclass(frozen=True)
class Magnitude(Method):
    """Removes the filters of the smallest norm, with all that belongs to their channels.

    Channels that meet in a sum leave together, by the norm of all their filters. All training
    that follows a cut is fine-tuning.

    *Departs from the paper*: a budget is met by one ranking of the whole network, each norm in
    units of the mean of its kind, instead of rates that are set by hand; ``scope="local"`` and
    ``norm="l1"`` take the same share of every layer by the paper's norm.

    >>> Magnitude(norm="l1", scope="local").share
    0.5
    """

    # of the channels that leaves, if there is no budget
    share: Annotated[float, In(0, 1, "high")] = 0.5
    norm: Literal["l1", "l2"] = "l2"  # of a filter
    scope: Scope = "global"  # rank all channels together, or those of each layer
    # share of the channels of a layer that stays in any case
    least: Annotated[float, In(0, 1)] = 0.1
    rounds: Annotated[int, In(1, MOST_ROUNDS)] = 1  # cuts; several are spread over the training
    during: Annotated[float, In(0, 1)] = 0.5  # share of the training in which they are made
    only: tuple[str, ...] = ()  # name patterns of the layers to consider
    exclude: tuple[str, ...] = ()  # name patterns of the layers to leave alone

    def prepare(self, run: Run) -> None:
        self._cut(run)

    def after_step(self, run: Run) -> None:
        self._cut(run)

    def finalize(self, run: Run) -> None:
        self._cut(run, last=True)

    def _cut(self, run: Run, *, last: bool = False) -> None:
        asked = Rounds(self.share, self.least, self.rounds, self.during)
        cut_in_rounds(run, self._rank, asked, only=self.only, exclude=self.exclude, last=last)

    def _rank(self, run: Run, groups: Sequence[Group], floors: Mapping[str, int]) -> list[Place]:
        order = 1.0 if self.norm == "l1" else 2.0
        scores = {group.name: filter_norms(run.model, group, order=order) for group in groups}
        return ranking(relative(scores), self.scope, floors)
