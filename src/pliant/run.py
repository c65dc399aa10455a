"""One compression in progress: everything that changes, and the calls of a training loop."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from pliant.budget import Budget
from pliant.cost import Cost, Example, LayerCost, bare, count
from pliant.data import Data
from pliant.edits import Edit, Replaced, from_json, to_json
from pliant.errors import BudgetError, ModelError, PliantError
from pliant.latency import Where
from pliant.latency.clock import Clock
from pliant.nn.layers import Factorizable
from pliant.observe.aside import Aside, Removable
from pliant.observe.finite import check_example, check_weights
from pliant.observe.order import called_by
from pliant.plan.planner import Planner
from pliant.surgery.batchnorm import recalibrate
from pliant.surgery.optim import add_gradient, carry
from pliant.surgery.select import factorizable, leave_unused, readable

ROUTED = 256  # samples that may call layers to which one sample is not routed
RECALIBRATED = 2048  # samples from which batch norms are re-estimated


class Hooks(Protocol):
    """What a run calls: see `pliant.method.Method`, which does nothing at each of these moments."""

    def prepare(self, run: Run, /) -> None:
        """Before training."""

    def loss(self, run: Run, loss: Tensor, output: Any, batch: Any, /) -> Tensor:
        """When a batch has gone through the network."""

    def penalty(self, run: Run, /) -> Tensor | None:
        """Before the step."""

    def before_step(self, run: Run, /) -> None:
        """When gradients are complete."""

    def after_step(self, run: Run, /) -> None:
        """When weights have moved."""

    def after_epoch(self, run: Run, /) -> None:
        """When one pass over the data is over."""

    def finalize(self, run: Run, /) -> None:
        """At the end."""


@dataclass
class Run:
    """All that changes while compressing. A method writes only ``state`` and calls ``apply``.

    Args:
        model: the network, changed in place.
        method: what is done to it.
        planner: spends the budget; knows the dense costs, the example and the target's clock.
        data: training data for methods that look at it, or None.
        optimizer: its state follows the model through every edit.
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
        aside: what to take out of the model at the end, and what is kept beside it until then.
        finished: whether the compression has been made permanent.
        began: of a view, step and epoch of the whole run at which its own clock began.
        observe: called whenever a stage of a chain is over; what it returns enters the history.
    """

    model: nn.Module
    method: Hooks
    planner: Planner
    data: Data | None
    optimizer: Optimizer | None
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
    aside: Aside = field(default_factory=Aside)
    finished: bool = False
    began: tuple[int, int] = (0, 0)
    observe: Callable[[Run], Mapping[str, Any]] | None = None

    @property
    def budget(self) -> Budget | None:
        """What the result may cost."""
        return self.planner.budget

    @property
    def example(self) -> Example:
        """Inputs of one forward call."""
        return self.planner.example

    @property
    def cost(self) -> Cost:
        """What the dense network costs."""
        return self.planner.dense

    @property
    def layers(self) -> dict[str, LayerCost]:
        """What every layer of the dense network costs."""
        return self.planner.layers

    @property
    def clock(self) -> Clock | None:
        """Measures on the target, if one was named."""
        return self.planner.clock

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
        after = self.planner.measured()
        if strict and (misses := self.misses(after)):
            raise BudgetError(f"The result misses the budget: {'; '.join(misses)}.")
        return after

    def misses(self, after: Cost) -> list[str]:
        """Say what stages missed, and which axes of the budget a cost exceeds, and by how much."""
        return [*self.missed, *self.planner.misses(after)]

    def close(self) -> None:
        """Take everything that the method handed to ``hook`` out of the model.

        Parameters that leave the model with it leave the optimizer too.
        """
        before = list(self.model.parameters())
        self.aside.clear()
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
            "clock": self.clock and self.clock.remember(),
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
        if self.clock is not None:
            self.clock.recall_layers(saved.get("clock"))

    def inputs(self, samples: int, *, batch: int = 256, seed: int = 1) -> list[Example]:
        """Return training inputs for statistics: see `pliant.data.Data.calibration`.

        Args:
            samples: how many at least; the run must have data.
            batch: samples per batch.
            seed: added to the run's own, so that looks for different ends differ.
        """
        assert self.data is not None
        return self.data.calibration(samples, batch=batch, seed=self.seed + seed)

    @property
    def has_inputs(self) -> bool:
        """Whether there are training inputs to calibrate on."""
        return self.data is not None and self.data.has("train")

    def recalibrate(self, samples: int = RECALIBRATED) -> None:
        """Re-estimate batch norms from training inputs; without these they stay as they are."""
        if self.has_inputs:
            recalibrate(self.model, self.inputs(samples))

    def factorizable(
        self, only: Sequence[str] = (), exclude: Sequence[str] = ()
    ) -> tuple[dict[str, Factorizable], dict[str, str]]:
        """Return the layers in use that can be factorized, and why others cannot.

        Raises:
            MethodError: a name pattern matches no layer.
        """
        return self._in_use(*factorizable(self.model, only=only, exclude=exclude))

    def readable(
        self, only: Sequence[str] = (), exclude: Sequence[str] = ()
    ) -> tuple[dict[str, Factorizable], dict[str, str]]:
        """Return the layers in use whose weight may be read and replaced, and why others' may not.

        Raises:
            MethodError: a name pattern matches no layer.
        """
        return self._in_use(*readable(self.model, only=only, exclude=exclude))

    def _in_use(
        self, layers: dict[str, Factorizable], reasons: dict[str, str]
    ) -> tuple[dict[str, Factorizable], dict[str, str]]:
        called = {name for name, row in self.planner.rows().items() if row.calls}
        if self.has_inputs and layers.keys() - called:  # what one sample is not routed to
            called |= called_by(self.model, layers, self.inputs(ROUTED))
        leave_unused(layers, reasons, called, self.planner.readers())
        return layers, reasons

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
        return self.planner.limits()

    def hook(self, handle: Removable) -> None:
        """Hand over what was put into the model: it is taken out when the run ends, however so.

        Args:
            handle: of a hook, or anything with ``remove()``: masks, parametrizations.
        """
        self.aside.put(handle)

    def note(self, **values: Any) -> None:
        """Add a row to the history: plain values, stamped with step and epoch."""
        step, epoch = self.began
        self.log.append({"step": step + self.step, "epoch": epoch + self.epoch, **values})

    def keep(self, layer: str, reason: str) -> None:
        """Record why a layer stays as it is; where times are known, they are the reason."""
        self.reasons[layer] = (self.clock and self.clock.why_not(layer)) or reason

    def scope(self, key: str, *, budget: Budget | None = None, **changes: Any) -> Run:
        """Return a view of this run with a state of its own, for one part of a composed method.

        Model, edits, log, reasons and what was missed are shared.

        Args:
            key: of the part's state.
            budget: of the part.
            changes: other fields of the view, such as its method and its steps.
        """
        state, planner = self.state.setdefault(key, {}), replace(self.planner, budget=budget)
        return replace(self, state=state, planner=planner, aside=self.aside.scope(key), **changes)

    def rehearsal(self, *, budget: Budget | None = None) -> Run:
        """Return a run on a copy of the network, to try edits on: this one stays as it is.

        Args:
            budget: to plan for; the run's own if None.
        """
        model, edits = copy.deepcopy(self.model), list(self.edits)
        own = replace(self.planner, model=model, edits=edits, budget=budget or self.budget)
        return replace(
            self,
            model=model,
            planner=own,
            edits=edits,
            optimizer=None,
            state={},
            reasons={},
            aside=Aside(),
        )

    def _edit(self, edit: Edit, *, weights: bool) -> None:
        replaced = edit.apply(self.model, weights=weights)
        if self.optimizer is not None:
            carry(self.optimizer, replaced)
        self.edits.append(edit)
        self.planner.counted.clear()


def start(
    model: nn.Module,
    method: Hooks,
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
        MethodError: the target is none.
        ModelError: there is neither data nor example, the model fails on it, or a weight is not
            finite.
        DataError: the example has no row, or is not finite.
    """
    if not example:
        if data is None:
            raise ModelError(
                "Counting needs the inputs of one forward call: give example=(inputs,) or data."
            )
        example = data.example()
    model = bare(model)
    check_weights(model)
    check_example(example)
    times = (saved or {}).get("clock")
    clock = None if target is None else Clock.start(model, example, target, times)
    dense, layers = count(model, example)
    edits: list[Edit] = []
    run = Run(
        model=model,
        method=method,
        planner=Planner(
            model=model,
            example=example,
            budget=budget,
            dense=replace(dense, latency_ms=clock.timing.median_ms) if clock else dense,
            layers=layers,
            edits=edits,
            clock=clock,
        ),
        data=data,
        optimizer=optimizer,
        steps=steps,
        seed=seed,
        generator=torch.Generator().manual_seed(seed),
        edits=edits,
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
