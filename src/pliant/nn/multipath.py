"""Residual blocks of parallel paths, each with a gate that looks at the input.

Source: Y. Su, Y. Wu, K. Chen, D. Liang, X. Hu, "Dynamic multi-path neural network", ICPR 2020.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.cost import LayerCost
from pliant.errors import EditError
from pliant.nn.paths import COUNTER, check_divisible, divided, fill_paths, reads

OPEN = 0.85  # probability with which gates begin open
EDGE = 1e-6  # of the uniform numbers under the logarithms of Gumbel noise


def straight_through(logits: Tensor, temperature: float) -> Tensor:
    """Draw gates, 0 or 1, with the gradient of their probability.

    Args:
        logits: (..., 2), closed and open; Gumbel noise is added to them in float32.
        temperature: of the softmax that gradients go through.

    Returns:
        (...), 1 where the gate is open.
    """
    drawn = torch.rand_like(logits, dtype=torch.float32).clamp(EDGE, 1 - EDGE)
    noisy = logits.float() - (-drawn.log()).log()
    soft = (noisy / temperature).softmax(-1)[..., 1]
    return (soft > 0.5).to(soft) - soft.detach() + soft


class Gates(nn.Module):
    """Opens and closes paths by a state: drawn in training, the more probable in evaluation.

    Args:
        width: d, of the state.
        paths: N.
    """

    forced: Tensor

    def __init__(self, width: int, paths: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.01 * torch.randn(2 * paths, width))
        half = math.log(OPEN / (1 - OPEN)) / 2
        self.bias = nn.Parameter(torch.tensor([-half, half]).repeat(paths))
        self.register_buffer("forced", torch.zeros(()))  # 1: all gates are open
        self.temperature = 1.0

    def forward(self, state: Tensor) -> Tensor:
        """Map (N, d) to gates (N, paths)."""
        logits = F.linear(state, self.weight, self.bias).unflatten(1, (-1, 2))
        if self.training:
            gates = straight_through(logits, self.temperature)
        else:
            gates = (logits[..., 1] > logits[..., 0]).to(logits)
        return torch.maximum(gates, self.forced.to(gates))


class Controller(nn.Module):
    """Decides for every sample which paths of a block run, from its features and what was before.

    Args:
        channels: of the features.
        paths: N.
        width: d, of the state.
    """

    def __init__(self, channels: int, paths: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Linear(channels, width, bias=False)
        self.norm = nn.LayerNorm(width)
        self.gate = Gates(width, paths)

    def forward(self, x: Tensor, state: Tensor, cell: StateCell) -> tuple[Tensor, Tensor]:
        """Map features (N, C, H, W) and a state (N, d) to gates (N, paths) and the next state."""
        state = cell(self.norm(self.embed(x.mean((2, 3)))).relu(), state)
        return self.gate(state), state


class StateCell(nn.Module):
    """tanh(W_x e + W_h h + b): what the controllers of one stage share.

    Args:
        width: d.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.read, self.keep = nn.Linear(width, width), nn.Linear(width, width, bias=False)

    def forward(self, seen: Tensor, state: Tensor) -> Tensor:
        """Map (N, d) and (N, d) to (N, d)."""
        found: Tensor = (self.read(seen) + self.keep(state)).tanh()
        return found


class MultiPathBlock(nn.Module):
    """y = P(x) + sum_n g_n F_n(x), and what follows the sum.

    Args:
        paths: F_n.
        shortcut: P, which always runs.
        after: what follows, such as a rectifier.
    """

    def __init__(
        self, paths: Iterable[nn.Module], shortcut: nn.Module, after: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.paths, self.shortcut = nn.ModuleList(paths), shortcut
        self.after = nn.Identity() if after is None else after

    def forward(self, x: Tensor, gates: Tensor) -> Tensor:
        """Run all paths, and multiply by the gates (N, paths)."""
        total = self.shortcut(x)
        for path, gate in zip(self.paths, gates.unbind(1), strict=True):
            total = total + path(x) * gate[:, None, None, None].to(x.dtype)
        found: Tensor = self.after(total)
        return found

    def sparse(self, x: Tensor, gates: Tensor) -> Tensor:
        """Run each path for those samples alone whose gate is open: the same, in evaluation."""
        total = self.shortcut(x)
        total = total.clone() if total is x else total
        for path, gate in zip(self.paths, gates.unbind(1), strict=True):
            rows = gate.nonzero()[:, 0]
            if len(rows):
                total.index_add_(0, rows, path(x[rows]).to(total.dtype))
        found: Tensor = self.after(total)
        return found


class MultiPathStage(nn.Module):
    """A row of blocks whose controllers pass a state on; others run as they are.

    ``sparse`` is how it runs in evaluation: all paths, with gates as factors, which can be
    exported; or only those that are open, which costs as much as the input asks for.

    Args:
        parts: blocks with paths, and others.
        controllers: one for each block with paths, in order.
        cell: which they share.
        heads: guesses of the category from the state behind each block, while it trains.
    """

    def __init__(
        self,
        parts: Iterable[nn.Module],
        controllers: Iterable[Controller],
        cell: StateCell,
        heads: Iterable[nn.Module] = (),
    ) -> None:
        super().__init__()
        self.parts, self.controllers = nn.ModuleList(parts), nn.ModuleList(controllers)
        self.cell, self.heads = cell, nn.ModuleList(heads)
        self.sparse = False

    def fill(self, layer: Any) -> None:
        """Divide the weights of the blocks of a row."""
        for part, own in zip(layer.children(), self.parts, strict=False):
            if isinstance(own, MultiPathBlock) and not isinstance(layer, MultiPathStage):
                fill_paths(part, list(own.paths))

    def forward(self, x: Tensor) -> Tensor:
        """Map features to features, as the row did."""
        return self.routed(x)[0]

    def routed(self, x: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Return features, the gates of every block (N, paths), and the states (N, d)."""
        state = x.new_zeros(x.shape[0], self.cell.read.in_features)
        gates: list[Tensor] = []
        states: list[Tensor] = []
        for part in self.parts:
            if not isinstance(part, MultiPathBlock):
                x = part(x)
                continue
            open_, state = self.controllers[len(gates)](x, state, self.cell)
            alone = self.sparse and not self.training and not torch.compiler.is_exporting()
            x = part.sparse(x, open_) if alone else part(x, open_)
            gates.append(open_)
            states.append(state)
        return x, gates, states


# ---------------------------------------------------------------- what edits put in


class MultiPath:
    """A row of residual blocks gets paths, controllers, and heads for categories if there are any.

    ``blocks`` says for every child of the row how many batch norms its hidden channels have (see
    `pliant.nn.paths.hidden_norms`), 0 where it stays as it is. All gates begin open, and paths
    divide what a block has: in evaluation it begins as it was.
    """

    spec: ClassVar[Mapping[str, type]] = {
        "blocks": tuple,
        "paths": int,
        "width": int,
        "classes": int,
    }

    @classmethod
    def build(cls, layer: Any, spec: Mapping[str, Any]) -> MultiPathStage:
        """Make the stage from the shapes of the blocks."""
        chosen, paths, width = spec["blocks"], spec["paths"], spec["width"]
        small = 1 <= paths <= 64 and 1 <= width <= 1 << 12 and 0 <= spec["classes"] <= 1 << 16
        if type(layer) is not nn.Sequential or len(layer) != len(chosen) or not any(chosen):
            raise EditError("must be an nn.Sequential with residual blocks, one word for each.")
        if not small:
            raise EditError("takes 1 to 64 paths, a width from 1 on and classes from 0 on.")
        parts: list[nn.Module] = []
        controllers = []
        for part, norms in zip(layer.children(), chosen, strict=True):
            if not norms:
                parts.append(part)
                continue
            check_divisible(part, paths, norms)
            branches, shortcut, after = divided(part, paths)
            parts.append(MultiPathBlock(branches, shortcut, after))
            controllers.append(Controller(reads(part), paths, width))
        count = len(controllers) if spec["classes"] else 0
        heads = [nn.Linear(width, spec["classes"]) for _ in range(count)]
        return MultiPathStage(parts, controllers, StateCell(width), heads)

    @classmethod
    def predict(cls, before: LayerCost, spec: Mapping[str, Any]) -> LayerCost:
        """Add controllers, and the batch norms that every path has for itself."""
        paths, width, item = spec["paths"], spec["width"], before.itemsize
        params, macs, extra = 2 * width**2 + width, 0, 0
        for norms, (_, part) in zip(spec["blocks"], before.parts, strict=True):
            if norms:
                outputs, inputs = part.output[0], part.input[0]
                macs += inputs * width + 2 * width**2 + 2 * paths * width
                params += inputs * width + 2 * width + 2 * paths * (width + 1)
                params += spec["classes"] * (width + 1)
                params += (2 * outputs + _last_bias(part)) * (paths - 1)
                extra += item + (paths - 1) * (2 * outputs * item + COUNTER * (norms + 1))
        return replace(
            before,
            kind=MultiPathStage.__name__,
            params=before.params + params,
            macs=before.macs + macs * before.calls,
            bytes=before.bytes + params * item + extra,
            parts=(),
        )


def _last_bias(part: LayerCost) -> int:
    """Count the biases of the last convolution of a block."""
    last = dict(part.parts).get("conv2")
    return last.params - math.prod(last.weight) if last else 0


class Routed:
    """A stage loses what only its training needs: the heads."""

    spec: ClassVar[Mapping[str, type]] = {}

    @classmethod
    def build(cls, layer: Any, spec: Mapping[str, Any]) -> MultiPathStage:
        """Make it of the same parts."""
        if not isinstance(layer, MultiPathStage):
            raise EditError("must be a stage of several paths to lose its heads.")
        known: Any = layer
        return MultiPathStage(known.parts, known.controllers, known.cell)

    @classmethod
    def predict(cls, before: LayerCost, spec: Mapping[str, Any]) -> LayerCost:
        """Take off what the heads cost."""
        heads = dict(before.parts)["heads"]
        return replace(
            before, params=before.params - heads.params, bytes=before.bytes - heads.bytes, parts=()
        )
