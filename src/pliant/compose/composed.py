"""Methods made of methods: one after the other, or in the same loop."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from pliant.budget import Budget
from pliant.compose.stage import Stage, budgets_of, check_losses, let_refuse, name_of
from pliant.data import Data, Epoch
from pliant.data.criterion import beside
from pliant.edits import Edit
from pliant.errors import BudgetError, ChainError, MethodError
from pliant.method import Method
from pliant.registry import build, check_options, entry_of, other_verb, plain
from pliant.run import Run


@dataclass(frozen=True)
class Chain(Method):
    """Runs methods one after the other, each with its own share of the training."""

    stages: tuple[Stage, ...]

    @property
    def parts(self) -> tuple[Method, ...]:
        """The methods, in order."""
        return tuple(stage.method for stage in self.stages)

    def refuse(self, run: Run) -> None:
        """Check the budgets, and let every stage refuse what it can see beforehand.

        What later stages can reach depends on what is left of the network by then, so they do not
        see their budgets here.
        """
        check_axes(self, run.budget)
        budgets = [budgets_of(self.stages, run.budget)[0]] + [None] * (len(self.stages) - 1)
        for stage, budget in zip(self.stages, budgets, strict=True):
            let_refuse(stage.method, run, budget)

    def prepare(self, run: Run) -> None:
        """Prepare the first stage."""
        self._enter(run, 0, self._end(run, 0))
        if run.steps:
            self._advance(run)

    def epoch(self, epoch: Epoch, data: Data) -> Epoch:
        """Let the stage that has all of the training choose the data of an epoch.

        Raises:
            ChainError: stages share the training out by steps, which one of them would change.
        """
        for stage in self.stages:
            if stage.method.uses("epoch"):
                if sum(other.share > 0 for other in self.stages) > 1 or not stage.share:
                    raise ChainError(
                        f"{name_of(stage.method)} chooses the data of every epoch, and so the "
                        "number of steps that the stages share out: give it all of the training, "
                        "Stage(..., share=0) for every other stage, or use together(...)."
                    )
                epoch = stage.method.epoch(epoch, data)
        return epoch

    def weigh(self, run: Run, losses: Tensor, output: Any, batch: Any) -> Tensor | None:
        """Let the running stage weigh samples."""
        part = self._now(run)
        return part.method.weigh(part, losses, output, batch)

    def loss(self, run: Run, loss: Tensor, output: Any, batch: Any) -> Tensor:
        """Let the running stage change the loss."""
        part = self._now(run)
        return part.method.loss(part, loss, output, batch)

    def before_step(self, run: Run) -> None:
        """Let the running stage change the gradients."""
        self._now(run).before_step()

    def after_step(self, run: Run) -> None:
        """Let the running stage act; where its share is over, finish it and begin the next."""
        part = self._now(run)
        part.method.after_step(part)
        self._advance(run)

    def after_epoch(self, run: Run) -> None:
        """Tell the running stage that an epoch is over."""
        part = self._now(run)
        part.method.after_epoch(part)

    def finalize(self, run: Run) -> None:
        """Finish the running stage and all that are left, which get no training."""
        self._leave(run)
        while run.state["stage"] + 1 < len(self.stages):
            stage = run.state["stage"] + 1
            if self._end(run, stage) > self._end(run, stage - 1):
                name = name_of(self.stages[stage].method)
                run.journal.unended.append(f"{name} was not trained at all")
            self._enter(run, stage, run.step)
            self._leave(run)
        run.state.pop("entered", None)

    def resume(self, run: Run, state: Mapping[str, Any], edits: Sequence[Edit]) -> None:
        """Bring a fresh run to the saved stage: prepare it on the network as it was then.

        What a stage puts into the model besides edits (hooks, masks, a teacher) is not saved:
        its ``prepare`` makes it, from the weights that the chain kept when the stage began.
        """
        if run.state["stage"] != state["stage"]:
            run.close()
            run.step, run.epoch = state["began"]
            if entered := state.get("entered"):
                run.replay(edits[: entered["edits"]])
                run.model.load_state_dict(entered["tensors"])
                run.generator.set_state(entered["generator"])
            self._enter(run, state["stage"], self._end(run, state["stage"]))
        part = self._now(run)
        part.method.resume(part, state[f"stage{state['stage']}"], edits)

    def plain(self) -> dict[str, Any]:
        """Return the chain as plain data."""
        rows = [
            {
                "method": plain(stage.method),
                "budget": stage.budget and stage.budget.given(),
                "share": stage.share,
            }
            for stage in self.stages
        ]
        return {"name": "chain", "stages": rows}

    def _advance(self, run: Run) -> None:
        """Go on to the stage to which this step belongs."""
        while run.state["stage"] + 1 < len(self.stages):
            if run.step < self._end(run, run.state["stage"]):
                return
            self._leave(run)
            following = run.state["stage"] + 1
            self._enter(run, following, self._end(run, following))

    def _enter(self, run: Run, stage: int, end: int) -> None:
        """Prepare a stage that trains until a step, with a clock of its own."""
        run.state.update(stage=stage, began=[run.step, run.epoch], steps=max(0, end - run.step))
        run.state.pop("entered", None)
        if stage and self.stages[stage].method.uses("prepare"):
            run.state["entered"] = {
                "edits": len(run.edits),
                "tensors": copy.deepcopy(dict(run.model.state_dict())),
                "generator": run.generator.get_state(),
            }
        part = self._now(run)
        part.method.prepare(part)

    def _leave(self, run: Run) -> None:
        part = self._now(run)
        part.method.finalize(part)
        part.close()
        self._check(run, part)
        if run.observe is not None:
            run.note(finished=plain(part.method)["name"], **run.observe(run))

    def _check(self, run: Run, part: Run) -> None:
        """Note what a stage missed of its own budget; the chain's is checked at the end."""
        if (budget := self.stages[run.state["stage"]].budget) is None:
            return
        # A clock of its own: the run's measures the finished network, and only once.
        clock = replace(part.clock, final=None) if part.clock and budget.latency else None
        own = replace(part.planner, budget=budget, clock=clock)
        name = name_of(part.method)
        run.journal.missed.extend(f"after {name}, {miss}" for miss in own.misses(own.measured()))

    def _end(self, run: Run, stage: int) -> int:
        """The step at which the share of a stage is over."""
        shares = [each.share for each in self.stages]
        return round(run.steps * sum(shares[: stage + 1]) / sum(shares))

    def _now(self, run: Run) -> Run:
        """The running stage's view: its own state, budget and clock."""
        index, (step, epoch) = run.state["stage"], run.state["began"]
        return run.scope(
            f"stage{index}",
            method=self.stages[index].method,
            budget=budgets_of(self.stages, run.budget)[index],
            steps=run.state["steps"],
            step=run.step - step,
            epoch=run.epoch - epoch,
            began=(run.began[0] + step, run.began[1] + epoch),
        )


@dataclass(frozen=True)
class Together(Method):
    """Runs methods in the same loop, each with its own state."""

    methods: tuple[Method, ...]

    @property
    def parts(self) -> tuple[Method, ...]:
        """The methods, in order."""
        return self.methods

    def refuse(self, run: Run) -> None:
        """Check the budgets, and let every part refuse what no other part can mend."""
        check_axes(self, run.budget)
        check_losses(self.parts)
        alone = len(self.parts) == 1
        for part in self.parts:
            let_refuse(part, run, run.budget if alone else None)

    def prepare(self, run: Run) -> None:
        """Prepare every part, in order."""
        for part in self._views(run):
            part.method.prepare(part)

    def epoch(self, epoch: Epoch, data: Data) -> Epoch:
        """Let every part change the data of an epoch, in order."""
        for part in self.parts:
            epoch = part.epoch(epoch, data)
        return epoch

    def weigh(self, run: Run, losses: Tensor, output: Any, batch: Any) -> Tensor | None:
        """Multiply the weights that the parts give."""
        whole: Tensor | None = None
        for part in self._views(run):
            weights = part.method.weigh(part, losses, output, batch)
            if weights is not None:
                weights = beside(weights, losses)
                whole = weights if whole is None else whole * weights
        return whole

    def loss(self, run: Run, loss: Tensor, output: Any, batch: Any) -> Tensor:
        """Let every part change the loss, in order."""
        for part in self._views(run):
            loss = part.method.loss(part, loss, output, batch)
        return loss

    def before_step(self, run: Run) -> None:
        """Let every part change the gradients, penalties included."""
        for part in self._views(run):
            part.before_step()

    def after_step(self, run: Run) -> None:
        """Let every part act on the weights."""
        for part in self._views(run):
            part.method.after_step(part)

    def after_epoch(self, run: Run) -> None:
        """Tell every part that an epoch is over."""
        for part in self._views(run):
            part.method.after_epoch(part)

    def finalize(self, run: Run) -> None:
        """Finish every part, in order."""
        for part in self._views(run):
            part.method.finalize(part)

    def resume(self, run: Run, state: Mapping[str, Any], edits: Sequence[Edit]) -> None:
        """Bring every part that is a chain to its saved stage, in the order of their beginnings."""
        views = self._views(run)
        saved = [state[f"part{i}"] for i in range(len(views))]
        for i in sorted(range(len(views)), key=lambda i: saved[i].get("began", [0, 0])):
            views[i].method.resume(views[i], saved[i], edits)

    def plain(self) -> dict[str, Any]:
        """Return the composition as plain data."""
        return {"name": "together", "methods": [plain(part) for part in self.parts]}

    def _views(self, run: Run) -> list[Run]:
        budgets = budgets_of([Stage(part) for part in self.parts], run.budget)
        return [
            run.scope(f"part{i}", method=part, budget=budget)
            for i, (part, budget) in enumerate(zip(self.parts, budgets, strict=True))
        ]


def chain(*methods: Method | Stage | str) -> Chain:
    """Return a method that runs several one after the other, nothing re-ordered.

    Raises:
        ChainError: there is nothing to run, or a share is not positive.

    >>> len(chain("nrmf", "energy").parts)
    2
    """
    if not methods:
        raise ChainError("A chain needs at least one method.")
    stages = tuple(
        replace(m, method=resolve(m.method)) if isinstance(m, Stage) else Stage(resolve(m))
        for m in methods
    )
    if min(stage.share for stage in stages) < 0 or not sum(stage.share for stage in stages):
        raise ChainError(
            "The stages of a chain share out its training: no share may be negative and one must "
            f"be positive, not {', '.join(f'{stage.share:g}' for stage in stages)}."
        )
    return Chain(stages)


def together(*methods: Method | str) -> Together:
    """Return a method that runs several in the same training loop.

    Raises:
        ChainError: there is nothing to run.
    """
    if not methods:
        raise ChainError("Together needs at least one method.")
    return Together(tuple(resolve(method) for method in methods))


def resolve(method: Method | Stage | str | Sequence[Any]) -> Method:
    """Return a method from a name, a spec string, a ``Method``, or a sequence of them (a chain).

    Raises:
        MethodError: it is none of these, the name belongs to another verb, or an option is out of
            its range.
    """
    if isinstance(method, str):
        method = build(method)
    if isinstance(method, Stage) or (isinstance(method, Sequence) and not isinstance(method, str)):
        return chain(*([method] if isinstance(method, Stage) else method))
    if not isinstance(method, Method):
        if (entry := entry_of(method)) is not None:
            raise other_verb(entry, "compress")
        raise MethodError(
            f"A compression method is a name, a spec string, a Method or a sequence of them, "
            f"not {type(method).__name__}."
        )
    check_options(method)
    return method


def check_axes(method: Method, budget: Budget | None) -> None:
    """Refuse bounds on what a method, or a stage with a budget of its own, does not save.

    Raises:
        BudgetError: a bound on what a method does not save.
        ChainError: no stage saves what is bounded, or several without budgets of their own.
    """
    if method.parts:
        stages = _stages(method)
        for stage, given in zip(stages, budgets_of(stages, budget), strict=True):
            check_axes(stage.method, given)
        return
    entry = entry_of(method)
    for axis in budget.given() if budget and entry else ():
        assert entry is not None
        if axis not in entry.saves:
            raise BudgetError(
                f"{entry.name} does not save {axis}: it saves {', '.join(entry.saves) or 'none'}; "
                f"drop {axis} from the budget, or add a method that saves it."
            )


def bounds(method: Method, budget: Budget | None) -> dict[str, Any]:
    """Return all bounds on the result: the budget's and, on other axes, those of the last stage."""
    found: dict[str, Any] = {}
    for stage in method.stages if isinstance(method, Chain) else ():
        found |= bounds(stage.method, stage.budget)
    return found | (budget.given() if budget else {})


def _stages(method: Method) -> Sequence[Stage]:
    """Return what a composed method is made of, as stages."""
    return method.stages if isinstance(method, Chain) else [Stage(part) for part in method.parts]
