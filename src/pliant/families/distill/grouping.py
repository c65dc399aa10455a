"""Puts classes that a network takes for one another into groups, and joins what both say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["similar", "different", "random"]


def confusion_groups(
    confusion: Tensor,
    groups: int,
    kind: Kind = "similar",
    *,
    margin: float = 1.1,
    generator: torch.Generator,
) -> list[int]:
    """Divide classes into groups of about one size, those next to one another that are confused.

    The class that is confused most opens the first group, and the class farthest from all groups
    the next, until all are open. Then the class nearest to a group comes to that whose members
    are nearest on average, as long as it is not full.

    Args:
        confusion: (classes, classes): how often a class of the row was taken for that of the
            column. The diagonal does not count.
        groups: how many, of one class at least.
        kind: ``similar`` puts classes together that are confused, ``different`` apart; ``random``
            does not look, and makes groups of equal size.
        margin: a group is full with so many times its share of the classes.
        generator: breaks ties.

    Returns:
        The number of its group for each class.

    >>> mistakes = torch.tensor([[9, 0, 3, 0], [0, 9, 0, 2], [4, 0, 9, 0], [0, 2, 0, 9]])
    >>> found = confusion_groups(mistakes, 2, generator=torch.Generator())
    >>> found[0] == found[2] != found[1] == found[3]
    True
    """
    count = len(confusion)
    if not 1 <= groups <= count:
        raise ValueError(f"{count} classes make 1 to {count} groups, not {groups}.")
    order = torch.randperm(count, generator=generator)
    if kind == "random":
        return [int(place) % groups for place in order.argsort()]
    far = _distances(confusion, kind)[order][:, order]  # the first of equals is any
    full = margin * count / groups
    members = torch.zeros(groups, count, dtype=far.dtype)
    members[0, far.sum(1).argmin()] = 1
    for opened in range(1, count):
        left = members.sum(0) == 0
        sizes = members.sum(1)
        means = far @ members.T / sizes.clamp(min=1)
        near = means.masked_fill(sizes == 0, torch.inf).min(1).values
        if opened < groups:
            members[opened, near.masked_fill(~left, -torch.inf).argmax()] = 1
            continue
        chosen = int(near.masked_fill(~left, torch.inf).argmin())
        members[means[chosen].masked_fill(sizes >= full, torch.inf).argmin(), chosen] = 1
    found = members.argmax(0)[order.argsort()]
    return [int(group) for group in found]


def _distances(confusion: Tensor, kind: Kind) -> Tensor:
    """How far classes are from one another, (classes, classes), 0 on the diagonal."""
    far = confusion.double().clone().fill_diagonal_(0)
    if kind == "similar":
        far = (far.max() - far).fill_diagonal_(0)
    return (far + far.T) / 2


def joint(
    scores: Tensor, heads: Sequence[Tensor], groups: Sequence[Sequence[int]], power: float
) -> Tensor:
    """Return the logarithms of class probabilities that count what heads say of groups.

    The probability of a class is multiplied by that of its group at every head, to a power.

    Args:
        scores: of the classes, (N, classes).
        heads: scores of the groups at every head, (N, groups) each.
        groups: for every head the group of each class.
        power: beta; 0 leaves the classes as they are.

    >>> scores, head = torch.zeros(1, 4), torch.tensor([[0.0, 100.0]])
    >>> joint(scores, [head], [[0, 1, 1, 0]], 1.0).exp().round(decimals=3)
    tensor([[0.0000, 0.5000, 0.5000, 0.0000]])
    """
    found = scores.log_softmax(-1)
    for head, known in zip(heads, groups, strict=True):
        index = torch.tensor(list(known), device=head.device)
        found = found + power * head.log_softmax(-1)[:, index]
    return found.log_softmax(-1)
