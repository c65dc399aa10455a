"""Plans for a target: prices what can be done to a layer, and measures the plan whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from pliant.budget import Option
from pliant.cost import Example, LayerCost, twin
from pliant.edits import Edit, Factor
from pliant.errors import BudgetError
from pliant.latency.builds import built, edited
from pliant.latency.compare import Comparison, Timing, compare, interleaved, measure, quiet
from pliant.latency.memory import KEPT, belongs, name_of, recalled, remembered
from pliant.latency.table import LatencyTable, input_shape, signature
from pliant.latency.target import Target, Where, as_target
from pliant.math.forms import forms_for, max_ranks
from pliant.nn.layers import obstacle

Plan = Callable[[Mapping[str, float]], list[Any]]
"""Gives edits for limits, with prices as the clock knows them now."""

WORTH = 0.97  # a replacement must take at most this share of the dense layer's time
TRIES = 5  # plans that are built and measured whole
SECONDS, ROUNDS = 1.5, 21  # for layers beside the network, at least
CHECKS = 6  # rounds of measuring the layers of one plan before it is built
NEAR = 0.93  # of the allowed time is near enough
AIM = 0.97  # share of the allowed time that a plan aims at: two measurements are never equal


@dataclass
class Clock:
    """Everything about time in one compression.

    Args:
        target: where the network is to run.
        dense: a copy of the network as it came, to compare with.
        example: inputs of one forward call.
        table: times of layers.
        timing: of the dense network.
        layers: for each dense layer looked at: milliseconds before, and after or of the best
            replacement that was measured.
        dense_ms: milliseconds of single layers by their signature, beside the dense network.
        weighed: what `weigh` found, by the names of networks and edits; each is measured once.
        final: the dense network against the finished one.
    """

    target: Target
    dense: nn.Module
    example: Example
    table: LatencyTable
    timing: Timing
    layers: dict[str, tuple[float, float]] = field(default_factory=dict)
    dense_ms: dict[str, float] = field(default_factory=dict)
    weighed: dict[str, tuple[float, bool]] = field(default_factory=dict)
    final: Comparison | None = None

    @classmethod
    def start(
        cls,
        model: nn.Module,
        example: Example,
        target: Where,
        saved: Mapping[str, Any] | None = None,
    ) -> Clock:
        """Measure a dense network on a target, or recall what was remembered of both."""
        target = as_target(target)
        dense = twin(model).cpu().eval()
        found = recalled(saved, dense, target) or {
            "table": LatencyTable.of(target),
            "timing": measure(dense, example, target),
        }
        return cls(target, dense, example, **found)

    def remember(self) -> dict[str, Any]:
        """Return all that was measured, but for the finished network, as plain data."""
        kept = {name: getattr(self, name) for name in (*KEPT, "layers")}
        return remembered(self.dense, self.target, self.timing, self.table, **kept)

    def recall_layers(self, saved: Mapping[str, Any] | None) -> None:
        """Take the times of layers that a report of the saved run would show."""
        if saved and belongs(saved, self.dense, self.target):
            self.layers = dict(saved["layers"])

    # ------------------------------------------------------------ prices

    def of_layer(self, model: nn.Module, name: str, cost: LayerCost) -> float:
        """Return the milliseconds of a layer as it is, all calls together."""
        key = self._key(model, name, cost)
        if key not in self.dense_ms:
            self._calibrate(model, {name: cost})
        return self.dense_ms[key] * cost.calls

    def of_edit(self, model: nn.Module, edit: Edit, cost: LayerCost) -> float:
        """Return the milliseconds of a layer after an edit, interpolated where that is possible."""
        if not isinstance(edit, Factor):
            return self.measured(model, edit, cost)
        layer: Any = model.get_submodule(edit.layer)
        shape = self._shape(layer, cost)
        ms = self.table.factor(layer, shape, edit.form, edit.ranks)
        return ms / self.table.time(layer, shape) * self.of_layer(model, edit.layer, cost)

    def measured(self, model: nn.Module, edit: Edit, cost: LayerCost) -> float:
        """Return the milliseconds of a layer after an edit, measured in turn with the layer."""
        layer: Any = model.get_submodule(edit.layer)
        shape = self._shape(layer, cost)
        if isinstance(edit, Factor):
            ms = self.table.exact(layer, shape, edit.form, edit.ranks)
        else:
            ms = self.table.replaced(layer, edited(layer, edit), shape)
        return ms / self.table.time(layer, shape) * self.of_layer(model, edit.layer, cost)

    def _shape(self, layer: nn.Module, cost: LayerCost) -> tuple[int, ...]:
        return input_shape(layer, cost, self.target.batch)

    def _key(self, model: nn.Module, name: str, cost: LayerCost) -> str:
        layer = model.get_submodule(name)
        return signature(layer, self._shape(layer, cost))

    def _calibrate(self, model: nn.Module, costs: Mapping[str, LayerCost]) -> None:
        """Measure layers in turn with the dense network, and keep their times as shares of its own.

        The table on disk holds the time of factors as a share of the time of their layer. Both are
        ratios of times taken together, so they hold whether the machine is busy or not.
        """
        layers = {
            key: (model.get_submodule(name), self._shape(model.get_submodule(name), cost))
            for name, cost in costs.items()
            if (key := self._key(model, name, cost)) not in self.dense_ms
        }
        if not layers:
            return
        if self.target.once:
            self.dense_ms |= {key: self.table.time(*row) for key, row in layers.items()}
            return
        samplers = [self.target.sampler(self.dense, self.example)]
        samplers += [
            self.target.layer_sampler(layer, (torch.ones(shape),))
            for layer, shape in layers.values()
        ]
        whole, *rows = interleaved(samplers, self.target, seconds=SECONDS, least=ROUNDS)
        for key, row in zip(layers, rows, strict=True):
            self.dense_ms[key] = quiet(row) / quiet(whole) * self.timing.median_ms

    def priced(
        self,
        model: nn.Module,
        options: Mapping[str, Sequence[Option]],
        costs: Mapping[str, LayerCost],
        *,
        edited: bool = False,
    ) -> tuple[dict[str, list[Option]], float]:
        """Put milliseconds into options; those that are not faster than the layer go.

        Args:
            model: the network as it is now.
            options: what can be done with its layers.
            costs: of its layers.
            edited: whether it is no longer the dense one.

        Returns:
            The options, and the milliseconds of everything else in the network.
        """
        taken = {name: costs[name] for name in options}
        each, rest = self.outside(model, taken, edited=edited)
        found = {
            name: [
                replace(row, cost=replace(row.cost, latency=ms + each * row.cost.params))
                for row, ms in self._worthy(model, name, rows, costs[name])
            ]
            for name, rows in options.items()
        }
        return found, rest

    def outside(
        self, model: nn.Module, taken: Mapping[str, LayerCost], *, edited: bool = False
    ) -> tuple[float, float]:
        """Return what a network takes beside the times of its layers alone.

        Two networks are measured: the present one, and one in which these layers have the lowest
        ranks. The time that both spend outside of these layers counts as fixed. What the present
        one spends beyond that counts as growing with the number of weights: those of a large
        network come from memory, those of a small one from caches.

        Args:
            model: the network as it is now.
            taken: the costs of some of its layers.
            edited: whether it is no longer the dense one.

        Returns:
            Milliseconds for each parameter of these layers, and for everything else.
        """
        self._calibrate(model, taken)
        whole = self.weigh(model, ())[0] if edited else self.timing.median_ms
        excess = whole - sum(self.of_layer(model, name, cost) for name, cost in taken.items())
        least = {} if self.target.once else self._least(model, taken)
        if not least:
            return 0.0, excess
        thin, _ = self.weigh(model, list(least.values()))
        alone = sum(
            self.measured(model, least[name], cost)
            if name in least
            else self.of_layer(model, name, cost)
            for name, cost in taken.items()
        )
        fewer = sum(
            cost.params - least[n].predict(cost).params for n, cost in taken.items() if n in least
        )
        each = (excess - (thin - alone)) / max(1, fewer)
        return each, excess - each * sum(cost.params for cost in taken.values())

    def _least(self, model: nn.Module, taken: Mapping[str, LayerCost]) -> dict[str, Factor]:
        """The lowest ranks of every layer that has some, where that is smaller."""
        found = {}
        for name in taken:
            if obstacle(model, name):
                continue
            layer: Any = model.get_submodule(name)
            shape = tuple(layer.weight.shape)
            form = "svd" if "svd" in forms_for(shape) else "tucker2"
            step = self.table.step_for(layer, form)
            edit = Factor(name, form, tuple(min(step, top) for top in max_ranks(shape, form)))
            if edit.predict(taken[name]).params < taken[name].params:
                found[name] = edit
        return found

    def _against_dense(self, model: nn.Module) -> Comparison:
        """Compare with the dense network; one that is built alike takes its time, unmeasured."""
        if name_of(model) == name_of(self.dense):
            return Comparison(self.timing, self.timing, speedup=1.0, low=1.0, high=1.0)
        return compare(self.dense, model, self.example, self.target)

    def _worthy(
        self, model: nn.Module, name: str, rows: Sequence[Option], cost: LayerCost
    ) -> list[tuple[Option, float]]:
        """Options with milliseconds: to leave the layer, and those that make it faster."""
        dense = self.of_layer(model, name, cost)
        edited = [(row, self.of_edit(model, row.edit, cost)) for row in rows if row.edit]
        if edited:
            self.layers[name] = (dense, min(ms for _, ms in edited))
        alone = [(row, dense) for row in rows if row.edit is None]
        return alone + [(row, ms) for row, ms in edited if ms <= WORTH * dense]

    # ------------------------------------------------------------ plans

    def weigh(self, model: nn.Module, edits: Sequence[Edit]) -> tuple[float, bool]:
        """Build a network with edits and measure it whole, in turn with the dense one, once.

        Returns:
            Its milliseconds on the scale of the budget, and whether the dense one is faster.
        """
        key = name_of(model, edits)
        if key not in self.weighed:
            found = self._against_dense(built(model, edits))
            took = self.timing.median_ms / found.speedup
            self.weighed[key] = took, found.verdict == "slower"
        return self.weighed[key]

    def missed(self, limit: float, best: float) -> BudgetError:
        """Return the refusal of a latency that the fastest network measured does not keep."""
        return BudgetError(
            f"The latency {limit:.3g} ms cannot be met on {self.target}: the fastest network that "
            f"was measured takes {best:.3g} ms, the dense one {self.timing.median_ms:.3g} ms; "
            "allow more, or let the method touch more layers."
        )

    def settle(
        self,
        model: nn.Module,
        costs: Mapping[str, LayerCost],
        limits: Mapping[str, float],
        make: Plan,
    ) -> list[Any]:
        """Find edits whose network, built and measured whole, keeps the limit on latency.

        Every layer of a plan is measured at its very ranks first, and the plan is made anew
        until no layer is slower than it was thought to be; then the network is built. If it
        takes too long the plan aims lower, and higher where much time is left.

        Args:
            model: the network as it is now; it stays so.
            costs: of its layers.
            limits: with ``latency``, in milliseconds.
            make: makes a plan for limits, from `priced` options.

        Raises:
            BudgetError: no plan keeps the limit; the message names the fastest network measured.
        """
        dense = self.timing.median_ms
        allowed, best = min(limits["latency"], dense), dense
        # The dense network itself would do: no rounding may say otherwise.
        aim = dense * (1 + 1e-6) if limits["latency"] >= dense else AIM * allowed
        kept: list[Any] | None = None
        for attempt in range(TRIES):
            try:
                edits = self._checked(model, costs, {**limits, "latency": aim}, make)
            except BudgetError:
                if attempt:
                    break
                edits = self._checked(model, costs, {**limits, "latency": allowed}, make)
            if not edits and dense <= limits["latency"]:
                return edits
            took, slower = self.weigh(model, edits)
            if took <= allowed and not slower:
                kept = edits
                if took >= NEAR * allowed or not edits:
                    break
                aim *= AIM * allowed / took  # there is time left: spend it
                continue
            if kept is not None:
                break
            best = min(best, took)
            aim *= min(AIM, allowed / took)
        if kept is not None:
            self._note(model, costs, kept)
            return kept
        raise self.missed(limits["latency"], best)

    def _checked(
        self,
        model: nn.Module,
        costs: Mapping[str, LayerCost],
        limits: Mapping[str, float],
        make: Plan,
    ) -> list[Any]:
        """Plan until every layer of the plan was measured as it will be; return what is worth it.

        What was measured replaces what was interpolated, so the next plan knows better.
        """
        for _ in range(CHECKS):
            edits = make(limits)
            rows = [(edit, costs[edit.layer]) for edit in edits]
            thought = sum(self.of_edit(model, *row) for row in rows)
            times = [self.measured(model, *row) for row in rows]
            dense = [self.of_layer(model, edit.layer, cost) for edit, cost in rows]
            worth = [ms <= WORTH * before for ms, before in zip(times, dense, strict=True)]
            if all(worth) and sum(times) - thought <= (1 - AIM) * limits["latency"]:
                break
        return [edit for edit, keep in zip(edits, worth, strict=True) if keep]

    def _note(
        self, model: nn.Module, costs: Mapping[str, LayerCost], edits: Sequence[Edit]
    ) -> None:
        """Keep both times of every layer of the plan for the report."""
        for edit in edits:
            cost = costs[edit.layer]
            before = self.of_layer(model, edit.layer, cost)
            self.layers[edit.layer] = (before, self.measured(model, edit, cost))

    # ------------------------------------------------------------ the end

    def why_not(self, layer: str) -> str:
        """Say why a layer was left alone, with both times; empty where they are not known."""
        if layer not in self.layers:
            return ""
        before, best = self.layers[layer]
        times = f"{best:.2g} ms against {before:.2g}"
        if best > before:
            return f"measured slower, {times}"
        if best > WORTH * before:
            return f"measured hardly faster, {times}"
        return f"the budget is met without it; at its lowest rank {times}"

    def finish(self, model: nn.Module) -> Comparison:
        """Compare the dense network with what became of it, once."""
        if self.final is None:
            self.final = self._against_dense(model)
        return self.final

    def sides(self, model: nn.Module) -> tuple[Timing, Timing]:
        """Return the times of the dense network and of the finished one, on one scale.

        The scale is that of the first measurement, to which the budget refers.
        """
        final = self.finish(model)
        return final.a.scaled(self.timing.median_ms), self._of_second(final)

    def beside(self, model: nn.Module) -> Timing:
        """Return the time of another network, measured in turn with the dense one, on its scale."""
        return self._of_second(self._against_dense(model))

    def _of_second(self, found: Comparison) -> Timing:
        return found.b.scaled(self.timing.median_ms / found.speedup)

    def least(self, model: nn.Module) -> float:
        """Return the milliseconds of the finished network at the fast end of what is certain."""
        return self.timing.median_ms / max(self.finish(model).high, self.finish(model).speedup)
