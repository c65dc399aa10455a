"""Tensors as cubes whose last axis holds the tubes: bands, frames or colours."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from pliant.errors import DataError

Scaling = Literal["max", "bands"]


def to_cube(x: Tensor, axis: int) -> Tensor:
    """Move the axis of the tubes to the end; a matrix becomes a cube of one slice."""
    return x[..., None] if x.dim() == 2 else x.movedim(axis, -1).contiguous()


def from_cube(cube: Tensor, like: Tensor, axis: int) -> Tensor:
    """Undo `to_cube`, for a tensor of the order of `like`."""
    return cube[..., 0] if like.dim() == 2 else cube.movedim(-1, axis)


def check_shape(name: str, x: Tensor, axis: int) -> None:
    """Refuse what is neither a matrix nor a tensor of third order.

    Raises:
        DataError: it is not, or has no such axis.
    """
    if x.dim() not in (2, 3) or not -x.dim() <= axis < x.dim():
        raise DataError(
            f"{name} recovers matrices and tensors of third order along one of their axes, not "
            f"shape {tuple(x.shape)} along axis {axis}; reshape it."
        )


def check_mask(mask: Tensor) -> None:
    """Refuse what no low-rank model can fill in.

    Args:
        mask: of a cube (n1, n2, n3), true where it is known.

    Raises:
        DataError: a row or a column of tubes has no known entry.
    """
    for axis, name in ((0, "row"), (1, "column")):
        empty = (~mask.any(2).any(1 - axis)).nonzero().flatten()
        if len(empty):
            raise DataError(
                f"Every {name} of x needs a known entry, but {name} {int(empty[0])} has none along "
                "the whole axis of the tubes; leave it out, or choose another axis."
            )


def band_scaler(cube: Tensor, mask: Tensor | None, how: Scaling) -> tuple[Tensor, Tensor]:
    """Return what to take off every band and what to divide it by, each (n3,).

    Args:
        cube: (n1, n2, n3).
        mask: true where it is known, if not everywhere.
        how: "max" divides the cube by its largest size, "bands" brings every band to 0..1.
    """
    known = torch.ones_like(cube, dtype=torch.bool) if mask is None else mask
    if how == "max":
        size = cube.masked_fill(~known, 0).abs().max().expand(cube.shape[2])
        return torch.zeros_like(size), torch.where(size > 0, size, 1.0)
    least = cube.masked_fill(~known, torch.inf).amin((0, 1))
    most = cube.masked_fill(~known, -torch.inf).amax((0, 1))
    size = most - least  # below zero where nothing of a band is known
    return least.nan_to_num(posinf=0.0), torch.where(size > 0, size, 1.0)
