"""AIMP: small weights go in many iterations, all of which train shortly but the last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch

from pliant.families.prune import sparse
from pliant.families.prune.columns import begin_anew, hold
from pliant.families.prune.rewind import (
    Annealing,
    Rates,
    beginnings,
    factor,
    iterations,
    kept_after,
    smallest,
    sparsity_for,
    within_bytes,
)
from pliant.method import Method
from pliant.registry import In, Paper, register
from pliant.run import Run

PAPER = Paper(
    "Speeding-Up Pruning for Artificial Neural Networks: Introducing Accelerated Iterative "
    "Magnitude Pruning",
    "M. Zullich, E. Medvet, F. A. Pellegrino, A. Ansuini",
    "ICPR",
    2020,
    "https://doi.org/10.1109/ICPR48806.2021.9412705",
)


@register("aimp", paper=PAPER, saves="bytes")
@dataclass(frozen=True)
class AIMP(Method):
    """Zeroes the smallest weights of all layers in iterations that train shortly, but for the last.

    Each iteration takes the same share (``rate``) of the weights that are left, by one threshold,
    and then trains: the last one as long as it should, the others ``short`` times as long. The
    learning rate begins anew with each, so train with ``schedule="constant"``; momentum is
    forgotten. Zeros stay zeros, whatever momentum and weight decay do, and are stored sparse: that
    saves bytes, not time, since kernels are decoded at every call and then computed with as before.
    Give a trained network, or ``dense=True`` to train it first.

    *Departs from the paper*, of which the schedule of short trainings is inferred: lengths are
    shares of the training, whatever its epochs; exactly as many weights go as the rate says, of
    equal ones the first; a budget of bytes sets the sparsity.

    *Not shown* (bench ``prune-items``, small networks, 2 seeds): ten prunings with short trainings
    are at most 1 behind those with full ones (-1 ± 0.3 points); three prunings with short trainings
    are at most 1 behind those with full ones (-1 ± 0.3 points).

    >>> AIMP(sparsity=0.988).rate
    0.2
    """

    sparsity: Annotated[float, In(0, 0.999)] = 0.9  # s, share that becomes zero, if no budget
    rate: Annotated[float, In(0.02, 0.9)] = 0.2  # p, share of the weights left that one takes
    short: Annotated[float, In(0, 1, "low")] = 0.4  # rho, length of all trainings but the last
    rewind: Literal["rate", "weights"] = "rate"  # what begins anew: the learning rate, or both
    annealing: Annealing = "cosine"  # of the rate in each training; none: the loop's own
    cut_off: bool = False  # end a short training early in its course, not go through it faster
    dense: bool = False  # train the whole network first, as long as in the last iteration
    linear: bool = False  # take linear layers too, not convolutions only, where there are some
    only: tuple[str, ...] = ()  # name patterns of the layers to consider
    exclude: tuple[str, ...] = ()  # name patterns of the layers to leave alone

    def prepare(self, run: Run) -> None:
        layers = sparse.prunable(run, self.only, self.exclude, linear=self.linear)
        masks = {n: torch.ones_like(sparse.weight_of(run, n), dtype=torch.bool) for n in layers}
        run.state.update(
            masks=masks, done=0, sparsity=sparsity_for(run, masks, self.sparsity), first={}
        )
        if self.rewind == "weights":
            run.state["first"] = {n: v.clone() for n, v in run.model.state_dict().items()}
        self._prune_if_due(run)

    def before_step(self, run: Run) -> None:
        hold(run.model, run.state["masks"], gradients=True)
        known = run.aside.all(Rates)
        rates = known[0] if known else run.aside.put(Rates())
        rates.attach(run.optimizers)
        share, shape = run.step / max(1, run.steps), (self.annealing, self.short)
        rates.factor = factor(share, self._starts(run), *shape, cut_off=self.cut_off)

    def after_step(self, run: Run) -> None:
        hold(run.model, run.state["masks"])  # momentum and decay move zeros too
        self._prune_if_due(run)

    def finalize(self, run: Run) -> None:
        self._prune_if_due(run, last=True)
        if not run.step:
            run.recalibrate()
        sparse.store(run, list(run.state["masks"]))

    def _starts(self, run: Run) -> list[float]:
        count = iterations(run.state["sparsity"], self.rate)
        return beginnings(count, self.short, dense=self.dense)

    def _prune_if_due(self, run: Run, *, last: bool = False) -> None:
        starts = self._starts(run)
        while run.state["done"] < len(starts):
            begins = round(starts[run.state["done"]] * run.steps)
            if not last and (not run.steps or run.step < begins):
                return
            self._prune(run, last=run.state["done"] + 1 == len(starts))

    def _prune(self, run: Run, *, last: bool) -> None:
        """Make the next pruning, and begin anew what is to begin anew."""
        state, masks = run.state, run.state["masks"]
        state["done"] += 1
        total = sum(mask.numel() for mask in masks.values())
        kept = kept_after(total, state["done"], state["sparsity"], self.rate)
        weights = {name: sparse.weight_of(run, name) for name in masks}
        kept = within_bytes(run, weights, masks, kept) if last else kept
        state["masks"] = smallest(weights, masks, kept)
        first = state["first"] if run.step < run.steps else {}
        begin_anew(run.model, first, state["masks"], run.optimizers)
        run.note(iteration=state["done"], zeros=sparse.share_of_zeros(state["masks"]))
