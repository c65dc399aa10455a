"""The compressions that checks look at: one call of `compress`, or steps taken by hand."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import SGD

from pliant.api import compress
from pliant.budget import Budget
from pliant.cost import call
from pliant.data import Train, unpack
from pliant.data.guess import task_loss
from pliant.method import Method
from pliant.result import Result
from pliant.run import Run, start
from pliant.testing.toys import Toy

BATCH, EPOCHS = 8, 2
MOST = 4  # batches of an epoch by hand
KEPT = 128  # compressions and walks, each some hundred kilobytes
PLAN = Train(epochs=EPOCHS, batch=BATCH, lr=0.01, device="cpu")


@dataclass(frozen=True)
class Trial:
    """One compression of a toy: what went in, as it was, and what came out."""

    toy: Toy
    budget: Budget | None
    dense: nn.Module
    before: dict[str, Tensor]
    result: Result


def trial(method: Method, toy: Toy, budget: Budget | None, *, train: bool = True) -> Trial:
    """Compress a toy, with a short training or by calibration only."""
    dense = toy.model()
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    plan = PLAN if train else None
    result = compress(dense, toy.data(), method, budget, train=plan, name=toy.name)
    return Trial(toy, budget, dense, before, result)


T = TypeVar("T")


def once(make: Callable[..., T]) -> Callable[..., T]:
    """Make what several checks look at once in a process, failures too.

    Who changes what came works on a copy.

    Args:
        make: takes a method, a toy or a problem, and more that is written out in full.
    """
    made: dict[Any, T | Exception] = {}

    def shared(method: Any, at: Any, *more: Any, **how: Any) -> T:
        key = type(method), at, repr((method, more, how))
        if key in made:
            made[key] = made.pop(key)  # asked for last
        else:
            while len(made) >= KEPT:  # checks of one method are neighbours: the others go
                made.pop(next(iter(made)))
            try:
                made[key] = make(method, at, *more, **how)
            except Exception as error:  # every check that needs it shall say the same
                made[key] = error
        found = made[key]
        if isinstance(found, Exception):
            raise found
        return found

    shared.forget = made.clear  # type: ignore[attr-defined]
    return shared


PASSED: set[Any] = set()


def unless_passed(check: Callable[[], None], *of: Any) -> None:
    """Make a check, unless it has passed in this process: on the same things it would again."""
    key = of or check
    if key not in PASSED:
        check()
        PASSED.add(key)


shared_trial = once(trial)
"""Like `trial`, but equal ones are one."""


def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    """Return all tensors that a model gives, without gradients."""
    with torch.no_grad():
        found = call(model, inputs)
    leaves = torch.utils._pytree.tree_leaves(dict(found) if hasattr(found, "keys") else found)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def put_in(model: nn.Module) -> list[str]:
    """Name what is in a model besides plain modules: hooks, parametrizations, patched calls."""
    found = []
    for name, module in model.named_modules():
        hooks = [kind for kind, held in vars(module).items() if kind.endswith("_hooks") and held]
        hooks = [kind for kind in hooks if "state_dict" not in kind]  # of saving, not of calling
        patched = [kind for kind in ("forward", "__call__") if kind in vars(module)]
        mixed = ["parametrizations"] if hasattr(module, "parametrizations") else []
        found += [f"{name or 'the model'}: {kind}" for kind in (*hooks, *patched, *mixed)]
    return found


# ---------------------------------------------------------------- steps taken by hand


@dataclass
class Walk:
    """A training by hand: the run, what was noticed on the way, and what was saved where."""

    run: Run
    optimizer: SGD
    strange: list[str] = field(default_factory=list)
    saved: dict[int, bytes] = field(default_factory=dict)


def begin(method: Method, toy: Toy, budget: Budget | None) -> Walk:
    """Start a run with an optimizer, told of the steps to come."""
    model = toy.model().train()
    optimizer = SGD([p for p in model.parameters() if p.requires_grad], 0.01, momentum=0.9)
    strange: list[str] = []
    with _own_randomness("prepare", strange):
        run = start(
            model,
            method,
            budget,
            data=toy.data(),
            example=toy.inputs(1),
            optimizer=optimizer,
            epochs=EPOCHS,
            batch=max(BATCH, toy.samples // MOST),  # where many samples are asked for
        )
    return Walk(run, optimizer, strange)


def walk(method: Method, toy: Toy, budget: Budget | None, *, stop: int | None = None) -> Walk:
    """Train and finish by hand; at step ``stop`` save all, begin afresh, load and go on."""
    with torch.random.fork_rng(devices=[]):
        now = begin(method, toy, budget)
        if stop is None:
            return _finished(now)
        _steps(now, stop)
        return resumed(_saved(now), method, toy, budget)


shared_walk = once(walk)
"""Like `walk`, but equal ones are one."""


def resumed(saved: bytes, method: Method, toy: Toy, budget: Budget | None) -> Walk:
    """What a process does that resumes: a fresh run, then edits, tensors and optimizer."""
    kept = torch.load(io.BytesIO(saved), weights_only=True)  # plain values and tensors only
    with torch.random.fork_rng(devices=[]):
        new = begin(method, toy, budget)
        new.run.load_state_dict(kept["run"])
        new.run.model.load_state_dict(kept["model"])
        new.optimizer.load_state_dict(kept["optimizer"])
        return _finished(new)


def _finished(now: Walk) -> Walk:
    """Take the steps that are left and finish; save at two of them all that a process needs."""
    whole = now.run.steps
    for stop in (whole // 4, whole - 1):
        if now.run.step <= stop:
            _steps(now, stop)
            now.saved[stop] = _saved(now)
    _steps(now, whole)
    with _own_randomness("finalize", now.strange):
        now.run.finish(strict=False)
    return now


def _steps(now: Walk, end: int) -> None:
    for step in range(now.run.step, end):
        _step(now, next(iter(now.run.batches())), step)
        assert now.run.epochs is not None
        if now.run.step == now.run.epochs.began(now.run.epoch + 1):
            now.run.after_epoch()


def _saved(now: Walk) -> bytes:
    buffer = io.BytesIO()
    rows: dict[str, Any] = {"run": now.run, "model": now.run.model, "optimizer": now.optimizer}
    torch.save({name: one.state_dict() for name, one in rows.items()}, buffer)
    return buffer.getvalue()


def _step(now: Walk, batch: Any, step: int) -> None:
    run = now.run
    run.model.train()
    torch.default_generator.manual_seed(step)  # dropout is the same in a resumed training
    now.optimizer.zero_grad()
    inputs, labels = unpack(batch)
    output = call(run.model, inputs)
    loss = run.loss(task_loss(output, labels, run.reduction), output, batch)
    loss.backward()
    with _own_randomness("before_step", now.strange):
        run.before_step()
    _notice(now, "gradient", [(n, p.grad) for n, p in run.model.named_parameters()])
    now.optimizer.step()
    with _own_randomness("after_step", now.strange):
        run.after_step()
    _notice(now, "value", [("loss", loss), *run.model.named_parameters()])


def _notice(now: Walk, what: str, tensors: list[tuple[str, Tensor | None]]) -> None:
    for name, tensor in tensors:
        if tensor is not None and not torch.isfinite(tensor).all():
            now.strange.append(f"the {what} of {name} is not finite after step {now.run.step}")


@contextmanager
def _own_randomness(hook: str, strange: list[str]) -> Iterator[None]:
    before = torch.get_rng_state()
    yield
    if not torch.equal(before, torch.get_rng_state()):
        strange.append(f"{hook} drew from the global random state instead of run.generator")
