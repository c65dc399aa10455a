"""Skip connections that every input weighs for itself, between all blocks of a row.

Source: K. Park, J. W. Soh, N. I. Cho, "Single image super-resolution with dynamic residual
connection", ICPR 2020.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.cost import LayerCost
from pliant.errors import EditError

MOST = 64  # blocks of one trunk, in a file of anybody's


def pairs(blocks: int) -> int:
    """Count the pairs of a block and a feature before it: M (M + 1) / 2."""
    return blocks * (blocks + 1) // 2


def place(block: int, feature: int) -> int:
    """Return where the coefficient of a block and of a feature before it stands, both from 0.

    >>> [place(block, feature) for block in range(3) for feature in range(block + 1)]
    [0, 1, 2, 3, 4, 5]
    """
    return block * (block + 1) // 2 + feature


class ResidualCoefficients(nn.Module):
    """Reads a map and gives one unbounded coefficient for each pair of blocks.

    Three convolutions, with maxima over 2 x 2 pixels between them where a map has as many, and
    the mean over all pixels.

    Args:
        inputs: channels of the map.
        blocks: M.
        zero: begin with coefficients of 0.

    >>> sum(p.numel() for p in ResidualCoefficients(3, 16).parameters())
    105298
    """

    def __init__(self, inputs: int, blocks: int, *, zero: bool = False) -> None:
        super().__init__()
        widths = _widths(blocks)
        self.convs = nn.ModuleList(
            nn.Conv2d(one, two, 3, padding=1) for one, two in pairwise((inputs, *widths))
        )
        self.slopes = nn.ModuleList(nn.PReLU(width, init=0.0) for width in widths[:-1])
        if zero:
            for parameter in self.convs[-1].parameters():
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, M (M + 1) / 2)."""
        for conv, slope in zip(self.convs, self.slopes, strict=False):
            x = conv(x)
            x = slope(F.max_pool2d(x, 2) if min(x.shape[2:]) > 1 else x)
        return torch.mean(self.convs[-1](x), (2, 3))


class Weighed(nn.Module):
    """Sums features (N, ...), each times its column of the weights (N, features)."""

    def forward(self, features: Sequence[Tensor], weights: Tensor) -> Tensor:
        """Add them one by one, so that no copy of all is held."""
        shape = (-1, *[1] * (features[0].dim() - 1))
        columns = [column.view(shape) for column in weights.unbind(1)]
        total = features[0] * columns[0]
        for feature, column in zip(features[1:], columns[1:], strict=True):
            total = total + feature * column
        return total

    @property
    def numbers(self) -> int:
        """How many parameters it stands for: none."""
        return 0

    def macs(self, inputs: list[Tensor], outputs: list[Tensor]) -> int:
        """Count a product for each number of each feature."""
        return outputs[0].numel() * inputs[-1].shape[1]


class DynamicResidualTrunk(nn.Module):
    """Runs blocks of which each adds all features before it, weighed by coefficients.

    f_{i+1} = F_i(f_i) + sum_{j <= i} a_k f_j, with k = i (i + 1) / 2 + j and f_0 the input. Whoever
    cuts a large image into tiles computes the coefficients once of all of it, and calls `mixed`.

    Args:
        blocks: F_i, which keep the shape of what they read.
        coefficients: gives a, (N, M (M + 1) / 2).
    """

    def __init__(self, blocks: Iterable[nn.Module], coefficients: nn.Module) -> None:
        super().__init__()
        self.blocks, self.coefficients = nn.ModuleList(blocks), coefficients
        self.mix = Weighed()

    def forward(self, x: Tensor, source: Tensor | None = None) -> Tensor:
        """Map features to the same shape; what coefficients are computed of is the source, or x."""
        return self.mixed(x, self.coefficients(x if source is None else source))

    def mixed(self, x: Tensor, weights: Tensor) -> Tensor:
        """Run the blocks with given coefficients, (N, M (M + 1) / 2)."""
        found = [x]
        for number, block in enumerate(self.blocks):
            own = weights[:, place(number, 0) : place(number + 1, 0)]
            found.append(block(found[-1]) + self.mix(found, own))
        return found[-1]


class FixedResidualTrunk(nn.Module):
    """The same with coefficients that no longer depend on the input, and only some of them.

    Args:
        blocks: F_i.
        kept: places of the coefficients that there are, in rising order.
        weights: the coefficients.
    """

    def __init__(
        self, blocks: Iterable[nn.Module], kept: Sequence[int], weights: Sequence[float]
    ) -> None:
        super().__init__()
        self.blocks, self.kept = nn.ModuleList(blocks), tuple(kept)
        self.weights = nn.Parameter(torch.tensor(weights, dtype=torch.float32))
        known = {at: number for number, at in enumerate(self.kept)}
        self.mix = Weighed()
        self.wiring = [
            [(f, known[at]) for f in range(block + 1) if (at := place(block, f)) in known]
            for block in range(len(self.blocks))
        ]

    def forward(self, x: Tensor) -> Tensor:
        """Map features to the same shape."""
        found = [x]
        for block, wires in zip(self.blocks, self.wiring, strict=True):
            x = block(found[-1])
            if wires:
                own = self.weights[wires[0][1] : wires[-1][1] + 1]
                x = x + self.mix([found[f] for f, _ in wires], own.expand(x.shape[0], -1))
            found.append(x)
        return found[-1]


# ---------------------------------------------------------------- what edits put in


class DynamicRow:
    """Rows of blocks that keep shapes get dynamic skip connections; others pass as they are.

    ``channels`` says for every child of the row how many channels it keeps, 0 where it joins no
    trunk. Coefficients begin as 0: nothing is changed at first, and blocks keep what they have.
    """

    spec: ClassVar[Mapping[str, type]] = {"channels": tuple}

    @classmethod
    def build(cls, layer: Any, spec: Mapping[str, Any]) -> nn.Sequential:
        """Make trunks of the blocks."""
        channels = spec["channels"]
        whole = all(type(c) is int and 0 <= c <= 1 << 16 for c in channels) and any(channels)
        if type(layer) is not nn.Sequential or len(layer) != len(channels) or not whole:
            raise EditError(
                "must be an nn.Sequential, with a number of channels for each child that keeps "
                f"its shape and 0 for others, not {str(channels)[:60]}."
            )
        if max(len(run) for run in _runs(channels)) > MOST:
            raise EditError(f"has more than {MOST} blocks in a row: exclude it.")
        parts = [*layer.children()]
        return nn.Sequential(
            *(
                DynamicResidualTrunk(
                    [parts[at] for at in run],
                    ResidualCoefficients(channels[run[0]], len(run), zero=True),
                )
                if channels[run[0]]
                else parts[run[0]]
                for run in _runs(channels)
            )
        )

    @classmethod
    def predict(cls, before: LayerCost, spec: Mapping[str, Any]) -> LayerCost:
        """Add what coefficients and weighed sums cost."""
        params, macs = before.params, before.macs
        for run in _runs(spec["channels"]):
            if spec["channels"][run[0]]:
                more = _added(before.parts[run[0]][1], len(run))
                params, macs = params + more[0], macs + more[1] * before.calls
        extra = (params - before.params) * before.itemsize
        return replace(before, params=params, macs=macs, bytes=before.bytes + extra, parts=())


class FixedTrunk:
    """A trunk keeps the coefficients that are named, whatever it reads."""

    spec: ClassVar[Mapping[str, type]] = {"kept": tuple, "weights": tuple}

    @classmethod
    def build(cls, layer: Any, spec: Mapping[str, Any]) -> FixedResidualTrunk:
        """Make it of the same blocks."""
        if not isinstance(layer, DynamicResidualTrunk):
            raise EditError("must be a trunk with dynamic skip connections to be fixed.")
        kept, weights = spec["kept"], spec["weights"]
        most = pairs(len(layer.blocks))
        good = all(type(at) is int and 0 <= at < most for at in kept)
        good = good and list(kept) == sorted({*kept}) and len(kept) == len(weights)
        if not good or not all(isinstance(w, float | int) for w in weights):
            raise EditError(
                f"takes rising places below {most}, and as many coefficients, not "
                f"{str(kept)[:60]} and {str(weights)[:60]}."
            )
        return FixedResidualTrunk(layer.blocks, kept, weights)

    @classmethod
    def predict(cls, before: LayerCost, spec: Mapping[str, Any]) -> LayerCost:
        """Take off what coefficients cost, and the sums that are no more."""
        parts, count = dict(before.parts), len(spec["kept"])
        gone, blocks = parts["coefficients"], len(parts["blocks"].parts)
        size = before.output[0] * before.output[1] * before.output[2]
        return replace(
            before,
            kind=FixedResidualTrunk.__name__,
            params=before.params - gone.params + count,
            macs=before.macs - gone.macs + (count - pairs(blocks)) * size * before.calls,
            bytes=before.bytes - gone.bytes + count * before.itemsize,
            parts=(),
        )


def _widths(blocks: int) -> tuple[int, int, int]:
    count = pairs(blocks)
    return max(1, count // 4), max(1, count // 2), count


def _runs(channels: Sequence[int]) -> list[list[int]]:
    """Divide a row: neighbours of as many channels that join, and each of the others alone."""
    found: list[list[int]] = []
    for at, count in enumerate(channels):
        if count and found and channels[found[-1][-1]] == count:
            found[-1].append(at)
        else:
            found.append([at])
    return found


def _added(first: LayerCost, blocks: int) -> tuple[int, int]:
    """Numbers and products of the coefficients and sums of a trunk, from its first block."""
    channels, high, wide = first.input
    widths = _widths(blocks)
    params, macs = widths[0] + widths[1], pairs(blocks) * channels * high * wide
    for one, two in pairwise((channels, *widths)):
        params += 9 * one * two + two
        macs += 9 * one * two * high * wide
        if min(high, wide) > 1:
            high, wide = high // 2, wide // 2
    return params, macs
