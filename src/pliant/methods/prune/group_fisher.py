"""Group Fisher pruning: the channels leave that matter least to the loss for what they cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from pliant.cost import cost, layer_costs
from pliant.errors import BudgetError, DataError, MethodError
from pliant.families.prune.channels import Place, after, leaving, numbered, ranking, up_to
from pliant.families.prune.cut import (
    MOST_ROUNDS,
    Rounds,
    cut_in_rounds,
    on_the_way,
    silenced,
    within,
)
from pliant.families.prune.fisher import group_fisher
from pliant.method import Method
from pliant.registry import In, Paper, register
from pliant.run import Run
from pliant.surgery.graph import Group
from pliant.surgery.prove import edits_of

BATCH = 64  # samples whose activations are held at once
MOST_LOOKS = 32


@register(
    "group_fisher",
    paper=Paper(
        "Group Fisher Pruning for Practical Network Compression",
        "L. Liu, S. Zhang, Z. Kuang, A. Zhou, J.-H. Xue, X. Wang, Y. Chen, W. Yang, Q. Liao, "
        "W. Zhang",
        "ICML",
        2021,
        "https://arxiv.org/abs/2108.00708",
    ),
    saves="params macs bytes latency",
)
@dataclass(frozen=True)
class GroupFisher(Method):
    """Removes the channels whose loss hurts least for what leaves with them.

    What a channel is worth is the Fisher information of a mask on it, shared by all layers that
    read it, divided by what the network saves without it: multiply-accumulates for a budget in
    these or in milliseconds, parameters or bytes for others, nothing without a budget.
    Needs unlabelled training inputs.

    *Departs from the paper*: all channels of a cut leave before training goes on, and scores are
    taken anew several times on the way, on a copy that ignores those that have left (``looks``);
    the paper removes one at a time while it trains (``rounds`` goes part of that way). Labels are
    drawn from the network's predictions; what a channel gives on average costs nothing, since
    biases and batch norms make up for it; savings are those the budget asks for.

    >>> GroupFisher(looks=1).samples
    1024
    """

    # of the channels that leaves, if there is no budget
    share: Annotated[float, In(0, 1, "high")] = 0.5
    samples: Annotated[int, In(1)] = 1024  # training inputs of one look
    looks: Annotated[int, In(1, MOST_LOOKS)] = 4  # how often scores are taken on the way of a cut
    # share of the channels of a layer that stays in any case
    least: Annotated[float, In(0, 1)] = 0.1
    rounds: Annotated[int, In(1, MOST_ROUNDS)] = 1  # cuts; several are spread over the training
    during: Annotated[float, In(0, 1)] = 0.5  # share of the training in which they are made
    only: tuple[str, ...] = ()  # name patterns of the layers to consider
    exclude: tuple[str, ...] = ()  # name patterns of the layers to leave alone

    def prepare(self, run: Run) -> None:
        if self.samples < 1 or not 1 <= self.looks <= MOST_LOOKS:
            raise MethodError(
                f"group_fisher: samples must be at least 1 and looks in 1..{MOST_LOOKS}, not "
                f"{self.samples} and {self.looks}."
            )
        if run.data is None or not run.data.has("train"):
            raise DataError(
                "group_fisher looks at training inputs, but there are none: give data, or take "
                "magnitude, which looks at weights alone."
            )
        self._cut(run)

    def after_step(self, run: Run) -> None:
        self._cut(run)

    def finalize(self, run: Run) -> None:
        self._cut(run, last=True)

    def _cut(self, run: Run, *, last: bool = False) -> None:
        asked = Rounds(self.share, self.least, self.rounds, self.during)
        cut_in_rounds(run, self._rank, asked, only=self.only, exclude=self.exclude, last=last)

    def _rank(self, run: Run, groups: Sequence[Group], floors: Mapping[str, int]) -> list[Place]:
        """Order all units by looks, each of which goes an equal part of the way."""
        line: list[Place] = []
        limits, total = counted(run), sum(len(group.units) for group in groups)
        for look in range(1, self.looks + 1):
            ranked = ranking(self._worth(run, groups, line, look), "global", floors)
            gone = {(place.group, place.unit) for place in line}
            rest = [place for place in ranked if (place.group, place.unit) not in gone]
            places = numbered([*line, *rest], total)
            part = look / self.looks
            if not limits:
                line = up_to(places, part * self.share)
                continue
            try:
                line = within(run, groups, places, on_the_way(run, limits, part))
            except BudgetError:  # the cut itself will say what cannot be met
                break
        return places

    def _worth(
        self, run: Run, groups: Sequence[Group], line: Sequence[Place], look: int
    ) -> dict[str, Tensor]:
        """Return what each unit is worth beside those that are left, for what leaves with it."""
        model = silenced(run, edits_of(run.model, groups, leaving(line)))
        seen = run.inputs(self.samples, batch=BATCH, seed=10 * look)
        damages = group_fisher(model, groups, seen, run.generator)
        costs = prices(run, groups, line, tuple(counted(run)))
        worth = {name: damage / costs[name] for name, damage in damages.items()}
        for place in line:
            worth[place.group][place.unit] = -1.0  # before those that are worth nothing
        return worth


def counted(run: Run) -> dict[str, float]:
    """Return the limits as numbers to count; milliseconds fall about as multiply-accumulates do."""
    limits = run.limits()
    if "latency" in limits:
        macs = limits.pop("latency") / max(run.cost.latency, 1e-12) * run.cost.macs
        limits["macs"] = min(macs, limits.get("macs", macs))
    return limits


def prices(
    run: Run, groups: Sequence[Group], line: Sequence[Place], axes: Sequence[str]
) -> dict[str, float]:
    """Return what leaves with one more unit of each group, as a share of the network.

    Args:
        run: its model is still whole.
        groups: of channels.
        line: the units that have left.
        axes: what is counted, each alike; all units cost the same if there are none.
    """
    now, rows = cost(run.model, run.example), layer_costs(run.model, run.example)
    gone, found = leaving(line), dict[str, float]()
    here = after(now, rows, edits_of(run.model, groups, gone))
    for group in groups:
        mine = gone.get(group.name, [])
        one = next(unit for unit in range(len(group.units)) if unit not in mine)
        there = after(now, rows, edits_of(run.model, groups, {**gone, group.name: [*mine, one]}))
        saved = sum((getattr(here, a) - getattr(there, a)) / getattr(now, a) for a in axes)
        found[group.name] = max(saved, 1e-12) if axes else 1.0
    return found
