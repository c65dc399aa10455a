"""WeightAlign: filters of one mean and spread keep activations in range, without batch norms.

The file is long because it says of every layer and batch norm whether it can be aligned.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from pliant.edits import Replaced, Swap
from pliant.errors import ModelError
from pliant.math.filters import RECTIFIED
from pliant.method import Method
from pliant.nn.align import Align, Aligned
from pliant.nn.filters import WEIGHTED, filter_size
from pliant.observe.order import Order, order
from pliant.registry import In, Paper, register
from pliant.run import Run
from pliant.surgery.select import check_patterns, matches, weighted


@register(
    "weightalign",
    paper=Paper(
        "WeightAlign: Normalizing Activations by Weight Alignment",
        "X. Shi, Y. Li, X. Liu, J. van Gemert",
        "ICPR",
        2020,
        "https://arxiv.org/abs/2010.07160",
    ),
)
@dataclass(frozen=True)
class WeightAlign(Method):
    """Trains with filters of mean zero and fixed spread instead of batch norms.

    Every filter w becomes gain (w - mean) / sqrt(n/scale variance + eps), which keeps activations
    centred and of one variance without looking at any sample. So training does not depend on the
    size of the batch, and training and inference compute the same. Batch norms are taken out, and
    layers get biases instead; at the end the filters are folded into plain weights. It is a way
    to train a network from the start: the scales of trained batch norms are not kept. Without
    norms, clip the gradient (`Train(clip=5)`), and let every residual branch begin at nothing
    (``zero=("*.conv2",)`` for a ResNet), or its sums grow from block to block.

    *Departs from the paper*: its scale is 2, from He's argument for weights that are independent.
    Those of a filter without mean are not: they see the variance of rectified inputs, not their
    square, and activations would lose a third of their variance in every layer. The default makes
    up for it. Depthwise convolutions and the last layer stay as they are, as do batch norms right
    behind such layers.

    >>> WeightAlign(norms="keep", scale=2.0).scale
    2.0
    """

    norms: Literal["remove", "keep"] = "remove"  # batch norms: take them out, or work beside them
    # n times a filter's variance: 1 behind no rectifier; paper: 2
    scale: Annotated[float, In(0, 100, "low")] = RECTIFIED
    eps: Annotated[float, In(0, 1, "low")] = 1e-6  # under the root
    affine: bool = True  # learn a gain for every filter
    zero: tuple[str, ...] = ()  # name patterns of layers whose gains begin at 0: ends of branches
    depthwise: bool = False  # align depthwise convolutions too
    only: tuple[str, ...] = ()  # name patterns of the layers to align
    exclude: tuple[str, ...] = ()  # name patterns of the layers to leave alone

    def prepare(self, run: Run) -> None:
        """Take batch norms out, and let layers compute with aligned filters."""
        check_patterns(run.model, (*self.zero, *self.only, *self.exclude))
        seen = _calls(run)
        layers = self._chosen(run, seen)
        if self.norms == "remove":
            run.apply(*_swaps(run, seen, layers))
        for name in layers:
            self._align(run, name)
        run.state["aligned"] = list(layers)

    def before_step(self, run: Run) -> None:
        """Keep the optimizer's weight decay off gains and biases."""
        spared = [layer.align.gain for layer in _aligned(run)]
        spared += [layer.layer.bias for layer in _aligned(run) if layer.layer.bias is not None]
        run.spare(spared)

    def finalize(self, run: Run) -> None:
        """Fold the filters; the gains leave the optimizer, and the moments of the old filters."""
        for aligned in _aligned(run):
            run.carry("", Replaced((aligned.raw, aligned.align.gain), (aligned.raw,)))
            aligned.remove()

    def _chosen(self, run: Run, seen: Order) -> list[str]:
        """Name the layers to align, and say why the others are not."""
        layers, chosen = weighted(run.model), []
        last = next((name for name in reversed(seen.called) if name in layers), "")
        for name, layer in layers.items():
            reason = self._obstacle(run.model, name, layer, seen)
            if not reason and name == last:
                reason = "the last layer gives the scores"
            run.keep(name, reason or "its filters were aligned and folded: the shape is the same")
            chosen += [] if reason else [name]
        if not chosen:
            raise ModelError(
                "weightalign needs a convolution or Linear before the last one, but the model has "
                "none that it may align: see only and exclude."
            )
        return chosen

    def _obstacle(self, model: nn.Module, name: str, layer: Any, seen: Order) -> str:
        """Say why a layer is left alone; nothing if it is not."""
        groups = getattr(layer, "groups", 1)
        owners = [n for n, p in model.named_parameters(remove_duplicate=False) if p is layer.weight]
        reasons = {
            "not selected": bool(self.only) and not matches(name, self.only),
            "excluded by name": matches(name, self.exclude),
            "never called in a forward pass": name not in seen.called,
            "its weight is parametrized: remove the parametrization first": len(owners) == 0
            or parametrize.is_parametrized(layer),
            "its weight is tied to another layer's": len(owners) > 1,
            "a depthwise filter of mean zero cannot smooth": not self.depthwise
            and groups == getattr(layer, "in_channels", 0) > 1,
            "a filter of one weight has no spread": filter_size(layer) < 2,
        }
        return next((reason for reason, holds in reasons.items() if holds), "")

    def _align(self, run: Run, name: str) -> None:
        layer = run.model.get_submodule(name)
        gain = 0.0 if matches(name, self.zero) else 1.0
        align = Align(layer, scale=self.scale, eps=self.eps, gain=gain, learn=self.affine)
        aligned = Aligned(layer, align)
        run.hook(aligned)
        if self.affine:
            run.carry(name, Replaced((aligned.raw,), (aligned.raw, align.gain)))


def _calls(run: Run) -> Order:
    """Follow the network's layers and batch norms."""
    kinds = (*WEIGHTED, _BatchNorm)
    names = [name for name, module in run.model.named_modules() if isinstance(module, kinds)]
    return order(run.model, run.example, names)


def _swaps(run: Run, seen: Order, layers: list[str]) -> list[Swap]:
    """Take out every batch norm but those right behind layers that are not aligned."""
    swaps, plain = [], set(weighted(run.model)) - set(layers)
    for name in seen.called:
        if not isinstance(run.model.get_submodule(name), _BatchNorm):
            continue
        if seen.reads[name] in plain:
            run.keep(name, "the layer before it is not aligned")
        else:
            swaps.append(Swap(name, "identity"))
    without = [name for name in layers if run.model.get_submodule(name).bias is None]
    return [*swaps, *(Swap(name, "biased") for name in without)]


def _aligned(run: Run) -> list[Aligned]:
    """Return what this method put into the network."""
    return run.aside.all(Aligned)
