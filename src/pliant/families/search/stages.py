"""Stages of a network: where they are, how much each says about the classes, how they grow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.cost import module_cost
from pliant.data import unpack
from pliant.data.sources import moved
from pliant.edits import Insert, Remove
from pliant.errors import DataError, MethodError
from pliant.math.pls import projection_importance
from pliant.observe.rows import Rows
from pliant.run import Run

WINDOW = 8  # side of the places that are averaged


def stages(run: Run, names: Sequence[str] = ()) -> list[str]:
    """Name the rows of blocks of which another one can be appended.

    Args:
        run: about to start.
        names: of the stages; all outermost rows that end with a block that keeps shapes if empty.

    Raises:
        MethodError: there is none, or one of those named is no such row.
    """
    whole = dict(run.model.named_modules())
    if unknown := [name for name in names if not _grows(run, name, whole.get(name))]:
        raise MethodError(
            f"A stage is an nn.Sequential of blocks whose last one keeps shapes, but "
            f"{unknown[0]!r} is none: name rows of named_modules()."
        )
    found = list(names) or [name for name, part in whole.items() if _grows(run, name, part)]
    outer = [n for n in found if not any(n.startswith(f"{other}.") for other in found)]
    if not outer:
        raise MethodError(
            f"Growing needs stages, rows of blocks of which the last one keeps shapes, but "
            f"{type(run.model).__name__} has none: build it such as pliant.zoo's staged-resnet."
        )
    return outer


def _grows(run: Run, name: str, row: nn.Module | None) -> bool:
    if not name or type(row) is not nn.Sequential or not len(row):
        return False
    block = row[-1]
    if next(block.children(), None) is None or isinstance(block, nn.Sequential):
        return False
    cost = module_cost(run.model, run.example, f"{name}.{list(row._modules)[-1]}")
    return cost.calls == 1 and cost.params > 0 and cost.input == cost.output


def depths(run: Run, names: Sequence[str]) -> list[int]:
    """Count the blocks of stages."""
    return [len(run.model.get_submodule(name)) for name in names]  # type: ignore[arg-type]


def deepen(run: Run, names: Sequence[str], growth: int) -> None:
    """Append so many blocks to each stage, of the kind of its last one."""
    for name in names:
        for _ in range(growth):
            seed = run.seed + len(run.edits)
            run.apply(Insert(name, "copy", {"start": "fresh"}, seed=seed))


def shorten(run: Run, names: Sequence[str], growth: int) -> None:
    """Take the last blocks of stages out, and let the edits be as if they had never come."""
    kept = list(run.edits)
    for name in names:
        for _ in range(growth):
            row = run.model.get_submodule(name)
            run.apply(Remove(f"{name}.{list(row._modules)[-1]}", out=True))
        grown = [place for place, edit in enumerate(kept) if edit.layer == name]
        kept = [edit for place, edit in enumerate(kept) if place not in grown[-growth:]]
    run.restate(kept)


def importance(run: Run, names: Sequence[str], *, parts: int, samples: int) -> dict[str, float]:
    """Return for every stage the mean importance of its features for the classes, in 0..1.

    Features are what the last block adds up, before it is rectified where the block has a module
    that does so, in means over 8x8 places.

    Args:
        run: with labelled data.
        names: of stages.
        parts: components of partial least squares.
        samples: of the training split, without augmentation.

    Raises:
        DataError: there are no labels of classes.
    """
    ends = {name: _end(run.model, name) for name in names}
    features: dict[str, list[Tensor]] = {name: [] for name in names}
    labels: list[Tensor] = []
    for inputs, given in _batches(run, samples):
        labels.append(given)
        for side in ("input", "output"):
            layers = [layer for layer, at in ends.values() if at == side]
            if layers:
                rows = Rows(run.model, layers, side, form=_pooled).of(inputs)
                for name, (layer, at) in ends.items():
                    if at == side:
                        features[name].append(rows[layer].cpu())
    known = torch.cat(labels)
    assert run.data is not None
    classes = max(int(known.max()) + 1, run.data.class_count)
    return {
        name: float(projection_importance(torch.cat(rows), known, classes, parts).mean())
        for name, rows in features.items()
    }


def weighed(run: Run, names: Sequence[str], *, parts: int, samples: int) -> list[float]:
    """Return the importance of all stages, which is noted with what the network costs.

    Args and errors are those of `importance`.
    """
    found = importance(run, names, parts=parts, samples=samples)
    cost = run.planner.now()
    run.note(
        depths=depths(run, names),
        importance=[round(value, 6) for value in found.values()],
        params=cost.params,
        macs=cost.macs,
    )
    return list(found.values())


def rising(
    run: Run, now: Sequence[float], before: Sequence[float], gain: float, *, any_of_them: bool
) -> list[bool]:
    """Say for every stage whether it became more important.

    Args:
        run: its generator draws.
        now: importance of all stages.
        before: the same.
        gain: by which it must rise, and more.
        any_of_them: draw as many stages at random, for comparison.
    """
    rose = [new > old + gain for new, old in zip(now, before, strict=True)]
    if any_of_them:
        order = torch.randperm(len(rose), generator=run.generator)[: sum(rose)].tolist()
        rose = [place in order for place in range(len(rose))]
    return rose


def _end(model: nn.Module, stage: str) -> tuple[str, str]:
    """The layer whose input or output is the sum of a stage's last block."""
    row = model.get_submodule(stage)
    block = f"{stage}.{list(row._modules)[-1]}"
    for name, part in model.get_submodule(block).named_children():
        if isinstance(part, nn.ReLU) and not part.inplace:
            return f"{block}.{name}", "input"
    return block, "output"


def _pooled(values: Tensor) -> Tensor:
    """Map (samples, channels, H, W) to means over windows, (samples, features)."""
    if values.dim() != 4:
        return values.flatten(1)
    height, width = (max(1, side // WINDOW) for side in values.shape[2:])
    return F.adaptive_avg_pool2d(values, (height, width)).flatten(1)


def _batches(run: Run, samples: int) -> list[tuple[tuple[Tensor, ...], Tensor]]:
    """Labelled training samples, the same ones each time."""
    assert run.data is not None
    found, seen = [], 0
    device = next(run.model.parameters()).device
    for batch in run.data.batches("train", 256, seed=run.seed, shuffle=True):
        inputs, labels = unpack(batch)
        if not isinstance(labels, Tensor) or labels.dim() != 1 or labels.is_floating_point():
            raise DataError("The importance of a stage needs samples with a class each.")
        taken = labels[: samples - seen]
        found.append((_first(moved(inputs, device), len(taken)), taken))
        seen += len(taken)
        if seen >= samples:
            break
    return found


def _first(inputs: object, count: int) -> tuple[Tensor, ...]:
    if isinstance(inputs, Tensor):
        return (inputs[:count],)
    if isinstance(inputs, Mapping):
        return {key: value[:count] for key, value in inputs.items()}  # type: ignore[return-value]
    return tuple(value[:count] for value in inputs)  # type: ignore[attr-defined]
