"""How many decisions stay when inputs are cut up, and when positions inside are permuted."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pliant.errors import DataError
from pliant.families.analyze import arrange, kernels
from pliant.families.analyze.evidence import chosen
from pliant.families.analyze.inputs import Samples, logits
from pliant.observe.order import called_by
from pliant.observe.watch import capture
from pliant.result import Curves


def decided(
    model: nn.Module,
    samples: Samples,
    change: Callable[[Tensor], Tensor] = lambda inputs: inputs,
    within: AbstractContextManager[Any] | None = None,
) -> Tensor:
    """Return the class scores of changed inputs, (samples, classes), in eval mode.

    Args:
        model: any network that gives class scores.
        samples: inputs.
        change: of a batch of inputs.
        within: what stands around the forward calls.
    """
    with capture(model, (), lambda *_: None), within or nullcontext():
        parts = [logits(model, (change(inputs),)).double().cpu() for inputs in samples.batches()]
    return torch.cat(parts)


def grids(sizes: Sequence[int], wanted: Sequence[int]) -> list[int]:
    """Return the numbers of parts by which at least one axis can be cut evenly.

    Raises:
        DataError: there are none.
    """
    found = [parts for parts in wanted if max(arrange.parts_of(sizes, parts)) > 1]
    if not found:
        raise DataError(
            f"Inputs of {'x'.join(map(str, sizes))} positions cannot be cut evenly into "
            f"{', '.join(map(str, wanted))} parts: name divisors of their sides as grids."
        )
    return found


def shuffled(
    model: nn.Module,
    samples: Samples,
    parts: int,
    permutations: int,
    generator: torch.Generator,
) -> dict[str, Any]:
    """Ask how many decisions stay when inputs are cut into tiles and shuffled.

    Works for any network that gives class scores, so that networks can be compared.

    Returns:
        One row: the agreement with its interval, what it is by chance; the same where the seams
        of the tiles are blurred, and where they are blurred only; how likely the decision still
        is; and, where there are labels, the accuracy.
    """
    plain = decided(model, samples)
    before = plain.argmax(1)
    mix = partial(arrange.shuffle_tiles, parts=parts, generator=generator)
    blur = partial(arrange.blur_seams, parts=parts)
    after = [decided(model, samples, mix) for _ in range(permutations)]
    soft = [decided(model, samples, lambda x: blur(mix(x))).argmax(1) for _ in range(permutations)]
    row = _row(f"input in {parts} parts", before, after, generator)
    smooth = torch.stack([(one == before).double().mean() for one in soft]).mean()
    row |= {
        "blurred": float(smooth),
        "seams": float((decided(model, samples, blur).argmax(1) == before).double().mean()),
        "confidence": float(
            torch.stack([chosen(one.softmax(1), before).mean() for one in after]).mean()
        ),
    }
    if samples.labels is not None:
        right = [(one.argmax(1) == samples.labels.cpu()).double().mean() for one in after]
        row["accuracy"] = float(torch.stack(right).mean())
    return row


def profile(
    model: nn.Module,
    samples: Samples,
    most: int,
    permutations: int,
    generator: torch.Generator,
) -> list[dict[str, Any]]:
    """Ask how many decisions stay when the positions of one layer's output are permuted.

    The control moves them round by half of each side, which leaves neighbours beside each other
    and moves what padding did at the borders just as far.

    Args:
        model: any network that gives class scores.
        samples: inputs.
        most: convolutions to look at, evenly spread over those that are called.
        permutations: orders of each.
        generator: draws them.

    Returns:
        A row for each layer, with the shape of its kernels where they have several taps.
    """
    convs = [name for name, m in model.named_modules() if isinstance(m, kernels.CONVS)]
    called = called_by(model, convs, [(samples.inputs[:2],)])
    names = _spread([name for name in convs if name in called], most)
    before = decided(model, samples).argmax(1)
    shapes, taps = kernels.kernel_stats(model), kernels.taps(model, samples.batches(), generator)
    rows = []
    for name in names:
        mix = partial(arrange.permute_positions, generator=generator)
        after = [
            decided(model, samples, within=arrange.rearranged(model, name, mix))
            for _ in range(permutations)
        ]
        moved = arrange.rearranged(model, name, arrange.shift_positions)
        turned = decided(model, samples, within=moved).argmax(1)
        row = _row(f"positions of {name}", before, after, generator)
        row["shifted"] = float((turned == before).double().mean())
        rows.append(row | (_kernel(shapes[name], taps.get(name)) if name in shapes else {}))
    return rows


def designed(sizes: Sequence[int]) -> list[dict[str, Any]]:
    """Return the shapes of designed kernels of these sides, to compare with."""
    return [
        {"what": f"{name} {size}x{size}", **_kernel(kernels.shape_of(kernel), None)}
        for size in sorted({size for size in sizes if size > 1})
        for name, kernel in kernels.classical(size).items()
    ]


def _kernel(shape: kernels.Shape, taps: kernels.Taps | None) -> dict[str, float]:
    found = {
        "concentration": kernels.median(shape.concentration),
        "smoothness": kernels.median(shape.smoothness),
        "centre": kernels.median(shape.centre),
    }
    return found | ({} if taps is None else {"taps": taps.effective, "dead": taps.dead})


def _row(
    what: str, before: Tensor, after: Sequence[Tensor], generator: torch.Generator
) -> dict[str, Any]:
    found = arrange.agreement(before, [scores.argmax(1) for scores in after], generator)
    spans = {"low": found.low, "high": found.high, "chance": found.chance, "p": found.p}
    return {"what": what, "agreement": found.share, **spans}


def _spread(names: Sequence[str], most: int) -> list[str]:
    """Keep at most so many, evenly spread, the last among them."""
    if len(names) <= most:
        return list(names)
    return [names[math.ceil((place + 1) * len(names) / most) - 1] for place in range(most)]


def figure(rows: Sequence[Mapping[str, Any]], grids: Sequence[int]) -> Curves:
    """Return what is to be drawn of rows of `shuffled`, one for each number of parts."""
    pairs = list(zip(grids, rows, strict=True))
    lines = {
        "shuffled": [(g, row["agreement"]) for g, row in pairs],
        "shuffled, seams blurred": [(g, row["blurred"]) for g, row in pairs],
        "seams blurred only": [(g, row["seams"]) for g, row in pairs],
        "by chance": [(g, row["chance"]) for g, row in pairs],
    }
    bands = {"shuffled": [(g, row["low"], row["high"]) for g, row in pairs]}
    caption = (
        "Decisions that stay when inputs are cut into tiles and shuffled, with 95 % intervals over "
        "images. Blurring seams alone shows what new edges do."
    )
    return Curves("Shuffled tiles", caption, lines, "parts of each side", "agreement", bands)
