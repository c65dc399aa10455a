"""Units whose activations the others of their group predict, and how the others replace them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pliant.cost import Example
from pliant.families.prune.columns import columns, set_columns
from pliant.families.prune.scores import Groups
from pliant.observe.rows import Rows
from pliant.surgery.batchnorm import read_from_constants
from pliant.surgery.graph import Group
from pliant.surgery.prove import Leaving

PIXELS = 8  # positions of each sample that are read


def grams(
    model: nn.Module, groups: Groups, batches: Iterable[Example], *, seed: int = 0
) -> dict[str, Tensor]:
    """Return Z^T Z / n of every group in float64, (units + 1, units + 1); the last column is ones.

    Z holds what layers read of the units: behind the nonlinearity and pooling, without dropout. A
    position of a map is a row, and so is each of the places to which a unit is flattened. Only
    sums are kept.

    Args:
        model: in eval mode meanwhile.
        groups: of channels.
        batches: inputs of forward calls.
        seed: of the positions that are read.
    """
    slots = [(group, slot) for group in groups for slot in group.slots if slot[1] == "in"]
    layers = list(dict.fromkeys(slot[0] for _, slot in slots))
    draws = torch.Generator().manual_seed(seed)
    sums = {g.name: torch.zeros(len(g.units) + 1, len(g.units) + 1).double() for g in groups}
    reading = Rows(model, layers, side="input", form="pixels", pixels=PIXELS, generator=draws)
    for rows in reading.stream(batches):
        for group, slot in slots:
            if slot[0] in rows:
                seen = rows[slot[0]].cpu().double()[:, group.rows(slot)]  # (rows, units, places)
                flat = seen.movedim(1, 2).flatten(0, 1)
                flat = torch.cat([flat, flat.new_ones(len(flat), 1)], 1)
                sums[group.name] += flat.T @ flat
    return {name: gram / gram[-1, -1].clamp_min(1) for name, gram in sums.items()}


def elimination(gram: Tensor, ridge: float) -> Tensor:
    """Return at what error each unit goes, if always the one goes that the rest predicts best.

    Errors are roots of mean squared residuals of ridge regressions on all units still there and
    a constant; they are made to rise, so that they sort units by the order in which they went.

    Args:
        gram: of one group: see `grams`.
        ridge: as a share of the mean energy of the units.

    Returns:
        Errors (units,) in float64.
    """
    count = len(gram) - 1
    precision = torch.linalg.inv(_ridged(gram, ridge))
    left, errors, last = torch.ones(count, dtype=torch.bool), torch.zeros(count).double(), 0.0
    for _ in range(count):
        # Residuals are inverses of the diagonal; who is gone has an infinite one.
        energies = torch.where(left, precision.diagonal()[:-1].clamp_min(1e-300), 0).reciprocal()
        unit = int(energies.argmin())
        last = max(last * (1 + 1e-9) + 1e-12, float(energies[unit].sqrt()))
        errors[unit], left[unit] = last, False
        column = precision[:, unit].clone()
        precision -= torch.outer(column, column) / column[unit]
    return errors


def coefficients(gram: Tensor, gone: Sequence[int], ridge: float) -> Tensor:
    """Return by what of the others each unit that leaves is predicted, (units that stay + 1, gone).

    The last row is the constant. For a single unit this is its column of the self-prediction
    matrix: minus a column of the inverse over its diagonal entry.

    Args:
        gram: of one group: see `grams`.
        gone: the units that leave together.
        ridge: as a share of the mean energy of the units.
    """
    stay = [unit for unit in range(len(gram)) if unit not in set(gone)]
    whole = _ridged(gram, ridge)
    factor = torch.linalg.cholesky(whole[stay][:, stay])
    return torch.cholesky_solve(gram[stay][:, list(gone)], factor)


@torch.no_grad()
def fold(model: nn.Module, group: Group, gone: Sequence[int], weights: Tensor) -> None:
    """Let all layers read, in place, what predicts units instead of the units themselves.

    Layers without a bias leave the constant to the batch norm behind them. It is exact inside of
    a map, not at padded borders.

    Args:
        model: holds the layers.
        group: of the units.
        gone: the units that leave; nothing reads them afterwards.
        weights: see `coefficients`.
    """
    stay = [unit for unit in range(len(group.units)) if unit not in set(gone)]
    for slot in group.slots:
        if slot[1] != "in":
            continue
        module: Any = model.get_submodule(slot[0])
        new, leaving = columns(module).double().clone(), list(gone)
        weights = weights.to(new.device)
        for places in group.rows(slot).T:  # each of the channels that a unit has here
            taken = new[places[leaving]]
            new[places[stay]] += weights[:-1] @ taken
            _shift(module, weights[-1], taken, places[leaving])
            new[places[leaving]] = 0
        set_columns(module, new)


def fold_all(
    model: nn.Module, groups: Groups, leaving: Leaving, found: Mapping[str, Tensor], ridge: float
) -> None:
    """Let layers read what predicts the units that leave, in place, group by group.

    Args:
        model: holds the layers.
        groups: of channels.
        leaving: the units of each that leave.
        found: their Gram matrices: see `grams`.
        ridge: as a share of the mean energy of the units.
    """
    for group in groups:
        if gone := leaving.get(group.name):
            fold(model, group, gone, coefficients(found[group.name], gone, ridge))


def _shift(module: Any, constants: Tensor, taken: Tensor, channels: Tensor) -> None:
    """Add to the bias what channels give that are constant."""
    if module.bias is None:
        return
    groups = getattr(module, "groups", 1)
    bias = module.bias.view(groups, -1)
    width = (module.in_channels if groups > 1 else len(columns(module))) // groups
    sums = read_from_constants(module, taken.unflatten(1, (bias.shape[1], -1)))
    for constant, given, channel in zip(constants, sums, channels.tolist(), strict=True):
        bias[channel // width] += (constant * given).to(bias.dtype)


def _ridged(gram: Tensor, ridge: float) -> Tensor:
    energy = gram.diagonal()[:-1].mean().clamp_min(1e-30)
    return gram + max(ridge, 1e-13) * energy * torch.eye(len(gram), dtype=gram.dtype)
