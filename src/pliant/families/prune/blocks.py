"""The pattern of whole blocks: which may leave, what each says of the output, who leaves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from pliant.cost import Example, cost, twin
from pliant.edits import Remove, replay
from pliant.errors import BudgetError, DataError, nothing_for
from pliant.families.prune.allocate import fewest
from pliant.latency.clock import AIM
from pliant.math.information import (
    Estimator,
    components,
    distance_correlation,
    gaussian,
    ksg,
    probe,
)
from pliant.nn.filters import WEIGHTED
from pliant.observe.rows import Rows
from pliant.run import Run
from pliant.surgery.remove import Appended, branch_ends, removable, without
from pliant.surgery.select import readable

SAMPLES, LEAST = 4, 8  # samples for each component, and at all
APART = 2048  # samples between which all distances are held
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def units(
    run: Run, only: Sequence[str] = (), exclude: Sequence[str] = (), *, needed: bool = True
) -> list[Remove]:
    """Return what may leave whole: blocks that pass what they read, and layers in no block.

    Of blocks within blocks the inner ones are meant. Why others stay is recorded.

    Args:
        run: of the network.
        only: name patterns of the layers to consider; a block is left out with any layer of it.
        exclude: name patterns of the layers to leave alone.
        needed: refuse a network without any.

    Raises:
        ModelError: there are none.
        MethodError: a name pattern matches no layer.
    """
    chosen, unwanted = readable(run.model, only=only, exclude=exclude)
    found, reasons = removable(run.model, run.example)
    found = [edit for edit in found if not edit.shortcut]
    blocks = _blocks(run.model)
    for name in (*chosen, *unwanted):
        whose = [block for block in blocks if _within(name, block) and block in reasons]
        reason = reasons.get(whose[0] if whose else name, "no block that may leave holds it")
        run.keep(name, unwanted.get(name, reason))
    good = [
        edit
        for edit in found
        if not any(_within(name, edit.layer) for name in unwanted)
        and (edit.layer in blocks or not any(_within(edit.layer, block) for block in blocks))
        and not any(
            _within(one.layer, edit.layer) for one in found if one.layer in blocks - {edit.layer}
        )
    ]
    if needed and not good:
        needs = "blocks that add to what they read or append to it, or layers that keep shapes"
        raise nothing_for(f"block that can be removed: it needs {needs}", reasons)
    return good


def keep_blocks(run: Run, edits: Iterable[Remove]) -> None:
    """Record of the layers of blocks that they say more than others."""
    for name in run.layers:
        if any(_within(name, edit.layer) for edit in edits):
            run.keep(name, "its block says more about the answers than others")


def information(
    model: nn.Module,
    example: Example,
    edits: Sequence[Remove],
    batches: Iterable[Example],
    *,
    estimator: Estimator,
    size: int,
    neighbours: int,
) -> list[float]:
    """Return how much what each block adds says about the scores of the network.

    Args:
        model: in eval mode meanwhile.
        example: inputs of one forward call.
        edits: the blocks, as they would leave.
        batches: inputs to look at.
        estimator: of the information, in nats; "dcor" is the squared distance correlation.
        size: principal components of each side at most; one for four samples, as many for all.
        neighbours: of "ksg".

    Raises:
        DataError: there are too few samples.
    """
    ends = branch_ends(model, example, edits)
    rows = Rows(model, [*dict.fromkeys(ends), ""]).all(batches)
    scores = rows[""].double()
    if len(scores) < LEAST:
        raise DataError(
            f"Information needs at least {LEAST} samples, but {len(scores)} came: give more data."
        )
    size = min(size, len(scores) // SAMPLES, *(rows[end].shape[1] for end in ends))
    labels = scores.argmax(1)
    told = components(scores, min(size, max(1, scores.shape[1] - 1)))
    seen = [components(rows[end], size) for end in ends]
    return [_between(each, told, labels, estimator, neighbours) for each in seen]


def increments(values: Sequence[float], edits: Sequence[Remove]) -> list[float]:
    """Return how much more each block says than the most that one before it in its stage does."""
    best: dict[str, float] = {}
    found = []
    for value, edit in zip(values, edits, strict=True):
        stage = edit.layer.rpartition(".")[0]
        found.append(value - best.get(stage, 0.0))
        best[stage] = max(value, best.get(stage, value))
    return found


def enough(
    run: Run, ranked: Sequence[Remove], limits: Mapping[str, float], channels: Appended
) -> list[Remove]:
    """Return the first of a ranking of blocks without which the network is within limits.

    Numbers are counted on copies, milliseconds are measured.

    Args:
        run: of the network.
        ranked: blocks, those first that leave first.
        limits: of the budget, by axis.
        channels: see `pliant.surgery.remove.appended`.

    Raises:
        BudgetError: even without all of them a limit is missed.
    """
    best: dict[str, float] = {}

    def fits(count: int) -> bool:
        model, edits = twin(run.model), without(run.model, ranked[:count], channels)
        replay(model, edits)
        left = cost(model, run.example)
        now = {axis: float(getattr(left, axis)) for axis in limits if axis != "latency"}
        if run.clock is not None and "latency" in limits:
            now["latency"] = run.clock.weigh(run.model, edits)[0] / AIM
        best.update({axis: min(value, best.get(axis, value)) for axis, value in now.items()})
        return all(value <= limits[axis] for axis, value in now.items())

    count = fewest(len(ranked), fits)
    if count is None:
        named = " and ".join(
            f"{axis}={limits[axis]:,.4g} (the least reachable is {best[axis]:,.4g})"
            for axis in best
            if best[axis] > limits[axis]
        )
        raise BudgetError(
            f"The budget {named} cannot be met by removing whole blocks: allow more, or chain a "
            "method that narrows layers."
        )
    return list(ranked[:count])


def _between(
    seen: Tensor, told: Tensor, labels: Tensor, estimator: Estimator, neighbours: int
) -> float:
    if not seen.any() or not told.any():
        return 0.0  # what never changes says nothing
    if estimator == "gaussian":
        return gaussian(seen, told)
    if estimator == "probe":
        return probe(seen, labels)
    if estimator == "ksg":
        return ksg(seen, told, min(neighbours, len(seen) - 1))
    return distance_correlation(seen[:APART], told[:APART])


def _blocks(model: nn.Module) -> set[str]:
    """Modules with a forward of their own that hold layers."""
    return {
        name
        for name, module in model.named_modules()
        if name
        and not isinstance(module, (*_CONTAINERS, *WEIGHTED))
        and any(isinstance(part, WEIGHTED) for part in module.modules())
    }


def _within(name: str, block: str) -> bool:
    return name == block or name.startswith(f"{block}.")
