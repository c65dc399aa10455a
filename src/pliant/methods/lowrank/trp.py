"""Trained Rank Pruning: train, and cut every kernel to low rank again and again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pliant.families.lowrank.cuts import add_nuclear, cut
from pliant.families.lowrank.factorize import (
    check_reachable,
    factorize,
    note_spectra,
    plan,
    subjects,
)
from pliant.method import Method
from pliant.nn.factorized import Factorizable
from pliant.plan.pace import every, until
from pliant.registry import In, Paper, register
from pliant.run import Run


@register(
    "trp",
    paper=Paper(
        "TRP: Trained Rank Pruning for Efficient Deep Neural Networks",
        "Y. Xu, Y. Li, S. Zhang, W. Wen, B. Wang, Y. Qi, Y. Chen, W. Lin, H. Xiong",
        "IJCAI",
        2020,
        "https://arxiv.org/abs/2004.14566",
    ),
    saves="params macs bytes latency",
)
@dataclass(frozen=True)
class TRP(Method):
    """Cuts kernels to the rank that keeps their energy every few steps, with a nuclear penalty.

    Between cuts the gradient of the nuclear norm is added (eq. 5); the last cut is made
    permanent by splitting every convolution in two: channel-wise (DxD, 1x1) or spatially
    (Dx1, 1xD).

    *Departs from the paper*: with a budget the last ranks are read off at the one energy
    threshold that meets it; the rest of the training fine-tunes the split network.

    >>> TRP(form="spatial").energy
    0.98
    """

    weight: Annotated[float, In(0)] = 3e-4  # lambda, of the nuclear norm
    energy: Annotated[float, In(0, 1)] = 0.98  # e, kept by every cut
    # m, steps between two cuts; None: 20, or fewer in a short search
    interval: Annotated[int, In(1)] | None = None
    # share of the training before the split; None: 0.5, or less in a short training
    search: Annotated[float, In(0, 1)] | None = None
    p: Annotated[float, In(0, 1)] = 0.95  # energy kept by the split, if there is no budget
    form: Literal["output", "spatial"] = "output"  # channel-wise or spatial decomposition
    only: tuple[str, ...] = ()  # name patterns of the layers to consider
    exclude: tuple[str, ...] = ()  # name patterns of the layers to leave alone

    def refuse(self, run: Run) -> None:
        """Refuse a budget that is out of reach."""
        check_reachable(run, self.form, only=self.only, exclude=self.exclude, every=True)

    def prepare(self, run: Run) -> None:
        """Choose the layers."""
        layers = subjects(run, self.only, self.exclude, every=True)
        run.state.update(layers=list(layers), split=False)

    def before_step(self, run: Run) -> None:
        """Add the gradient of the nuclear norm of the decomposed matrix."""
        for module in self._searched(run):
            add_nuclear(module, self.form, self.weight)

    def after_step(self, run: Run) -> None:
        """Cut, or split when the search is over."""
        search = round(until(self.search, 0.5, run.steps) * run.steps)
        if run.step % every(self.interval, 20, search) == 0:
            for module in self._searched(run):
                cut(module, self.form, self.energy)
        if not run.state["split"] and run.step >= search:
            self._split(run)

    def after_epoch(self, run: Run) -> None:
        """Write the spectra into the history."""
        if not run.state["split"]:
            note_spectra(run, subjects(run, self.only, self.exclude, every=True), self.p)

    def finalize(self, run: Run) -> None:
        """Split, if the training was too short to have done it."""
        if not run.state["split"]:
            self._split(run)

    def _split(self, run: Run) -> None:
        layers = subjects(run, self.only, self.exclude, every=True)
        factorize(run, plan(run, layers, self.form, {}, self.p), layers, {})
        run.state["split"] = True

    def _searched(self, run: Run) -> list[Factorizable]:
        names = [] if run.state["split"] else run.state["layers"]
        return [run.model.get_submodule(name) for name in names]  # type: ignore[misc]
