"""What heads learn of groups of classes: their targets, losses, steps, and what they know."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pliant.cost import call, evaluating
from pliant.data import unpack
from pliant.data.sources import moved
from pliant.data.splits import Split
from pliant.errors import DataError, MethodError, ModelError
from pliant.families.distill.grouping import Kind, confusion_groups, joint
from pliant.observe import heads
from pliant.observe.heads import Reading, answer
from pliant.observe.order import order
from pliant.run import Run
from pliant.surgery.select import weighted


def refuse(run: Run, weights: Sequence[float], groups: Sequence[int], at: Sequence[str]) -> None:
    """Refuse a run on which heads can learn nothing, and options that do not fit one another.

    Raises:
        DataError: the answers of the task are no classes.
        MethodError: there are no data, numbers do not match, or a layer is unknown.
    """
    if run.task is not None and run.task.scores is None:
        raise DataError("ssal groups classes, but the answers of this task are no classes.")
    if not run.has_inputs:
        raise MethodError("ssal groups classes by mistakes on data, but the run has none.")
    counts = {len(weights), len(groups or weights), len(at or weights)}
    if len(counts) > 1 or not weights:
        raise MethodError(
            "ssal has one number in weights for each head, and as many in groups and names in "
            f"at, not {len(weights)}, {len(groups)} and {len(at)}."
        )
    if min(weights) < 0 or min(groups, default=2) < 2:
        raise MethodError("ssal: weights are 0 or more, and groups are 2 or more.")
    known = dict(run.model.named_modules())
    if unknown := [name for name in at if name not in known]:
        raise MethodError(f"ssal: the network has no layer {unknown[0]!r} for a head to read.")


def regroup(
    run: Run, groups: Sequence[int], kind: Kind, *, heads: int, margin: float, samples: int
) -> None:
    """Count mistakes, and give every head its groups.

    Args:
        run: whose state gets them.
        groups: of each head; those of `shares` if none.
        kind: see `confusion_groups`.
        heads: how many there are.
        margin: see `confusion_groups`.
        samples: on which mistakes are counted.

    Raises:
        MethodError: there are fewer classes than groups.
    """
    mistakes = confusion(run, samples)
    classes = len(mistakes)
    counts = groups or shares(classes, heads)
    if max(counts) > classes:
        raise MethodError(f"ssal: {classes} classes make at most {classes} groups.")
    run.state["groups"] = [
        confusion_groups(mistakes, count, kind, margin=margin, generator=run.generator)
        for count in counts
    ]
    run.note(groups=[list(known) for known in run.state["groups"]])


def places(run: Run, count: int) -> list[str]:
    """Name so many layers with weights, at equal distances in the order in which they are called.

    The last layer, whose outputs are the classes, is none of them.

    Raises:
        ModelError: the network has no layer before its last one.
    """
    called = order(run.model, run.example, list(weighted(run.model))).called[:-1]
    if not called:
        raise ModelError(
            "Heads read layers within the network, but it has none with weights before its last "
            "one: train it without them."
        )
    at = [len(called) * (n + 1) // (count + 1) for n in range(count)]
    return [called[min(place, len(called) - 1)] for place in at]


def shares(classes: int, heads: int) -> list[int]:
    """Return how many groups heads have: from a fifth of the classes on to a half, two at least.

    >>> shares(100, 3), shares(10, 3)
    ([20, 33, 50], [2, 3, 5])
    """
    steps = [1 / (5 - 3 * n / max(1, heads - 1)) for n in range(heads)]
    if heads == 3:
        steps = [1 / 5, 1 / 3, 1 / 2]
    return [min(classes, max(2, int(classes * step + 1e-9))) for step in steps]


def classes(scores: Tensor, labels: Any) -> Tensor:
    """Return labels that are one class number for each row of scores.

    Raises:
        DataError: they are not.
    """
    numbers = isinstance(labels, Tensor) and not labels.is_floating_point()
    if not numbers or scores.dim() != 2 or labels.shape != scores.shape[:1]:
        raise DataError(
            "ssal needs one class number for each sample: leave it out of tasks with other labels."
        )
    return labels.to(scores.device)


def confusion(run: Run, samples: int) -> Tensor:
    """Count how often the network takes each class for another, on data it does not train on.

    Where it makes no mistake, its mean probabilities stand in the place of counts.

    Args:
        run: with labelled data.
        samples: of the validation split, or of the training split where there is none.

    Returns:
        A row for each class, (classes, classes) in float64.
    """
    counts, soft = torch.zeros(0, 0), torch.zeros(0, 0)
    for scores, labels, _ in _seen(run, samples):
        size = scores.shape[1]
        if not len(counts):
            counts, soft = (torch.zeros(size, size, dtype=torch.float64) for _ in range(2))
        known = (labels >= 0) & (labels < size)
        labels, chances = labels[known].cpu(), scores[known].double().softmax(1).cpu()
        counts.index_add_(0, labels, F.one_hot(chances.argmax(1), size).double())
        soft.index_add_(0, labels, chances)
    missed = counts.clone().fill_diagonal_(0)
    return counts if missed.any() else soft


def _seen(run: Run, samples: int) -> Iterator[tuple[Tensor, Tensor, dict[str, Tensor]]]:
    """Yield scores, labels and what heads read, of the network in eval mode."""
    assert run.data is not None
    split: Split = "val" if run.data.has("val") else "train"
    device, seen = next(run.model.parameters()).device, 0
    reading = run.aside.get(Reading)
    reading.follow(run.model)
    with evaluating(run.model), torch.no_grad(), reading.always():
        for batch in run.data.batches(split, 256):
            batch = moved(batch, device)
            scores = run.class_scores(call(run.model, run.inputs_of(batch)))
            yield scores, classes(scores, unpack(batch)[1]), reading.take()
            seen += len(scores)
            if seen >= samples:
                break


def losses(
    run: Run,
    features: Mapping[str, Tensor],
    labels: Tensor,
    weights: Sequence[float],
    width: int,
) -> Tensor:
    """Return the weighted sum of the losses of all heads, and keep the gradients of their weights.

    A head of weight 0 trains all the same: the network does not feel it. One whose layer has
    another number of channels than before begins anew, and one whose layer was not called rests.
    """
    total, reading = labels.new_zeros((), dtype=torch.float32), run.aside.get(Reading)
    for number, (name, weight) in enumerate(zip(run.state["names"], weights, strict=True)):
        if name not in features or features[name].dim() < 2:
            continue
        given, groups = features[name], run.state["groups"][number]
        if len(given) != len(labels):
            continue
        head = heads.leaves(
            run.state, reading, str(number), given, max(groups) + 1, width=width, seed=run.seed
        )
        index = torch.tensor(groups, device=labels.device)
        known = (labels >= 0) & (labels < len(groups))
        target = torch.where(known, index[labels.clamp(0, len(groups) - 1)], -100)
        if not known.any():
            continue
        loss = F.cross_entropy(answer(head, given), target)
        heads.collect(reading, str(number), head, loss)
        if weight:
            total = total + weight * loss
    reading.batches += 1
    return total


@torch.no_grad()
def step(run: Run, decay: float) -> None:
    """Move the weights of all heads, by the mean gradient of the batches since the last step.

    Args:
        run: its first optimizer tells learning rate and momentum.
        decay: weight decay.
    """
    rate = run.lr if run.optimizer is not None else 0.01
    heads.step(run.state, run.aside.get(Reading), run.optimizer, rate, decay)


def read(run: Run, power: float, samples: int) -> dict[str, float]:
    """Return how often the network is right alone, and with its heads, and where they agree.

    Returns:
        ``alone`` and ``joint``, shares of samples whose class is right; ``agreeing``, the share in
        which every head names the group of the network's class, and ``right_agreeing``, the share
        of these that is right.
    """
    alone = both = agree = right = total = 0
    for scores, labels, features in _seen(run, samples):
        kept = [n for n, name in enumerate(run.state["names"]) if _usable(run, n, features)]
        groups = [run.state["groups"][n] for n in kept]
        said = [answer(run.state["heads"][str(n)], features[run.state["names"][n]]) for n in kept]
        hits, best = scores.argmax(1) == labels, scores.argmax(1)
        one = torch.ones_like(hits)
        for head, known in zip(said, groups, strict=True):
            one &= head.argmax(1) == torch.tensor(known, device=best.device)[best]
        alone += int(hits.sum())
        both += int((joint(scores, said, groups, power).argmax(1) == labels).sum())
        agree, right, total = (
            agree + int(one.sum()),
            right + int((one & hits).sum()),
            total + len(hits),
        )
    rows = {"alone": alone / total, "joint": both / total, "agreeing": agree / total}
    return rows | {"right_agreeing": right / max(1, agree)}


def _usable(run: Run, number: int, features: Mapping[str, Tensor]) -> bool:
    head, given = run.state["heads"].get(str(number)), features.get(run.state["names"][number])
    return head is not None and given is not None and head["first"].shape[1] == given.shape[1]
