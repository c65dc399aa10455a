"""Refuses what cannot be trained before it is trained, and says what went wrong where it did."""

from typing import Any

import torch
from torch import Tensor, nn

from pliant.cost import call, device_of, evaluating
from pliant.data import Data, unpack
from pliant.drivers.score import moved
from pliant.errors import DataError, MethodError, PliantError, TrainingError
from pliant.run import Run

TRAINING = ("epoch", "weigh", "loss", "penalty", "before_step", "after_step", "after_epoch")


def trains(run: Run) -> bool:
    """Say whether the run's method does anything while the network trains."""
    return any(run.method.uses(hook) for hook in TRAINING)


def check_steps(run: Run, steps: int | None = None) -> None:
    """Refuse a run whose method plans by its steps and was told none, or others.

    Args:
        run: as it was started.
        steps: optimizer steps of the training, None where only the trainer knows.

    Raises:
        MethodError: `start` was given no steps, or others.
    """
    wrong = run.steps == 0 if steps is None else run.steps != steps
    if wrong and steps != 0 and trains(run):
        wanted = "steps=..." if steps is None else f"steps={steps}"
        raise MethodError(
            f"{type(run.method).__name__} works while the network trains and plans by the number "
            f"of optimizer steps, but the run was started for {run.steps}; call "
            f"pliant.start(..., {wanted})."
        )


def check_trainer(run: Run, steps: float) -> None:
    """Refuse a trainer that ends before the run does.

    Args:
        run: as it was started.
        steps: of the trainer; not finite or negative where it does not know.

    Raises:
        MethodError: the run was started for more.
    """
    if 0 <= steps < run.steps:
        check_steps(run, int(steps))


def check_served(run: Run) -> None:
    """Refuse a run whose method chooses the data of epochs and that cannot give them.

    Raises:
        MethodError: `start` was not told how many epochs there are, and how large batches.
    """
    if run.method.uses("epoch") and run.epochs is None:
        raise MethodError(
            f"{type(run.method).__name__} chooses samples, batch size and learning rate of every "
            "epoch: call pliant.start(..., data=data, epochs=..., batch=...), and give the "
            "trainer run.batches() as its loader of training batches."
        )


def check_heard(run: Run, how: str) -> None:
    """Refuse a step whose loss the method was not asked about.

    Args:
        run: before the step.
        how: what to write so that it is.

    Raises:
        MethodError: it changes the loss, and the trainer left it out.
    """
    if (run.method.uses("loss") or run.method.uses("weigh")) and not run.called.heard:
        raise MethodError(
            f"{type(run.method).__name__} changes the loss, but the trainer took a step without "
            f"asking it: {how}."
        )


def check_data(model: nn.Module, data: Data) -> None:
    """Refuse data that does not fit the model, by one forward call with one sample.

    Raises:
        ModelError: the model fails on the inputs.
        DataError: samples are missing or not finite.
    """
    if not data.has("train"):
        raise DataError("Training needs the train split, but the data has none; give it to Data.")
    check_call(model, data)
    data.check(labelled=False)


def check_call(model: nn.Module, data: Data) -> None:
    """Refuse a model that fails on one sample of the training data, if there are any.

    Raises:
        ModelError: the model fails on the inputs.
    """
    if data.has("train"):
        with evaluating(model), torch.no_grad():
            call(model, moved(data.example_for(model), device_of(model)))


def not_finite(model: nn.Module, batch: Any = None) -> str:
    """Say which layer first gives an output that is not finite, or holds such a weight.

    The batch goes through the model once more, in the order of its layers; statistics and the
    random state may move, so call it where training is over.
    """
    seen: list[str] = []

    def hook(name: str) -> Any:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            if not seen and isinstance(output, Tensor) and not bool(torch.isfinite(output).all()):
                seen.append(name)

        return look

    leaves = [(name, m) for name, m in model.named_modules() if name and not list(m.children())]
    handles = [module.register_forward_hook(hook(name)) for name, module in leaves]
    try:
        if batch is not None:
            with torch.no_grad():
                call(model, unpack(batch)[0])
    except PliantError:
        pass  # the loss is what is being explained
    finally:
        for handle in handles:
            handle.remove()
    broken = [name for name, p in model.named_parameters() if not bool(torch.isfinite(p).all())]
    if seen:
        weights = f", whose weights ({broken[0]}) are not finite" if broken else ""
        return f"the first layer with an output that is not finite is {seen[0]}{weights}"
    if broken:
        return f"the first weight that is not finite is {broken[0]}"
    return "every layer's output is finite, so it is the loss itself"


def check_one_device(world: int, who: str) -> None:
    """Refuse a layer replaced under a wrapper of several devices, which would not follow it.

    Raises:
        TrainingError: there is more than one device.
    """
    if world > 1:
        raise TrainingError(
            f"A layer was replaced while {who} on several devices, but its wrapper averages the "
            "old layer's gradients only; train on one device, or with pliant.compress, which "
            "wraps anew."
        )
