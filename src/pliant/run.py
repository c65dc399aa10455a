"""One compression in progress: everything that changes, and the calls of a training loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from pliant.budget import Budget, Limits, Option, allocate, shown
from pliant.cost import Cost, Example, LayerCost, cost, layer_costs
from pliant.data import Data
from pliant.edits import Edit, Replaced, from_json, to_json
from pliant.errors import BudgetError, ModelError, PliantError
from pliant.latency import Where
from pliant.latency.clock import Clock
from pliant.latency.memory import recall_layers, remembered
from pliant.method import Method
from pliant.observe.finite import check_example, check_weights
from pliant.registry import check_options
from pliant.surgery.optim import add_gradient, carry


class Removable(Protocol):
    """Something put into a model that can be taken out again, as a hook's handle can."""

    def remove(self) -> None:
        """Take it out."""


@dataclass
class Run:
    """All that changes while compressing. A method writes only ``state`` and calls ``apply``.

    Args:
        model: the network, changed in place.
        method: what is done to it.
        budget: what the result may cost, or None.
        data: training data for methods that look at it, or None.
        example: inputs of one forward call, for counting.
        optimizer: its state follows the model through every edit.
        cost: the cost of the dense network, to which fractions of a budget refer.
        layers: the dense cost of every layer.
        steps: optimizer steps that the training loop will take; 0 without training.
        seed: of everything random in the method.
        generator: the only source of randomness for methods.
        step: optimizer steps taken.
        epoch: epochs completed.
        state: tensors and plain values of the method: the resumable part.
        edits: what has been done to the model, in order.
        log: the history that the report draws.
        reasons: for every layer left alone, why.
        missed: what stages of a chain missed of budgets of their own.
        handles: what to take out of the model at the end, each with the path of its owner.
        finished: whether the compression has been made permanent.
        path: of a view, the scopes it lies in; empty for the whole run.
        began: of a view, step and epoch of the whole run at which its own clock began.
        clock: measures on the target, or None where none was named.
        observe: called whenever a stage of a chain is over; what it returns enters the history.
    """

    model: nn.Module
    method: Method
    budget: Budget | None
    data: Data | None
    example: Example
    optimizer: Optimizer | None
    cost: Cost
    layers: dict[str, LayerCost]
    steps: int
    seed: int
    generator: torch.Generator
    step: int = 0
    epoch: int = 0
    state: dict[str, Any] = field(default_factory=dict)
    edits: list[Edit] = field(default_factory=list)
    log: list[dict[str, Any]] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    missed: list[str] = field(default_factory=list)
    handles: list[tuple[str, Removable]] = field(default_factory=list)
    finished: bool = False
    path: str = ""
    began: tuple[int, int] = (0, 0)
    clock: Clock | None = None
    observe: Callable[[Run], Mapping[str, Any]] | None = None

    # For a training loop.

    def loss(self, loss: Tensor, output: Any, batch: Any) -> Tensor:
        """Return the loss to differentiate; equal to ``loss`` unless the method needs outputs."""
        return self.method.loss(self, loss, output, batch)

    def before_step(self) -> None:
        """Call when all gradients are there, before the optimizer's step.

        A penalty is added as a gradient, not as a term of the loss: it is unaffected by loss
        scaling and accumulation, and a distributed reducer never sees it.
        """
        with torch.enable_grad():
            penalty = self.method.penalty(self)
        if isinstance(penalty, Tensor) and penalty.requires_grad:  # a sum over nothing is a 0
            add_gradient(self.model, penalty)
        self.method.before_step(self)

    def after_step(self) -> None:
        """Call after every optimizer step."""
        self.step += 1
        self.method.after_step(self)

    def after_epoch(self) -> None:
        """Call at the end of every epoch."""
        self.epoch += 1
        self.method.after_epoch(self)

    def finish(self, *, strict: bool = True) -> Cost:
        """Make the compression permanent and return what the network costs now.

        Hooks are removed, also if the method fails. A second call does nothing more.

        Args:
            strict: raise where the budget is missed.

        Raises:
            BudgetError: the result misses the budget, or a stage missed its own.
        """
        if not self.finished:
            try:
                self.method.finalize(self)
            finally:
                self.close()
            self.finished = True
        after = self.measured()
        if strict and (misses := self.misses(after)):
            raise BudgetError(f"The result misses the budget: {'; '.join(misses)}.")
        return after

    def misses(self, after: Cost) -> list[str]:
        """Say what stages missed, and which axes of the budget a cost exceeds, and by how much."""
        return [*self.missed, *self.exceeded(after)]

    def measured(self) -> Cost:
        """Return what the network costs now; milliseconds, where there is a clock, are final."""
        now = cost(self.model, self.example)
        if self.clock is None:
            return now
        return replace(now, latency_ms=self.clock.sides(self.model)[1].median_ms)

    def exceeded(self, after: Cost) -> list[str]:
        """Say which axes of the budget a cost exceeds, and by how much.

        A latency exceeds its bound when even the fast end of its spread does.
        """
        slack = {}
        if self.clock is not None and self.clock.final is not None:
            slack["latency"] = after.latency - self.clock.least(self.model)
        return [
            f"{axis} is {shown(axis, getattr(after, axis))} where {shown(axis, bound)} was allowed"
            for axis, bound in self.limits().items()
            if getattr(after, axis) - slack.get(axis, 0.0) > bound
        ]

    def close(self) -> None:
        """Take everything that the method handed to ``hook`` out of the model.

        Parameters that leave the model with it leave the optimizer too.
        """
        mine = [handle for path, handle in self.handles if path.startswith(self.path)]
        self.handles[:] = [pair for pair in self.handles if not pair[0].startswith(self.path)]
        before = list(self.model.parameters())
        for handle in reversed(mine):
            handle.remove()
        kept = {id(parameter) for parameter in self.model.parameters()}
        if self.optimizer is not None:
            carry(self.optimizer, Replaced(tuple(p for p in before if id(p) not in kept)))

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to resume, as it is now: tensors and plain values only."""
        return {
            "step": self.step,
            "epoch": self.epoch,
            "state": _copied(self.state),
            "edits": to_json(self.edits),
            "log": list(self.log),
            "reasons": dict(self.reasons),
            "missed": list(self.missed),
            "generator": self.generator.get_state(),
            "finished": self.finished,
            "clock": self.clock and remembered(self.clock),
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Bring a fresh run of the same method to a saved point.

        Edits are replayed with shapes only: load the model's and the optimizer's tensors after.
        Tensors of the state are copied to the device of the model.

        Raises:
            PliantError: the saved run had other edits at its start, so it is not the same run.
        """
        edits = from_json(saved["edits"])
        resume = getattr(self.method, "resume", None)  # of composed methods
        if saved["finished"]:
            self.close()
        elif resume is not None:
            resume(self, saved["state"], edits)
        self.replay(edits)
        self.step, self.epoch, self.finished = saved["step"], saved["epoch"], saved["finished"]
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        self.state.clear()
        self.state.update(_copied(saved["state"], device))
        self.log[:] = list(saved["log"])
        self.generator.set_state(saved["generator"])
        self.reasons.clear()
        self.reasons.update(saved["reasons"])
        self.missed[:] = saved.get("missed", ())
        recall_layers(self.clock, saved.get("clock"))

    def inputs(self, samples: int, *, batch: int = 256, seed: int = 1) -> list[Example]:
        """Return training inputs for statistics: see `pliant.data.Data.calibration`.

        Args:
            samples: how many at least; the run must have data.
            batch: samples per batch.
            seed: added to the run's own, so that looks for different ends differ.
        """
        assert self.data is not None
        return self.data.calibration(samples, batch=batch, seed=self.seed + seed)

    def replay(self, edits: Sequence[Edit]) -> None:
        """Apply, with shapes only, those of the edits of a saved run that are still missing.

        Raises:
            PliantError: the edits so far are not the first of them.
        """
        done = len(self.edits)
        if self.edits != list(edits[:done]):
            raise PliantError(
                "The saved run began with other edits than this one: resume with the same model, "
                "method, budget, data and seed; with a target, the same one, and start(saved=...)."
            )
        for edit in edits[done:]:
            self._edit(edit, weights=False)

    # For a method.

    def apply(self, *edits: Edit) -> None:
        """Change the model; the optimizer keeps the state of every parameter that survives.

        Raises:
            EditError: an edit does not fit the model.
        """
        for edit in edits:
            self._edit(edit, weights=True)

    def limits(self) -> dict[str, float]:
        """Return the budget in absolute numbers for the whole network; empty without one."""
        return self.budget.limits(self.cost) if self.budget else {}

    def allocate(
        self, options: Mapping[str, Sequence[Option]], *, rule: Literal["max", "sum"] = "max"
    ) -> list[Edit]:
        """Spend the budget over layers with options, all others staying as they are now.

        Raises:
            BudgetError: the budget cannot be met; the message names what is reachable.
        """
        return self.settle(lambda limits: self._plan(options, limits, rule))

    def settle(self, make: Callable[[Limits], list[Edit]]) -> list[Edit]:
        """Plan edits for the budget; with a latency in it the plan is measured before it is made.

        Args:
            make: gives edits for limits, from options that `priced` has put milliseconds into.

        Raises:
            BudgetError: the budget cannot be met; the message names what is reachable.
        """
        limits = self.limits()
        if self.clock is None or "latency" not in limits:
            return make(limits)
        rows = layer_costs(self.model, self.example)
        return self.clock.settle(self.model, rows, limits, make)

    def check(self, options: Mapping[str, Sequence[Option]]) -> None:
        """Raise a BudgetError if no choice among the options meets the budget; build nothing."""
        self._plan(options, self.limits(), "max")

    def priced(
        self, options: Mapping[str, Sequence[Option]]
    ) -> tuple[Mapping[str, Sequence[Option]], Cost]:
        """Return options with what the budget asks for, and the cost of everything else.

        Where the budget bounds latency, the options get milliseconds, and those that are not
        measured faster than their layer are left out.
        """
        now, rows = cost(self.model, self.example), layer_costs(self.model, self.example)
        fixed = now.without(rows[layer] for layer in options)
        if self.clock is None or "latency" not in self.limits():
            return options, fixed
        options, rest = self.clock.priced(self.model, options, rows, edited=bool(self.edits))
        return options, replace(fixed, latency_ms=rest)

    def _plan(
        self,
        options: Mapping[str, Sequence[Option]],
        limits: Limits,
        rule: Literal["max", "sum"],
    ) -> list[Edit]:
        priced, fixed = self.priced(options)
        return allocate(priced, limits, fixed=fixed, rule=rule)

    def hook(self, handle: Removable) -> None:
        """Hand over what was put into the model: it is taken out when the run ends, however so.

        Args:
            handle: of a hook, or anything with ``remove()``: masks, parametrizations.
        """
        self.handles.append((self.path, handle))

    def note(self, **values: Any) -> None:
        """Add a row to the history: plain values, stamped with step and epoch."""
        step, epoch = self.began
        self.log.append({"step": step + self.step, "epoch": epoch + self.epoch, **values})

    def keep(self, layer: str, reason: str) -> None:
        """Record why a layer stays as it is; where times are known, they are the reason."""
        self.reasons[layer] = (self.clock and self.clock.why_not(layer)) or reason

    def scope(self, key: str, **changes: Any) -> Run:
        """Return a view of this run with a state of its own, for one part of a composed method.

        Model, edits, log, reasons and what was missed are shared; ``changes`` replaces fields
        such as budget.
        """
        state = self.state.setdefault(key, {})
        return replace(self, state=state, path=f"{self.path}{key}/", **changes)

    def _edit(self, edit: Edit, *, weights: bool) -> None:
        replaced = edit.apply(self.model, weights=weights)
        if self.optimizer is not None:
            carry(self.optimizer, replaced)
        self.edits.append(edit)


def start(
    model: nn.Module,
    method: Method,
    budget: Budget | None = None,
    *,
    data: Data | None = None,
    example: Example = (),
    optimizer: Optimizer | None = None,
    steps: int = 0,
    seed: int = 0,
    target: Where | None = None,
    saved: Mapping[str, Any] | None = None,
) -> Run:
    """Begin to compress ``model`` in place, and prepare the method.

    Args:
        model: any network.
        method: a ``Method``; ``pliant.method("nrmf")`` builds one from its name.
        budget: what the result may cost.
        data: for methods that calibrate on data.
        example: inputs of one forward call; taken from ``data`` if not given.
        optimizer: hand it over and its state follows every edit.
        steps: optimizer steps that your loop will take; methods schedule themselves by it.
        seed: for everything random in the method.
        target: where milliseconds are measured, text and functions included; a latency in the
            budget needs one.
        saved: the ``state_dict`` to be loaded next: plans are made of the times measured then.

    Raises:
        BudgetError: the budget is malformed, or bounds latency without a target.
        MethodError: the target is none, or an option of the method is out of its range.
        ModelError: there is neither data nor example, the model fails on it, or a weight is not
            finite.
        DataError: the example has no row, or is not finite.
    """
    check_options(method)
    if not example:
        if data is None:
            raise ModelError(
                "Counting needs the inputs of one forward call: give example=(inputs,) or data."
            )
        example = data.example()
    check_weights(model)
    check_example(example)
    times = (saved or {}).get("clock")
    clock = None if target is None else Clock.start(model, example, target, times)
    dense = cost(model, example)
    run = Run(
        model=model,
        method=method,
        budget=budget,
        data=data,
        example=example,
        optimizer=optimizer,
        cost=replace(dense, latency_ms=clock.timing.median_ms) if clock else dense,
        layers=layer_costs(model, example),
        steps=steps,
        seed=seed,
        generator=torch.Generator().manual_seed(seed),
        clock=clock,
    )
    run.limits()  # a malformed budget is refused now
    try:
        method.prepare(run)
    except BaseException:
        run.close()
        raise
    return run


def _copied(state: Any, device: torch.device | None = None) -> Any:
    """Copy a state, so that two never share one; its tensors go to the device, if one is named."""
    return tree_map(lambda v: v.clone().to(device) if isinstance(v, Tensor) else v, state)
