"""Adaptive ranks: they fall and rise while the network trains in its factors, towards a budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pliant.edits.rerank import merged
from pliant.families.lowrank.factorize import Form, look, note_spectra, subjects
from pliant.families.lowrank.ranks import changes, dense_again, forms_of, gradients, plan_ranks
from pliant.families.lowrank.times import check_schedule, due, end_search, falling
from pliant.method import Method
from pliant.registry import In, Paper, register
from pliant.run import Run


@register(
    "adaptive_ranks",
    paper=Paper(
        "Exploiting Elasticity in Tensor Ranks for Compressing Neural Networks (its ranks, "
        "searched within the factors)",
        "J. Ran, R. Lin, H. K.-H. So, G. Chesi, N. Wong",
        "ICPR",
        2020,
        "https://arxiv.org/abs/2105.04218",
    ),
    saves="params macs bytes",
)
@dataclass(frozen=True)
class AdaptiveRanks(Method):
    """Trains a network in its factors, and plans the ranks of all layers anew as it goes.

    ``plans`` times in the ``search``, evenly from ``start`` on, all layers compete for what the
    network may cost now: the budget, and of the rest the share (1 - t)^``power`` with t the part
    of the search that is over. A direction counts for what it is worth to the loss, estimated anew
    from training inputs without labels. A layer goes on dense until factors are planned for it;
    from then on its ranks may fall and rise. Momentum, and Adam's squares, follow the factors.

    After every plan but the last each row of factors gets the share ``grow`` of its ranks on top:
    components that read the strongest directions of the loss's gradient by the dense kernel, from
    labelled samples where there are any, with no effect yet. At the next plan they compete with all
    others. The last plan meets the budget; the rest of the training fine-tunes.

    Without training steps it factorizes once, by the same plan.

    *Departs from the paper*: there is no penalty; what dies is cut off as the budget falls, and
    what is missed may come back. The schedule is that of AdaLoRA (Zhang et al., ICLR 2023).

    >>> AdaptiveRanks(plans=4).plans
    4
    """

    search: Annotated[float, In(0, 1)] = 0.5  # share of the training by which the budget is reached
    start: Annotated[float, In(0, 1)] = 0.0  # share before ranks begin to fall: a warm-up
    plans: Annotated[int, In(1)] = 8  # times at which ranks are planned, the last for the budget
    power: Annotated[float, In(0, open="low")] = 3.0  # how fast the cost falls; 1: a straight line
    grow: Annotated[float, In(0, 1)] = 0.1  # share of its ranks that a row of factors gets to try
    form: Form = "auto"  # of the factors; "auto" takes the best per layer
    samples: Annotated[int, In(0)] = 1024  # training inputs to look at; 0 looks at weights only
    only: tuple[str, ...] = ()  # name patterns of the layers to consider
    exclude: tuple[str, ...] = ()  # name patterns of the layers to leave alone

    def prepare(self, run: Run) -> None:
        """Choose the layers."""
        check_schedule("adaptive_ranks", run, self.start, self.search)
        layers = subjects(run, self.only, self.exclude)
        run.state.update(layers=list(layers), split={}, made=0)
        note_spectra(run, layers, 0.95)

    def after_step(self, run: Run) -> None:
        """Plan anew when it is time."""
        begin, end = round(self.start * run.steps), round(self.search * run.steps)
        step, times = run.step - begin, min(self.plans, max(1, end - begin))
        over, now = run.step >= end, step > 0 and due(step, 1, end - begin, times)
        if run.state["made"] < self.plans and (over or now):
            self._plan(run, 1.0 if over else step / (end - begin))

    def finalize(self, run: Run) -> None:
        """Meet the budget, if the training has not come to it."""
        if run.state["made"] < self.plans:
            self._plan(run, 1.0)
        run.restate(merged(run.edits))

    def _plan(self, run: Run, part: float) -> None:
        """Give every layer the ranks that it is to have when this part of the search is over."""
        state, last = run.state, part >= 1
        state["made"] = self.plans if last else state["made"] + 1
        whole, layers = dense_again(run, state["split"], state["layers"])
        seen = look(whole, layers, self.samples, seed=run.step)
        bounds, left = run.limits(), 0.0 if last else (1 - part) ** self.power
        limits = falling(run.cost, bounds, left), bounds
        edits = plan_ranks(whole, layers, seen, self.form, state["split"], *limits)
        wanted = {} if last else gradients(whole, layers, self.samples, seed=run.step)
        grow = 0.0 if last else self.grow
        found = changes(edits, run, layers, seen, state["split"], grow=grow, wanted=wanted)
        run.apply(*found)
        state["split"] = state["split"] | forms_of(found)
        run.note(planned={edit.layer: [edit.form, *edit.ranks] for edit in edits})
        if last:
            end_search(run, layers.keys() - state["split"].keys())
