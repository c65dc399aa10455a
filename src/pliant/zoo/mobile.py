"""Search spaces of inverted bottlenecks, and the network that they are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from pliant.nn.mobile import MobileNetwork, Space, Stage, chosen, mbconvs
from pliant.nn.operations import SKIP

DEVICE_OPS = (*mbconvs((3, 5, 7), (3, 6)), SKIP)
KEYWORD_OPS = (*mbconvs((3, 5, 7), range(1, 7)), SKIP)

DEVICE = Space(
    inputs=3,
    stem=32,
    kernel=(3, 3),
    stride=(1, 1),
    stages=(
        Stage(16, 1, 1, ("mbconv_k3_e1",)),
        Stage(24, 4, 1, DEVICE_OPS),
        Stage(40, 4, 2, DEVICE_OPS),
        Stage(80, 4, 2, DEVICE_OPS),
        Stage(96, 4, 1, DEVICE_OPS),
        Stage(192, 4, 2, DEVICE_OPS),
        Stage(320, 1, 1, DEVICE_OPS),
    ),
    head=1280,
)
"""21 blocks with six candidates each, and a skip where no shape changes; for 32x32 images."""

DEVICE_LARGE = replace(
    DEVICE,
    stride=(2, 2),
    stages=(DEVICE.stages[0], replace(DEVICE.stages[1], stride=2), *DEVICE.stages[2:]),
)
"""The same for 224x224 images."""

KEYWORDS = Space(
    inputs=1,
    stem=72,
    kernel=(5, 11),
    stride=(1, 2),
    stages=(Stage(72, 12, 2, KEYWORD_OPS),),
    head=144,
    eps=1e-3,
)
"""12 blocks of 72 channels for cepstra of one second, 1x10x51 (Peter, Roth and Pernkopf)."""

_V2 = mbconvs((3,), (6,))
MOBILENET_V2 = replace(
    DEVICE,
    stages=(
        Stage(16, 1, 1, ("mbconv_k3_e1",)),
        Stage(24, 2, 1, _V2),
        Stage(32, 3, 2, _V2),
        Stage(64, 4, 2, _V2),
        Stage(96, 3, 1, _V2),
        Stage(160, 3, 2, _V2),
        Stage(320, 1, 1, _V2),
    ),
)
"""MobileNetV2 for 32x32 images (Sandler et al., CVPR 2018)."""


def supernet(space: Space = DEVICE, *, classes: int = 10) -> MobileNetwork:
    """Make a network to search in, with random weights."""
    return MobileNetwork(space, classes)


def evaluation(space: Space, ops: Sequence[str], *, classes: int = 10) -> MobileNetwork:
    """Make the plain network of an architecture, with random weights.

    Args:
        space: that was searched in.
        ops: what was chosen for every block, in order.
        classes: number of logits.

    Raises:
        ModelError: the architecture is not of this space.
    """
    return MobileNetwork(chosen(space, ops), classes)


def random(space: Space, generator: torch.Generator) -> tuple[str, ...]:
    """Draw an architecture: every candidate of a block is as probable as the others."""
    rows = [ops for *_, ops in space.blocks()]
    return tuple(ops[int(torch.randint(len(ops), (), generator=generator))] for ops in rows)
