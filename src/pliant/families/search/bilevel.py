"""The bilevel trainer of every search: weights learn on one split, the architecture on another.

The training loop moves the weights. After some of its steps `step` moves the logits of all mixed
operations by Adam, on a batch of the validation split. All its state is plain and lies in the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from pliant.cost import call
from pliant.data import Data, batch_of, unpack
from pliant.data.splits import Split
from pliant.errors import DataError, MethodError
from pliant.math.alone import forked
from pliant.nn.mixed import Mixed, MixedOp
from pliant.observe.watch import samples
from pliant.registry.options import In, fault
from pliant.run import Run
from pliant.surgery.batchnorm import recalibrate
from pliant.surgery.redraw import redraw

Rate = Annotated[float, In(0, open="low")]
Share = Annotated[float, In(0, 1, "high")]
NUDGE = 0.01  # length of the step of the finite difference, as in DARTS
Objective = Callable[[Tensor], Tensor]
"""Makes the loss of the architecture from that of the task, for example by adding a cost."""
Gates = Mapping[str, tuple[int, ...]]
"""For operations that run alone, by name: the candidates whose logits learn in a step."""


@dataclass(frozen=True)
class Bilevel:
    """When and how the architecture learns.

    Args:
        lr: of Adam.
        betas: of Adam.
        decay: weight decay of the logits, as a part of the gradient.
        every: weight steps between two architecture steps.
        warmup: share of the training in which only weights learn.
        batch: samples of an architecture step.
        order: 1 takes the weights as they are; 2 looks one weight step ahead.
        single: whether the architecture learns on the training split too, not on a split of its
            own: a search of one level.
    """

    lr: Rate = 6e-4
    betas: tuple[float, float] = (0.5, 0.999)
    decay: Annotated[float, In(0)] = 1e-3
    every: Annotated[int, In(1)] = 1
    warmup: Share = 0.0
    batch: Annotated[int, In(2)] = 64  # for batch norms
    order: Literal[1, 2] = 1
    single: bool = False

    def check(self, method: str) -> None:
        """Refuse values that make no search.

        Raises:
            MethodError: one of them is out of its range; the message begins with the method.
        """
        if said := fault(self):
            raise MethodError(f"{method}: {said}.")


def mixed(model: nn.Module) -> dict[str, MixedOp]:
    """Return all mixed operations of a network by name."""
    return {name: part for name, part in choices(model).items() if isinstance(part, MixedOp)}


def choices(model: nn.Module) -> dict[str, Mixed]:
    """Return all layers of a network that have candidates, by name."""
    return {name: part for name, part in model.named_modules() if isinstance(part, Mixed)}


def architecture(model: nn.Module) -> list[nn.Parameter]:
    """Return the logits of all layers that have candidates, shared ones once."""
    return list({id(part.logits): part.logits for part in choices(model).values()}.values())


def halves(data: Data, *, seed: int = 0) -> Data:
    """Divide the training split: one half for the weights, the other as validation split.

    The halves are disjoint and have equally many samples of every class, but for one. What was
    the validation split is left out.

    Raises:
        DataError: the training split is not a pair of tensors.
    """
    labels = data.train[1] if isinstance(data.train, tuple) and len(data.train) == 2 else None
    if not isinstance(labels, Tensor):
        raise DataError(
            "Halves with equal classes need a training split of tensors (inputs, labels), not "
            f"{type(data.train).__name__}; give a search Data(train, val) with splits of your own."
        )
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    by_class = order[labels[order].argsort(stable=True)]  # of each class, one to each in turn
    parts = [rows.sort().values for rows in (by_class[::2], by_class[1::2])]
    train, val = ((data.train[0][rows], labels[rows]) for rows in parts)
    return replace(data, train=train, val=val)


def begin(run: Run, plan: Bilevel, name: str) -> None:
    """Check that a run can be searched in, and lay out the state of the trainer.

    Args:
        run: about to start.
        plan: when and how the architecture learns.
        name: of the method, for refusals.

    Raises:
        MethodError: the network has no mixed operations, or there is no validation split.
    """
    plan.check(name)
    logits = architecture(run.model)
    if not logits:
        raise MethodError(
            f"{name} chooses from mixed operations, but {type(run.model).__name__} has none: give "
            "it a network to search in, such as pliant.zoo.build('edarts-search')."
        )
    split: Split = "train" if plan.single else "val"
    if run.steps and (run.data is None or not run.data.has(split)):
        raise MethodError(
            f"{name} learns weights on the training split and the architecture on the validation "
            "split, but there is none: give Data(train, val)."
        )
    zeros = [torch.zeros_like(one, requires_grad=False) for one in logits]
    run.state["bilevel"] = {
        "steps": 0,
        "first": zeros,
        "second": [zero.clone() for zero in zeros],
        "places": {"val": [0, 0], "train": [0, 0]},
    }


def due(run: Run, plan: Bilevel) -> bool:
    """Say whether the architecture moves after the present weight step."""
    return run.step >= plan.warmup * run.steps and not run.step % plan.every


def step(
    run: Run,
    plan: Bilevel,
    objective: Objective | None = None,
    gates: Gates | None = None,
) -> float | None:
    """Move the architecture after a weight step, if it is due.

    Args:
        run: of a method that called `begin`.
        plan: when and how.
        objective: see `Objective`; the loss of the task itself if None.
        gates: see `Gates`; needed where operations run alone.

    Returns:
        The loss on the validation batch, None where no step was due.
    """
    if not due(run, plan):
        return None
    logits = architecture(run.model)
    with _own_randomness(run), _learning(logits), _gated(run.model, gates or {}):
        loss, gradients = _gradients(run, plan, logits, objective or (lambda task: task))
    before = [logit.detach().clone() for logit in logits]
    gradients = _masked(run.model, logits, gradients, gates or {})
    _adam(run.state["bilevel"], plan, logits, gradients)
    _rescale(run.model, logits, before, gates or {})
    return loss


def _gradients(
    run: Run, plan: Bilevel, logits: Sequence[nn.Parameter], objective: Objective
) -> tuple[float, Sequence[Tensor]]:
    def loss_on(batch: Any) -> Tensor:
        inputs, labels = batch
        return run.task_loss(call(run.model, inputs), batch_of(inputs, labels))

    val = _batch(run, plan, "train" if plan.single else "val")
    if plan.order == 1:
        loss = loss_on(val)
        return float(loss.detach()), torch.autograd.grad(
            objective(loss), logits, allow_unused=True, materialize_grads=True
        )
    train = _batch(run, plan, "train")
    rate = run.optimizer.param_groups[0]["lr"] if run.optimizer else plan.lr
    own = {id(logit) for logit in logits}
    weights = [p for p in run.model.parameters() if p.requires_grad and id(p) not in own]
    return unrolled(lambda: objective(loss_on(val)), lambda: loss_on(train), logits, weights, rate)


def unrolled(
    val: Callable[[], Tensor],
    train: Callable[[], Tensor],
    logits: Sequence[Tensor],
    weights: Sequence[Tensor],
    rate: float,
) -> tuple[float, list[Tensor]]:
    """Differentiate val(w - rate * grad train(w)) by the logits: DARTS, eq. (7) and (8).

    The product with the second derivative is a finite difference. The weights come back as they
    were.

    Args:
        val: computes the loss of the architecture from the present weights and logits.
        train: computes the loss of the weights.
        logits: to differentiate by.
        weights: leaves of both losses.
        rate: xi, length of the step ahead.

    Returns:
        The validation loss after the step ahead, and the gradients.
    """
    ahead = torch.autograd.grad(train(), weights, allow_unused=True, materialize_grads=True)
    with _moved(weights, ahead, -rate):
        loss = val()
        found = torch.autograd.grad(
            loss, [*logits, *weights], allow_unused=True, materialize_grads=True
        )
    direct, back = found[: len(logits)], found[len(logits) :]
    size = NUDGE / max(float(torch.stack([g.norm() for g in back]).norm()), 1e-12)
    sides = []
    for sign in (1, -1):
        with _moved(weights, back, sign * size):
            sides.append(torch.autograd.grad(train(), logits))
    gradients = [
        own - rate * (up - down) / (2 * size) for own, up, down in zip(direct, *sides, strict=True)
    ]
    return float(loss.detach()), gradients


@contextmanager
def _moved(weights: Sequence[Tensor], by: Sequence[Tensor], scale: float) -> Iterator[None]:
    saved = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        for weight, direction in zip(weights, by, strict=True):
            weight.add_(direction, alpha=scale)
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, old in zip(weights, saved, strict=True):
                weight.copy_(old)


@contextmanager
def _gated(model: nn.Module, gates: Gates) -> Iterator[None]:
    """Let the gates of some candidates get gradients inside the block only."""
    known = mixed(model)
    for name, learning in gates.items():
        known[name].gates = learning
    try:
        yield
    finally:
        for name in gates:
            known[name].gates = ()


def _masked(
    model: nn.Module, logits: Sequence[Tensor], gradients: Sequence[Tensor], gates: Gates
) -> list[Tensor]:
    """Leave gradients to candidates whose gates learn; where there are none, to all."""
    known = mixed(model)
    learning = {id(known[name].logits): list(rows) for name, rows in gates.items()}
    found = []
    for logit, gradient in zip(logits, gradients, strict=True):
        rows = learning.get(id(logit))
        if rows is not None:
            kept = torch.zeros_like(gradient)
            kept[rows] = gradient[rows]
            gradient = kept
        found.append(gradient)
    return found


@torch.no_grad()
def _rescale(
    model: nn.Module, logits: Sequence[Tensor], before: Sequence[Tensor], gates: Gates
) -> None:
    """Shift logits that moved so that candidates whose gates did not learn stay as probable."""
    known = mixed(model)
    learning = {id(known[name].logits): list(rows) for name, rows in gates.items()}
    for logit, old in zip(logits, before, strict=True):
        rows = learning.get(id(logit))
        if rows and len(rows) < len(logit):
            logit[rows] += old[rows].logsumexp(0) - logit[rows].logsumexp(0)


@torch.no_grad()
def _adam(
    state: dict[str, Any],
    plan: Bilevel,
    logits: Sequence[nn.Parameter],
    gradients: Sequence[Tensor],
) -> None:
    """One step of Adam, its moments in plain tensors."""
    state["steps"] += 1
    (fast, slow), count = plan.betas, state["steps"]
    for i, (logit, gradient) in enumerate(zip(logits, gradients, strict=True)):
        pull = gradient + plan.decay * logit
        first, second = state["first"][i], state["second"][i]
        first.lerp_(pull, 1 - fast)
        second.lerp_(pull * pull, 1 - slow)
        size = (second / (1 - slow**count)).sqrt_().add_(1e-8)
        logit.sub_(plan.lr * (first / (1 - fast**count)) / size)


def mend(run: Run, count: int = 512, *, fresh: bool = False) -> None:
    """Re-estimate batch norms, which saw mixtures of operations, for what is left of them.

    Args:
        run: whose network has no candidates any more.
        count: training samples to look at.
        fresh: draw all weights anew before.
    """
    if fresh:
        redraw(run.model, run.generator, run.optimizers)
    if run.has_inputs:
        recalibrate(run.model, run.inputs(count, batch=128, seed=0))


def _batch(run: Run, plan: Bilevel, split: Split) -> tuple[Any, Tensor]:
    """The next batch of an endless, shuffled stream; its place is part of the state."""
    assert run.data is not None
    place = run.state["bilevel"]["places"][split]
    for _ in range(2):
        epoch, start = place
        stream = run.data.batches(
            split, plan.batch, seed=run.seed + 1, epoch=epoch,
            augment=True, shuffle=True, start=start,
        )  # fmt: skip
        inputs, labels = unpack(next(stream, None))
        if labels is not None and samples(inputs) > 1:  # batch norms need two
            place[1] = start + 1
            return _to(inputs, run.model), _to(labels, run.model)
        place[:] = [epoch + 1, 0]
    raise DataError(
        f"A search needs batches (inputs, labels) of at least 2 samples in the split {split!r}, "
        "but it gives none."
    )


def _to(value: Any, model: nn.Module) -> Any:
    device = next(model.parameters()).device
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {name: _to(item, model) for name, item in value.items()}
    return tuple(_to(item, model) for item in value)


@contextmanager
def _learning(logits: Sequence[nn.Parameter]) -> Iterator[None]:
    """Let the logits ask for gradients inside the block only."""
    for logit in logits:
        logit.requires_grad_(True)
    try:
        yield
    finally:
        for logit in logits:
            logit.requires_grad_(False)


@contextmanager
def _own_randomness(run: Run) -> Iterator[None]:
    """Let dropout draw from the run's generator, not from the training's random state."""
    seed = int(torch.randint(2**31, (), generator=run.generator))
    devices = sorted({p.device.index for p in run.model.parameters() if p.is_cuda})
    with forked(devices, seed):
        yield
