"""Linear layers whose weights are sums of outer products.

Source: K. Makantasis, A. Voulodimos, A. Doulamis, N. Doulamis, N. Bakalos, "Space-time domain
tensor neural networks", ICPR 2020.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pliant.cost import LayerCost
from pliant.errors import EditError
from pliant.math import cp


class CPLinear(nn.Module):
    """A linear layer whose rows, as tensors, are sums of a few outer products.

    W_h = sum_r a^1_{h,r} o ... o a^M_{h,r}: H R sum n_m numbers in the place of H prod n_m. It
    contracts one mode after the other, the largest first, and never builds W; that takes more
    multiply-accumulates than one product with W, unless what it reads is an outer product itself
    (`of_outer`).

    Args:
        shape: n_1 ... n_M, the sizes of the modes of what it reads, which comes flat.
        outputs: H.
        rank: R.
        bias: whether a bias is added.

    >>> sum(p.numel() for p in CPLinear((8, 9), 10, rank=2).parameters())  # 720 and 10 otherwise
    350
    """

    spec: ClassVar[Mapping[str, type]] = {"shape": tuple, "rank": int}

    def __init__(
        self, shape: Sequence[int], outputs: int, rank: int = 1, *, bias: bool = True
    ) -> None:
        super().__init__()
        self.shape, self.rank, self.out_features = tuple(shape), rank, outputs
        self.in_features = math.prod(shape)
        for mode, size in enumerate(shape):
            self.register_parameter(f"factor{mode}", nn.Parameter(torch.empty(outputs, rank, size)))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self.reset()

    @property
    def factors(self) -> list[nn.Parameter]:
        """The factors of the modes, each (outputs, rank, size)."""
        return [self.get_parameter(f"factor{mode}") for mode in range(len(self.shape))]

    @torch.no_grad()
    def reset(self) -> None:
        """Draw factors so that W has the spread that Glorot's rule wants of a dense one."""
        variance = 2 / (self.in_features + self.out_features) / self.rank
        most = math.sqrt(3) * variance ** (1 / 2 / len(self.shape))
        for factor in self.factors:
            factor.uniform_(-most, most)

    @property
    def weight(self) -> Tensor:
        """W, (outputs, inputs), multiplied out."""
        return cp.dense(self.factors).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., n_1 n_2 ... n_M) to (..., outputs)."""
        found = self._contracted(x.reshape(-1, *self.shape))
        found = found.unflatten(1, (self.out_features, self.rank)).sum(2)
        found = found if self.bias is None else found + self.bias
        return found.reshape(*x.shape[:-1], self.out_features)

    def _contracted(self, x: Tensor) -> Tensor:
        """Map (N, n_1, ..., n_M) to (N, H R)."""
        order = _order(self.shape)
        x = x.permute(0, *(1 + mode for mode in reversed(order)))
        factors = self.factors
        rows = [factors[mode].flatten(0, 1) for mode in order]  # (H R, n)
        found = x.reshape(-1, x.shape[-1]) @ rows[0].T
        for mode, row in zip(order[1:], rows[1:], strict=True):
            found = found.unflatten(0, (-1, self.shape[mode])).permute(2, 0, 1)
            found = torch.bmm(found, row[:, :, None])[:, :, 0].T
        return found

    def of_outer(self, parts: Sequence[Tensor]) -> Tensor:
        """Return what it gives for the outer product of vectors (N, n_m), without building that."""
        product: Any = 1
        for part, factor in zip(parts, self.factors, strict=True):
            product = product * (part @ factor.flatten(0, 1).T)
        found: Tensor = product.unflatten(1, (self.out_features, self.rank)).sum(2)
        return found if self.bias is None else found + self.bias

    @classmethod
    def from_linear(cls, linear: nn.Linear, shape: Sequence[int], rank: int) -> CPLinear:
        """Make the one that is near to a trained layer: the nearest, where it has two modes.

        Raises:
            EditError: the shape does not hold as many numbers as the layer reads.
        """
        new = cls.build(linear, {"shape": tuple(shape), "rank": rank}).to(linear.weight)
        with torch.no_grad():
            new.fill(linear)
        return new

    @classmethod
    def build(cls, layer: Any, spec: Mapping[str, Any]) -> CPLinear:
        """Make it in the place of a Linear, whose bias it keeps."""
        shape, rank = spec["shape"], spec["rank"]
        good = all(type(size) is int and size >= 1 for size in shape) and len(shape) >= 2
        if type(layer) is not nn.Linear or not good or math.prod(shape) != layer.in_features:
            raise EditError(
                "must be a Linear that reads as many numbers as the modes have, two or more, not "
                f"{str(shape)[:60]}."
            )
        if not 1 <= rank <= layer.in_features or len(shape) > 8:
            raise EditError(f"takes a rank of 1 to {layer.in_features}, not {rank}.")
        new = cls(shape, layer.out_features, rank, bias=layer.bias is not None)
        if layer.bias is not None:
            new.bias = layer.bias
        return new

    def fill(self, layer: Any) -> None:
        """Begin near to the layer."""
        rows = layer.weight.detach().reshape(-1, *self.shape)
        for factor, found in zip(self.factors, cp.fit(rows, self.rank), strict=True):
            factor.copy_(found)

    @classmethod
    def predict(cls, before: LayerCost, spec: Mapping[str, Any]) -> LayerCost:
        """Return the cost of the factors and of contracting them."""
        outputs, inputs = before.weight
        wide, shape = outputs * spec["rank"], spec["shape"]
        places = before.macs // (outputs * inputs)
        bias = before.params - outputs * inputs
        params = wide * sum(shape) + bias
        left, each = inputs, 0
        for mode in _order(shape):
            each += wide * left
            left //= shape[mode]
        return replace(
            before,
            kind=cls.__name__,
            params=params,
            macs=places * each,
            bytes=params * before.itemsize,
            weight=(outputs, inputs),
        )

    def extra_repr(self) -> str:
        """Return the settings."""
        return f"{self.shape}, {self.out_features}, rank={self.rank}, bias={self.bias is not None}"


class MultipliedOut:
    """A layer of factors becomes the Linear that it stands for."""

    spec: ClassVar[Mapping[str, type]] = {"bias": bool}

    @classmethod
    def build(cls, layer: Any, spec: Mapping[str, Any]) -> nn.Linear:
        """Make it; the bias is the same object."""
        if not isinstance(layer, CPLinear) or spec["bias"] != (layer.bias is not None):
            raise EditError("must be a CPLinear, with a bias or without, to be multiplied out.")
        new = nn.Linear(layer.in_features, layer.out_features, bias=False)
        new.register_parameter("bias", layer.bias)
        with torch.no_grad():  # where a file is read, its values replace these
            new.weight.copy_(layer.weight)
        return new

    @classmethod
    def predict(cls, before: LayerCost, spec: Mapping[str, Any]) -> LayerCost:
        """Return the cost of the dense weight."""
        outputs, inputs = before.weight
        params = outputs * (inputs + spec["bias"])
        return replace(
            before,
            kind="Linear",
            params=params,
            macs=math.prod(before.output) * inputs * before.calls,
            bytes=params * before.itemsize,
        )


def _order(shape: Sequence[int]) -> list[int]:
    """Return the modes, the largest first: so the least is left after each."""
    return sorted(range(len(shape)), key=lambda mode: -shape[mode])
