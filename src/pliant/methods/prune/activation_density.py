"""AD pruning: a layer whose activations are non-zero to 0.4 keeps 0.4 of its channels."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pliant.families.prune.allocate import Goal
from pliant.families.prune.density import Density, measured, need_rectifiers, saturated
from pliant.families.prune.fresh import redraw
from pliant.families.prune.judge import need_inputs
from pliant.families.prune.pruner import ChannelPruning, Ratio, Rounds, Share
from pliant.families.prune.ranking import Scope
from pliant.families.prune.scores import Groups, Scores
from pliant.families.prune.widths import powers, resized
from pliant.registry import In, Paper, register
from pliant.run import Run
from pliant.surgery.prove import Leaving

PAPER = Paper(
    "Activation Density Driven Efficient Pruning in Training",
    "T. Foldy-Porto, Y. Venkatesha, P. Panda",
    "ICPR",
    2020,
    "https://arxiv.org/abs/2002.02949",
)


@register("activation_density", paper=PAPER, saves="params macs bytes latency")
@dataclass(frozen=True)
class ActivationDensity(ChannelPruning):
    """Shrinks every layer to the share of its activations that is not zero, while it trains.

    After every epoch the density of each group of channels is measured behind its rectifiers. When
    densities no longer change, or the schedule says so, a group of C channels at density d keeps
    round(d C) of them, those of the highest density of their own, and training goes on. So the
    later epochs are cheap: the history says how cheap, as ``complexity``, the part of the
    multiply-accumulates that the dense training would have taken. It ends when all densities reach
    ``enough``, or the budget is met. Needs training inputs and rectifiers (ReLU, ReLU6).

    *Departs from the paper*, of which the rule and the schedule are inferred: densities are
    measured on ``samples`` inputs in eval mode, after every epoch, instead of being counted in the
    training passes; weights are kept by default (``weights="fresh"`` draws them anew after each
    resizing, with the optimizer's state; the learning rate goes on as it was in both). A budget is
    met by density to a power that is the same for all groups, which is what resizing several
    times at constant densities comes to; the last resizing goes all the way there.

    *Measured* (bench ``prune-family``): with 50 % of its multiply-accumulates, trained for 2 epochs
    on 2,000 images, ResNet-20 was right on 56.6 % by ``activation_density(rounds=1, samples=256)``
    and on 68.8 % by ``magnitude`` (means of 3 seeds).

    *Measured* (bench ``prune-vgg16``): with 10 % of its parameters, trained for 2 epochs on 4,000
    images, VGG-16 of half the width was right on 31.2 % by ``activation_density(rounds=1,
    samples=256)`` and on 48.7 % by ``magnitude`` (means of 2 seeds).

    *Not shown* (bench ``prune-items``, small networks, 2 seeds): at a fifth of the parameters,
    weights inherited, it is at most 1.5 behind the dense network (-9.3 ± 2.4 points); weights
    inherited, it is no worse than a network as small of equal shares (-4.3 ± 1.7 points); weights
    drawn anew, it is no worse than a network as small of equal shares (-3.85 ± 0.15 points); layers
    that are denser at the end than before, weights inherited (66.667 ± 0 %); layers that are denser
    at the end than before, weights drawn anew (50 ± 0 %).

    >>> ActivationDensity(weights="fresh").rounds
    5
    """

    ratio: Ratio = field(default=0.5, init=False)
    scope: Scope = field(default="global", init=False)
    rounds: Rounds = 5  # R_max, resizings at most
    start: Share = 0.1  # share of the training before the first resizing, unless saturated
    weights: Literal["inherit", "fresh"] = "inherit"  # what the smaller network starts from
    samples: Annotated[int, In(1)] = 1024  # training inputs of one measurement
    window: Annotated[int, In(1)] = 5  # w, epochs that a density is compared with
    # eps, change of densities below which they are saturated
    tolerance: Annotated[float, In(0)] = 0.01
    enough: Annotated[float, In(0, 1)] = 0.95  # density at which no channel leaves any more

    def refuse(self, run: Run) -> None:
        need_inputs(run, "activation_density", "looks at training inputs")

    def prepare(self, run: Run) -> None:
        run.state.update(history={}, spent=0, since=0)
        need_rectifiers(self._measure(run, self.groups(run)))
        run.state["history"] = {}
        super().prepare(run) if not run.steps else run.state.setdefault("rounds", 0)

    def after_step(self, run: Run) -> None:
        """Wait for the end of the epoch."""

    def after_epoch(self, run: Run) -> None:
        if not self.pending(run):
            return
        found, history = self._measure(run, self.groups(run)), run.state["history"]
        for name, density in found.items():
            history[name] = [*history.get(name, ()), density.mean]
        mean = sum(density.mean for density in found.values()) / max(1, len(found))
        run.note(density=mean)
        due = self.schedule(run).due(run.step, run.steps) > run.state["rounds"]
        if due or saturated(history.values(), self.window, self.tolerance):
            done = run.state["rounds"] + 1
            self.cut(run, Goal(1.0, run.limits()), last=done == self.rounds)
            run.state.update(rounds=done, history={})
            if self.weights == "fresh":
                redraw(run)

    def finalize(self, run: Run) -> None:
        if self.pending(run) and (run.limits() or not run.state["rounds"]):
            self.cut(run, Goal(1.0, run.limits()))
        run.state["rounds"] = self.rounds
        self._account(run)
        if run.steps:
            run.note(complexity=run.state["spent"] / (run.cost.macs * max(1, run.step)))

    def cut(self, run: Run, goal: Goal, *, last: bool = True) -> None:
        self._account(run)
        run.state["last"] = last
        super().cut(run, goal, last=last)

    def scores(self, run: Run, groups: Groups) -> Scores:
        """Return the power of its group's density at which each unit leaves."""
        return powers(self._measure(run, groups), self.enough)

    def allocation(self, run: Run, groups: Groups, goal: Goal) -> Leaving:
        last = run.state["last"]
        return resized(run, groups, self.scores(run, groups), goal.limits, last=last)

    def _measure(self, run: Run, groups: Groups) -> dict[str, Density]:
        return measured(run, groups, self.samples)

    def _account(self, run: Run) -> None:
        """Add the multiply-accumulates of the steps since the last resizing."""
        run.state["spent"] += run.planner.now().macs * (run.step - run.state["since"])
        run.state["since"] = run.step
