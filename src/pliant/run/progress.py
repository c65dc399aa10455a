"""The run itself.

Longer than other files: a loop and a method find all that they may call in one place.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from pliant.budget import Budget
from pliant.cost import Cost, Example, LayerCost, device_of, twin
from pliant.data import Data, unpack
from pliant.data.criterion import Reduction, weighted
from pliant.data.draws import Draws, ranks
from pliant.data.epochs import Epochs, check_epoch
from pliant.data.guess import guess, task_loss
from pliant.data.sources import moved
from pliant.data.task import Task
from pliant.edits import Edit, Replaced, from_json, made, note, to_json
from pliant.errors import AccuracyWarning, BudgetError, DataError, PliantError, TrainingError
from pliant.latency.clock import Clock
from pliant.nn.layers import Factorizable
from pliant.observe.aside import Aside, Removable
from pliant.observe.finite import check_left, in_words
from pliant.observe.order import called_by
from pliant.observe.outputs import logits
from pliant.plan.planner import Planner
from pliant.run.early import FirstSteps, chance
from pliant.run.ended import unended
from pliant.run.hooks import Hooks
from pliant.run.journal import Called, Journal
from pliant.surgery.batchnorm import recalibrate
from pliant.surgery.followers import Followers
from pliant.surgery.optim import Optimizers, add_gradient, cancel_decay, check_rate
from pliant.surgery.plain import plain
from pliant.surgery.select import factorizable, leave_unused, readable

ROUTED = 256  # samples that may call layers to which one sample is not routed
Loss = Callable[[int, Any], Tensor]
RECALIBRATED = 2048  # samples from which batch norms are re-estimated


@dataclass
class Run:
    """All that changes while compressing. A method writes only ``state`` and calls ``apply``.

    Args:
        model: the network, changed in place.
        method: what is done to it.
        planner: spends the budget; knows the dense costs, the example and the target's clock.
        data: training data for methods that look at it, or None.
        steps: optimizer steps that the training loop will take; 0 without training.
        seed: of everything random in the method.
        generator: the only source of randomness for methods.
        step: optimizer steps taken.
        epoch: epochs completed.
        state: tensors and plain values of the method: the resumable part.
        journal: edits, history and reasons, which the report tells.
        criterion: the loss of the task, from outputs and labels.
        task: what the network is for, None until that is known.
        epochs: what each epoch trains on, where the loop was told; see `batches`.
        followers: optimizers and copies, which go along with every edit.
        called: what the training loop has called so far.
        first: watches whether the learning rate destroys what the network knew.
        aside: what to take out of the model at the end, and what is kept beside it until then.
        finished: whether the compression has been made permanent.
        began: of a view, step and epoch of the whole run at which its own clock began.
        observe: called whenever a stage of a chain is over; what it returns enters the history.
    """

    model: nn.Module
    method: Hooks[Run]
    planner: Planner
    data: Data | None
    steps: int
    seed: int
    generator: torch.Generator
    step: int = 0
    epoch: int = 0
    state: dict[str, Any] = field(default_factory=dict)
    journal: Journal = field(default_factory=Journal)
    criterion: Callable[..., Tensor] = task_loss
    task: Task | None = None
    epochs: Epochs | None = None
    followers: Followers = field(default_factory=Followers)
    called: Called = field(default_factory=Called)
    first: FirstSteps = field(default_factory=FirstSteps)
    aside: Aside = field(default_factory=Aside)
    finished: bool = False
    began: tuple[int, int] = (0, 0)
    observe: Callable[[Run], Mapping[str, Any]] | None = None

    @property
    def edits(self) -> list[Edit]:
        """What has been done to the model, in order."""
        return self.journal.edits

    @property
    def log(self) -> list[dict[str, Any]]:
        """The history that the report draws."""
        return self.journal.log

    @property
    def reasons(self) -> dict[str, str]:
        """For every layer left alone, why."""
        return self.journal.reasons

    @property
    def missed(self) -> list[str]:
        """What stages of a chain missed of budgets of their own."""
        return self.journal.missed

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

    @property
    def optimizer(self) -> Optimizer | None:
        """The optimizer, the first of several; None if none was handed over.

        Assign one or a list of them to hand them over late: they are carried over all edits that
        were made before.
        """
        return self.optimizers[0] if self.optimizers else None

    @optimizer.setter
    def optimizer(self, given: Optimizers) -> None:
        factor = self._rate if self.method.uses("epoch") else None
        self.followers.hand_over(self.model, given, factor)

    @property
    def optimizers(self) -> list[Optimizer]:
        """All optimizers that were handed over."""
        return self.followers.optimizers

    @property
    def lr(self) -> float:
        """Learning rate of a step as it is now, of the first group; 1 without an optimizer."""
        if self.optimizer is None:
            return 1.0
        return float(self.optimizer.param_groups[0]["lr"]) * self._ahead()

    # For a training loop.

    @property
    def reduction(self) -> Reduction:
        """How to compute the loss that `loss` gets: as a mean, or "none" where samples are weighed.

        ``cross_entropy(output, labels, reduction=run.reduction)`` serves every method.
        """
        return "none" if self.method.uses("weigh") else "mean"

    def inputs_of(self, batch: Any) -> Example:
        """Return what the network is called with for a batch; with labels, where it reads them."""
        return unpack(batch)[0] if self.task is None else self.task.inputs(batch)

    def task_loss(self, output: Any, batch: Any, reduction: Reduction = "mean") -> Tensor:
        """Return the loss of the task, for a loop, or for a method that draws a batch of its own.

        Where nobody named the task, the first batch tells it.

        Args:
            output: of the network.
            batch: from which it came, with labels.
            reduction: as `reduction` says.

        Raises:
            DataError: there are no labels, or the task is in doubt.
        """
        if self.criterion is not task_loss:
            more = {"reduction": reduction} if reduction != "mean" else {}
            return self.criterion(output, unpack(batch)[1], **more)
        if self.task is None:
            self.task = guess(output, batch, self.model)
        return self.task.total(output, batch, reduction)

    def class_scores(self, output: Any) -> Tensor:
        """Return a row of class scores for every answer in an output, (rows, classes).

        Raises:
            ModelError: the output holds none.
        """
        if self.task is None or self.task.scores is None:
            return logits(output)
        return self.task.scores(output).flatten(0, -2)

    def batches(self) -> Iterable[Any]:
        """Return the training batches of the present epoch, as the method wants them.

        They can be gone through once an epoch, by a loop of one's own or as the loader of a
        trainer. A resumed run begins where it stands within the epoch, if every batch is a step.

        Raises:
            DataError: the run was started without `epochs` and `batch`.
        """
        if self.epochs is None:
            raise DataError(
                "The batches of an epoch depend on how many there are and how large: call "
                "pliant.start(..., data=data, epochs=..., batch=...)."
            )
        return self.epochs.served(lambda: (self.epoch, self.step, self.steps))

    def loss(self, loss: Tensor, output: Any, batch: Any) -> Tensor:
        """Return the loss to differentiate; equal to ``loss`` unless the method needs outputs.

        The first losses tell whether the learning rate destroys what the network knew.

        Args:
            loss: of the task, computed with ``reduction=run.reduction``.
            output: of the network.
            batch: from which it came: (inputs, labels), or a mapping with labels.

        Raises:
            MethodError: the method weighs samples, and the loss is one number.
        """
        self.called.heard = True
        self.hear(loss, output, batch)
        with self._in_words():
            if self.method.uses("weigh"):
                weights = self.method.weigh(self, loss.detach(), output, batch)
                loss = weighted(loss, weights, output, unpack(batch)[1])
            return self.method.loss(self, loss, output, batch)

    def hear(self, loss: Any, output: Any = None, batch: Any = None) -> None:
        """Take the loss of a batch, where a loop does not ask `loss`, to watch its first steps.

        Args:
            loss: of the task, a number or a tensor.
            output: of the network, if it is known.
            batch: from which it came.
        """
        known = output is not None and self.first.asks
        self.first.hear(loss, chance(self.task, output, batch, self.model) if known else None)

    def before_step(self) -> None:
        """Call when all gradients are there, before the optimizer's step.

        A penalty is added as a gradient, not as a term of the loss: it is unaffected by loss
        scaling and accumulation, and a distributed reducer never sees it.

        Raises:
            MethodError: the method chooses the data of an epoch, and the loop took others.
        """
        whole = not self.aside.path  # not a view of a part
        self.called.begun, self.called.followed = True, len(self.edits)
        if whole and self.method.uses("epoch"):
            check_epoch(self.epochs, self.epoch, type(self.method).__name__)
            check_rate(self._rate(), self.optimizers, type(self.method).__name__)
        with self._in_words():
            with torch.enable_grad():
                penalty = self.method.penalty(self)
            if isinstance(penalty, Tensor) and penalty.requires_grad:  # a sum over nothing is a 0
                add_gradient(self.model, penalty)
            self.method.before_step(self)
        if whole:
            self.followers.stale.listen()

    def after_step(self) -> None:
        """Call after every optimizer step.

        Raises:
            TrainingError: an optimizer stepped that still holds the weights of a layer that was
                replaced, so that the new ones do not train.
        """
        self.followers.stale.check()
        self.called.heard = False
        self.judge()
        self.step += 1
        with self._in_words():
            self.method.after_step(self)

    def judge(self) -> None:
        """Warn once, and note in the history, if the learning rate destroys what was known."""
        if said := self.first.step(self.lr if self.optimizer else None, len(self.edits)):
            self.note(finding=said)
            warnings.warn(said, AccuracyWarning, stacklevel=3)

    def after_epoch(self) -> None:
        """Call at the end of every epoch."""
        self.epoch += 1
        with self._in_words():
            self.method.after_epoch(self)

    def finish(self, *, strict: bool = True) -> Cost:
        """Make the compression permanent and return what the network costs now.

        Hooks are removed, also if the method fails. A second call does nothing more.

        Args:
            strict: raise where the budget is missed or the training ended before the method did;
                else warn of the latter.

        Raises:
            TrainingError: fewer steps were taken than the run was started for, and the network was
                changed only when they were over; or what is left is not finite.
            BudgetError: the result misses the budget, or a stage missed its own.
        """
        if not self.finished:
            done = len(self.edits)
            try:
                with self._in_words():
                    self.method.finalize(self)
            finally:
                self.close()
            self.finished = True
            check_left(self.model, type(self.method).__name__)
            late = [edit.layer for edit in self.edits[done:]]
            if said := self._unended(late):
                if strict:
                    raise TrainingError(said)
                warnings.warn(said, stacklevel=2)
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
        self.carry("", Replaced(tuple(p for p in before if id(p) not in kept)))
        if not self.aside.path:
            self.followers.close()

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to resume, as it is now: tensors and plain values only."""
        return {
            "step": self.step,
            "epoch": self.epoch,
            "state": _copied(self.state),
            "edits": to_json(self.edits),
            "log": list(self.log),
            "first": self.first.state_dict(),
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
        if saved["finished"]:
            self.close()
        else:
            self.method.resume(self, saved["state"], edits)
        self.replay(edits)
        self.step, self.epoch, self.finished = saved["step"], saved["epoch"], saved["finished"]
        device = device_of(self.model)
        self.state.clear()
        self.state.update(_copied(saved["state"], device))
        self.log[:] = list(saved["log"])
        self.first.load_state_dict(saved.get("first", {}))
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

    def looks(
        self, samples: int, *, batch: int = 256, seed: int = 1
    ) -> tuple[list[Example], Loss | None]:
        """Return inputs for statistics, and the loss by whose gradients outputs matter.

        Where the user gave a loss, or the network returns its own, that counts, with the labels.
        Elsewhere it is None: labels drawn from the network's predictions count, or all outputs.

        Args:
            samples: how many at least.
            batch: samples per batch.
            seed: as for `inputs`.

        Returns:
            Inputs of forward calls, and a function of a batch's number and its output, which gives
            the loss summed over samples.
        """
        task = self.task
        if task is None or not task.judges or self.data is None:
            return self.inputs(samples, batch=batch, seed=seed), None
        items = self.data.calibration_batches(samples, batch=batch, seed=self.seed + seed)
        return [task.inputs(item) for item in items], task.summed(items, device_of(self.model))

    @property
    def has_inputs(self) -> bool:
        """Whether there are training inputs to calibrate on."""
        return self.data is not None and self.data.has("train")

    def recalibrate(self, samples: int = RECALIBRATED) -> None:
        """Re-estimate batch norms from training inputs; without these they stay as they are."""
        if self.has_inputs:
            recalibrate(self.model, self.inputs(samples))

    def factorizable(
        self, only: Sequence[str] = (), exclude: Sequence[str] = (), *, every: bool = False
    ) -> tuple[dict[str, Factorizable], dict[str, str]]:
        """Return the layers in use that can be factorized, and why others cannot.

        Args:
            only: name patterns of layers to consider; none means all.
            exclude: name patterns of layers to leave alone.
            every: see `pliant.nn.layers.obstacle`.

        Raises:
            MethodError: a name pattern matches no layer.
        """
        self.unwrap()
        return self._in_use(*factorizable(self.model, only=only, exclude=exclude, every=every))

    def readable(
        self, only: Sequence[str] = (), exclude: Sequence[str] = ()
    ) -> tuple[dict[str, Factorizable], dict[str, str]]:
        """Return the layers in use whose weight may be read and replaced, and why others' may not.

        Raises:
            MethodError: a name pattern matches no layer.
        """
        self.unwrap()
        return self._in_use(*readable(self.model, only=only, exclude=exclude))

    def unwrap(self) -> None:
        """Put plain layers in the place of those that compute the same: see `Plain`."""
        self.apply(*plain(self.model, self.example))

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

    def carry(self, layer: str, replaced: Replaced) -> None:
        """Tell the optimizers which parameters of a layer took the place of which."""
        self.followers.carry(self.model, layer, replaced)

    def spare(self, parameters: Iterable[Tensor]) -> None:
        """Keep the weight decay of the coming step off parameters; call it in ``before_step``."""
        cancel_decay(self.optimizers, parameters, self._ahead())

    def draw(self, count: int) -> tuple[Example, Any]:
        """Return more training samples, beside the batch that the loop has: see `Draws`.

        Their place is part of the state. In `pliant.compress`, and with `batches`, a method that
        draws once a step as many as the step's batch holds gets none of that batch: where data are
        tensors or a data set, or the method chooses them, and an epoch has two batches or more.

        Args:
            count: how many; a stream without index gives what its next batch holds.

        Returns:
            Arguments of a forward call, and labels, on the device of the network.

        Raises:
            DataError: the run has no training data.
        """
        if not self.has_inputs:
            raise DataError(
                f"{type(self.method).__name__} draws samples of its own at every step, and the run "
                "has no training data: call pliant.start(..., data=data)."
            )
        assert self.data is not None
        known = self.aside.all(Draws) or [self.aside.put(Draws(self.data, self.seed, *ranks()))]
        number = self.began[1] + self.epoch
        rows = self.epochs.rows(number) if self.epochs else None
        place = self.state.get("drawn", [])
        batch, self.state["drawn"] = known[0].take(place, count, epoch=number, rows=rows)
        inputs, labels = unpack(batch)
        device = device_of(self.model)
        return moved(inputs, device), moved(labels, device)

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

    def keep_all(self, reasons: Mapping[str, str]) -> None:
        """Record of several layers, by name, why they stay as they are."""
        for layer, reason in reasons.items():
            self.keep(layer, reason)

    def scope(self, key: str, *, budget: Budget | None = None, **changes: Any) -> Run:
        """Return a view of this run with a state of its own, for one part of a composed method.

        Model and journal are shared.

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
        model, edits = twin(self.model), list(self.edits)
        own = replace(self.planner, model=model, edits=edits, budget=budget or self.budget)
        return replace(
            self,
            model=model,
            planner=own,
            journal=replace(self.journal, edits=edits, reasons={}),
            called=replace(self.called),
            followers=Followers(),
            state={},
            aside=Aside(),
        )

    def restate(self, edits: Sequence[Edit]) -> None:
        """Write down other edits that make the same network of the dense one, in fewer steps."""
        known = made(self.model)
        note(self.model, [*known[: len(known) - len(self.edits)], *edits])
        self.edits[:] = edits

    def _edit(self, edit: Edit, *, weights: bool) -> None:
        self.followers.edit(self.model, edit, weights=weights)
        self.edits.append(edit)
        self.planner.counted.clear()

    def _in_words(self) -> AbstractContextManager[None]:
        return in_words(type(self.method).__name__)

    def _rate(self) -> float:
        """The factor of the learning rate in the present epoch, 1 when the method has ended."""
        if self.finished or self.epochs is None or self.epochs.change is None:
            return 1.0
        return self.epochs[min(self.began[1] + self.epoch, self.epochs.last)].rate

    def _ahead(self) -> float:
        """By how much the next step multiplies the rates that the optimizers have now."""
        return 1.0 if self.followers.stepping else self._rate()

    def _unended(self, late: Sequence[str]) -> str:
        """Say what was still to be done in a training that ended too early; "" if nothing was."""
        if self.step >= self.steps or not (self.called.begun or self.step):  # or was never trained
            return ""
        return unended(self.journal.unended, late, self.step, self.steps)


def _copied(state: Any, device: torch.device | None = None) -> Any:
    """Copy a state, so that two never share one; its tensors go to the device, if one is named."""
    return tree_map(lambda v: v.clone().to(device) if isinstance(v, Tensor) else v, state)
