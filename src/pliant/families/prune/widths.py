"""From densities to widths: a group of C units at density d keeps about d C of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from pliant.budget import Limits
from pliant.families.prune.allocate import within
from pliant.families.prune.density import Density
from pliant.families.prune.ranking import by_group, ranking, up_to
from pliant.families.prune.scores import Groups, Scores, weakest
from pliant.run import Run


def powers(found: Mapping[str, Density], enough: float) -> dict[str, Tensor]:
    """Return the power of its group's density at which each unit leaves, (units,) by group.

    Args:
        found: densities by group.
        enough: density at which no unit leaves any more.
    """
    levels = {}
    for name, density in found.items():
        count = len(density.units)
        base = math.log(max(density.mean, 1e-6)) if density.mean < enough else -1e-9
        left = (torch.arange(count, 0, -1).double() - 0.5) / count
        levels[name] = torch.empty(count).double()
        levels[name][weakest(density.units, count)] = left.log() / base
    return levels


def resized(
    run: Run, groups: Groups, found: Scores, limits: Limits, *, last: bool
) -> dict[str, list[int]]:
    """Return the units that leave: those beyond the density itself, or more for a budget at last.

    Args:
        run: with the network.
        groups: of channels.
        found: see `powers`.
        limits: of the budget, if there is one.
        last: no resizing follows.
    """
    units = ranking(found, "global", run.state["floors"])
    ranked = [replace(unit, level=float(found[unit.group][unit.index])) for unit in units]
    once = up_to(ranked, 1.0)
    if not limits:
        return by_group(once)
    enough = within(run, groups, ranked, limits)
    return by_group(enough if last or len(enough) < len(once) else once)
