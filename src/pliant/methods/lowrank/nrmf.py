"""NRMF, elastic tensor ranks: training itself finds how few channel directions a layer needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch

from pliant.cost import cost, layer_costs
from pliant.edits import Factor
from pliant.errors import MethodError
from pliant.families.lowrank.factorize import (
    Form,
    Layers,
    check_reachable,
    factorize,
    look,
    note_spectra,
    plan,
    subjects,
)
from pliant.families.lowrank.losses import losses
from pliant.math.metric import Metric
from pliant.math.norms import penalty_gradient
from pliant.math.prox import shrink
from pliant.math.rank import energy_rank
from pliant.math.svd import spectrum
from pliant.method import Method
from pliant.registry import In, Paper, register
from pliant.run import Run

Shrinkage = Literal["soft", "relative", "reweighted", "gradient"]

START = 0.1  # strength with which the controller begins
PACE = 1.25  # by which the controller changes the strength at one interval
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

    Search: every ``interval`` steps (twice at least) the singular values of every kernel's two
    channel unfoldings are shrunk, so that weak directions die. Then ranks and forms are read off
    for the whole network at once, by one energy p or for a budget, layers are factorized, and the
    rest of the training fine-tunes them. Without training steps it only factorizes, in seconds.

    Every shrinkage is the proximal step of what ``interval`` steps of the penalty would do: its
    threshold is tau = alpha * lr * k, in the unit of the singular values (``soft``), of the
    largest of them (``relative``) or of their root mean square (``reweighted``).

    A fixed strength adds up: on a trained network it suits searches of some ten steps. For one of
    hundreds take ``alpha=None``, which raises and lowers it so that the ranks reach the budget as
    the search ends; the budget must bound params, macs or bytes then.

    With ``early`` a layer is factorized as soon as the ranks that the whole network's plan gives
    it hold the share p of its energy, and trains on in its factors, with its momentum: a step
    gets cheaper while the search goes on. Five times in the search it is planned anew; at its end
    the rest is factorized.

    *Departs from the paper*: its own form is ``PAPER``. The defaults differ where measurements
    on small networks under BatchNorm said so: small singular values shrink more and the norm is
    kept, the search is short, forms are chosen per layer, and energy is what a direction is
    worth to the loss (estimated from inputs without labels), not its share of the weights.

    >>> NRMF(alpha=0.1).alpha
    0.1
    """

    # weight of the penalty; None: found for the budget and p
    alpha: Annotated[float, In(0)] | None = 0.5
    shrinkage: Shrinkage = "reweighted"  # rule; "soft" and "gradient" are the paper's penalty
    # k, steps between two shrinkages; fewer where the search is short
    interval: Annotated[int, In(1)] = 15
    keep_norm: bool = True  # scale shrunken kernels back to their norm
    search: Annotated[float, In(0, 1)] = 0.1  # share of the training before the factorization
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
        check_reachable(run, self.form, only=self.only, exclude=self.exclude)

    def prepare(self, run: Run) -> None:
        """Choose the layers."""
        if self.interval < 1:
            raise MethodError(f"nrmf: interval must be at least 1 step, not {self.interval}.")
        if self.alpha is None and run.steps and not _counted(run):
            raise MethodError(
                "nrmf(alpha=None) finds its strength for a budget of params, macs or bytes, and "
                "there is none: bound one of them, or give alpha a number."
            )
        layers = subjects(run, self.only, self.exclude)
        run.state.update(
            layers=list(layers), alpha=START if self.alpha is None else self.alpha, factorized=False
        )
        note_spectra(run, layers, self.p)
        if run.steps and not self._searching(run):
            self._factorize(run)

    def before_step(self, run: Run) -> None:
        """Add the exact gradient of the nuclear norms, if that form of the penalty is chosen."""
        if self.shrinkage != "gradient" or run.state["factorized"]:
            return
        for module in self._layers(run).values():
            if module.weight.grad is not None:
                modes = (0, 1) if module.weight[0, 0].numel() > 1 else (0,)
                pull = penalty_gradient(module.weight, modes)
                module.weight.grad.add_(pull, alpha=run.state["alpha"])

    def after_step(self, run: Run) -> None:
        """Shrink at intervals; factorize when the search is over."""
        if run.state["factorized"]:
            return
        if run.step % self._pace(run) == 0:
            if self.shrinkage != "gradient":
                self._shrink(run)
            if self.alpha is None:
                self._steer(run)
        if run.step >= self._searching(run):
            self._factorize(run)
        elif self.early and self._due(run):
            self._factorize_ready(run)

    def after_epoch(self, run: Run) -> None:
        """Write spectra and ranks into the history."""
        if not run.state["factorized"] and run.state["layers"]:
            note_spectra(run, self._layers(run), self.p)

    def finalize(self, run: Run) -> None:
        """Factorize, if the training has not come to it."""
        if not run.state["factorized"]:
            self._factorize(run)

    def _factorize_ready(self, run: Run) -> None:
        """Factorize the layers that lose next to nothing at the ranks they are to have.

        The weights alone say cheaply whether there may be any; then the data's plan decides.
        """
        layers = self._layers(run)
        if not layers or not self._ready(run, layers, {}):
            return
        seen = look(run, layers, self.samples)
        ready = self._ready(run, layers, seen)
        if ready:
            names = [edit.layer for edit in ready]
            own = {name: layers[name] for name in names}
            factorize(run, ready, own, seen, recalibrate=False)
            run.state["layers"] = [name for name in layers if name not in names]
            run.note(factorized=names)

    def _ready(self, run: Run, layers: Layers, seen: Mapping[str, Metric]) -> list[Factor]:
        """The edits of the plan that keep the share p of their layer's energy."""

        def lost(edit: Factor) -> float:
            found = losses(layers[edit.layer].weight, (edit.form,))[edit.form]
            return found.at([edit.ranks])[0]

        edits = plan(run, layers, self.form, seen, self.p)
        return [edit for edit in edits if lost(edit) <= 1 - self.p]

    def _factorize(self, run: Run) -> None:
        layers = self._layers(run)
        if not layers:
            run.state["factorized"] = True
            return
        note_spectra(run, layers, self.p)
        seen = look(run, layers, self.samples)
        edits = plan(run, layers, self.form, seen, self.p)
        follows = run.steps > run.step
        reconstruct = 0 if follows or not self.samples else self.reconstruct
        factorize(run, edits, layers, seen, reconstruct=reconstruct)
        run.state["factorized"] = True

    def _pace(self, run: Run) -> int:
        """Steps between two shrinkages: every search has room for two of them."""
        return max(1, min(self.interval, self._searching(run) // 2))

    def _due(self, run: Run) -> bool:
        """Whether to plan again, after a shrinkage: a plan takes as long as dozens of steps."""
        pace, search = self._pace(run), self._searching(run)
        before, now = ((run.step - less) * PLANS // search for less in (pace, 0))
        return run.step % pace == 0 and before < now

    def _searching(self, run: Run) -> int:
        """Steps of the search."""
        return round(self.search * run.steps)

    def _layers(self, run: Run) -> Layers:
        return {name: run.model.get_submodule(name) for name in run.state["layers"]}  # type: ignore[misc]

    @torch.no_grad()
    def _shrink(self, run: Run) -> None:
        """The proximal step of the penalty on both unfoldings, one after the other."""
        kind = self.shrinkage if self.shrinkage != "gradient" else "soft"
        threshold = run.state["alpha"] * run.lr * self._pace(run)
        for module in self._layers(run).values():
            weight = module.weight
            for mode in (0, 1) if weight[0, 0].numel() > 1 else (0,):
                weight.copy_(shrink(weight, mode, threshold, kind=kind, keep_norm=self.keep_norm))

    def _steer(self, run: Run) -> None:
        """Raise the strength while ranks at energy p lag behind a straight line to the budget."""
        left = 1 - min(1.0, run.step / max(1, self._searching(run)))
        reach = self._reach(run)
        lags = any(
            reach[axis] > bound + left * (getattr(run.cost, axis) - bound)
            for axis, bound in _counted(run).items()
        )
        run.state["alpha"] *= PACE if lags else 1 / PACE
        run.note(alpha=run.state["alpha"])

    def _reach(self, run: Run) -> dict[str, int]:
        """What the whole network would cost if it were factorized at energy p now, by axis."""
        now, rows = cost(run.model, run.example), layer_costs(run.model, run.example)
        reach = {axis: getattr(now, axis) for axis in _counted(run)}
        for name, module in self._layers(run).items():
            weight = module.weight.detach()
            ranks = [energy_rank(spectrum(weight, mode), self.p) for mode in (1, 0)]
            form = "tucker2" if weight[0, 0].numel() > 1 else "svd"
            edit = Factor(name, form, tuple(ranks if form == "tucker2" else ranks[:1]))
            after = edit.predict(rows[name])
            for axis in reach:
                reach[axis] -= max(0, getattr(rows[name], axis) - getattr(after, axis))
        return reach


def _counted(run: Run) -> dict[str, float]:
    """The bounds that can be followed in training: all but milliseconds, which are measured."""
    return {axis: bound for axis, bound in run.limits().items() if axis != "latency"}


PAPER = (
    'nrmf(alpha=0.01, shrinkage="soft", interval=5, keep_norm=False, search=0.8, '
    'form="tucker2", samples=0)'
)
"""The paper's own form: plain nuclear norms, Tucker-2, energy of the weights."""
