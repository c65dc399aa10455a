"""`Train`: how long and how to train."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

from pliant.errors import DataError

_PRECISIONS = ("32-true", "64-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true")


Make = Callable[[nn.Module], Optimizer | Sequence[Optimizer]]


@dataclass(frozen=True)
class Train:
    """How long and how to train; every value is checked when the plan is made.

    Attributes:
        epochs: passes over the training data while the method works; fractions are allowed.
        finetune: passes after the network has been made smaller.
        batch: samples per batch and process.
        lr: highest learning rate.
        optimizer: "sgd", "adamw", or a function that takes the network and gives an optimizer or
            several; it is called anew for fine-tuning. Their groups keep learning rates of their
            own, which the schedule multiplies by a share from 0 to 1.
        momentum: of SGD.
        weight_decay: of both optimizers.
        nesterov: use Nesterov's momentum in SGD.
        schedule: "cosine" falls to zero, "step" falls to a tenth at 1/2 and at 3/4 of the steps,
            "constant" stays.
        warmup: fraction of the steps in which the learning rate rises from zero.
        clip: largest norm of the gradient, None for no limit.
        distill: weight of the distillation loss from the dense network, in 0..1; 0 for none.
        temperature: of the distillation.
        precision: as Lightning Fabric names it: "32-true", "bf16-mixed", ...
        device: "auto", "cpu", "cuda", "cuda:1" or "mps".
        devices: number of processes.
        checkpoint_every: steps between two checkpoints, None for one per epoch.
    """

    epochs: float = 10
    finetune: float = 0
    batch: int = 128
    lr: float = 0.02
    optimizer: Literal["sgd", "adamw"] | Make = "sgd"
    momentum: float = 0.9
    weight_decay: float = 5e-4
    nesterov: bool = True
    schedule: Literal["cosine", "constant", "step"] = "cosine"
    warmup: float = 0
    clip: float | None = None
    distill: float = 0.0
    temperature: float = 4.0
    precision: str = "32-true"
    device: str = "auto"
    devices: int = 1
    checkpoint_every: int | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "finetune", "momentum", "weight_decay"):
            self._need(name, "a number of at least 0", lambda v: _number(v) and v >= 0)
        for name in ("lr", "temperature"):
            self._need(name, "a number above 0", lambda v: _number(v) and v > 0)
        for name in ("batch", "devices"):
            self._need(name, "a whole number of at least 1", lambda v: _whole(v) and v >= 1)
        for name in ("warmup", "distill"):
            self._need(name, "a number in 0..1", lambda v: _number(v) and 0 <= v <= 1)
        self._need("momentum", "below 1", lambda v: v < 1)
        self._need("clip", "None or above 0", lambda v: v is None or (_number(v) and v > 0))
        self._need("checkpoint_every", "None or at least 1", lambda v: v is None or _whole(v) and v)
        known = ("sgd", "adamw")
        self._need(
            "optimizer",
            f"one of {', '.join(known)}, or a function that takes the network",
            lambda v: v in known if isinstance(v, str) else callable(v),
        )
        self._one_of("schedule", ("cosine", "constant", "step"))
        self._one_of("precision", _PRECISIONS)
        self._need("nesterov", "True or False", lambda v: isinstance(v, bool))
        if self.optimizer == "sgd" and self.nesterov:
            self._need("momentum", "above 0 when nesterov is True", lambda v: v > 0)
        device = r"auto|cpu|mps|cuda(:\d+)?"
        self._need(
            "device",
            "auto, cpu, cuda, cuda:N or mps",
            lambda v: isinstance(v, str) and re.fullmatch(device, v),
        )

    def plain(self) -> dict[str, Any]:
        """Return the plan as plain data; a function goes by its name."""
        plan = {field.name: getattr(self, field.name) for field in fields(self)}
        if not isinstance(self.optimizer, str):
            plan["optimizer"] = called(self.optimizer)
        return plan

    def steps(self, per_epoch: int, *, finetune: bool = False) -> int:
        """Count the optimizer steps of the search, or of fine-tuning, to the nearest whole.

        A part of an epoch that rounds to no step at all is one step.
        """
        epochs = self.finetune if finetune else self.epochs
        return max(1, round(epochs * per_epoch)) if epochs else 0

    def _one_of(self, name: str, choices: tuple[str, ...]) -> None:
        self._need(name, "one of " + ", ".join(choices), lambda v: v in choices)

    def _need(self, name: str, what: str, holds: Callable[[Any], Any]) -> None:
        value = getattr(self, name)
        if not holds(value):
            raise DataError(f"Train({name}=...) must be {what}, but {value!r} came; change it.")


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def called(make: Any) -> str:
    """Name a function, as the same one is named in another process."""
    if isinstance(make, partial):
        options = [*map(repr, make.args), *(f"{k}={v!r}" for k, v in make.keywords.items())]
        return f"{called(make.func)}({', '.join(options)})"
    kind = make if hasattr(make, "__qualname__") else type(make)
    return f"{kind.__module__}.{kind.__qualname__}"
