"""How a run begins: all that it needs is checked before the method does anything."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from pliant.budget import Budget
from pliant.cost import Example, as_example, bare, check_model, count, fitted
from pliant.data import Data
from pliant.data.digest import digest_of
from pliant.data.epochs import planned
from pliant.data.guess import task_loss
from pliant.data.ready import Metrics, task_of
from pliant.data.task import Task
from pliant.edits import Edit
from pliant.errors import MethodError, ModelError, must_be
from pliant.latency import Where
from pliant.latency.clock import Clock
from pliant.observe.finite import check_example, check_weights, in_words
from pliant.plan.planner import Planner
from pliant.registry import build, check_options
from pliant.run.hooks import Hooks
from pliant.run.journal import Journal
from pliant.run.progress import Run
from pliant.surgery.followers import Followers
from pliant.surgery.optim import Optimizers, check_holds


def start(
    model: nn.Module,
    method: Hooks[Run] | str,
    budget: Budget | str | None = None,
    *,
    data: Any = None,
    example: Example = (),
    optimizer: Optimizers = None,
    steps: int = 0,
    epochs: float = 0,
    batch: int = 0,
    criterion: Callable[..., Tensor] | None = None,
    task: Task | str | None = None,
    loss: Callable[..., Tensor] | None = None,
    metrics: Metrics | None = None,
    copies: Sequence[nn.Module] = (),
    seed: int = 0,
    target: Where | None = None,
    saved: Mapping[str, Any] | None = None,
) -> Run:
    """Begin to compress ``model`` in place, and prepare the method.

    Args:
        model: any network.
        method: a ``Method``, or text such as ``"nrmf(p=0.9)"``.
        budget: what the result may cost, or text such as ``"params=0.3"``.
        data: for methods that calibrate on data: whatever ``Data.of`` reads.
        example: inputs of one forward call, (input,) or by name; taken from ``data`` if not given.
        optimizer: hand it over, or all of several, and its state follows every edit.
        steps: optimizer steps that your loop will take; methods schedule themselves by it. If it
            is not given, the batches of all epochs.
        epochs: of your loop, for methods that choose the data of each: see `Run.batches`.
        batch: samples of a batch in your loop, unless the method says otherwise.
        criterion: your loss, from outputs and labels, for methods that compute it on samples of
            their own; cross-entropy or squared error, by the labels, if None.
        task: what the network is for, such as ``"segmentation(void=255)"``; see `Task`. The first
            batch of `Run.task_loss` tells it if None, where there is no doubt.
        loss: in place of the task's: a function of (output, batch) to a number.
        metrics: by name, each (function of (output, batch), "higher" or "lower") or a `Metric`.
        copies: networks that follow every edit, such as an average of the weights.
        seed: for everything random in the method.
        target: where milliseconds are measured, text and functions included; a latency in the
            budget needs one.
        saved: the ``state_dict`` to be loaded next: plans are made of the times measured then.

    Raises:
        BudgetError: the budget is malformed, or bounds latency without a target.
        MethodError: the target is none, the method refuses, an option of it is out of range, or
            there is no such task.
        TrainingError: an optimizer holds nothing of the network.
        ModelError: there is neither data nor example, the model fails on it, or a weight is not
            finite.
        DataError: the example has no row, or is not finite.
    """
    method, budget = _method(method), Budget.of(budget)
    for what, number in (("steps", steps), ("epochs", epochs), ("batch", batch), ("seed", seed)):
        must_be(Real, what, number, MethodError, "a number")
    known = task_of(task, loss, metrics)
    if known is not None and known.loss is not None and method.uses("weigh") and not known.weighs:
        raise MethodError(
            f"{type(method).__name__} weighs samples, so it needs a loss for each of them: write "
            'the loss as a function of (output, batch, reduction="mean") that takes "none" too.'
        )
    model, given = bare(model), as_example(example)
    check_model(model)
    if data is not None:
        data = Data.of(data, seed=seed).read_by(model)
    if not given:
        if data is None:
            raise ModelError(
                "Counting needs the inputs of one forward call: give example=(inputs,) or data."
            )
        given = data.example_for(model)
    example = fitted(model, given)
    check_weights(model)
    check_example(example)
    check_holds(model, optimizer)
    change = method.epoch if method.uses("epoch") else None
    plan = planned(data, epochs, batch, seed, change)
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
        steps=steps or (plan.steps if plan else 0),
        seed=seed,
        generator=torch.Generator().manual_seed(seed),
        journal=Journal(edits, origin=digest_of(*model.state_dict().values())),
        criterion=criterion or task_loss,
        task=known,
        epochs=plan,
        followers=Followers(copies=tuple(copies)),
    )
    run.limits()  # a malformed budget is refused now
    run.optimizer = optimizer
    try:
        with in_words(type(method).__name__):
            method.refuse(run)
            method.prepare(run)
    except BaseException:
        run.close()
        raise
    return run


def _method(method: Any) -> Hooks[Run]:
    method = build(method) if isinstance(method, str) else method
    must_be(Hooks, "method", method, MethodError, 'a method, or text such as "nrmf(p=0.9)"')
    check_options(method)
    return method
