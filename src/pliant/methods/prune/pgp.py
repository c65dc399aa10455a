"""PGP: filters that training hardly moves leave while it goes on, or start anew."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from pliant.errors import ModelError
from pliant.families.prune import progress
from pliant.families.prune.allocate import uniform_ratios
from pliant.families.prune.pruner import ChannelPruning, Share
from pliant.families.prune.ranking import Scope, floors_of
from pliant.families.prune.schedule import Schedule
from pliant.families.prune.scores import Groups, Scores
from pliant.plan.pace import cuts, until
from pliant.registry import In, Paper, register
from pliant.run import Run

PAPER = Paper(
    "Progressive Gradient Pruning for Classification, Detection and Domain Adaptation",
    "L. T. Nguyen-Meidine, E. Granger, M. Pedersoli, M. Kiran, L.-A. Blais-Morin",
    "ICPR",
    2020,
    "https://arxiv.org/abs/1906.08746",
)


@register("pgp", paper=PAPER, saves="params macs bytes latency")
@dataclass(frozen=True)
class PGP(ChannelPruning):
    """Removes the filters with the smallest gradients in many small cuts while the network trains.

    Between two cuts the norms of each filter's gradients are added up. Those of the smallest sums
    are weak: as many as a layer has too many by then, on an exponential way to its width. A part
    of them (``hard``) leaves at once; the others become zero but go on training (RPGP; 1 for PGP).
    At the last cut all weak ones leave. The optimizer's state is cut and zeroed along, so a single
    training, from scratch too, ends with a small network.

    *Departs from the paper* and its code: cuts are at equal parts of the training, not after
    epochs; gradients are read when they are complete; the way ends at the ratio and not beyond it;
    channels that meet in a sum leave together and all layers take part. Batch norms of zeroed
    filters stay (``reset_norms``), since with them at zero nothing could ever recover; before a
    rectifier, only those with a bias above zero do. The first gradients of zeroed filters are
    shortened to what is usual in their layer. Without training, filters of small norm leave.

    *Measured* (bench ``prune-family``): with 50 % of its multiply-accumulates, trained for 2 epochs
    on 2,000 images, ResNet-20 was right on 57.8 % by ``pgp`` and on 68.8 % by
    ``magnitude`` (means of 3 seeds).

    >>> PGP(hard=1.0).course
    'exponential'
    """

    scope: Scope = field(default="local", init=False)
    # E, cuts; None: 10, or fewer in a short training
    rounds: Annotated[int, In(1, 200)] | None = None  # type: ignore[assignment]
    start: float = field(default=0.0, init=False)
    # share of the training in which cuts are made; None: 0.8, or less in a short training
    end: Share | None = None  # type: ignore[assignment]
    hard: Share = 0.5  # R, share of the weak filters that leaves at once; the others become zero
    course: progress.Course = "exponential"  # how the number of filters falls
    # of gradients: the sum of their norms, the norm of their sum, the sum of all their entries
    criterion: progress.Criterion = "path"
    reset_norms: bool = False  # zero the batch norms of zeroed filters too, as the paper's code

    def schedule(self, run: Run) -> Schedule:
        end = until(self.end, 0.8, run.steps)
        return Schedule(cuts(self.rounds, 10, end * run.steps), 0.0, end)

    def prepare(self, run: Run) -> None:
        groups = self.groups(run)
        ratios = uniform_ratios(run, groups, self.ratio, least=self.least)
        whole = {group.name: len(group.units) for group in groups}
        floors = floors_of(groups, self.least)
        run.state.update(rounds=0, ratios=ratios, whole=whole, floors=floors, fresh={}, sums={})
        run.state["rows"] = progress.listened(groups)
        if not run.steps:
            self.cut_to(run, self.schedule(run).rounds)

    def before_step(self, run: Run) -> None:
        progress.calm(run.model, run.state["rows"], run.state["fresh"])
        run.state["fresh"] = {}
        if self.pending(run):
            layers = {layer: None for rows in run.state["rows"].values() for layer in rows}
            progress.add_gradients(run.model, layers, run.state["sums"], self.criterion)

    def after_step(self, run: Run) -> None:
        schedule = self.schedule(run)
        end = max(1, round(schedule.end * run.steps))
        due = min(schedule.rounds, int(run.step * schedule.rounds / end + 1e-9))
        if due > run.state["rounds"]:
            self.cut_to(run, due)

    def finalize(self, run: Run) -> None:
        if self.pending(run):
            self.cut_to(run, self.schedule(run).rounds)

    def scores(self, run: Run, groups: Groups) -> Scores:
        return progress.pulled(run, groups, self.criterion)

    def cut_to(self, run: Run, number: int) -> None:
        """Make the cut of this number: weak units leave, or become zero."""
        state: dict[str, Any] = run.state
        groups = [group for group in self._left(run) if group.name in state["ratios"]]
        rounds = self.schedule(run).rounds
        scores, last = self.scores(run, groups), number == rounds
        way = (number, rounds, self.course)
        leaving = progress.weak_units(run, scores, way, 1.0 if last else self.hard)
        progress.take(run, groups, leaving, norms=self.reset_norms, last=last)
        run.first.anew()
        state.update(rounds=number, fresh=progress.moved_up(state["fresh"], leaving), sums={})
        state["rows"] = {} if last else progress.listened(self._left(run))

    def _left(self, run: Run) -> Groups:
        """The groups of which more than one unit is left."""
        try:
            return self.groups(run)
        except ModelError:  # there was one to begin with
            return []
