"""A channel pruner is a score: all else, from the groups to the proven cut, is the same for all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pliant.families.prune.allocate import Goal, allocate, check_reachable, on_the_way
from pliant.families.prune.channels import keep_whole, leave_out, removable, remove, routed
from pliant.families.prune.ranking import Scope, floors_of, ranking
from pliant.families.prune.schedule import MOST_ROUNDS, Schedule
from pliant.families.prune.scores import Groups, Scores
from pliant.method import Method
from pliant.plan.remember import remembered
from pliant.registry import In
from pliant.run import Run
from pliant.surgery.prove import Leaving, edits_of, unproven

Ratio = Annotated[float, In(0, 1, open="high")]
Share = Annotated[float, In(0, 1)]
Rounds = Annotated[int, In(1, MOST_ROUNDS)]

RENAMED = {"share": "ratio", "during": "end"}
"""Options as they were called before, for `register`."""


@dataclass(frozen=True)
class ChannelPruning(Method):
    """Removes channels by importance, with all that belongs to them, at the moments of a schedule.

    A method overrides `scores`, and of the rest what it does otherwise: which groups it looks at
    (`groups`), how many units of each leave (`allocation`), what becomes of them before they do
    (`adjust`). Hooks of its own call the hook of this class as well. An option that means nothing
    to a method is fixed: ``scope: Scope = field(default="local", init=False)``. One that follows
    the number of steps until it is written is widened: ``start: Share | None = None``. mypy takes
    that for a wrong assignment, since here it is a number; the method's `schedule` makes it one.
    """

    ratio: Ratio = 0.5  # share of the channels that leaves, if there is no budget
    scope: Scope = "global"  # rank all channels together, or take the same share of every layer
    least: Share = 0.1  # share of the channels of a layer that stays in any case
    rounds: Rounds = 1  # cuts, each an equal part of the way; between them the network trains
    start: Share = 0.0  # share of the training before the first cut; 1 cuts when it is over
    end: Share = 0.5  # share of the training up to which several cuts are spread
    only: tuple[str, ...] = ()  # name patterns of the layers to consider
    exclude: tuple[str, ...] = ()  # name patterns of the layers to leave alone

    # What a method says.

    def groups(self, run: Run) -> Groups:
        """Return the groups of channels that may leave the network as it is, the others noted."""
        return removable(run, self.only, self.exclude)

    def scores(self, run: Run, groups: Groups) -> Scores:
        """Return the importance of every unit, by group: the least important leave first.

        It is asked for at every cut. Units of groups that are left out stay.
        """
        raise NotImplementedError(f"{type(self).__name__} must say how important channels are.")

    def allocation(self, run: Run, groups: Groups, goal: Goal) -> Leaving:
        """Return the units that leave in one cut, by group: as few of a ranking as the goal asks.

        ``run.state["floors"]`` says how many of each group stay in any case.
        """
        ranked = ranking(self._scores(run, groups), self.scope, run.state["floors"])
        return allocate(run, groups, ranked, goal)

    def adjust(self, run: Run, groups: Groups, leaving: Leaving) -> None:
        """Change weights before units leave, so that the rest does without them."""

    # What is the same for all.

    def _scores(self, run: Run, groups: Groups) -> Scores:
        """Return scores that were asked for before, of the same network for the same axes."""
        key = ("scores", self, *(group.name for group in groups), *sorted(run.limits()))
        return remembered(run, key, lambda: self.scores(run, groups))

    def prepare(self, run: Run) -> None:
        """Refuse what cannot work, and make the first cut if it is due."""
        self.cut_if_due(run)
        if not run.state["rounds"]:
            check_reachable(run, self.groups(run), least=self.least)

    def after_step(self, run: Run) -> None:
        """Make the cuts that are due."""
        self.cut_if_due(run)

    def finalize(self, run: Run) -> None:
        """Go the rest of the way."""
        self.cut_if_due(run, last=True)

    def schedule(self, run: Run) -> Schedule:
        """Return when cuts are made."""
        return Schedule(self.rounds, self.start, self.end)

    def pending(self, run: Run) -> bool:
        """Say whether a cut is still to come."""
        return bool(run.state["rounds"] < self.schedule(run).rounds)

    def cut_if_due(self, run: Run, *, last: bool = False) -> None:
        """Make the cuts that are due, each an equal part of the way: in cost, or in channels.

        Args:
            run: its state holds how many cuts were made.
            last: no training follows, so go all the way now.
        """
        schedule = self.schedule(run)
        due = schedule.rounds if last else schedule.due(run.step, run.steps)
        while run.state.setdefault("rounds", 0) < due:
            done = run.state["rounds"]
            then = schedule.rounds if last or not run.steps else done + 1
            limits = on_the_way(run, run.limits(), schedule.part(done, then))
            goal = Goal(schedule.ratio(self.ratio, done, then), limits)
            self.cut(run, goal, last=then == schedule.rounds)
            run.state["rounds"] = then

    def cut(self, run: Run, goal: Goal, *, last: bool = True) -> None:
        """Take the least important units out of the network, once it is proven to run without.

        Args:
            run: groups and scores are those of its network as it is now.
            goal: how far to go.
            last: no cut follows, so batch norms and biases make up for what has left.

        Raises:
            BudgetError: the limits cannot be met; the message names what is reachable.
            EditError: the network runs without the units of no group.
        """
        groups = self.groups(run)
        run.state.setdefault("floors", floors_of(groups, self.least))
        groups, leaving = self._proven(run, groups, goal)
        edits = edits_of(run.model, groups, leaving)
        self.adjust(run, groups, leaving)
        remove(run, edits, recalibrate=last)
        keep_whole(run, groups)

    def _proven(self, run: Run, groups: Groups, goal: Goal) -> tuple[Groups, Leaving]:
        """Plan what leaves; groups that cannot leave so are left out, and the rest goes further."""
        while True:
            leaving = self.allocation(run, groups, goal)
            failing = unproven(run.model, run.example, groups, leaving, routed(run))
            if not failing:
                return groups, leaving
            groups = leave_out(run, groups, failing)
