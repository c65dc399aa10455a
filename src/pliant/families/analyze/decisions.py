"""Which positions of the last map the decisions of a network come from, and how few do."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from scipy.stats import wilcoxon
from torch import Tensor, nn

from pliant.families.analyze import arrange, evidence
from pliant.families.analyze.heads import Head, maps
from pliant.families.analyze.inputs import Samples, check_logits
from pliant.result import Curves, Heat

Fill = Literal["mean", "zero"]
ORDERS = ("evidence", "random", "saliency")
WAYS = ("deletion", "insertion")


@dataclass(frozen=True, eq=False)
class Decisions:
    """Where the decisions of a network come from.

    Args:
        classes: decided on, (samples,).
        chances: softmax probability of each, (samples,).
        evidence: of each position for the decision, (samples, *positions).
        points: the fewest strongest positions that keep the decision, (samples,).
        curves: probability of the decision by the share of positions taken away ("deletion") or
            put in ("insertion"), by way and order of positions, (samples, steps + 1).
        exactness: largest distance of a score from the sum of its evidence and its bias, over
            the score where that is more than one.
        permuted: largest change of a score by another order of the last map's positions, alike.
    """

    classes: Tensor
    chances: Tensor
    evidence: Tensor
    points: Tensor
    curves: Mapping[tuple[str, str], Tensor]
    exactness: float
    permuted: float


def decisions(
    model: nn.Module,
    head: Head,
    samples: Samples,
    *,
    fill: Fill,
    steps: int,
    generator: torch.Generator,
) -> Decisions:
    """Decompose every decision, and take away and put in positions by three orders.

    Args:
        model: whose head this is.
        head: as `find_head` gives it.
        samples: inputs.
        fill: features of a removed position: their mean over inputs and positions, or zeros.
        steps: points of a curve beside its beginning.
        generator: draws the random order.
    """
    filling = evidence.filled(head, _mean(model, head, samples, fill))
    parts: list[dict[Any, Tensor]] = []
    for inputs in samples.batches():
        seen, scores = maps(model, head, inputs)
        check_logits(scores)
        each, classes = head.evidence(seen).cpu(), scores.argmax(1).cpu()
        slope = evidence.saliency(model, inputs, classes, head.shape[1:]).cpu()
        orders = {
            "evidence": evidence.ranking(each, classes),
            "random": torch.rand(len(each), head.positions, generator=generator).argsort(1),
            "saliency": slope.flatten(1).argsort(dim=1, descending=True, stable=True),
        }
        part = _curves(head, each, classes, orders, filling, steps)
        kept = evidence.insertions(head, each, orders["evidence"], filling)
        told = each.flatten(2).sum(2) + head.bias.cpu().double()
        turned = head.scores(arrange.permute_positions(seen, generator)).cpu()
        size = scores.cpu().double().abs().clamp_min(1)
        parts.append(
            part
            | {
                "classes": classes,
                "chances": evidence.chosen(scores.cpu().double().softmax(1), classes),
                "evidence": evidence.chosen(each, classes),
                "points": evidence.minimal_points(kept, classes),
                "exactness": ((told - scores.cpu()).abs() / size).amax(1),
                "permuted": ((turned - told).abs() / size).amax(1),
            }
        )
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    exactness, permuted = (float(whole.pop(name).max()) for name in ("exactness", "permuted"))
    classes, chances, told, points = (
        whole.pop(name) for name in ("classes", "chances", "evidence", "points")
    )
    return Decisions(classes, chances, told, points, whole, exactness, permuted)


def _curves(
    head: Head,
    each: Tensor,
    classes: Tensor,
    orders: Mapping[str, Tensor],
    filling: Tensor,
    steps: int,
) -> dict[Any, Tensor]:
    filling, found = filling.cpu(), {}
    head = Head(head.layer, head.pooled, head.weight.cpu(), head.bias.cpu(), head.shape)
    for name, order in orders.items():
        for way, taken in zip(WAYS, (evidence.removals, evidence.insertions), strict=True):
            found[way, name] = evidence.chances(taken(head, each, order, filling), classes, steps)
    return found


def _mean(model: nn.Module, head: Head, samples: Samples, fill: Fill) -> Tensor:
    """Return the features of a removed position, (channels,)."""
    total = torch.zeros(head.shape[0], dtype=torch.float64, device=head.weight.device)
    if fill == "zero":
        return total
    for inputs in samples.batches():
        total += maps(model, head, inputs)[0].double().flatten(2).mean(2).sum(0)
    return total / len(samples.inputs)


def better(one: Tensor, other: Tensor) -> float:
    """Return how likely areas are so much smaller than others of the same images by chance.

    Wilcoxon's signed ranks, one-sided; 1 where all are equal.
    """
    p = float(wilcoxon(one - other, alternative="less", zero_method="zsplit").pvalue)
    return p if math.isfinite(p) else 1.0


def figures(samples: Samples, found: Decisions, most: int) -> tuple[Curves | Heat, ...]:
    """Return what is to be drawn of decisions: evidence over images, and deletion curves.

    Args:
        samples: that were looked at; only what has height and width is drawn with its evidence.
        found: about them.
        most: how many images.
    """
    lines = {order: _line(found.curves["deletion", order].mean(0).tolist()) for order in ORDERS}
    caption = (
        "Mean probability of the class decided on while positions of the last map are replaced, "
        "those first that an order puts first. The lower, the more an order tells of the decision."
    )
    curves = Curves("Deletion", caption, lines, "share of positions replaced", "probability")
    if samples.inputs.dim() != 4 or not most:
        return (curves,)
    labels = tuple(
        f"class {int(one)} at {100 * float(chance):.0f} %, positions needed: {int(count)}"
        for one, chance, count in zip(found.classes, found.chances, found.points, strict=True)
    )
    caption = (
        "What each position of the last map adds to the score of the class decided on; all of a "
        "map and a bias are the score. Orange is for the class, blue against it."
    )
    heat = Heat(
        "Evidence", caption, samples.inputs[:most].cpu(), found.evidence[:most], labels[:most]
    )
    return (heat, curves)


def _line(values: list[float]) -> list[tuple[float, float]]:
    return [(at / (len(values) - 1), value) for at, value in enumerate(values)]
