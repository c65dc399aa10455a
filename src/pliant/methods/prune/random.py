"""Random pruning: channels leave by lot, the baseline that any score must beat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from pliant.families.prune.channels import Place, Scope, random_scores, ranking, relative
from pliant.families.prune.cut import MOST_ROUNDS, Rounds, cut_in_rounds
from pliant.method import Method
from pliant.registry import In, Paper, register
from pliant.run import Run
from pliant.surgery.graph import Group


@register(
    "random",
    paper=Paper(
        "Recovering from Random Pruning: On the Plasticity of Deep Convolutional Neural Networks",
        "D. Mittal, S. Bhardwaj, M. M. Khapra, B. Ravindran",
        "WACV",
        2018,
        "https://arxiv.org/abs/1801.10447",
    ),
    saves="params macs bytes latency",
)
@dataclass(frozen=True)
class Random(Method):
    """Removes channels by lot, with all that belongs to them; the rest of the training repairs.

    >>> Random(share=0.3).scope
    'local'
    """

    # of the channels that leaves, if there is no budget
    share: Annotated[float, In(0, 1, "high")] = 0.5
    scope: Scope = "local"  # the same share of every layer, or any of the network
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
        scores = {group.name: random_scores(group, run.generator) for group in groups}
        return ranking(relative(scores), self.scope, floors)
