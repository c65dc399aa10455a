"""Networks of cells for 32x32 images: to search in, and to train what a search has found.

Source: Liu et al., "DARTS: Differentiable architecture search", ICLR 2019. The evaluation network
has neither its auxiliary head nor its drop path: it is the network as it is deployed. The method
``edarts`` adds both while it trains.
"""

from __future__ import annotations

from collections.abc import Sequence

from pliant.nn.cells import CellNetwork
from pliant.nn.genotype import DARTS_V2_WIRING, Genotype, Layout, Wiring, dense
from pliant.nn.operations import NONE, OPERATIONS

DENSE = dense()
DARTS_OPS = tuple(OPERATIONS)
EDARTS_OPS = tuple(name for name in OPERATIONS if name != NONE)


def supernet(
    wiring: Wiring = DARTS_V2_WIRING,
    ops: Sequence[str] = EDARTS_OPS,
    *,
    cells: int = 5,
    channels: int = 16,
    classes: int = 10,
    inputs: int = 3,
    share: int = 1,
) -> CellNetwork:
    """Make a network whose edges hold all operations at once; as it is, that of eDARTS.

    Args:
        wiring: who reads whom, in both kinds of cells.
        ops: candidates on every edge.
        cells: at least 3.
        channels: of a node in the first cells.
        classes: number of logits.
        inputs: channels of the images.
        share: one of so many channels goes through the candidates, as in PC-DARTS; 4 there. A
            network that was derived keeps the detour: train its genotype anew.

    Raises:
        ModelError: fewer than 3 cells, channels that cannot be divided, or wiring or operations
            that cannot be.
    """
    layout = Layout.of(wiring, ops)
    return CellNetwork(
        *(layout, layout), cells=cells, channels=channels,
        classes=classes, inputs=inputs, affine=False, share=share,
    )  # fmt: skip


def evaluation(
    genotype: Genotype,
    *,
    cells: int = 20,
    channels: int = 36,
    classes: int = 10,
    inputs: int = 3,
) -> CellNetwork:
    """Make the plain network of a genotype, with random weights, to be trained from scratch.

    Args:
        genotype: from a search, or a published one such as ``DARTS_V2``.
        cells: at least 3.
        channels: of a node in the first cells.
        classes: number of logits.
        inputs: channels of the images.

    Raises:
        ModelError: fewer than 3 cells.
    """
    return CellNetwork(
        *genotype.layouts(), cells=cells, channels=channels,
        classes=classes, inputs=inputs, affine=True,
    )  # fmt: skip
