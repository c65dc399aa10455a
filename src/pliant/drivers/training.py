"""One training of a run, step by step: where it stands, and how it goes on from there."""

import gc
import math
import operator
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pliant.cost import call, counted
from pliant.data import Data, Train, unpack
from pliant.data.criterion import weighted
from pliant.data.epochs import Epochs
from pliant.drivers import checkpoint
from pliant.drivers.check import not_finite, trains
from pliant.drivers.devices import (
    agree,
    differentiable,
    mean,
    random_states,
    restore_random,
    take_step,
)
from pliant.drivers.interrupt import uninterrupted
from pliant.drivers.lone import with_statistics
from pliant.drivers.schedule import optimizers_of, rate
from pliant.drivers.score import distillation, scored
from pliant.edits import Edit
from pliant.errors import DataError, TrainingError
from pliant.observe.gradients import differentiated
from pliant.run import FirstSteps, Run

if TYPE_CHECKING:
    from lightning_fabric import Fabric

Watch = Callable[[dict[str, Any]], None]
SEARCH, FINETUNE, DONE = 0, 1, 2  # the phases of a training, in order


@dataclass
class Place:
    """Where a training stands: all that its position is made of."""

    phase: int = SEARCH
    epoch: int = 0  # of the phase
    batch: int = 0  # of the epoch
    step: int = 0  # of the phase
    total: float = 0.0  # sum of the epoch's losses
    ended: bool = False  # the epoch's last hook was called
    seconds: float = 0.0  # spent on the epoch


@dataclass
class Training:
    """One training of a run: its phases, its place, and all that a checkpoint of it holds."""

    run: Run
    data: Data
    train: Train
    fabric: "Fabric"
    folder: Path | None
    watch: Watch | None
    teacher: nn.Module | None
    planned: Epochs  # of the search
    per_epoch: int  # of fine-tuning
    phase_steps: tuple[int, int]
    place: Place = field(default_factory=Place)
    module: Any = None
    optimizers: list[Optimizer] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)  # of all groups, before any schedule
    wrapped: list[Edit] | None = None  # edits that the wrapped module knows
    clean: bool = False  # between two steps: what is saved now can be resumed
    identity: dict[str, str] = field(default_factory=dict)
    began: float = 0.0
    taken: int = 0  # steps since then

    @property
    def hooks(self) -> bool:
        """Whether the method's hooks are called: while it searches."""
        return self.place.phase == SEARCH

    @property
    def steps(self) -> int:
        """Optimizer steps of the phase."""
        return self.phase_steps[self.place.phase]

    @property
    def name(self) -> str:
        """What the phase is called in the history."""
        return ("search" if trains(self.run) else "train") if self.hooks else "finetune"

    def begin(self, *, resume: bool) -> None:
        """Set up the first phase, or stand where the checkpoint stood."""
        if self.folder is not None:
            self.identity = checkpoint.identity(self.run, self.data, self.train)
        elif resume:
            raise TrainingError("Resuming needs the folder of the checkpoint; pass folder=.")
        saved = checkpoint.read(self.folder, self.identity) if resume and self.folder else None
        if self.folder is not None and not resume and self.fabric.is_global_zero:
            checkpoint.forget(self.folder)
        self.fabric.to_device(self.run.model)
        if self.teacher is not None:
            self.teacher = self.fabric.to_device(self.teacher.eval())
        if saved is None:
            self.run.first = FirstSteps(self.name, self.train.lr)
            self._set_up()
        else:
            self._restore(saved)
        self.began = time.monotonic()

    def go(self) -> None:
        """Go through the phases that are left."""
        if self.place.phase == SEARCH:
            self._epochs()
            self.clean = False
            agree(self.run.model, self.fabric.world_size)
            self.run.finish(strict=False)
            self.place = Place(FINETUNE)
            self.run.first = FirstSteps(self.name, self.train.lr, edits=len(self.run.edits))
            self._set_up()
            self.save()
        if self.place.phase == FINETUNE:
            self._epochs()
            agree(self.run.model, self.fabric.world_size)
            self.place = Place(DONE)
            self.save()

    def save(self) -> None:
        """Write a checkpoint; process 0 writes for all."""
        if self.folder is None:
            return
        broken = [n for n, p in self.run.model.named_parameters() if not torch.isfinite(p).all()]
        if broken:
            raise TrainingError(self._lost(not_finite(self.run.model)))
        random = random_states(self.fabric)
        if self.fabric.is_global_zero:
            content = {
                "identity": self.identity,
                "threads": torch.get_num_threads(),
                "place": vars(self.place),
                "run": self.run.state_dict(),
                "model": self.run.model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                "random": random,
            }
            checkpoint.write(self.folder, content)
        self.fabric.barrier()

    def _restore(self, saved: dict[str, Any]) -> None:
        """Edits first, with shapes only; then the tensors."""
        self.place = Place(**saved["place"])
        if self.place.phase == SEARCH:
            self._set_up()
        self.run.load_state_dict(saved["run"])
        self.run.model.load_state_dict(saved["model"])
        if self.place.phase == FINETUNE:
            self._set_up()
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=False):
            optimizer.load_state_dict(state)
        restore_random(self.fabric, saved["random"])
        self.clean = True

    def _set_up(self) -> None:
        """Give the phase optimizers of its own."""
        self.optimizers = optimizers_of(self.run.model, self.train) if self.steps else []
        self.rates = [float(group["lr"]) for group in self._groups()]
        self.run.optimizer = self.optimizers or self.run.optimizers
        self.wrapped = None
        self.clean = True

    def _groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def _epochs(self) -> None:
        while self.place.step < self.steps or self.place.batch:
            self._epoch()

    def _epoch(self) -> None:
        """Train one epoch, or what a checkpoint or a fraction leaves of it."""
        place, began = self.place, time.monotonic() - self.place.seconds
        length = self.planned.length(place.epoch) if self.hooks else self.per_epoch
        last = min(length, place.batch + self.steps - place.step)
        self.run.model.train()
        for batch in self._batches() if place.batch < last else ():
            with self._whole():
                loss = self._step(batch)
                place.batch, place.step = place.batch + 1, place.step + 1
                place.total, place.seconds = place.total + loss, time.monotonic() - began
            every = self.train.checkpoint_every
            if every and place.step % every == 0 and place.batch < last:
                self.save()
            self._show(loss)
            if place.batch == last:
                break
        if place.batch < last:
            raise DataError(
                f"The loader must give as many batches as its length says, {length}, but "
                f"epoch {place.epoch} ended after {place.batch}; correct its "
                "__len__, and give no empty batches."
            )
        self._end_epoch()

    def _batches(self) -> Iterator[Any]:
        if self.hooks:
            return self.planned.batches(self.place.epoch, start=self.place.batch)
        return self.data.batches(
            "train",
            self.train.batch,
            seed=self.run.seed,
            epoch=self.place.epoch + math.ceil(self.train.epochs),
            augment=True,
            shuffle=True,
            rank=self.fabric.global_rank,
            world=self.fabric.world_size,
            start=self.place.batch,
        )

    def _step(self, batch: Any) -> float:
        """Take one optimizer step, with the hooks of the method while it searches."""
        now = rate(self.train, self.place.step, self.steps)
        for group, own in zip(self._groups(), self.rates, strict=True):
            group["lr"] = now if own == self.train.lr else own * (now / self.train.lr)
        self.run.model.zero_grad()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        batch = self.fabric.to_device(batch)
        task, loss = self._loss(batch)
        if not math.isfinite(value := float(loss.detach())):
            why = not_finite(self.run.model, batch)
            raise TrainingError(self._lost(f"the loss is {value}, and {why}"))
        with differentiated(self.run.model):
            self.fabric.backward(loss)
        for optimizer in self.optimizers:
            self.fabric.strategy.precision.unscale_gradients(optimizer)  # of 16-mixed only
        if self.train.clip is not None:
            nn.utils.clip_grad_norm_(self.run.model.parameters(), self.train.clip)
        if self.hooks:
            self.run.before_step()
        take_step(self.fabric, self.optimizers)
        if self.hooks:
            agree(self.run.model, self.fabric.world_size, weights=False)
            self.run.after_step()
        else:
            self.run.judge()
        return float(task.detach())

    def _loss(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return the loss of the task, and the one to differentiate."""
        labels = unpack(batch)[1]
        output = self._output(batch)
        weighs = self.hooks and self.run.reduction == "none"
        if weighs:
            losses = self.run.task_loss(output, batch, "none")
            task = weighted(losses.detach(), None, output, labels)
            with differentiable():
                loss = self.run.loss(losses, output, batch)
        else:
            task = loss = self.run.task_loss(output, batch)
            if self.hooks and self.run.method.uses("loss"):
                with differentiable():
                    loss = self.run.loss(loss, output, batch)
        if self.train.distill and self.teacher is not None:
            with torch.no_grad(), self.fabric.autocast():
                target = call(self.teacher, self.run.inputs_of(batch))
            gap = distillation(output, target, self.train.temperature, self.run.task)
            loss = (1 - self.train.distill) * loss + self.train.distill * gap
        self.run.hear(task, output, batch)
        return task, loss

    def _output(self, batch: Any) -> Any:
        """Run the network, whose batch norms rest where a last batch has one sample left."""
        inputs, module = self.run.inputs_of(batch), self._wrapped()
        if counted(inputs) > 1 or self.data.batch_size(self.train.batch) == 1:
            return call(module, inputs)
        with with_statistics(self.run.model):
            return call(module, inputs)

    def _wrapped(self) -> Any:
        """Return what Fabric calls; made anew after an edit, whose parameters DDP must learn."""
        if self.wrapped is None or not _same(self.wrapped, self.run.edits):
            self.module = None
            if self.fabric.world_size > 1:
                gc.collect()  # the old reducer must be gone before the new one listens
            self.module = self.fabric.setup_module(self.run.model)
            self.wrapped = list(self.run.edits)
        return self.module

    def _end_epoch(self) -> None:
        place, run = self.place, self.run
        if not place.ended:
            with self._whole():
                agree(self.run.model, self.fabric.world_size)
                if self.hooks:
                    run.after_epoch()
                place.ended = True
        row: dict[str, Any] = {"loss": mean(self.fabric, place.total / max(1, place.batch))}
        if self.data.has("val"):
            row |= scored(run, self.data, batch=self.train.batch)
        with self._whole():
            row |= {"lr": self._lr(), "seconds": place.seconds}
            at = {} if self.hooks else {"step": run.step + place.step, "epoch": self._number()}
            run.note(phase=self.name, **row, **at)
            self.place = Place(place.phase, place.epoch + 1, step=place.step)
        self.save()

    def _lr(self) -> float:
        """The learning rate of the last step, of the first group."""
        now = rate(self.train, self.place.step - 1, self.steps)
        own = self.rates[0] / self.train.lr
        return now * own * (self.planned[self.place.epoch].rate if self.hooks else 1.0)

    def _number(self) -> int:
        """Count the epochs of both phases, the present one included."""
        return self.run.epoch + self.place.epoch + 1

    def _show(self, loss: float) -> None:
        self.taken += 1
        if self.watch is None:
            return
        place = self.place
        left = sum(self.phase_steps[place.phase :]) - place.step
        self.watch(
            {
                "phase": self.name,
                "step": place.step,
                "steps": self.steps,
                "epoch": place.epoch + 1,
                "epochs": self.train.epochs if self.hooks else self.train.finetune,
                "loss": loss,
                "lr": self._lr(),
                "seconds_left": left * (time.monotonic() - self.began) / self.taken,
            }
        )

    def _lost(self, what: str) -> str:
        saved = self.folder is not None and (self.folder / checkpoint.NAME).exists()
        kept = f"; the last good checkpoint is in {self.folder}" if saved else ""
        begun = self.place.step or self.place.phase != SEARCH
        remedy = (
            f"lower the learning rate ({self.train.lr}), add a warmup or clip the gradient"
            if begun
            else "nothing was trained yet, so look at the loss, the labels and the weights"
        )
        return (
            f"Loss and weights must stay finite, but after step {self.place.step} of the "
            f"{self.name} {what}; {remedy}{kept}."
        )

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """Let Ctrl-C wait until the block is over: what is saved within it could not be resumed."""
        self.clean = False
        with uninterrupted():
            yield
            self.clean = True


def _same(one: list[Edit], other: list[Edit]) -> bool:
    """Say whether edits are the very same: as many may stand for others (`Run.restate`)."""
    return len(one) == len(other) and all(map(operator.is_, one, other))
