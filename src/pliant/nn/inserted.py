"""What can be put between the layers of a network: layers that begin as nothing, and copies."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pliant.cost import LayerCost
from pliant.errors import EditError
from pliant.nn.filters import WEIGHTED
from pliant.nn.layers import drop_hooks

_CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_GEOMETRY: Mapping[str, type] = {"channels": int, "kernel": int, "dims": int, "identity": bool}

STARTS = ("same", "fresh", "zero")


class Conv:
    """A convolution of as many channels as come, which leaves maps as large as they are."""

    spec: ClassVar[Mapping[str, type]] = _GEOMETRY

    @classmethod
    def build(cls, layer: Any, spec: Mapping[str, Any]) -> nn.Module:
        """Make it; as an identity, each filter begins by giving back its own channel."""
        new = _conv(spec, bias=True)
        if spec["identity"]:
            nn.init.dirac_(new.weight)
            nn.init.zeros_(new.bias)
        return new

    @classmethod
    def predict(cls, before: LayerCost, spec: Mapping[str, Any]) -> LayerCost:
        """A kernel at every position, and a bias."""
        kernel = _kernel(before, spec)
        return _counted("Conv", before, kernel + spec["channels"], kernel)


class Linear:
    """A linear layer of as many features as come."""

    spec: ClassVar[Mapping[str, type]] = {"features": int, "identity": bool}

    @classmethod
    def build(cls, layer: Any, spec: Mapping[str, Any]) -> nn.Module:
        """Make it; as an identity, it begins by giving back what comes."""
        if spec["features"] < 1:
            raise EditError(f"needs features from 1 on, not {spec['features']}.")
        new = nn.Linear(spec["features"], spec["features"])
        if spec["identity"]:
            new.weight.detach().zero_().fill_diagonal_(1)
            nn.init.zeros_(new.bias)
        return new

    @classmethod
    def predict(cls, before: LayerCost, spec: Mapping[str, Any]) -> LayerCost:
        """A weight for each pair of features at every position, and a bias."""
        features = spec["features"]
        if before.output[-1:] != (features,):
            raise EditError(f"gives {before.output}, where {features} features were said to come.")
        row = _counted("Linear", before, features * features + features, features * features)
        return replace(row, macs=features * math.prod(before.output) * before.calls)


class Residual(nn.Module):
    """x plus a branch of two convolutions with batch norms and a rectifier between them.

    There is no rectifier behind the sum: where the branch gives nothing, x passes as it is.

    Source: He et al., "Deep residual learning for image recognition", CVPR 2016.
    """

    spec: ClassVar[Mapping[str, type]] = _GEOMETRY

    def __init__(self, spec: Mapping[str, Any]) -> None:
        super().__init__()
        norm = _NORMS[spec["dims"]]
        self.conv1, self.norm1 = _conv(spec, bias=False), norm(spec["channels"])
        self.conv2, self.norm2 = _conv(spec, bias=False), norm(spec["channels"])
        if spec["identity"]:
            nn.init.zeros_(self.norm2.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, channels, ...) to the same shape."""
        branch: Tensor = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        return x + branch

    @classmethod
    def build(cls, layer: Any, spec: Mapping[str, Any]) -> Residual:
        """Make it; as an identity, its last batch norm begins with scales of zero."""
        _conv(spec, bias=False)
        return cls(spec)

    @classmethod
    def predict(cls, before: LayerCost, spec: Mapping[str, Any]) -> LayerCost:
        """Two kernels at every position, and two batch norms with their statistics."""
        kernel, channels = _kernel(before, spec), spec["channels"]
        row = _counted("Residual", before, 2 * kernel + 4 * channels, 2 * kernel)
        statistics = 4 * channels * before.itemsize + 2 * 8  # and two counters of batches
        return replace(row, bytes=row.bytes + statistics)


class Copy:
    """The neighbour once more: a block of the network's own class.

    ``start`` says how it begins: ``same``, with the weights of the neighbour; ``fresh``, with
    those that its layers draw; ``zero``, as the same but for its last batch norm (its last
    convolution or Linear, if it has none), which gives nothing: a residual block passes its input
    then, if its branch ends there.
    """

    spec: ClassVar[Mapping[str, type]] = {"start": str}

    @classmethod
    def build(cls, layer: Any, spec: Mapping[str, Any]) -> nn.Module:
        """Copy it."""
        if spec["start"] not in STARTS:
            raise EditError(f"is copied as {', '.join(STARTS)}, not as {spec['start']!r}.")
        new: nn.Module = copy.deepcopy(layer)
        drop_hooks(new)
        if spec["start"] == "fresh":
            for module in new.modules():
                if callable(reset := getattr(module, "reset_parameters", None)):
                    reset()
        if spec["start"] == "zero":
            _silence(new)
        return new

    @classmethod
    def predict(cls, before: LayerCost, spec: Mapping[str, Any]) -> LayerCost:
        """As much as the neighbour."""
        if before.input != before.output:
            raise EditError(
                f"makes {before.output} of {before.input}, so a copy of it cannot read what it "
                "gives: copy a block that keeps shapes."
            )
        return before


def _silence(block: nn.Module) -> None:
    owners = [m for m in block.modules() if getattr(m, "weight", None) is not None]
    norms: list[Any] = [m for m in owners if isinstance(m, _BatchNorm)]
    ends = norms or [m for m in owners if isinstance(m, WEIGHTED)]
    if not ends:
        raise EditError("has neither batch norm nor convolution nor Linear that could give zeros.")
    for tensor in (ends[-1].weight, ends[-1].bias):
        if isinstance(tensor, Tensor):
            tensor.detach().zero_()


def _conv(spec: Mapping[str, Any], *, bias: bool) -> Any:
    channels, kernel, dims = spec["channels"], spec["kernel"], spec["dims"]
    if channels < 1 or kernel < 1 or kernel % 2 == 0 or dims not in _CONVS:
        raise EditError(
            "needs channels from 1 on, an odd kernel and 1 to 3 dims behind it, not "
            f"{channels}, {kernel} and {dims}."
        )
    return _CONVS[dims](channels, channels, kernel, padding=kernel // 2, bias=bias)


def _kernel(before: LayerCost, spec: Mapping[str, Any]) -> int:
    """Count the weights of a kernel, after comparing it with what comes."""
    channels, dims = spec["channels"], spec["dims"]
    if before.output[:1] != (channels,) or len(before.output) != dims + 1:
        raise EditError(
            f"gives {before.output}, where {channels} channels with {dims} dims were said to come."
        )
    return int(channels * channels * spec["kernel"] ** dims)


def _counted(kind: str, before: LayerCost, params: int, weights: int) -> LayerCost:
    """The cost of weights that are applied at every position of a map."""
    return replace(
        before,
        kind=kind,
        params=params,
        macs=weights * math.prod(before.output[1:]) * before.calls,
        bytes=params * before.itemsize,
        weight=(),
        input=before.output,
        parts=(),
    )
