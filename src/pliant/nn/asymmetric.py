"""Dilated kernels in two halves: a column and then a row, and the two modules made of them.

Source: L. Rosas-Arias, G. Benitez-Garcia, J. Portillo-Portillo, G. Sanchez-Perez, K. Yanai,
"Fast and accurate real-time semantic segmentation with dilated asymmetric convolutions", ICPR 2020.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pliant.cost import LayerCost
from pliant.errors import EditError

BETWEEN = ("norm", "nothing")
COUNTER = 8  # bytes of the batch counter of a batch norm


class AsymmetricConv2d(nn.Module):
    """A k x 1 convolution and then a 1 x k one, which see together what one of k x k sees.

    Args:
        layer: the convolution to stand for; it says geometry, channels and bias.
        width: channels between the two.
        between: "norm" puts a batch norm and a rectifier there, as the paper has it; "nothing"
            leaves a linear pair, which is the best of its width for the kernel.

    >>> pair = AsymmetricConv2d(nn.Conv2d(8, 4, 3, padding=2, dilation=2), 4, "nothing")
    >>> [tuple(p.shape) for p in pair.parameters()]
    [(4, 8, 3, 1), (4, 4, 1, 3), (4,)]
    """

    spec: ClassVar[Mapping[str, type]] = {"width": int, "between": str}

    def __init__(self, layer: nn.Conv2d, width: int, between: str) -> None:
        super().__init__()
        column, row = _halves(layer)
        self.column = nn.Conv2d(layer.in_channels, width, bias=False, **column)
        rest = (nn.BatchNorm2d(width), nn.ReLU()) if between == "norm" else ()
        self.between = nn.Sequential(*rest)
        self.row = nn.Conv2d(width, layer.out_channels, bias=layer.bias is not None, **row)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, outputs, H', W')."""
        found: Tensor = self.row(self.between(self.column(x)))
        return found

    @classmethod
    def build(cls, layer: Any, spec: Mapping[str, Any]) -> AsymmetricConv2d:
        """Make it in the place of a convolution; the bias is the same object."""
        check_asymmetric(layer)
        most = min(layer.in_channels * layer.kernel_size[0], layer.out_channels * 1 << 10)
        if spec["between"] not in BETWEEN or not 1 <= spec["width"] <= max(
            most, layer.out_channels
        ):
            raise EditError(
                f"takes between of {', '.join(BETWEEN)} and a width from 1 to "
                f"{max(most, layer.out_channels)}, not {spec['between'][:80]!r}, {spec['width']}."
            )
        new = cls(layer, spec["width"], spec["between"])
        if layer.bias is not None:
            new.row.bias = layer.bias
        return new

    def fill(self, layer: Any) -> None:
        """Begin as the pair nearest to the kernel."""
        weight = layer.weight.detach().double()
        outputs, inputs, high, wide = weight.shape
        matrix = weight.permute(1, 2, 0, 3).reshape(inputs * high, outputs * wide)
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        count = min(self.column.out_channels, len(values))
        root = values[:count].sqrt()
        self.column.weight[:count] = (
            (left[:, :count] * root).T.reshape(count, inputs, high, 1).to(self.column.weight)
        )
        halves = (root[:, None] * right[:count]).reshape(count, outputs, 1, wide)
        self.row.weight[:, :count] = halves.transpose(0, 1).to(self.row.weight)
        self.row.weight[:, count:] = 0

    @classmethod
    def predict(cls, before: LayerCost, spec: Mapping[str, Any]) -> LayerCost:
        """Return the cost of both halves and of the norm between them."""
        outputs, inputs, high, wide = before.weight
        width, normed = spec["width"], spec["between"] == "norm"
        bias = before.params > outputs * inputs * high * wide
        column, row = width * inputs * high, outputs * width * wide
        params = column + row + outputs * bias + 2 * width * normed
        extra = normed * (2 * width * before.itemsize + COUNTER)
        places = before.macs // (outputs * inputs * high * wide)  # of all calls
        wider = places * before.input[2] // before.output[2]  # the column is not strided there
        macs = wider * column + places * row
        return replace(
            before,
            kind=cls.__name__,
            params=params,
            macs=macs,
            bytes=params * before.itemsize + extra,
            weight=(),
        )


def check_asymmetric(layer: Any) -> None:
    """Refuse what is no Conv2d of a k x k kernel without groups, in a sentence after its name."""
    if type(layer) is not nn.Conv2d or layer.groups != 1 or min(layer.kernel_size) < 2:
        raise EditError(
            "must be a Conv2d without groups, of more than one tap in both directions, to become "
            "a column and a row."
        )


def pair_weights(layer: Any, width: int) -> int:
    """Count the weights of the two halves of a convolution."""
    high, wide = layer.kernel_size
    return int(width * (layer.in_channels * high + layer.out_channels * wide))


def _halves(layer: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The geometry of the column and that of the row."""
    found = []
    for axis in (0, 1):
        padding: Any = layer.padding
        if not isinstance(padding, str):
            padding = tuple(padding[axis] if axis == at else 0 for at in (0, 1))
        options = {
            name: tuple(getattr(layer, name)[axis] if axis == at else 1 for at in (0, 1))
            for name in ("kernel_size", "stride", "dilation")
        }
        found.append({**options, "padding": padding, "padding_mode": layer.padding_mode})
    return found[0], found[1]


# ---------------------------------------------------------------- modules for dense prediction


def unit(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """Make a convolution without bias, its batch norm and a rectifier."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


def dilated_pair(inputs: int, outputs: int, dilation: int) -> list[nn.Conv2d]:
    """Make a 3 x 1 and a 1 x 3 convolution of a dilation, which keep maps as large as they are."""
    far = dilation
    return [
        nn.Conv2d(inputs, outputs, (3, 1), padding=(far, 0), dilation=(far, 1), bias=False),
        nn.Conv2d(outputs, outputs, (1, 3), padding=(0, far), dilation=(1, far), bias=False),
    ]


class DAPF(nn.Module):
    """Sees a map at several distances at once: a pointwise branch and dilated asymmetric pairs.

    "Dilated asymmetric pyramidal fusion", for the end of an encoder. A dilation larger than the
    map sees nothing but padding beside its centre: take smaller ones for small maps.

    Args:
        channels: C, in and out.
        alpha: by how much branches are narrower.
        dilations: one for each pair.
    """

    spec: ClassVar[Mapping[str, type]] = {"channels": int, "alpha": int, "dilations": tuple}

    def __init__(
        self, channels: int, alpha: int = 2, dilations: Sequence[int] = (12, 24, 36)
    ) -> None:
        super().__init__()
        inner = channels // alpha
        branches = [unit(channels, inner, 1)]
        for dilation in dilations:
            column, row = dilated_pair(channels, inner, dilation)
            branches.append(
                nn.Sequential(
                    *(column, nn.BatchNorm2d(inner), nn.ReLU(inplace=True)),
                    *(row, nn.BatchNorm2d(inner), nn.ReLU(inplace=True)),
                )
            )
        self.branches = nn.ModuleList(branches)
        self.fuse = unit(inner * len(branches), channels, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape."""
        found: Tensor = self.fuse(torch.cat([branch(x) for branch in self.branches], 1))
        return found

    @classmethod
    def build(cls, layer: Any, spec: Mapping[str, Any]) -> DAPF:
        """Make it, behind a layer of as many channels."""
        far = spec["dilations"]
        good = all(type(d) is int and 1 <= d <= 1 << 12 for d in far) and 1 <= len(far) <= 16
        if not good or not 1 <= spec["alpha"] <= spec["channels"] <= 1 << 16:
            raise EditError(
                "needs channels from 1 on, an alpha up to them and 1 to 16 dilations behind it, "
                f"not {spec['channels']}, {spec['alpha']} and {str(far)[:60]}."
            )
        return cls(spec["channels"], spec["alpha"], far)

    @classmethod
    def predict(cls, before: LayerCost, spec: Mapping[str, Any]) -> LayerCost:
        """Return the cost of the branches and of what fuses them."""
        channels = _matching(before, spec["channels"])
        inner, pairs = channels // spec["alpha"], len(spec["dilations"])
        kernels = inner * channels * (1 + 3 * pairs) + pairs * 3 * inner**2
        kernels += (1 + pairs) * inner * channels
        norms = [inner] * (1 + 2 * pairs) + [channels]
        return _row(cls, before, kernels, 2 * sum(norms), norms)


class PreActivation(nn.Sequential):
    """A batch norm and a rectifier with a slope for each channel."""

    def __init__(self, channels: int) -> None:
        super().__init__(nn.BatchNorm2d(channels, eps=1e-3), nn.PReLU(channels))


class MDA(nn.Module):
    """Refines a map: x plus what a plain and a dilated asymmetric branch see together.

    "Multi-resolution dilated asymmetric" module, for each step of a decoder.

    Args:
        channels: C, in and out; inside there are half as many, rounded down.
        dilation: of the asymmetric branch.
        identity: begin as the identity, with a last convolution of zeros.
    """

    spec: ClassVar[Mapping[str, type]] = {"channels": int, "dilation": int, "identity": bool}

    def __init__(self, channels: int, dilation: int, *, identity: bool = False) -> None:
        super().__init__()
        half = channels // 2
        column, row = dilated_pair(half, half, dilation)
        self.narrow = nn.Sequential(
            PreActivation(channels),
            *(nn.Conv2d(channels, half, 3, padding=1, bias=False), PreActivation(half)),
        )
        self.plain = nn.Sequential(
            nn.Conv2d(half, half, 3, padding=1, bias=False), PreActivation(half)
        )
        self.dilated = nn.Sequential(column, PreActivation(half), row, PreActivation(half))
        last = nn.Conv2d(half, channels, 1, bias=False)
        if identity:
            nn.init.zeros_(last.weight)
        self.widen = nn.Sequential(PreActivation(half), last)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape."""
        inner = self.narrow(x)
        branch: Tensor = self.widen(self.plain(inner) + self.dilated(inner))
        return x + branch

    @classmethod
    def build(cls, layer: Any, spec: Mapping[str, Any]) -> MDA:
        """Make it, behind a layer of as many channels."""
        if not 2 <= spec["channels"] <= 1 << 16 or not 1 <= spec["dilation"] <= 1 << 12:
            raise EditError(
                "needs 2 channels or more and a dilation from 1 on behind it, not "
                f"{spec['channels']} and {spec['dilation']}."
            )
        return cls(spec["channels"], spec["dilation"], identity=spec["identity"])

    @classmethod
    def predict(cls, before: LayerCost, spec: Mapping[str, Any]) -> LayerCost:
        """Return the cost of its five convolutions and six norms."""
        channels = _matching(before, spec["channels"])
        half = channels // 2
        kernels = 10 * channels * half + 15 * half**2
        norms = [channels] + [half] * 5
        return _row(cls, before, kernels, 3 * sum(norms), norms)


class HarDBlock(nn.Module):
    """Densely connected 3 x 3 convolutions in which layer l reads those a power of two before it.

    Source: P. Chao, C.-Y. Kao, Y.-S. Ruan, C.-H. Huang, Y.-L. Lin, "HarDNet", ICCV 2019.

    Args:
        inputs: channels that it reads.
        growth: g, of a layer that reads one other.
        layers: how many.
        factor: m, by which a layer is wider for every further one that it reads.
    """

    def __init__(self, inputs: int, growth: int, layers: int, factor: float = 1.7) -> None:
        super().__init__()
        self.links = [
            [at - (1 << i) for i in range(at.bit_length()) if at % (1 << i) == 0]
            for at in range(1, layers + 1)
        ]
        widths = [inputs]
        for link in self.links:
            widths.append(int(int(growth * factor ** (len(link) - 1) + 1) / 2) * 2)
        self.layers = nn.ModuleList(
            unit(sum(widths[at] for at in link), width, 3)
            for link, width in zip(self.links, widths[1:], strict=True)
        )
        self.given = [at for at in range(1, layers + 1) if at % 2 or at == layers]
        self.outputs = sum(widths[at] for at in self.given)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, outputs, H, W): odd layers and the last, in order."""
        made = [x]
        for layer, link in zip(self.layers, self.links, strict=True):
            read = [made[at] for at in link]
            made.append(layer(torch.cat(read, 1) if len(read) > 1 else read[0]))
        return torch.cat([made[at] for at in self.given], 1)


def _matching(before: LayerCost, channels: int) -> int:
    if len(before.output) != 3 or before.output[0] != channels:
        raise EditError(f"gives {before.output}, where maps of {channels} channels were to come.")
    return channels


def _row(kind: type, before: LayerCost, kernels: int, rest: int, norms: Sequence[int]) -> LayerCost:
    params, places = kernels + rest, before.output[1] * before.output[2]
    statistics = 2 * sum(norms) * before.itemsize + COUNTER * len(norms)
    return replace(
        before,
        kind=kind.__name__,
        params=params,
        macs=kernels * places * before.calls,
        bytes=params * before.itemsize + statistics,
        weight=(),
        input=before.output,
        parts=(),
    )
