"""NRMF, elastic tensor ranks: training itself finds how few channel directions a layer needs.

The file is long because of the options and what they mean: eight penalties, two spaces.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pliant.families.lowrank.factorize import (
    Form,
    check_reachable,
    factorize,
    look,
    named,
    note_spectra,
    plan,
    subjects,
)
from pliant.families.lowrank.leaving import factorize_ready
from pliant.families.lowrank.penalties import Penalty, Shrinkage, Space
from pliant.families.lowrank.steering import START, check_steering, steered
from pliant.families.lowrank.times import due
from pliant.method import Method
from pliant.registry import In, Paper, register
from pliant.run import Run

LONGEST = 100  # steps of a search whose share is not given: the default strength is for so many
PLANS = 6  # in a search whose layers may leave early, the one at its end included


@register(
    "nrmf",
    paper=Paper(
        "Exploiting Elasticity in Tensor Ranks for Compressing Neural Networks",
        "J. Ran, R. Lin, H. K.-H. So, G. Chesi, N. Wong",
        "ICPR",
        2020,
        "https://arxiv.org/abs/2105.04218",
    ),
    saves="params macs bytes latency",
)
@dataclass(frozen=True)
class NRMF(Method):
    """Shrinks the spectra of both channel unfoldings in training, then factorizes what is left.

    Search: a penalty pulls on the singular values of every kernel, so that weak directions die.
    Then ranks and forms are read off for the whole network at once, by one energy p or for a
    budget, layers are factorized, and the rest of the training fine-tunes them. Without training
    steps it only factorizes, in seconds.

    ``gradient`` is the paper's penalty: the exact gradient of the nuclear norms before every step;
    ``logdet``, ``schatten`` and ``hoyer`` are others in its place; ``planned`` pulls every kernel
    towards what a plan for the budget would leave of it now, as BATUDE does by ADMM (Yin et al.,
    AAAI 2022). The rest shrink singular values every ``interval`` steps, as far as the optimizer
    would have gone with such a gradient, with its momentum or Adam's scaling: alike (``soft``: the
    nuclear norm), in units of the largest (``relative``), or the weak ones more, in units of their
    root mean square (``reweighted``). In ``space="whitened"`` a direction counts for what it is
    worth to the loss, as it does when ranks are chosen, and not for its weights. The data is looked
    at anew, and the plan made anew, ``refresh`` times.

    A fixed strength adds up, so the search is short however long the training: a tenth of it, 100
    steps at most. For a longer ``search`` on a trained network take ``alpha=None``, which raises
    and lowers it so that the ranks reach a budget of params, macs or bytes as the search ends.
    With ``early`` a layer is factorized once its ranks in the plan of the whole network, made
    five times in the search, hold p, and trains on with its momentum.

    *Departs from the paper*: its own form is ``PAPER``. The defaults differ where measurements on
    small networks under BatchNorm said so: weak directions shrink more, the norm is kept, the
    search is short, forms are chosen per layer, and energy is worth to the loss, from inputs alone.

    >>> NRMF(alpha=0.1).alpha
    0.1
    """

    # weight of the penalty; None: found for the budget and p
    alpha: Annotated[float, In(0)] | None = 0.05
    shrinkage: Shrinkage = "reweighted"  # rule; "gradient" is the paper's penalty
    space: Space = "weights"  # whose singular values: "whitened" needs data
    # times in the search to look at data and to plan anew, for "whitened" and "planned"
    refresh: Annotated[int, In(1)] = 5
    # k, steps between two shrinkages; fewer where the search is short
    interval: Annotated[int, In(1)] = 15
    keep_norm: bool = True  # leave the norm of a kernel as it is, and change directions only
    # share of the training before the factorization; None: a tenth, of 100 steps at most
    search: Annotated[float, In(0, 1)] | None = None
    p: Annotated[float, In(0, 1)] = 0.95  # energy kept, if there is no budget
    form: Form = "auto"  # of the factors; "auto" takes the best per layer
    samples: Annotated[int, In(0)] = 1024  # training inputs to look at; 0 looks at weights only
    # training inputs to refit layers from, if no training follows
    reconstruct: Annotated[int, In(0)] = 512
    early: bool = False  # factorize each layer once its planned ranks hold p, within the search
    only: tuple[str, ...] = ()  # name patterns of the layers to consider
    exclude: tuple[str, ...] = ()  # name patterns of the layers to leave alone

    def refuse(self, run: Run) -> None:
        """Refuse a budget that is out of reach."""
        check_reachable(run, self.form, only=self.only, exclude=self.exclude, every=True)

    def prepare(self, run: Run) -> None:
        """Choose the layers."""
        check_steering("nrmf", run, self.alpha)
        layers, alpha = subjects(run, self.only, self.exclude, every=True), self.alpha
        run.state.update(layers=list(layers), factorized=False, frames={}, goals={})
        run.state["alpha"] = START if alpha is None else alpha
        note_spectra(run, layers, self.p)
        if self._search(run):
            run.state |= self._penalty.look(run, layers)
        elif run.steps:
            self._factorize(run)

    def before_step(self, run: Run) -> None:
        """Add the exact gradient of the penalty, if that form of it is chosen."""
        if not (state := run.state)["factorized"]:
            layers = named(run, state["layers"])
            self._penalty.before_step(layers, state["alpha"], state["frames"], state["goals"])

    def after_step(self, run: Run) -> None:
        """Shrink at intervals; factorize when the search is over."""
        if (state := run.state)["factorized"]:
            return
        layers, search = named(run, state["layers"]), self._search(run)
        pace = max(1, min(self.interval, search // 2))  # every search has room for two shrinkages
        if run.step % pace == 0:
            self._penalty.after_steps(run, layers, state["alpha"], state["frames"], steps=pace)
            if self.alpha is None:
                state["alpha"] = steered(run, layers, state["alpha"], self.p, search)
                run.note(alpha=state["alpha"])
        if run.step >= search:
            self._factorize(run)
        elif self.early and due(run.step, pace, search, PLANS):
            left = factorize_ready(run, layers, self.form, self.samples, self.p)
            state["layers"] = [name for name in layers if name not in left]
        elif due(run.step, 1, search, self.refresh):
            state |= self._penalty.look(run, layers)

    def after_epoch(self, run: Run) -> None:
        """Write spectra and ranks into the history."""
        if not run.state["factorized"] and run.state["layers"]:
            note_spectra(run, named(run, run.state["layers"]), self.p)

    def finalize(self, run: Run) -> None:
        """Factorize, if the training has not come to it."""
        if not run.state["factorized"]:
            self._factorize(run)

    @property
    def _penalty(self) -> Penalty:
        return Penalty(self.shrinkage, self.space, self.keep_norm, self.samples, self.form, self.p)

    def _search(self, run: Run) -> int:
        if self.search is None:
            return min(round(0.1 * run.steps), LONGEST)
        return round(self.search * run.steps)

    def _factorize(self, run: Run) -> None:
        run.state.update(factorized=True, frames={}, goals={})
        if layers := named(run, run.state["layers"]):
            note_spectra(run, layers, self.p)
            seen = look(run, layers, self.samples)
            edits = plan(run, layers, self.form, seen, self.p)
            alone = run.steps <= run.step and self.samples  # no training follows
            factorize(run, edits, layers, seen, reconstruct=self.reconstruct if alone else 0)


PAPER = (
    'nrmf(alpha=0.01, shrinkage="gradient", keep_norm=False, search=0.8, form="tucker2", samples=0)'
)
"""The paper's own form: plain nuclear norms, Tucker-2, energy of the weights."""
