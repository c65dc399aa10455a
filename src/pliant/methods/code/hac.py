"""HAC and sHAC: prune, let weights share few values, and code what is left without loss.

The file is long because three stages (pruning, sharing, coding) each keep state that resumes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from pliant.codecs import address_map
from pliant.cost import is_packed
from pliant.edits.encode import encoding
from pliant.families.code.shared import MOST, Shared, Sharing, same_draws
from pliant.method import Method
from pliant.nn.layers import Factorizable
from pliant.registry import In, Paper, register
from pliant.run import Run

WHOLE = "its weights are whole numbers already: encode='auto' codes them in the file"
NO_GAIN = "coded it would not be smaller: it holds too few weights"

PAPER = 'hac(zeros=True, rate=0.001, format="shac")'
"""The method as it was published."""

Layers = dict[str, Factorizable]


@register(
    "hac",
    paper=Paper(
        "Compression strategies and space-conscious representations for deep neural networks",
        "G. C. Marinò, G. Ghidoli, M. Frasca, D. Malchiodi",
        "ICPR",
        2020,
        "https://arxiv.org/abs/2007.07967",
    ),
    saves="bytes",
)
@dataclass(frozen=True)
class HAC(Method):
    """Prunes, lets the weights of each layer share a few values, and codes them by Huffman.

    In every layer the smallest weights become zero, and the rest takes values from a short list:
    quantiles drawn without bias (``pq``) or k-means (``ws``). While training goes on, masks and
    assignments stay; each value moves by the mean of what its weights would have moved. In the end
    the kernels stay coded, also in memory: layers decode some of their outputs at a time while
    they compute. ``hac`` writes all weights into one stream of codewords, ``shac`` codes only
    those that are not zero and keeps where they stand (smaller below about 5 % of them), ``ans``
    is one stream at the entropy, and ``auto`` takes the smallest.

    Bytes are those of the coded kernels with dictionaries, and of all other tensors as they are.
    A budget of bytes is met by pruning more, alike in all layers. Layers whose weights are whole
    numbers already keep them; save with ``encode="auto"`` to have these coded in the file.

    *Departs from the paper*: values are shared among the weights that survive, not among the zeros
    too, which leave nearly all quantiles at zero and send survivors there; values move by a mean,
    not by ``rate`` times a sum, which overshoots or lags with the size of a layer; convolutions
    are coded too, as matrices; codewords are canonical, so that only lengths are stored; ``ans``
    is ours; pruning, sharing and both fine-tunings are one training, which ends
    when its epochs do and not when accuracy stops rising; k-means is Lloyd's on the sorted line;
    where nothing is trained, batch norms are re-estimated. ``PAPER`` is the published form.

    >>> HAC(prune=0.99, format="shac").values
    32
    """

    # p, share of each layer's weights that become zero, if there is no budget
    prune: Annotated[float, In(0, MOST)] = 0.9
    # k, distinct values that the weights of one layer are given
    values: Annotated[int, In(2, address_map.MOST)] = 32
    share: Literal["pq", "ws"] = "pq"  # probabilistic quantization, or weight sharing by k-means
    zeros: bool = False  # share values among the pruned weights too, as the paper does
    format: Literal["auto", "hac", "shac", "ans"] = "auto"  # how kernels are coded
    masked: Annotated[float, In(0, 1)] = 0.5  # share of the training before values are shared
    # eta_c, on the sum of what a value's weights would move; None: mean
    rate: Annotated[float, In(0, 1)] | None = None
    only: tuple[str, ...] = ()  # name patterns of the layers to code
    exclude: tuple[str, ...] = ()  # name patterns of the layers to leave alone

    def prepare(self, run: Run) -> None:
        """Choose the layers and the pruning level, and prune."""
        layers, reasons = run.readable(self.only, self.exclude)
        for name, module in run.model.named_modules():
            if is_packed(module):
                reasons[name] = WHOLE
        run.keep_all(reasons)
        run.state.update(layers=list(layers), shared=False, masks={}, index={}, levels={})
        self._prune(run, self._sharing.lowest(run, layers, 0.0 if run.limits() else self.prune))

    def before_step(self, run: Run) -> None:
        """Take the gradient off pruned weights."""
        for name, module in self._subjects(run).items():
            if module.weight.grad is not None:
                module.weight.grad.mul_(run.state["masks"][name])

    @torch.no_grad()
    def after_step(self, run: Run) -> None:
        """Prune again, since momentum moves what has no gradient; move shared values."""
        for name, module in self._subjects(run).items():
            if run.state["shared"]:
                self._move(run, name, module)
            else:
                module.weight.mul_(run.state["masks"][name])
        if not run.state["shared"] and run.step >= round(self.masked * run.steps):
            self._share(run)

    def finalize(self, run: Run) -> None:
        """Share, if the training was too short to have done it, and code."""
        if not run.state["shared"]:
            self._share(run)
        edits = []
        for name, module in self._subjects(run).items():
            edit = encoding(name, module.weight.detach(), self.format)
            if edit is None:
                run.keep(name, NO_GAIN)
            else:
                edits.append(edit)
        run.apply(*edits)
        if not run.step:
            run.recalibrate()

    @property
    def _sharing(self) -> Sharing:
        return Sharing(self.values, self.share, self.zeros, self.format)

    def _subjects(self, run: Run) -> Layers:
        return {name: run.model.get_submodule(name) for name in run.state["layers"]}  # type: ignore[misc]

    @torch.no_grad()
    def _prune(self, run: Run, level: float) -> None:
        """Zero the smallest weights of the layers that coding will make smaller."""
        for name, module in self._subjects(run).items():
            found = self._sharing.of(module.weight, level, same_draws(run.generator))
            if not self._left(run, name, found, module.weight):
                run.state["masks"][name] = found.mask
                module.weight.mul_(found.mask)
        run.state["level"] = level

    @torch.no_grad()
    def _share(self, run: Run) -> None:
        """Give every weight one of a few values, from now on."""
        layers = self._subjects(run)
        run.state["level"] = level = self._sharing.lowest(run, layers, run.state["level"])
        for name, module in layers.items():
            found = self._sharing.of(module.weight, level, run.generator)
            if not self._left(run, name, found, module.weight):
                run.state["masks"][name] = found.mask
                run.state["index"][name] = found.index.to(torch.int32)
                run.state["levels"][name] = found.levels
                module.weight.copy_(found.weight)
        run.state["shared"] = True

    def _left(self, run: Run, name: str, found: Shared, weight: Tensor) -> bool:
        """Leave a layer alone from now on if coding would not make it smaller."""
        if self._sharing.gains(found, weight):
            return False
        run.keep(name, NO_GAIN)
        run.state["layers"].remove(name)
        run.state["masks"].pop(name, None)
        return True

    def _move(self, run: Run, name: str, module: Factorizable) -> None:
        """Move each value by what its weights would have moved; they stay together."""
        state = run.state
        now = Shared(state["masks"][name], state["index"][name], state["levels"][name])
        now.move(module.weight, self.rate)
        module.weight.copy_(now.weight)
