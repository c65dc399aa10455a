"""MaxDropout: a layer that sets the largest activations to zero while a network trains."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

Mode = Literal["minmax", "l2-random"]
Scope = Literal["tensor", "sample", "channel"]


def largest(x: Tensor, drop: float, mode: str = "minmax", scope: str = "tensor") -> Tensor:
    """Say which activations are the largest: those that a drop rate sets to zero.

    Args:
        x: activations (N, C, ...), signed or not.
        drop: in 0..1; it is a share of the range, not of the units.
        mode: "minmax" takes what lies above 1 - drop of the range from the smallest number to the
            largest; "l2-random" what lies above 1 - drop of the largest, whatever the smallest.
        scope: over what the smallest and the largest are taken: the whole tensor, each sample, or
            each channel.

    Returns:
        A boolean tensor like ``x``; all False where all numbers are equal. No gradient.
    """
    wide = x.detach().float() if x.dtype in (torch.float16, torch.bfloat16) else x.detach()
    axes: list[int] = []
    for axis in range(x.dim()):  # TorchScript knows no filters in comprehensions
        if not (scope == "sample" and axis == 0) and not (scope == "channel" and axis == 1):
            axes.append(axis)
    top = wide.amax(axes, keepdim=True)
    if mode != "minmax":
        return wide > (1 - drop) * top
    low = wide.amin(axes, keepdim=True)
    return (wide - low) / (top - low).clamp_min(1e-37) > 1 - drop


class MaxDropout(nn.Module):
    """Sets the most active units to zero while training, without scaling those that stay.

    Stands where a dropout would, behind a rectifier: of signed activations it takes the large
    ones only. The share of units it drops depends on their distribution: of half-normal ones some
    4e-4 at drop=0.3. It has no parameters, and in evaluation it does nothing.

    Source: C. F. G. dos Santos, D. Colombo, M. Roder, J. P. Papa, ICPR 2020.

    Args:
        drop: r, the share of the range of activations that is cut off at its top; in 0..1.
        mode: "l2-random" draws the rate of each call from 0..drop.
        scope: see `largest`; "tensor" is the paper's.
        apply_in_eval: drop in evaluation too, as the released code does.

    Raises:
        ValueError: drop is not in 0..1, or mode or scope has another name.

    >>> layer = MaxDropout(0.5)
    >>> layer(torch.tensor([[0.0, 1.0, 2.0, 4.0]]))
    tensor([[0., 1., 2., 0.]])
    >>> layer.last_drop_fraction
    0.25
    """

    def __init__(
        self,
        drop: float = 0.3,
        mode: Mode = "minmax",
        scope: Scope = "tensor",
        *,
        apply_in_eval: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= drop <= 1:
            raise ValueError(f"drop must be in 0..1, not {drop}.")
        if mode not in ("minmax", "l2-random") or scope not in ("tensor", "sample", "channel"):
            raise ValueError(f"Unknown mode or scope: {mode!r}, {scope!r}.")
        self.drop, self.mode, self.scope = float(drop), str(mode), str(scope)
        self.apply_in_eval = apply_in_eval
        self.dropped: Tensor = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, ...) to the same shape."""
        if not self.training and not self.apply_in_eval:
            return x
        drop = self.drop
        if self.mode == "l2-random":
            drop = drop * float(torch.rand(()))
        mask = largest(x, drop, self.mode, self.scope)
        self.dropped = mask.float().mean()
        return x.masked_fill(mask, 0.0)

    @property
    def last_drop_fraction(self) -> float:
        """The share of the units that the last call has dropped."""
        return float(self.dropped)

    def extra_repr(self) -> str:
        """Return the settings."""
        return f"{self.drop}, {self.mode}, {self.scope}"
