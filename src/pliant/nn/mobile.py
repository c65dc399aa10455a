"""Networks of inverted bottlenecks, from a search space that is plain data.

A space says for every stage which candidates its blocks have. With one candidate each it is an
ordinary network, with several a network to search in.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pliant.errors import ModelError
from pliant.nn.mixed import MixedOp
from pliant.nn.operations import SKIP

_NAME = re.compile(r"mbconv_k(\d{1,2})_e(\d{1,2})")


def mbconvs(kernels: Sequence[int], expansions: Sequence[int]) -> tuple[str, ...]:
    """Return the names of inverted bottlenecks, for all pairs of kernel and expansion."""
    return tuple(f"mbconv_k{kernel}_e{factor}" for kernel in kernels for factor in expansions)


@dataclass(frozen=True)
class Stage:
    """Blocks at one resolution.

    Args:
        channels: that each gives.
        blocks: how many.
        stride: of the first.
        ops: candidates, ``mbconv_k5_e6`` (kernel 5, expansion 6) or ``skip_connect``, which only
            blocks take that change no shape; one name is a fixed block.
    """

    channels: int
    blocks: int
    stride: int
    ops: tuple[str, ...]


@dataclass(frozen=True)
class Space:
    """A search space as plain data: all that a network is made from.

    Args:
        inputs: channels of the images.
        stem: channels of the first convolution.
        kernel: of the first convolution, height and width, odd.
        stride: of the first convolution.
        stages: one after the other.
        head: channels of the pointwise layer before the mean over places.
        eps: of the batch norms.

    Raises:
        ModelError: a number or a name that cannot be.
    """

    inputs: int
    stem: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    stages: tuple[Stage, ...]
    head: int
    eps: float = 1e-5

    def __post_init__(self) -> None:
        numbers = [self.inputs, self.stem, *self.kernel, *self.stride, self.head]
        numbers += [n for s in self.stages for n in (s.channels, s.blocks, s.stride)]
        if any(type(n) is not int or n < 1 for n in numbers) or not self.stages:
            raise ModelError("A search space has stages, and whole numbers from 1 on in them.")
        if not all(size % 2 for size in self.kernel):
            raise ModelError(f"The kernel of a stem must be odd, not {self.kernel}.")
        for inputs, outputs, stride, ops in self.blocks():
            if not ops:
                raise ModelError(
                    f"A block from {inputs} to {outputs} channels with stride {stride} needs a "
                    f"candidate that is not {SKIP}."
                )
            for name in ops:
                _parsed(name)

    def blocks(self) -> Iterator[tuple[int, int, int, tuple[str, ...]]]:
        """Yield for every block: channels in and out, stride, and candidates that it can have."""
        inputs = self.stem
        for stage in self.stages:
            for number in range(stage.blocks):
                stride = 1 if number else stage.stride
                same = stride == 1 and inputs == stage.channels
                ops = tuple(name for name in stage.ops if same or name != SKIP)
                yield inputs, stage.channels, stride, ops
                inputs = stage.channels

    def scaled(self, width: float) -> Space:
        """Return the space with all channels multiplied, to multiples of 8."""

        def wide(channels: int) -> int:
            return max(8, int(channels * width / 8 + 0.5) * 8)

        stages = tuple(replace(stage, channels=wide(stage.channels)) for stage in self.stages)
        return replace(self, stem=wide(self.stem), stages=stages, head=wide(self.head))

    def plain(self) -> dict[str, Any]:
        """Return lists, numbers and strings, for JSON."""
        return asdict(self)

    @classmethod
    def from_plain(cls, value: Any) -> Space:
        """Read a space from what `plain` returned, also through JSON.

        Raises:
            ModelError: it is something else.
        """
        try:
            stages = tuple(Stage(**{**s, "ops": tuple(s["ops"])}) for s in value["stages"])
            pairs = {name: tuple(value[name]) for name in ("kernel", "stride")}
            return cls(**{**value, **pairs, "stages": stages})
        except (TypeError, KeyError, ValueError) as error:
            raise ModelError(
                f"A search space has the fields of pliant.nn.mobile.Space, not {str(value)[:80]}."
            ) from error


class MBConv(nn.Module):
    """An inverted bottleneck: widen, filter every channel, narrow; plus its input where it fits.

    Source: Sandler et al., "MobileNetV2: inverted residuals and linear bottlenecks", CVPR 2018.

    Args:
        inputs: channels in.
        outputs: channels out.
        kernel: side of the filters.
        expansion: by how much it is wider inside; with 1 there is no first layer.
        stride: of the filters.
        eps: of the batch norms.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int, expansion: int, stride: int, eps: float
    ) -> None:
        super().__init__()
        wide = expansion * inputs
        first = _unit(inputs, wide, (1, 1), eps=eps) if expansion > 1 else []
        self.layers = nn.Sequential(
            *first,
            *_unit(wide, wide, (kernel, kernel), (stride, stride), groups=wide, eps=eps),
            *_unit(wide, outputs, (1, 1), eps=eps)[:2],
        )
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, outputs, H / stride, W / stride), rounded up."""
        out: Tensor = self.layers(x)
        return x + out if self.adds else out


def _unit(
    inputs: int,
    outputs: int,
    kernel: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    *,
    groups: int = 1,
    eps: float,
) -> list[nn.Module]:
    reach = (kernel[0] // 2, kernel[1] // 2)
    conv = nn.Conv2d(inputs, outputs, kernel, stride, reach, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs, eps=eps), nn.ReLU6()]


def is_block(name: str) -> bool:
    """Say whether a name is that of an inverted bottleneck."""
    return _NAME.fullmatch(name) is not None


def block(name: str, inputs: int, outputs: int, stride: int, eps: float = 1e-5) -> nn.Module:
    """Make a block by its name.

    Raises:
        ModelError: there is none of this name.
    """
    kernel, expansion = _parsed(name)
    return MBConv(inputs, outputs, kernel, expansion, stride, eps) if kernel else nn.Identity()


def _parsed(name: str) -> tuple[int, int]:
    if name == SKIP:
        return 0, 0
    found = _NAME.fullmatch(name)
    kernel, expansion = (int(part) for part in found.groups()) if found else (0, 0)
    if not kernel % 2 or not expansion:
        raise ModelError(
            f"A block is {SKIP} or such as mbconv_k3_e6, with an odd kernel, not {name!r}."
        )
    return kernel, expansion


class MobileNetwork(nn.Module):
    """Classifies images by inverted bottlenecks; blocks with several candidates are mixed.

    Args:
        space: see `Space`.
        classes: number of logits.
    """

    def __init__(self, space: Space, classes: int = 10) -> None:
        super().__init__()
        self.space = space
        stem = space.inputs, space.stem, space.kernel, space.stride
        self.stem = nn.Sequential(*_unit(*stem, eps=space.eps))
        self.blocks = nn.Sequential(*(_mixed(*row, space.eps) for row in space.blocks()))
        last = space.stages[-1].channels
        self.head = nn.Sequential(*_unit(last, space.head, (1, 1), eps=space.eps))
        self.classify = nn.Linear(space.head, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, inputs, H, W) to class scores (N, classes)."""
        features = self.head(self.blocks(self.stem(x)))
        out: Tensor = self.classify(torch.mean(features, (2, 3)))
        return out


def _mixed(inputs: int, outputs: int, stride: int, ops: tuple[str, ...], eps: float) -> nn.Module:
    made = {name: block(name, inputs, outputs, stride, eps) for name in ops}
    return MixedOp(made) if len(made) > 1 else made[ops[0]]


def chosen(space: Space, ops: Sequence[str]) -> Space:
    """Return the space of a single network: one candidate for every block, in order.

    Args:
        space: that was searched in.
        ops: a name for every block.

    Raises:
        ModelError: there are other numbers of blocks, or one cannot have its candidate.
    """
    rows = list(space.blocks())
    if len(ops) != len(rows) or any(op not in row[3] for op, row in zip(ops, rows, strict=False)):
        raise ModelError(f"A network of {len(rows)} blocks needs one of its candidates for each.")
    stages = tuple(
        Stage(outputs, 1, stride, (op,))
        for op, (_, outputs, stride, _) in zip(ops, rows, strict=True)
    )
    return replace(space, stages=stages)
